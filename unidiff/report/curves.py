"""Training curves as small multiples, from the rows of a metrics.jsonl.

Grey text, transparent background and lines of medium lightness are legible on light and dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from os import PathLike

    from matplotlib.axes import Axes

INK, GRID = "#7d8590", "#7d859040"
COLOURS = ("#2f81d8", "#d9772b", "#2a9d5c", "#a35fc9", "#d04a6a", "#1f9bb0", "#a08a1c", "#7a7f87")
WIDTH, HEIGHT = 3.4, 2.3  # inches of one panel
_SMOOTH = 5  # steps of the running mean
_LEAST = 1e-9  # a "log" axis is linear below this


@dataclass(frozen=True)
class Panel:
    """One plot. keys: patterns of whole metric names. unit: "number"; "share", an axis from 0 to 100 %; "percent", a
    share on an axis that fits the data; "log". leading: shown first. faults: metrics that should be 0; metrics that are
    always 0 are left out. kind: only rewards with this `on`; "" = rewards whose `on` is unknown."""

    title: str
    keys: tuple[str, ...]
    unit: Literal["number", "share", "percent", "log"] = "number"
    leading: bool = False
    faults: bool = False
    kind: str | None = None


PANELS = (
    Panel("answers, training prompts", ("success", "agreement", "format"), "share", leading=True),
    Panel("pictures, training prompts", ("image_exact", "image_cells"), "share", leading=True),
    Panel("held out", (r"eval/.*(success|image_exact)",), "share", leading=True),
    Panel("rewards of texts", (r"reward/.*",), leading=True, kind="text"),
    Panel("rewards of pictures", (r"reward/.*",), leading=True, kind="image"),
    Panel("rewards of whole responses", (r"reward/.*",), leading=True, kind="sequence"),
    Panel("rewards", (r"reward/.*",), leading=True, kind=""),
    Panel("lost rewards", (r"lost/.*",), "percent", leading=True, faults=True),
    Panel("groups without spread", (r"zero_std/.*",), "share", leading=True),
    Panel("first-iteration ratio: max |ρ − 1|", ("ratio_first_iteration_max_dev",), "log", leading=True),
    Panel("KL", (r"kl(/.*)?",), leading=True),
    Panel(
        "token-forwards of a rollout",
        (r"compute/(prompt|text|write_text|select|image|write_image)/token_forwards",),
        leading=True,
    ),
    Panel("seconds by phase", (r"seconds/.*",), leading=True),
    Panel("text and image advantage: correlation", ("advantage_correlation",)),
    Panel("clipped tokens", (r"clip.*",), "percent"),
    Panel("gradient norm", ("grad_norm",)),
)

Rows = Sequence[Mapping[str, Any]]


def draw_curves(
    metrics: Rows,
    path_or_buffer: str | PathLike[str] | IO[bytes],
    *,
    keys: Sequence[str] | None = None,
    kinds: Mapping[str, str] | None = None,
    leading: Sequence[str] = (),
) -> None:
    """Writes a PNG of all panels that the rows have data for.

    metrics: rows {"step": int, name: number, …}; a name may be missing from some rows. keys: draw only names that match
    these patterns, such as "reward/.*"; a name that no panel shows gets its own panel. kinds: each reward's `on`
    ("text", "image" or "sequence"), by its name; each kind has its own panel. leading: the task's leading figures.
    Raises ValueError if there is nothing to draw.
    """
    from matplotlib.figure import Figure

    drawn = panels_of(metrics, kinds, leading, keys=keys)
    if not drawn:
        raise ValueError("metrics: no row holds a number that is to be drawn")
    columns = min(3, len(drawn))
    lines = math.ceil(len(drawn) / columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * lines), layout="constrained", facecolor="none")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, (panel, names) in zip(axes, drawn):
        _draw(axis, panel, names, metrics)
    for axis in axes[len(drawn) :]:
        axis.remove()
    figure.savefig(path_or_buffer, format="png", dpi=160, transparent=True)


def draw_panels(
    metrics: Rows, kinds: Mapping[str, str] | None = None, leading: Sequence[str] = ()
) -> list[tuple[Panel, bytes]]:
    """Each panel that the rows have data for, with its PNG, as wide as a phone's screen. kinds, leading: see
    `draw_curves`."""
    from matplotlib.figure import Figure

    out = []
    for panel, names in panels_of(metrics, kinds, leading):
        figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained", facecolor="none")
        _draw(figure.subplots(), panel, names, metrics)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=200, transparent=True)
        out.append((panel, buffer.getvalue()))
    return out


def series(metrics: Rows, name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, without values that are not finite."""
    points = [(row.get("step", i), row.get(name)) for i, row in enumerate(metrics)]
    kept = [(float(s), float(v)) for s, v in points if isinstance(v, (int, float)) and math.isfinite(v)]
    return [s for s, _ in kept], [v for _, v in kept]


