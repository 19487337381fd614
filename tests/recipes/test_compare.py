"""Arms × seeds: what is passed on, what is not done twice, and the arithmetic of the table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


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

    def __call__(self, config, folder: Path, words: list[str]) -> None:
        self.calls.append(words)
        folder.mkdir(parents=True, exist_ok=True)
        if words[0].endswith("supervised.py"):
            (folder / "training.json").write_text("{}")
            return
        success = 0.5 + 0.1 * int(words[words.index("--seed") + 1]) + (0.2 if "segment" in words else 0.0)
        (folder / "summary.json").write_text(json.dumps(summary(success)))
        shared = {"success": success, "image_exact": 1.0, "progress": 0.1, "zero_std/text": success / 2}
        shared |= {"seconds/rollout": 1.5, "seconds/update": success}
        steps = [{"step": 0, **shared}, {"step": 1, **shared, "eval/success": success / 4}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))


def go(compare: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> Runs:
    runs = Runs(compare)
    monkeypatch.setattr(compare, "call", runs)
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    compare.main()
    return runs


def test_every_arm_has_every_seed_and_the_shared_settings(compare, monkeypatch, tmp_path, capsys) -> None:
    words = ("--arms", "credit", "--seeds", "0,1", "--output_dir", str(tmp_path), "--max_steps", "7")
    runs = go(compare, monkeypatch, *words)
    got = {(w[w.index("--assignment") + 1], w[w.index("--seed") + 1]) for w in runs.calls}
    assert got == {(a, s) for a in ("joint", "segment") for s in "01"}
    assert all(w[w.index("--max_steps") + 1] == "7" for w in runs.calls)
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
    assert all("--init" not in call for call in runs.calls[:2])  # all of GRPO comes first
    grpo = runs.calls[0]
    control = next(call for call in runs.calls if "--init" in call and call[-1].endswith("seed2"))
    evaluation = next(call for call in runs.calls if str(tmp_path / "continued-seed2") in call and call is not control)
    assert grpo[grpo.index("--model") + 1] == "mine" == control[control.index("--init") + 1]
    assert float(control[control.index("--max_seconds") + 1]) == 33.0
    models = [evaluation[i + 1] for i, word in enumerate(evaluation) if word == "--model"]
    assert models[-1] == str(tmp_path / "continued-seed2")  # the last one counts
    assert evaluation[evaluation.index("--max_steps") + 1] == "0"


def test_arms_in_words(compare) -> None:
    arms = compare.parse_arms("low: learning_rate=1e-4; high: learning_rate=1e-3, seed=2")
    assert arms == {"low": {"learning_rate": "1e-4"}, "high": {"learning_rate": "1e-3", "seed": "2"}}
    with pytest.raises(SystemExit, match="it must be one of assignment, "):
        compare.parse_arms("asignment")


@pytest.mark.parametrize("n", [2, 3, 5])
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
