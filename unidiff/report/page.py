"""One self-contained HTML page of a run: its settings, its results, and rollouts.

Everything that a model or a user wrote is escaped. The page's Content-Security-Policy forbids loading anything, and
allows only the page's own scripts, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from unidiff.files import write_text
from unidiff.report.curves import draw_panels, series
from unidiff.report.filters import FILTERS, Card, Edit, cards, edits_of
from unidiff.report.record import RolloutRecord, SegmentRecord, data_uri
from unidiff.report.results import columns, duration, held_out, percent
from unidiff.rewards.idle import silent_rewards

_LARGEST_SIDE, _LARGEST_PNG = 256, 32_000  # pixels, bytes; larger pictures are embedded as JPEG of at most this side


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    summary: Mapping[str, Any] | None = None,
    metrics: Sequence[Mapping[str, Any]] | None = None,
    galleries: Mapping[str, Sequence[RolloutRecord]] | None = None,
    comparisons: Sequence[Comparison] = (),
    kinds: Mapping[str, str] | None = None,
    curves_png: bytes | None = None,
    open: bool = False,
) -> Path:
    """Writes the page atomically and returns its path.

    summary: "base" and "final" hold held-out figures (see `results.held_out`), "config" the settings; other single
    values are shown at the top. metrics: rows of a metrics.jsonl, drawn as curves. kinds: each reward's `on`, by its
    name (see `draw_curves`). curves_png: shown only without metrics. galleries: name -> rollouts, in order.
    comparisons: rollouts side by side, above the galleries. open: edits are shown large from the start, for a page of
    few rollouts.
    """
    pictures = PictureLibrary()
    shown = held_out(summary)
    settings = _flat((summary or {}).get("config") or {})
    leading = [f for f in shown if f.leading] or shown
    records = [r for g in (galleries or {}).values() for r in g] + [r for c in comparisons for r in c.records.values()]
    panels = draw_panels(metrics or (), kinds, (summary or {}).get("leading") or ())
    compared = bool((summary or {}).get("base")) and bool((summary or {}).get("final"))
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
            compared=compared,
            eval_size=_eval_size(summary or {}),
            uncertainty=_uncertainty(_eval_size(summary or {}), compared),
            panels=[(panel, data_uri(picture)) for panel, picture in panels],
            curves=None if curves_png is None else data_uri(curves_png),
            training=_training(metrics or ()),
            warnings=silent_rewards(metrics or (), kinds or {}),
            galleries=[Gallery(name, list(records)) for name, records in (galleries or {}).items()],
            comparisons=comparisons,
            drawn=any(segment.picture for record in records for segment in record.response),
            open=open,
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
    env.filters |= FILTERS | {"sha256": _sha256}
    return env


def _sha256(text: str) -> str:
    """A script's hash for the Content-Security-Policy."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@dataclass
class ShownPicture:
    """One embedded picture: element id, size in pixels, data URI."""

    id: str
    width: int
    height: int
    uri: str


class PictureLibrary:
    """The pictures of a page; each is embedded once, however often it is shown. Iterates over the added pictures."""

    def __init__(self) -> None:
        self._shown: dict[str, ShownPicture] = {}

    def add(self, picture: bytes) -> ShownPicture:
        """Adds a picture (PNG) to the page."""
        digest = hashlib.sha256(picture).hexdigest()
        if digest not in self._shown:
            image = Image.open(io.BytesIO(picture))
            small = max(image.size) <= _LARGEST_SIDE and len(picture) <= _LARGEST_PNG
            content, kind = (picture, "png") if small else _smaller(image)
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

    def ids(self, number: int) -> list[str]:
        """Each rollout's link id, for the gallery with this number."""
        return [f"rollout-{number}-{i}" for i in range(len(self.records))]

    def failures(self, number: int) -> list[str]:
        """The link ids of rollouts without success."""
        return [name for name, record in zip(self.ids(number), self.records) if record.success is False]

    @property
    def remark(self) -> str:
        judged = [r.success for r in self.records if r.success is not None]
        count = f"{len(self.records)} rollout{'s' * (len(self.records) != 1)}"
        return f"{count}, {sum(judged)} of {len(judged)} with success" if judged else count


@dataclass
class Cell:
    """One rollout's texts and edits in one round of a comparison."""

    texts: list[SegmentRecord]
    edits: list[Edit]


@dataclass
class Round:
    """One row of a comparison. cells: by column, None if that rollout had ended. steps: of the longest denoising, None
    if nothing was drawn."""

    heading: str
    cells: dict[str, Cell | None]

    @property
    def steps(self) -> int | None:
        edits = [e for cell in self.cells.values() if cell for e in cell.edits]
        return max((e.segment.steps for e in edits), default=None)


@dataclass
class Comparison:
    """Rollouts of one prompt, keyed by their difference (such as a setting)."""

    title: str
    records: dict[str, RolloutRecord]

    @property
    def prompt(self) -> tuple[SegmentRecord, ...]:
        return next(iter(self.records.values())).prompt

    @property
    def rounds(self) -> list[Round]:
        """The rounds in order. All answers are in the last row, whichever round they came in."""
        by_heading = {name: {c.heading: c for c in cards(r) if not c.given} for name, r in self.records.items()}
        headings = dict.fromkeys(h for columns in by_heading.values() for h in columns if h != "answer")
        ordered = sorted(headings, key=lambda h: int(h.split()[-1]))
        if any("answer" in columns for columns in by_heading.values()):
            ordered.append("answer")
        return [
            Round(h, {name: self._cell(name, columns.get(h)) for name, columns in by_heading.items()}) for h in ordered
        ]

    def _cell(self, name: str, card: Card | None) -> Cell | None:
        if card is None:
            return None
        edits = [e for e in edits_of(self.records[name]) if e.heading == card.heading]
        return Cell([s for s in card.segments if s.modality == "text"], edits)


# ---------------------------------------------------------------- the head of the page


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Single values of a summary, by name."""
    plain = {k: v for k, v in summary.items() if isinstance(v, (str, int, float)) and k not in ("base", "final")}
    return [(k.replace("_", " "), _shown_fact(k, v)) for k, v in plain.items()]


def _shown_fact(name: str, value: Any) -> str:
    if "seconds" in name.split("_"):
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


def _uncertainty(prompts: int | None, compared: bool) -> str:
    """A sentence about the standard error of held-out shares. compared: changes are shown too."""
    if prompts is None:
        return ""
    points = 100 * math.sqrt(0.25 / prompts)
    return (
        f"{prompts} held-out prompt{'s' * (prompts != 1)}, one response each: the standard error of a share is at most "
        f"{points:.1f} points."
    ) + " Coloured changes are larger than two standard errors of the difference." * compared


def _training(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The number of steps, and their time by phase."""
    if not metrics:
        return ""
    names = dict.fromkeys(name for row in metrics for name in row if name.startswith("seconds/"))
    phases = {name.removeprefix("seconds/"): sum(series(metrics, name)[1]) for name in names}
    times = series(metrics, "seconds")[1]
    total = sum(times)
    parts = [f"{len(metrics)} step{'s' * (len(metrics) != 1)}"]
    if total:
        parts.append(f"{duration(total)}, {duration(total / len(times))} a step")
        large = sorted(((v / total, k) for k, v in phases.items() if v / total >= 0.01), reverse=True)
        parts.append(", ".join(f"{name} {percent(share)}" for share, name in large))
    return " · ".join(p for p in parts if p)
