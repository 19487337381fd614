"""The recipe of the base model: what a run leaves behind, and that a stop by the clock anneals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unidiff import UnifiedModel

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "supervised.py"
TINY = ["--corpus", "6", "--batch_size", "2", "--window_batch", "3", "--warmup", "1"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, str(RECIPE), *TINY, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_fresh_run_and_one_that_goes_on(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run("--steps", "2", "--d_model", "32", "--layers", "1", "--output_dir", str(first))
    lines = [json.loads(line) for line in (first / "supervised.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all(line["text"] > 0 for line in lines)
    assert json.loads((first / "training.json").read_text())["d_model"] == 32

    run("--init", str(first), "--max_seconds", "1", "--output_dir", str(second))
    before, after = (UnifiedModel.from_pretrained(folder).state_dict() for folder in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    steps = json.loads((second / "training.json").read_text())["steps"]
    assert len((second / "supervised.jsonl").read_text().splitlines()) < steps  # the clock ended it
