"""Held-out results before and after training: one list of figures for the page and for the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

WAYS, RESULT = ("greedy", "sampled"), "result"  # columns by decoding; `RESULT` if a summary does not separate them
LEADING = ("success", "image_exact", "format", "agreement", "progress", "legal", "image_cells")  # if a task names none
_NO_SHARE = {"seconds", "flops", "forward", "forwards", "compute", "length", "tokens", "loss", "kl", "count", "size"}


@dataclass
class Figure:
    """One measure. cells: column -> (before, after), None = not measured. leading: whether it is shown first."""

    name: str
    cells: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    leading: bool = True

    @property
    def share(self) -> bool:
        """Whether it is a share, to be shown in percent; decided by its values and its name."""
        values = [v for pair in self.cells.values() for v in pair if v is not None]
        return all(0 <= v <= 1 for v in values) and _NO_SHARE.isdisjoint(re.findall("[a-z]+", self.name))

    def shown(self, value: float | None) -> str:
        """A value as text."""
        if value is None:
            return "–"
        return percent(value, 1) if self.share else number(value)

    def change(self, column: str) -> str | None:
        """after - before of a column, with sign; shares in percentage points. None unless both were measured."""
        before, after = self.cells.get(column, (None, None))
        if before is None or after is None:
            return None
        difference = after - before
        text = f"{100 * abs(difference):.1f}" if self.share else number(abs(difference))
        return text if not float(text.split()[0]) else ("+" if difference > 0 else "−") + text

    def tone(self, column: str, prompts: int | None) -> str:
        """Whether a leading share rose or fell: "good", "bad", or "none" within two standard errors of the difference.

        prompts: number of prompts before, and after; None = every difference counts. The error is that of two equal
        binomial shares, the largest that measures in [0, 1] can have.
        """
        before, after = self.cells.get(column, (None, None))
        if before is None or after is None or not (self.leading and self.share):
            return "none"
        pooled = (before + after) / 2
        variance = 2 * pooled * (1 - pooled) / prompts if prompts else 0.0
        if abs(after - before) <= 2 * math.sqrt(variance):
            return "none"
        return "good" if after > before else "bad"


def held_out(summary: Mapping[str, Any] | None) -> list[Figure]:
    """Figures of `summary["base"]` and `summary["final"]`, leading ones first; empty without either.

    Each of the two may be flat {"success": 0.4}, by decoding {"greedy": {"success": 0.4}, "sampled": {...}} or with
    slashes {"greedy/success": 0.4}. Deeper dictionaries become names with slashes. Values that are not finite numbers
    are left out. The label of the sampled column includes the temperatures of `summary["config"]`. `summary["leading"]`
    names the leading figures.
    """
    summary = summary or {}
    rank = {name: i for i, name in enumerate(summary.get("leading") or LEADING)}
    labels = {"sampled": f"sampled{_temperatures(summary.get('config'))}"}
    sides = [_by_column(summary.get(name), labels) for name in ("base", "final")]
    names = list(dict.fromkeys(key for side in sides for key in side))
    figures: dict[str, Figure] = {}
    for column, name in names:
        cells = figures.setdefault(name, Figure(name, leading=name in rank)).cells
        cells[column] = (sides[0].get((column, name)), sides[1].get((column, name)))
    return sorted(figures.values(), key=lambda f: rank.get(f.name, len(rank)))


def columns(figures: list[Figure]) -> list[str]:
    """All columns of the figures: greedy first, `RESULT` last."""
    present = dict.fromkeys(column for figure in figures for column in figure.cells)
    return sorted(present, key=lambda column: (column != WAYS[0], column == RESULT))


def percent(share: float, digits: int = 0) -> str:
    """A share in percent; only exact 0 and 1 are shown as 0 % and 100 %."""
    text, least = f"{100 * share:.{digits}f}", 10.0**-digits
    if share < 1 and float(text) == 100:
        return f"over {100 - least:.{digits}f} %"
    return f"under {least:.{digits}f} %" if share > 0 and not float(text) else f"{text} %"


def number(value: float) -> str:
    """A short number: 0.0312, 12.4, 3.2 k, 1.7 G."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    for limit, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= limit:
            shown = float(f"{value / (1e3 if unit == ' k' else limit):.3g}")
            return f"{shown:g}{unit}"
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """A short duration: 8.3 s, 4 min 05 s, 2 h 07 min; "–" if it is not finite."""
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _temperatures(config: Any) -> str:
    """ ", T = 1", or separately for texts and pictures; empty if they are unknown."""
    given = [(config or {}).get(f"{kind}_temperature") for kind in ("text", "image")]
    if not all(isinstance(value, int | float) for value in given):
        return ""
    text, image = (f"{value:g}" for value in given)
    return f", T = {text}" if text == image else f", T = {text} (texts), {image} (pictures)"


def _by_column(side: Any, labels: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """{(column, name): value}. labels: displayed names of decodings."""
    out = {}
    for path, value in _leaves(side):
        head, rest = path[0].lower(), path[1:]
        column, name = (labels.get(head, head), rest) if head in WAYS and rest else (RESULT, path)
        out[column, "/".join(name)] = value
    return out


def _leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], float]]:
    if isinstance(value, Mapping):
        return [leaf for k, v in value.items() for leaf in _leaves(v, (*path, *str(k).split("/")))]
    if isinstance(value, Real) and not isinstance(value, bool) and path and math.isfinite(value):
        return [(path, float(value))]
    return []
