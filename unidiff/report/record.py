"""One rollout as plain data for display: strings, numbers, lists and PNG bytes.

A record does not reference the model, the batch or a device. It can be pickled, sent between processes, and written as
JSON.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from unidiff.images.picture import rgb
from unidiff.rewards.reward import Cause
from unidiff.rewards.router import Routed
from unidiff.rewards.segment_view import SegmentView
from unidiff.rewards.table import WHOLE, RewardTable
from unidiff.sampling.compute import PICTURE_PHASES, Compute
from unidiff.sampling.rollout import Rollout, Stop
from unidiff.sequence import Modality, Segment


@dataclass(frozen=True)
class RewardRecord:
    """One reward's value. None = missing; then `why` is the reason, starting with the cause's name."""

    name: str
    value: float | None
    weight: float = 1.0
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class SegmentRecord:
    """One segment of n tokens.

    modality: "text" or "image". prompt: part of the prompt, not sampled. tokens: [n] ids. text: decoded, None for an
    image. words: [n] one string per token, None without a decoder. picture: PNG, None for text. read: a prompt's
    picture as its tokens decode, PNG, None if that is equal or unknown. grid: rows and columns of an image. step: [n]
    denoising step that committed the token, -1 = copied. probability: [n] of the token when it was committed. edited:
    [n] tokens denoised again, None = every token was sampled. changed: [n] tokens that differ from the previous image,
    None if there is none of this size. trace: for each step and token, the probability of the drawn token, None if it
    was not masked; None as a whole without a trace. choices: a schedule's (committed tokens, temperature factor) for
    each step. advantage: the trained advantage, None = none. advantages: by assignment, to compare.
    """

    modality: str
    prompt: bool = False
    tokens: list[int] = field(default_factory=list)
    text: str | None = None
    words: list[str] | None = None
    picture: bytes | None = None
    read: bytes | None = None
    grid: tuple[int, int] | None = None
    step: list[int] | None = None
    probability: list[float] | None = None
    edited: list[bool] | None = None
    changed: list[bool] | None = None
    trace: list[list[float | None]] | None = None
    rewards: list[RewardRecord] = field(default_factory=list)
    choices: list[tuple[int, float]] | None = None
    advantage: float | None = None
    advantages: dict[str, float | None] = field(default_factory=dict)

    @property
    def denoised(self) -> int:
        """Number of tokens that were sampled here, not given or copied."""
        if self.prompt:
            return 0
        return len(self.tokens) if self.edited is None else sum(self.edited)

    @property
    def kept(self) -> int:
        """Number of tokens copied from the previous image."""
        return 0 if self.prompt else len(self.tokens) - self.denoised

    @property
    def steps(self) -> int:
        """Number of denoising steps of this segment."""
        return max(self.step or [], default=-1) + 1

    @property
    def strays(self) -> int | None:
        """Number of changed tokens outside the edit mask: 0 unless there is a bug; None = no edit."""
        if self.edited is None or self.changed is None:
            return None
        return sum(changed and not edited for changed, edited in zip(self.changed, self.edited))


@dataclass(frozen=True, kw_only=True)
class RolloutRecord:
    """One rollout: prompt and response segments in order, stop reason, rewards and cost.

    stop: name of the `Stop`, in lower case; stop_reason: the same in words. compute: forwards, token_forwards, flops
    and seconds by phase. full: the same with every picture regenerated (see `regeneration`), empty if not requested or
    without pictures.
    rewards: of the whole response. figures: the row's held-out measures. settings: the sampler's. key: its noise key.
    assignment: the router's, which gave the segments' `advantage`.
    """

    title: str
    segments: tuple[SegmentRecord, ...]
    stop: str
    stop_reason: str
    compute: dict[str, dict[str, float]] = field(default_factory=dict)
    full: dict[str, dict[str, float]] = field(default_factory=dict)
    rewards: list[RewardRecord] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    key: int = 0
    assignment: str = ""

    @property
    def prompt(self) -> tuple[SegmentRecord, ...]:
        return tuple(s for s in self.segments if s.prompt)

    @property
    def response(self) -> tuple[SegmentRecord, ...]:
        return tuple(s for s in self.segments if not s.prompt)

    @property
    def success(self) -> bool | None:
        """Whether the figure "success", else the last value of a reward with that name, is at least 1; None without
        either."""
        if "success" in self.figures:
            return self.figures["success"] >= 1
        said = [r for s in self.response for r in s.rewards] + self.rewards
        values = [r.value for r in said if r.name == "success" and r.value is not None]
        return values[-1] >= 1 if values else None

    @property
    def image_tokens(self) -> int:
        """Number of tokens of the response's pictures."""
        return sum(len(s.tokens) for s in self.response if s.modality == "image")

    @property
    def kept_tokens(self) -> int:
        """Number of the pictures' tokens that were copied instead of denoised."""
        return sum(s.kept for s in self.response if s.modality == "image")

    @property
    def changed_tokens(self) -> int:
        """Number of the pictures' tokens that differ from the previous picture."""
        return sum(sum(s.changed or ()) for s in self.response)

    @property
    def saved(self) -> float | None:
        """Share of the pictures' token-forwards (see `Compute.pictures`) that editing saved compared with regenerating
        them; negative if it cost more. None without pictures or without `full`."""
        spent, full = (
            sum(phases.get(name, {}).get("token_forwards", 0.0) for name in PICTURE_PHASES)
            for phases in (self.compute, self.full)
        )
        return 1 - spent / full if full else None

    @property
    def total(self) -> dict[str, float]:
        """The cost of all phases together."""
        return _total(self.compute)

    @property
    def full_total(self) -> dict[str, float]:
        """The same with every picture regenerated."""
        return _total(self.full)

    def to_dict(self) -> dict[str, Any]:
        """JSON data; pictures become data URIs, numbers that are not finite become None."""
        return _jsonable(asdict(self))


