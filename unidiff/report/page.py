"""One self-contained HTML page of a run: what it was, what came out, and rollouts that a person can look at.

Everything that a model or a user wrote is escaped; the page's own policy forbids it to load anything from anywhere.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from unidiff.files import write_text
from unidiff.report.curves import draw_panels
from unidiff.report.record import RewardRecord, RolloutRecord, SegmentRecord, data_uri
from unidiff.report.results import columns, duration, held_out, number

_LARGEST_SIDE = 256  # pixels; larger pictures are shown smaller, as JPEG
_LONG_TEXT = 120  # characters that need a wider column
_SPECIAL = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    galleries: Mapping[str, Sequence[RolloutRecord]] | None = None,
    curves_png: bytes | None = None,
) -> Path:
    """Writes the page and returns its path. A page that stands there is replaced at once, never half-written.

    summary: "base" and "final" hold held-out figures (see `results.held_out`), "config" the settings; single values
    under other names head the page. metrics: rows of a metrics.jsonl, drawn as curves; curves_png is shown only where
    there are none. galleries: name -> rollouts, in order.
    """
    pictures = PictureLibrary()
    shown = held_out(summary)
    settings = _flat((summary or {}).get("config") or {})
    leading = [f for f in shown if f.leading] or shown
    html = (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            facts=_facts(summary or {}),
            settings=settings,
            results=leading,
            more_results=[f for f in shown if f not in leading],
            result_columns=columns(shown),
            compared=bool((summary or {}).get("base")) and bool((summary or {}).get("final")),
            eval_size=_eval_size(summary or {}),
            uncertainty=_uncertainty(_eval_size(summary or {})),
            panels=[(panel, data_uri(picture)) for panel, picture in draw_panels(metrics or ())],
            curves=None if curves_png is None else data_uri(curves_png),
            training=_training(metrics or ()),
            galleries=[Gallery(name, list(records)) for name, records in (galleries or {}).items()],
            pictures=pictures,
        )
    )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, html)
    return path


def environment() -> Environment:
    """Jinja's environment with the templates of this package: extend "page.html", import macros from "parts.html"."""
    env = Environment(
        loader=PackageLoader("unidiff.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    env.filters |= {f.__name__.strip("_"): f for f in _FILTERS}
    return env


@dataclass
class ShownPicture:
    """One embedded picture: id of its element, size in pixels, data URI."""

    id: str
    width: int
    height: int
    uri: str


class PictureLibrary:
    """The pictures of a page, each embedded once however often it is shown. Iterates over what was added."""

    def __init__(self) -> None:
        self._shown: dict[str, ShownPicture] = {}

    def add(self, picture: bytes) -> ShownPicture:
        """Makes a picture (PNG) part of the page."""
        digest = hashlib.sha256(picture).hexdigest()
        if digest not in self._shown:
            image = Image.open(io.BytesIO(picture))
            content, kind = (picture, "png") if max(image.size) <= _LARGEST_SIDE else _smaller(image)
            name = f"picture-{len(self._shown)}"
            self._shown[digest] = ShownPicture(name, image.width, image.height, data_uri(content, kind))
        return self._shown[digest]

    def __iter__(self) -> Iterator[ShownPicture]:
        return iter(self._shown.values())


def _smaller(image: Image.Image) -> tuple[bytes, str]:
    copy = image.convert("RGB")
    copy.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=85)
    return buffer.getvalue(), "jpeg"


@dataclass
class Gallery:
    """Rollouts under one heading."""

    name: str
    records: list[RolloutRecord]

    @property
    def remark(self) -> str:
        judged = [r.success for r in self.records if r.success is not None]
        count = f"{len(self.records)} rollout{'s' * (len(self.records) != 1)}"
        return f"{count}, {sum(judged)} of {len(judged)} with success" if judged else count


@dataclass
class Card:
    """One column of a rollout: the prompt, a round (text, then picture) or the answer."""

    heading: str
    segments: list[SegmentRecord]
    given: bool = False


@dataclass
class Token:
    """One token of a text as shown. doubt: 0 to 1, how uncertain it was."""

    word: str
    gap: str
    kind: str = ""
    hint: str = ""
    step: int = -1
    percent: int = 100
    doubt: float = 0.0


# ---------------------------------------------------------------- filters: one rollout


def _cards(record: RolloutRecord) -> list[Card]:
    """Columns of a rollout. A round begins with a text, or with a picture that follows a picture."""
    rounds: list[Card] = []
    for segment in record.response:
        if not rounds or segment.modality == "text" or rounds[-1].segments[-1].modality == "image":
            rounds.append(Card(f"round {len(rounds) + 1}", []))
        rounds[-1].segments.append(segment)
    if rounds and rounds[-1].segments[-1].modality == "text":
        rounds[-1].heading = "answer"
    return [Card("prompt", list(record.prompt), given=True), *rounds]


def _long_texts(record: RolloutRecord) -> bool:
    return any(len(s.text or "") > _LONG_TEXT for s in record.segments)


def _saving(record: RolloutRecord) -> str:
    """What the rollout cost, and what its edits saved, in one line."""
    parts = []
    if record.image_tokens:
        parts.append(f"{100 * record.kept_tokens / record.image_tokens:.0f} % of picture tokens kept")
    if record.saved is not None:
        parts.append(f"{100 * record.saved:.0f} % of picture token-forwards saved")
    total = record.total
    parts += [f"{number(total['token_forwards'])} token-forwards", _flops(total["flops"])]
    return " · ".join(parts)


def _flops(count: float) -> str:
    """1.37 GFLOPs: the unit's prefix stands with the unit."""
    text = number(count)
    return f"{text}FLOPs" if text[-1].isalpha() else f"{text} FLOPs"


# ---------------------------------------------------------------- filters: one segment


def _token_count(segment: SegmentRecord) -> str:
    """How many tokens of a picture were denoised, and how many came out different."""
    n = len(segment.tokens)
    if segment.prompt:
        return f"{n} tokens, given"
    kind = f"all {n} tokens sampled" if segment.edited is None else f"{segment.denoised} of {n} tokens denoised again"
    return kind if segment.changed is None else f"{kind}, {sum(segment.changed)} changed"


def _outline(segment: SegmentRecord) -> str:
    """SVG path, in tokens, around the tokens that were denoised again."""
    rows, columns_ = segment.grid or (0, 0)
    edited = segment.edited or []

    def inside(row: int, column: int) -> bool:
        return 0 <= row < rows and 0 <= column < columns_ and edited[row * columns_ + column]

    path = []
    for at in (i for i, e in enumerate(edited) if e):
        row, column = divmod(at, columns_)
        sides = (
            (row - 1, column, f"M{column} {row}h1"),
            (row + 1, column, f"M{column} {row + 1}h1"),
            (row, column - 1, f"M{column} {row}v1"),
            (row, column + 1, f"M{column + 1} {row}v1"),
        )
        path += [edge for r, c, edge in sides if not inside(r, c)]
    return "".join(path)


def _token_data(segment: SegmentRecord) -> str:
    """Each token as "step:percent", or "-" where it was kept or nothing is known."""
    if segment.step is None or segment.probability is None:
        return " ".join("-" for _ in segment.tokens)
    sampled = segment.edited or [True] * len(segment.tokens)
    known = zip(sampled, segment.step, segment.probability)
    return " ".join(f"{step}:{_percent(p)}" if is_sampled else "-" for is_sampled, step, p in known)


def _spoken(segment: SegmentRecord) -> list[Token]:
    """A text token by token. Spaces are put between them unless the tokens bring their own."""
    words = segment.words or []
    gap = "" if segment.text and segment.text.strip() in "".join(words) else " "
    out = []
    for i, word in enumerate(words):
        token = Token(word, gap, kind=" special" if _SPECIAL.fullmatch(word.strip()) else "")
        if not segment.prompt and segment.step is not None and segment.probability is not None:
            step, p = segment.step[i], segment.probability[i]
            token.step, token.percent, token.doubt = step, _percent(p), round(1 - p, 2)
            token.hint = f"step {step}, probability {p:.2f}"
        out.append(token)
    return out


def _percent(probability: float) -> int:
    return round(100 * probability)


# ---------------------------------------------------------------- filters: values


def _tone(reward: RewardRecord) -> str:
    if reward.value is None:
        return "none"
    return "good" if reward.value >= 1 else "bad" if reward.value <= 0 else "part"


def _mark(reward: RewardRecord) -> str:
    return {"good": "✓", "bad": "✗", "part": "◐", "none": "–"}[_tone(reward)]


def _filled(reward: RewardRecord) -> float:
    return 0.0 if reward.value is None else round(min(max(reward.value, 0.0), 1.0), 3)


def _signed_number(value: float) -> str:
    return number(value).replace("-", "−")


def _direction(value: float | None) -> str:
    return "none" if not value else "good" if value > 0 else "bad"


def _advantage(value: float | None) -> str:
    if value is None:
        return "– none"
    mark = "▲" if value > 0 else "▼" if value < 0 else "●"
    return f"{mark} {value:+.2f}".replace("-", "−") if value else f"{mark} 0"


_FILTERS = (
    _cards,
    _long_texts,
    _saving,
    _token_count,
    _outline,
    _token_data,
    _spoken,
    _tone,
    _mark,
    _filled,
    _signed_number,
    _direction,
    _advantage,
    number,
)


# ---------------------------------------------------------------- the head of the page


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Single values of a summary, by name."""
    plain = {k: v for k, v in summary.items() if isinstance(v, (str, int, float)) and k not in ("base", "final")}
    return [(k.replace("_", " "), _shown_fact(k, v)) for k, v in plain.items()]


def _shown_fact(name: str, value: Any) -> str:
    if name == "seconds" or name.endswith("_seconds"):
        return duration(float(value))
    return _text(value)


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    out = []
    for k, v in value.items():
        name = f"{prefix}{k}"
        out += _flat(v, f"{name}.") if isinstance(v, Mapping) else [(name, _text(v))]
    return out


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _eval_size(summary: Mapping[str, Any]) -> int | None:
    config = summary.get("config")
    size = summary.get("eval_size") or (config.get("eval_size") if isinstance(config, Mapping) else None)
    return size if isinstance(size, int) and size > 0 else None


def _uncertainty(prompts: int | None) -> str:
    """How far held-out shares can be off by the choice of prompts."""
    if prompts is None:
        return ""
    points = 100 * math.sqrt(0.25 / prompts)
    return (
        f"{prompts} held-out prompts, one response each: the standard error of a share is at most {points:.1f} points. "
        "Coloured changes are larger than two standard errors of the difference."
    )


def _training(metrics: Sequence[Mapping[str, Any]]) -> str:
    """How many steps there were, and where their time went."""
    if not metrics:
        return ""
    phases: dict[str, float] = {}
    for row in metrics:
        for name, value in row.items():
            if name.startswith("seconds/") and isinstance(value, (int, float)):
                phases[name.removeprefix("seconds/")] = phases.get(name.removeprefix("seconds/"), 0.0) + value
    total = sum(row["seconds"] for row in metrics if isinstance(row.get("seconds"), (int, float)))
    parts = [f"{len(metrics)} step{'s' * (len(metrics) != 1)}"]
    if total:
        parts.append(f"{duration(total)}, {duration(total / len(metrics))} a step")
        large = sorted(((v / total, k) for k, v in phases.items() if v / total >= 0.01), reverse=True)
        parts.append(", ".join(f"{name} {100 * share:.0f} %" for share, name in large))
    return " · ".join(p for p in parts if p)
