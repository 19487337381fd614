"""Arms × seeds: what is passed on, what is not done twice, and the arithmetic of the table."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest

from tests.tables import each


@pytest.fixture(scope="module")
def compare(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("recipes/compare.py")


def summary(success: float, seed: int = 0) -> dict:
    held = dict.fromkeys(("image_exact", "format", "agreement", "legal", "progress"), 0.5) | {"success": success}
    return {
        "base": {"greedy": held | {"success": 0.25}, "sampled": held},
        "final": {"greedy": held, "sampled": held | {"success": success / 2}},
        "rollout": {"token_forwards": 100.0, "seconds": 0.5},
        "seconds": 60.0,
        "seconds_training": 33.0,
    }


class Runs:
    """Stands in for the runs: writes what a run writes, and remembers how it was called."""

    def __init__(self, module: ModuleType) -> None:
        self.calls: list[list[str]] = []
        self.module = module

    def __call__(self, config, run, script: str) -> None:
        self.calls.append([script, *run.words, *(["--resume"] if run.folder.begun else [])])
        run.folder.open(replace(run.config, resume=run.folder.begun))
        folder, settings = run.folder.path, run.config
        if script == "supervised.py":
            (folder / "summary.json").write_text("{}")
            return
        success = 0.5 + 0.1 * settings.seed + (0.2 if settings.assignment == "segment" else 0.0)
        (folder / "summary.json").write_text(json.dumps(summary(success)))
        shared = {"success": success, "image_exact": 1.0, "progress": 0.1, "zero_std/text": success / 2}
        shared |= {"seconds/rollout": 1.5, "seconds/update": success}
        steps = [{"step": 0, **shared}, {"step": 1, **shared, "eval/success": success / 4}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def value(words: list[str], name: str) -> str:
    """What a command line gives for a setting."""
    (found,) = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found


def go(compare: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> Runs:
    runs = Runs(compare)
    monkeypatch.setattr(compare, "call", runs)
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    compare.main()
    return runs


def test_every_arm_has_every_seed_and_the_shared_settings(compare, monkeypatch, tmp_path, capsys) -> None:
    words = ("--arms", "credit", "--seeds", "0,1", "--output_dir", str(tmp_path), "--max_steps", "7")
    runs = go(compare, monkeypatch, *words)
    got = {(value(w, "assignment"), value(w, "seed")) for w in runs.calls}
    assert got == {(a, s) for a in ("joint", "segment") for s in "01"}
    assert all(value(w, "max_steps") == "7" for w in runs.calls)
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["segment"]["greedy/success"]["mean"] == pytest.approx(0.75)
    assert data["joint"]["sampled/success"]["mean"] == pytest.approx(0.275)
    shown = capsys.readouterr().out.splitlines()
    assert any(line.startswith("| segment | 2 | 0.750 ±") for line in shown)
    row = next(line for line in shown if line.startswith("| segment | 0.188 ±"))  # success at step 2
    # Seconds; the zero-std share of text; there is none of images, nor a correlation.
    assert row.endswith("| 1.50 | 0.75 | 0.38 | – | – |")
    head, line = (next(x for x in shown if x.startswith(start)).split(" | ") for start in ("| arm | s", "| joint | 2"))
    assert len(head) == len(line) and line[head.index("training s")] == "33" and line[-1] == "60 |"
    assert (tmp_path / "compare.png").stat().st_size > 1000
    assert go(compare, monkeypatch, *words).calls == []  # what is there is not done again


def test_the_control_trains_as_long_as_grpo_did(compare, monkeypatch, tmp_path) -> None:
    words = ("--arms", "sft", "--seeds", "2,3", "--parallel", "2", "--output_dir", str(tmp_path), "--model", "mine")
    runs = go(compare, monkeypatch, *words)
    assert [call[0] for call in runs.calls].index("supervised.py") == 2  # all of GRPO comes first
    grpo, control, evaluation = (
        next(c for c in runs.calls if value(c, "output_dir") == str(tmp_path / name))
        for name in ("grpo-seed2", "continued-seed2", "supervised-seed2")
    )
    assert value(grpo, "model") == "mine" == value(control, "init")
    assert float(value(control, "max_seconds")) == 33.0
    assert value(evaluation, "model") == str(tmp_path / "continued-seed2") and value(evaluation, "max_steps") == "0"
    assert go(compare, monkeypatch, *words).calls == []


def test_the_control_begins_with_the_model_of_a_file_of_settings(compare, monkeypatch, tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("model: 1.10\nthreads: 3")
    words = ("--arms", "sft", "--seeds", "0", f"--output_dir={tmp_path}", "--config", str(tmp_path / "c.yaml"))
    calls = go(compare, monkeypatch, *words).calls
    assert value(calls[1], "init") == "1.10" and not any("--threads" in word for word in calls[0])


def test_other_settings_under_the_same_name_are_refused(compare, monkeypatch, tmp_path) -> None:
    """Before anything is run, and never taken for what is there."""
    words = ["--arms", "low: learning_rate=1e-4", "--seeds", "0", "--output_dir", str(tmp_path), "--max_steps", "7"]
    assert len(go(compare, monkeypatch, *words).calls) == 1
    for other, message in (
        (("--arms", "new: seed_=1; low: learning_rate=1e-4"), "unknown setting 'seed_'"),
        (("--arms", "new: edit=full; low: learning_rate=1e-3"), "learning_rate was 0.0001, is 0.001"),
        (("--num_prompts", "4"), "num_prompts was 8, is 4"),
        (("--max_steps", "6"), "max_steps was 7, is 6"),
    ):
        with pytest.raises(SystemExit, match=re.escape(message)):
            go(compare, monkeypatch, *words, *other)
        assert not (tmp_path / "new-seed0").exists()
    assert go(compare, monkeypatch, *words, "--quiet", "--micro_batch_size", "2").calls == []  # it is the same run
    (longer,) = go(compare, monkeypatch, *words, "--max_steps", "9").calls
    assert longer[-1] == "--resume" and value(longer, "max_steps") == "9"


@pytest.mark.parametrize(
    "words", [("--seed", "3"), ("--resume",), ("--arms", "a: seed=2"), ("--arms", "a: output_dir=x")]
)
def test_what_is_set_for_each_run_cannot_be_given(compare, monkeypatch, tmp_path, words) -> None:
    with pytest.raises(SystemExit, match=r"error: (seed|resume|output_dir) is set for each run by --seeds"):
        go(compare, monkeypatch, "--output_dir", str(tmp_path), *words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--threads", "1"), "1"),
        (("--threads=5", "--parallel", "2"), "5"),
        (("--parallel", "2"), str(max((os.cpu_count() or 1) // 2, 1))),
        (("--arms", "a: threads=7", "--threads", "1"), "7"),
    ],
)
def test_threads(compare, monkeypatch, tmp_path, words, expected) -> None:
    runs = go(compare, monkeypatch, "--arms", "a: edit=full", "--seeds", "0", "--output-dir", str(tmp_path), *words)
    assert value(runs.calls[0], "threads") == expected and (tmp_path / "compare.md").is_file()


@each(
    ("words", "message"),
    [
        (("--threads", "0"), "threads is 0; it must be at least 1"),
        (("--parallel", "-1"), "parallel is -1; it must be at least 1"),
        (("--seeds", "1,1"), "seeds is '1,1'; name at least one, each once"),
        (("--seeds="), "seeds is ''; name at least one"),
        (("stray",), "expected --setting value, got 'stray'"),
        (("--arms", "a: edit"), "it must be one of assignment, "),
        (("--arms", "a: edit=full; a: edit=region"), "'a' must be a folder's name, and each arm have its own"),
        (("--arms", "../a: edit=full"), "'../a' must be a folder's name"),
        (("--arms", "a: edit=fully"), "edit is 'fully'; choose one of"),
        (("--learning_rate", "inf"), "learning_rate is 'inf'; it must be a finite number"),
    ],
)
def test_refusals(compare, monkeypatch, tmp_path, words, message) -> None:
    words = (words,) if isinstance(words, str) else words
    with pytest.raises(SystemExit, match=re.escape(message)) as refused:
        go(compare, monkeypatch, "--output_dir", str(tmp_path), *words)
    assert str(refused.value).startswith("error: ")


def test_arms_in_words(compare) -> None:
    arms = compare.parse_arms("low: learning_rate=1e-4; high: learning_rate=1e-3, seed=2")
    assert arms == {"low": {"learning_rate": "1e-4"}, "high": {"learning_rate": "1e-3", "seed": "2"}}
    with pytest.raises(ValueError, match="it must be one of assignment, "):
        compare.parse_arms("asignment")


@each("n", [2, 3, 5])
def test_intervals_cover_the_mean_19_times_in_20(compare, n: int) -> None:
    draws = np.random.default_rng(n).normal(loc=3.0, size=(4000, n))
    means, halves = np.array([compare.interval(row) for row in draws.tolist()]).T
    assert (abs(means - 3.0) <= halves).mean() == pytest.approx(0.95, abs=0.011)  # 3 standard errors


def test_one_seed_has_no_interval(compare) -> None:
    assert compare.interval([0.4]) == (0.4, 0.0)


def test_an_arm_that_only_evaluates_has_no_curve(compare, tmp_path) -> None:
    step = {"step": 0, "success": 0.5, "image_exact": 0.0, "progress": 0.1}
    for arm, steps in (("grpo", [step] * 3), ("supervised", [])):
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in steps))
    compare.curves(tmp_path / "mixed.png", {arm: [tmp_path / arm] for arm in ("grpo", "supervised")})
    compare.curves(tmp_path / "none.png", {"supervised": [tmp_path / "supervised"]})
    assert (tmp_path / "mixed.png").stat().st_size > (tmp_path / "none.png").stat().st_size > 0