def record(
    rollout: Rollout,
    views: Sequence[SegmentView],
    *,
    table: RewardTable | None = None,
    routed: Routed | None = None,
    compared: Mapping[str, Routed] | None = None,
    full: Compute | None = None,
    row: int | None = None,
    title: str = "",
    decode_token: Callable[[int], str] | None = None,
    read: Sequence[str | Image.Image] = (),
    figures: dict[str, float] | None = None,
    assignment: str = "",
) -> RolloutRecord:
    """Builds the record of one rollout.

    views: its sampled segments, decoded (see `rewards.segment_view`). table, routed: the batch's rewards and
    advantages; row: the rollout's index in them, optional if they have one row. compared: the batch's advantages by
    assignment. full: the cost with every picture regenerated. decode_token: id -> string, such as
    `model.tokenizer.decode`. read: the prompt's parts as their tokens decode, from `model.decode`. figures: measures of
    this row, such as {"success": 1.0}; NaN is left out.

    Raises ValueError if the views do not match the rollout, or the row is not in the tables.
    """
    sampled = rollout.segments
    if len(views) != len(sampled):
        raise ValueError(f"views: the rollout has {len(sampled)} sampled segments, got {len(views)} views")
    at = _row(table, routed, row)
    shown = [*_prompt_parts(rollout.sequence.prompt, views), *((v.text, _pixels(v)) for v in views)]
    before = _before([*rollout.sequence.prompt, *sampled])
    segments, given = [], len(rollout.sequence.prompt)
    for i, (segment, (text, picture)) in enumerate(zip([*rollout.sequence.prompt, *sampled], shown)):
        earned: dict[str, Any] = {}
        if i >= given:
            earned = {"rewards": _rewards(table, at, i - given), "advantage": _advantage(routed, at, i - given)}
            earned["advantages"] = {k: _advantage(r, at, i - given) for k, r in (compared or {}).items()}
        elif i < len(read):
            earned = {"read": _other(picture, read[i])}
        segments.append(_segment(segment, text, picture, before[i], decode_token, **earned))
    return RolloutRecord(
        title=title,
        segments=tuple(segments),
        stop=rollout.stop.name.lower() if isinstance(rollout.stop, Stop) else str(rollout.stop),
        stop_reason=str(rollout.stop.value),
        compute={phase: cost.to_dict() for phase, cost in rollout.compute.items()},
        full={phase: cost.to_dict() for phase, cost in (full or {}).items()},
        rewards=_rewards(table, at, WHOLE),
        figures={k: float(v) for k, v in (figures or {}).items() if math.isfinite(v)},
        settings=asdict(rollout.settings),
        key=int(rollout.key),
        assignment=assignment,
    )


