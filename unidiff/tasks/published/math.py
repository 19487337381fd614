r"""GSM8K, MATH, countdown and sudoku, with the rewards of MaskGRPO (2510.02880) and d1 (2504.12216)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from unidiff.rewards.reward import reward
from unidiff.scorers.answers import last_boxes
from unidiff.scorers.form import boxed, integer, soft_format
from unidiff.scorers.math import math_answer
from unidiff.scorers.text import extract, numeric_answer
from unidiff.tasks.countdown import value_of
from unidiff.tasks.published.sources import splits
from unidiff.tasks.rows import Rows

BOX = r"\\boxed\{([^{}]*)\}"
TAG = r"<answer>(.*?)</answer>"
_ASK_BOX = (
    "You are good at mathematics. Think step by step between <reasoning> and </reasoning>, then give the final answer "
    "as \\boxed{}.\n\n"
)
ASK_TAG = "Think between <reasoning> and </reasoning>, then give the answer between <answer> and </answer>.\n\n"
_Row = Mapping[str, Any]


def gsm8k(train: str | None = None, test: str | None = None, room: int = 256) -> Rows:
    """Grade-school problems (openai/gsm8k; columns question and answer, with the number after "####").

    Rewards as in MaskGRPO: 2 for the right number in the box, .5 for a whole number in it, .5 for the format. MaskGRPO
    compares texts, so a right answer "1,000" earns nothing there; ours compares numbers.
    """
    return Rows(
        splits(train, test, {"train": ("openai/gsm8k", "main", "train"), "test": ("openai/gsm8k", "main", "test")}),
        prompt=lambda row: _ASK_BOX + row["question"],
        columns={"gold": lambda row: str(row["answer"]).split("####")[-1].strip()},
        room=room,
        rewards=[
            numeric_answer("gold", pattern=BOX, weight=2.0, name="correct"),
            integer(weight=0.5),
            soft_format(weight=0.5),
        ],
        measure={"success": numeric_answer("gold", pattern=f"{BOX}|{TAG}"), "boxed": boxed()},
    )


def math500(train: str | None = None, test: str | None = None, room: int = 256) -> Rows:
    """Competition problems (ankner/math-500 to train, HuggingFaceH4/MATH-500 to test; columns problem, and solution
    with a box or answer).

    Rewards as in MaskGRPO: 2 for a right answer, .5 for a box. (MaskGRPO gives .25 without a box.) Answers are compared
    by math-verify (extra `math`); MaskGRPO compares normalized texts.
    """
    hub = {"train": ("ankner/math-500", "train"), "test": ("HuggingFaceH4/MATH-500", "test")}
    return Rows(
        splits(train, test, hub),
        prompt=lambda row: _ASK_BOX + row["problem"],
        columns={"gold": _boxed_or_answer},
        room=room,
        rewards=[math_answer("gold", weight=2.0, name="correct"), boxed(weight=0.5)],
        measure={"success": math_answer("gold"), "boxed": boxed()},
    )


def _boxed_or_answer(row: _Row) -> str:
    if row.get("answer") not in (None, ""):
        return str(row["answer"])
    found = last_boxes(str(row["solution"]))
    if not found:
        raise ValueError("column 'solution' has no \\boxed{…}, and there is no column 'answer'")
    return found[-1]


# ---------------------------------------------------------------- countdown


def countdown(train: str | None = None, test: str | None = None, room: int = 256) -> Rows:
    """Reach a target with each number once (Jiayi-Pan/Countdown-Tasks-3to4 with three numbers; columns nums and target,
    or input "30,100,93" and output, as in d1's test file). It is not the shipped task `countdown` with small numbers.

    Rewards as in d1: 1 for a right expression in <answer>, .1 for any other, 0 without one.
    """
    path = "Jiayi-Pan/Countdown-Tasks-3to4"
    hub = {"train": (path, "train[:-500]"), "test": (path, "train[-500:]")}
    return Rows(
        splits(train, test, hub),
        prompt=lambda row: (
            f"{ASK_TAG}Use each of the numbers {', '.join(map(str, _numbers(row)))} once, with + - * / and brackets, "
            f"to reach {_target(row)}. The answer is one expression."
        ),
        columns={"numbers": _numbers, "goal": _target},
        room=room,
        rewards=[expression],
        measure={"success": _solved},
    )


def _numbers(row: _Row) -> list[int]:
    given = row["nums"] if "nums" in row else row["input"]
    return [int(n) for n in (given.split(",") if isinstance(given, str) else given)]


def _target(row: _Row) -> int:
    return int(row["target"] if "target" in row else row["output"])


def score_of(text: str, numbers: Sequence[int], goal: int) -> float:
    """d1's score of the last <answer>."""
    answer = extract(text, TAG)
    if answer is None:
        return 0.0
    value = value_of(answer.strip())
    return 1.0 if value is not None and value[0] == goal and Counter(value[1]) == Counter(numbers) else 0.1


@reward(on="text")
def expression(segments: Sequence[Any], **columns: Any) -> list[float]:
    """See `score_of`."""
    return [score_of(s.text or "", s.columns["numbers"], s.columns["goal"]) for s in segments]


@reward(on="text")
def _solved(segments: Sequence[Any], **columns: Any) -> list[float]:
    return [float(score_of(s.text or "", s.columns["numbers"], s.columns["goal"]) == 1.0) for s in segments]


# ---------------------------------------------------------------- sudoku


def sudoku(train: str | None = None, test: str | None = None, room: int = 256) -> Rows:
    """4 × 4 sudokus (CSV with the columns Puzzle and Solution of 16 digits each, 0 = empty; d1's file). It needs files,
    as no hub has it.

    Reward as in d1: the share of empty cells that the digits of the last <answer> fill correctly.
    """
    if train is None and test is None:
        raise ValueError("sudoku needs files: --task.train 4x4_sudoku.csv --task.test 4x4_test_sudoku.csv")
    return Rows(
        splits(train, test, {}),
        prompt=lambda row: (
            f"{ASK_TAG}Fill the empty cells (0) of this 4 x 4 sudoku with the digits 1 to 4. Every row, column and "
            f"2 x 2 box holds each digit once. The answer is all 16 digits.\n\n{_cells(row, 'Puzzle')}"
        ),
        columns={"puzzle": lambda row: _cells(row, "Puzzle"), "right": lambda row: _cells(row, "Solution")},
        room=room,
        rewards=[cells],
        measure={"cells": cells, "success": _all_cells},
        headline=("success", "cells"),
    )


def _cells(row: _Row, name: str) -> str:
    digits = re.sub(r"\D", "", str(row[name])).zfill(16)  # readers of numbers drop leading zeros
    if len(digits) != 16:
        raise ValueError(f"column {name!r} holds {row[name]!r}; a 4 x 4 sudoku has 16 digits")
    return digits


def filled(text: str, puzzle: str, right: str) -> float:
    """The share of a puzzle's empty cells that the last <answer> fills correctly."""
    given = re.sub(r"\D", "", extract(text, TAG) or "")[:16].ljust(16, "0")
    empty = [i for i, cell in enumerate(puzzle) if cell == "0"]
    return sum(given[i] == right[i] for i in empty) / len(empty) if empty else 1.0


@reward(on="text")
def cells(segments: Sequence[Any], **columns: Any) -> list[float]:
    """See `filled`."""
    return [filled(s.text or "", s.columns["puzzle"], s.columns["right"]) for s in segments]


@reward(on="text")
def _all_cells(segments: Sequence[Any], **columns: Any) -> list[float]:
    return [float(filled(s.text or "", s.columns["puzzle"], s.columns["right"]) == 1.0) for s in segments]
