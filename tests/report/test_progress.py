"""Progress: plain lines, a live table, and the results at the end."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from unidiff.report.progress import Progress, figures_table, results_table, sparkline
from unidiff.report.results import Figure, columns, duration, held_out, number

METRICS = {
    "step": 0,
    "success": 0.42,
    "image_exact": 0.8,
    "reward/legal": 0.9,
    "reward/exact": -0.5,
    "zero_std/text": 0.25,
    "ratio_first_iteration_max_dev": 3e-7,
    "seconds": 7.5,
    "seconds/rollout": 3.0,
}


def test_one_plain_line_a_step_where_there_is_no_terminal(capsys) -> None:
    with Progress(10, start=4) as progress:
        progress.message("[resumed] at 4")
        progress.update(METRICS)
        progress.update({"step": 5})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[resumed] at 4" and len(lines) == 3
    start = (
        "step 5/10 | success 42% | image_exact 80% | rewards legal 0.90 exact -0.50 | zero-std text 25% | "
        "ratio dev 3.0e-07 | 7.5 s (rollout 3.00) | "
    )
    assert lines[1].startswith(start) and lines[1].endswith(" left")
    assert lines[2].startswith("step 6/10 | ")


def test_quiet_says_nothing(capsys) -> None:
    with Progress(2, quiet=True) as progress:
        progress.update(METRICS)
        progress.message("hidden")
    assert capsys.readouterr() == ("", "")


def test_live_display_shows_the_last_step() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80, height=24, color_system=None)
    with Progress(3, console=screen) as progress:
        assert progress.live
        for i in range(3):
            progress.update({**METRICS, "success": 0.1 * i})
        progress.message("saved")
    last = screen.file.getvalue().split("saved")[-1]  # type: ignore[attr-defined]
    assert "3/3" in last and "success" in last and "▁▅█" in last and "groups without spread: text 25%" in last


def test_figures_of_a_frozen_lake_run_fit_a_small_terminal() -> None:
    rewards = {f"reward/{name}": [0.5, 1.0] for name in "abcdefg"}
    history = (
        {name: [value, value] for name, value in METRICS.items()} | {"format": [1.0], "agreement": [1.0]} | rewards
    )
    screen = Console(file=io.StringIO(), width=80)
    screen.print(figures_table(history))
    lines = screen.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert any("reward/g" in line and "▁█" in line for line in lines)
    assert len(lines) <= 22 and max(map(len, lines)) <= 80


def test_the_terminal_is_given_back_when_a_step_fails() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=80)
    with pytest.raises(RuntimeError, match="boom"), Progress(3, console=screen):
        raise RuntimeError("boom")
    assert screen.file.getvalue().rstrip().endswith("\x1b[?25h")  # type: ignore[attr-defined]


def test_sparkline() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█" and sparkline([1.0]) == "" and sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline(list(range(100)), width=24)) == 24


def test_results_table_has_both_columns() -> None:
    base = {"greedy": {"success": 0.473}, "sampled": {"success": 0.4, "format": 1.0}}
    text = results_table({"base": base, "final": {"greedy": {"success": 0.645}, "sampled": {"success": 0.35}}})
    row = next(line for line in text.splitlines() if "success" in line)
    assert [cell.strip() for cell in row.strip("| ").split("|")][1:] == [
        "47.3 %", "64.5 %", "+17.2", "40.0 %", "35.0 %", "−5.0",
    ]  # fmt: skip
    assert "–" in next(line for line in text.splitlines() if "format" in line)
    assert "\x1b" not in text and results_table({}) == ""


@pytest.mark.parametrize("side", [{"success": 0.5}, {"success": 0.5, "note": "text", "flag": True, "bad": math.nan}])
def test_flat_summaries(side) -> None:
    (figure,) = held_out({"base": side, "final": side})
    assert figure.name == "success" and figure.cells == {"result": (0.5, 0.5)}


def test_slashes_are_columns_too_and_leading_figures_come_first() -> None:
    figures = held_out({"base": {"sampled/zeta": 3.0, "greedy/success": 0.1}})
    assert [f.name for f in figures] == ["success", "zeta"] and columns(figures) == ["greedy", "sampled"]
    assert held_out(None) == []


def test_only_changes_beyond_the_error_are_coloured() -> None:
    figure = Figure("success", {"greedy": (0.50, 0.55), "sampled": (0.5, 0.7), "result": (0.7, 0.5)})
    assert [figure.tone(c, 256) for c in figure.cells] == ["none", "good", "bad"]
    assert figure.tone("greedy", None) == "good" and Figure("seconds", {"": (0.1, 0.9)}).tone("", None) == "none"


def test_what_is_a_share_is_told_by_whole_words() -> None:
    cells: dict[str, tuple[float | None, float | None]] = {"": (0.0, 0.156)}
    assert Figure("success/counting", cells).shown(0.156) == "15.6 %"
    for name in ("count", "token_forwards", "kl/text", "seconds"):
        assert Figure(name, cells).shown(0.156) == "0.156"


def test_numbers_and_durations() -> None:
    assert [number(v) for v in (0.0, 0.03124, 12.44, 812.0, 4321.4, 54321.0, 1.35e9, 9.997e11, 1.02e15)] == [
        "0", "0.0312", "12.4", "812", "4321", "54.3 k", "1.35 G", "1000 G", "1.02 P",
    ]  # fmt: skip
    assert [duration(s) for s in (8.31, 245, 7630)] == ["8.3 s", "4 min 05 s", "2 h 07 min"]