def panels_of(
    metrics: Rows,
    kinds: Mapping[str, str] | None = None,
    leading: Sequence[str] = (),
    *,
    keys: Sequence[str] | None = None,
) -> list[tuple[Panel, list[str]]]:
    """Each panel that the rows have data for, with the names of its metrics. Arguments: see `draw_curves`."""
    kinds = kinds or {}
    names = [n for n in dict.fromkeys(k for row in metrics for k in row) if n != "step" and series(metrics, n)[1]]
    panels = [*_task_panels(metrics, leading), *PANELS]
    if keys is not None:
        names = [n for n in names if any(re.fullmatch(k, n) for k in keys)]
        panels += [Panel(n, (re.escape(n),)) for n in names if not any(_shows(p, n, kinds) for p in panels)]
    eventful = {n for n in names if any(series(metrics, n)[1])}
    found = [(p, [n for n in names if _shows(p, n, kinds) and (n in eventful or not p.faults)]) for p in panels]
    return [(p, matching) for p, matching in found if matching]


def _task_panels(metrics: Rows, leading: Sequence[str]) -> list[Panel]:
    """Panels of a task's leading figures that no other panel shows: shares, and numbers."""
    own = [n for n in leading if not any(_shows(p, n, {}) or _shows(p, f"eval/{n}", {}) for p in PANELS)]
    panels: list[Panel] = []
    units: tuple[Literal["share", "number"], ...] = ("share", "number")
    for title, start in (("figures, training prompts", ""), ("figures, held out", "eval/")):
        shares = [n for n in own if all(0 <= v <= 1 for v in series(metrics, start + n)[1])]
        numbers = [n for n in own if n not in shares]
        for unit, some in zip(units, (shares, numbers)):
            keys = tuple(re.escape(start + n) for n in some)
            panels.append(Panel(title if unit == "share" else f"{title}: numbers", keys, unit, leading=True))
    return panels


def _shows(panel: Panel, name: str, kinds: Mapping[str, str]) -> bool:
    mine = panel.kind is None or panel.kind == kinds.get(name.removeprefix("reward/"), "")
    return mine and any(re.fullmatch(key, name) for key in panel.keys)


def _draw(axis: Axes, panel: Panel, names: list[str], metrics: Rows) -> None:
    for i, name in enumerate(names):
        steps, values = series(metrics, name)
        colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
        few = len(values) <= 2 * _SMOOTH
        smooth = values if few or panel.unit == "log" else running_mean(values, _SMOOTH)
        if smooth is not values:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        marker = "o" if few else ""
        axis.plot(steps, smooth, style, color=colour, linewidth=1.6, marker=marker, markersize=3, label=_label(name))
    _dress(axis, panel)
    _frame(axis, panel, metrics)
    if len(names) > 1 or names[0] not in panel.keys:  # otherwise the title is enough
        _legend(axis)


def _dress(axis: Axes, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axis.set_title(_literal(panel.title), fontsize=9.5, color=INK, loc="left", fontweight="bold")
    axis.set_facecolor("none")
    axis.grid(axis="y", color=GRID, linewidth=0.7)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(colors=INK, labelsize=8, length=0)
    if panel.unit in ("share", "percent"):
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if panel.unit == "share" else None))


def _frame(axis: Axes, panel: Panel, metrics: Rows) -> None:
    """Sets the axes' limits; every panel spans all steps of the run."""
    steps = series(metrics, "step")[1] or [0.0, len(metrics) - 1.0]
    margin = max((max(steps) - min(steps)) * 0.04, 0.25)
    axis.set_xlim(min(steps) - margin, max(steps) + margin)
    low, high = axis.dataLim.intervaly
    if panel.unit == "log":
        axis.set_yscale("symlog", linthresh=_LEAST)  # symlog, so that 0 is visible at the bottom
        axis.set_ylim(-_LEAST / 5, 10.0 ** (math.floor(math.log10(max(high, _LEAST))) + 1))
        axis.minorticks_off()
    elif panel.unit == "share":
        axis.set_ylim(-0.02, 1.02)
    elif panel.unit == "percent":
        axis.set_ylim(0, None)
    elif low == high:
        axis.set_yticks([low])  # a constant line needs one tick


def _legend(axis: Axes) -> None:
    """Adds a legend below the panel, in as many columns as fit."""
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(
        handles,
        labels,
        loc="upper left",
        bbox_to_anchor=(-0.02, -0.1),
        ncols=max(1, min(len(labels), 3, 54 // (max(map(len, labels)) + 6))),
        fontsize=7.5,
        labelcolor=INK,
        frameon=False,
        handlelength=1.2,
        borderaxespad=0.3,
        columnspacing=1.2,
    )


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Mean of each value and up to width - 1 values before it."""
    out = []
    for i in range(len(values)):
        window = values[max(0, i + 1 - width) : i + 1]
        out.append(sum(window) / len(window))
    return out


def _label(name: str) -> str:
    """A metric's name without the group that is in the panel's title."""
    head, *rest = name.split("/")
    if head == "compute":
        return rest[0].replace("_", " ")
    shown = rest if rest and not head.startswith("clip") else [head, *rest]
    return _literal(" ".join(shown).replace("_", " "))


def _literal(text: str) -> str:
    """Escapes $, so that matplotlib does not read a name as mathematics."""
    return text.replace("$", r"\$")