def data_uri(picture: bytes, kind: str = "png") -> str:
    """A picture's bytes as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def png(picture: Image.Image | np.ndarray) -> bytes:
    """PNG bytes of a PIL image or of uint8 [H, W, 3]."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else rgb(picture)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _row(table: RewardTable | None, routed: Routed | None, row: int | None) -> int:
    sizes = {len(t) for t in (table and table.modality_BS, routed and routed.advantage_BS) if t is not None}
    if len(sizes) > 1:
        raise ValueError(f"table and routed have different numbers of rows: {sorted(sizes)}")
    size = sizes.pop() if sizes else 1
    if row is None and size != 1:
        raise ValueError(f"row: say which of the {size} rows of the table is this rollout's")
    if row is not None and not 0 <= row < size and (table or routed):
        raise ValueError(f"row: expected 0 to {size - 1}, got {row}")
    return row or 0


def _prompt_parts(
    prompt: Sequence[Segment], views: Sequence[SegmentView]
) -> list[tuple[str | None, Image.Image | None]]:
    """(text, picture) of each prompt segment, (None, None) if the views do not have it."""
    parts = list(views[0].prompt) if views else []
    if len(parts) != len(prompt):
        parts = [None] * len(prompt)
    return [(part, None) if isinstance(part, str) else (None, part) for part in parts]


def _other(given: Any, read: Any) -> bytes | None:
    """The decoded picture as PNG, if it differs from the given one."""
    if not isinstance(given, Image.Image) or not isinstance(read, Image.Image) or png(given) == png(read):
        return None
    return png(read)


def _pixels(view: SegmentView) -> np.ndarray | None:
    return None if view.pixels is None else np.ascontiguousarray(view.pixels)


def _before(segments: Sequence[Segment]) -> list[Segment | None]:
    """The last image before each segment."""
    last: Segment | None = None
    out = []
    for segment in segments:
        out.append(last)
        last = segment if segment.modality is Modality.IMAGE else last
    return out


def _segment(
    segment: Segment,
    text: str | None,
    picture: Image.Image | np.ndarray | None,
    before: Segment | None,
    decode_token: Callable[[int], str] | None,
    **earned: Any,
) -> SegmentRecord:
    is_text = segment.modality is Modality.TEXT
    tokens = segment.tokens.tolist()
    comparable = not is_text and not segment.prompt and before is not None and len(before) == len(segment)
    return SegmentRecord(
        modality=segment.modality.name.lower(),
        prompt=segment.prompt,
        tokens=tokens,
        text=text,
        words=[decode_token(t) for t in tokens] if is_text and decode_token else None,
        picture=None if picture is None else png(picture),
        grid=segment.grid and (int(segment.grid[0]), int(segment.grid[1])),
        step=None if segment.step is None else segment.step.tolist(),
        probability=None if segment.probability is None else [round(p, 4) for p in segment.probability.tolist()],
        edited=None if segment.edited is None else segment.edited.bool().tolist(),
        trace=None if segment.trace is None else [_rounded(row) for row in segment.trace.tolist()],
        choices=None if (c := segment.choices) is None else list(zip(c.committed.tolist(), c.temperature.tolist())),
        changed=(segment.tokens != before.tokens).tolist() if comparable and before is not None else None,
        **earned,
    )


def _rounded(probabilities: list[float]) -> list[float | None]:
    return [None if math.isnan(p) else round(p, 4) for p in probabilities]


def _total(compute: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    names = ("forwards", "token_forwards", "flops", "seconds")
    return {name: sum(cost.get(name, 0.0) for cost in compute.values()) for name in names}


def _rewards(table: RewardTable | None, row: int, segment: int) -> list[RewardRecord]:
    """The rewards of this segment (WHOLE: of the whole response)."""
    if table is None:
        return []
    kind = "sequence" if segment == WHOLE else Modality(int(table.modality_BS[row, segment])).name.lower()
    values = table.sequence_BF[row] if segment == WHOLE else table.values_BSF[row, segment]
    out = []
    for f, (name, on, weight) in enumerate(zip(table.names, table.on, table.weights)):
        if on != kind:
            continue
        value, loss = float(values[f]), table.missing.get((f, row, segment))
        if not math.isnan(value):
            out.append(RewardRecord(name, value, weight))
        elif loss is not None:
            out.append(RewardRecord(name, None, weight, _why(loss.cause, loss.message)))
    return out


def _why(cause: Cause, message: str) -> str:
    return "not applicable" if cause is Cause.NONE else f"{cause}: {message}"


def _advantage(routed: Routed | None, row: int, segment: int) -> float | None:
    if routed is None or segment >= routed.advantage_BS.shape[1] or not bool(routed.valid_BS[row, segment]):
        return None
    return float(routed.advantage_BS[row, segment])


def _jsonable(value: Any) -> Any:
    if isinstance(value, bytes):
        return data_uri(value)
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
