"""Progress of a run: a live table on a terminal, one plain line per step elsewhere."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from unidiff.report.results import LEADING, Figure, columns, duration, held_out, number, percent

_SHOWN = 4  # figures of the task besides the rewards
_BARS = "▁▂▃▄▅▆▇█"
_TREND = 24  # steps that a sparkline shows


class Progress:
    """Context manager that shows the steps of a run as they end.

    total: steps of the whole run. start: steps already done, in a resumed run. quiet: show nothing, as on every process
    except the first. leading: the task's leading figures; the first few are shown. console: None = standard output.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        quiet: bool = False,
        *,
        leading: Sequence[str] = LEADING,
        console: Console | None = None,
    ) -> None:
        self.total, self.start, self.done, self.quiet = total, start, start, quiet
        self.leading = tuple(leading)[:_SHOWN]
        self.console = console or Console(highlight=False)
        self.history: dict[str, list[float]] = {}
        self._began = time.perf_counter()
        self._live: Live | None = None
        self._bar = Bar(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            _Remaining(self),
            console=self.console,
        )
        self._task = self._bar.add_task("", total=total, completed=start)

    @property
    def live(self) -> bool:
        """Whether the display is redrawn in place instead of adding lines."""
        return self.console.is_terminal and not self.quiet

    def __enter__(self) -> Progress:
        self._began = time.perf_counter()
        if self.live:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.update(self._view(), refresh=True)
            self._live.stop()
            self._live = None

    def update(self, metrics: Mapping[str, Any]) -> None:
        """Shows one step's metrics; call it once per step."""
        self.done += 1
        for name, value in metrics.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.history.setdefault(name, []).append(float(value))
        if self.quiet:
            return
        if self._live is None:
            self._print(plain_line(metrics, self.done, self.total, self.remaining, self.leading))
            return
        self._bar.update(self._task, completed=self.done)
        self._live.update(self._view())

    def message(self, text: str) -> None:
        """Prints a message, above the live table or on its own line."""
        if self.quiet:
            return
        if self._live is not None:
            self.console.print(Text(text))
        else:
            self._print(text)

    @property
    def remaining(self) -> float | None:
        """Seconds until the end, at the mean pace so far; None before the first step."""
        steps = self.done - self.start
        return (time.perf_counter() - self._began) / steps * (self.total - self.done) if steps else None

    def _print(self, text: str) -> None:
        print(text, file=self.console.file, flush=True)

    def _view(self) -> Group:
        return Group(self._bar, figures_table(self.history, self.leading)) if self.history else Group(self._bar)


class _Remaining(ProgressColumn):
    """Time left, at the pace that `Progress` measures (rich's own column counts steps before a resume)."""

    max_refresh = 1.0

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def render(self, task: Any) -> Text:
        left = self._progress.remaining
        return Text("" if left is None else f"{duration(left)} left", style="cyan")


def plain_line(
    metrics: Mapping[str, Any], done: int, total: int, remaining: float | None, leading: Sequence[str] = LEADING
) -> str:
    """One step on one line: figures, rewards by kind, zero-std share by modality, ratio deviation, seconds by phase."""
    parts = [f"step {done}/{total}"]
    parts += [f"{name} {_figure(metrics[name])}" for name in leading if name in metrics]
    parts.append(_group(metrics, "reward/", "rewards"))
    parts.append(_group(metrics, "zero_std/", "zero-std"))
    if "ratio_first_iteration_max_dev" in metrics:
        parts.append(f"ratio dev {metrics['ratio_first_iteration_max_dev']:.1e}")
    if "seconds" in metrics:
        phases = _group(metrics, "seconds/", "")
        parts.append(duration(metrics["seconds"]) + (f" ({phases})" if phases else ""))
    if remaining is not None:
        parts.append(f"{duration(remaining)} left")
    return " | ".join(p for p in parts if p)


def _group(metrics: Mapping[str, Any], prefix: str, title: str) -> str:
    found = [f"{k.removeprefix(prefix)} {_shown(k, v)}" for k, v in metrics.items() if k.startswith(prefix)]
    return f"{title} {' '.join(found)}".strip() if found else ""


def _figure(value: float | None) -> str:
    """A figure of the task: a share in percent, or a number."""
    return _shown("zero_std/" if value is not None and 0 <= value <= 1 else "", value)


def _shown(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    if name.startswith("zero_std/"):
        return percent(value).replace(" %", "%")
    return f"{value:.2f}" if name.startswith(("reward/", "seconds")) else number(value)


def figures_table(history: Mapping[str, list[float]], leading: Sequence[str] = LEADING) -> Group:
    """The leading figures and rewards: first value, current value and trend. Below: the last step's zero-std shares,
    ratio deviation and seconds. It fits a small terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0))
    for head, justify in (("", "left"), ("first", "right"), ("now", "right"), ("trend", "left")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    figures = [n for n in leading if n in history]
    for name in figures + [n for n in history if n.startswith("reward/") and n not in figures]:
        values = history[name]
        first, now = (_figure(v) if name in figures else _shown(name, v) for v in (values[0], values[-1]))
        table.add_row(Text(name), first, Text(now, style="bold"), sparkline(values))
    last = {name: values[-1] for name, values in history.items()}
    lines = [_group(last, "zero_std/", "groups without spread:")]
    if "ratio_first_iteration_max_dev" in last:
        lines.append(f"first-iteration ratio, max |ρ − 1|: {last['ratio_first_iteration_max_dev']:.1e}")
    if "seconds" in last:
        lines.append(f"{last['seconds']:.1f} s a step: {_group(last, 'seconds/', '')}")
    return Group(table, *(Text(line) for line in lines if line))


def sparkline(values: list[float], width: int = _TREND) -> str:
    """The last values as a row of bars, scaled from minimum to maximum; empty for fewer than two."""
    last = values[-width:]
    if len(last) < 2:
        return ""
    low, high = min(last), max(last)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((v - low) * scale)] for v in last)


def results_table(summary: Mapping[str, Any]) -> str:
    """Held-out results before and after as plain text; empty if the summary has none (see `results.held_out`)."""
    figures = [f for f in held_out(summary) if f.leading] or held_out(summary)
    if not figures:
        return ""
    table = Table(box=box.ASCII2, title="held-out prompts", title_justify="left")
    table.add_column("")
    shown = columns(figures)
    for column in shown:
        for head in ("before", "after", "change"):
            table.add_column(head if len(shown) == 1 else f"{head}\n{column}", justify="right")
    for figure in figures:
        table.add_row(Text(figure.name), *(cell for column in shown for cell in _cells(figure, column)))
    console = Console(file=io.StringIO(), width=120, color_system=None, force_terminal=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())  # type: ignore[attr-defined]


def _cells(figure: Figure, column: str) -> tuple[str, str, str]:
    before, after = figure.cells.get(column, (None, None))
    return figure.shown(before), figure.shown(after), figure.change(column) or ""
