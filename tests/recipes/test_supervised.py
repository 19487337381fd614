"""The recipe of the base model: what a run leaves behind, and that a stop by the clock anneals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from unidiff import UnifiedModel
from unidiff.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes" / "supervised.py"
TINY = ["--corpus", "6", "--batch_size", "2", "--window_batch", "3", "--warmup", "1"]


@pytest.fixture
def here(program: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """here(folder, *words) -> the folder, after a run in this process."""
    recipe = program("recipes/supervised.py")

    def call(folder: Path, *words: str) -> Path:
        monkeypatch.setattr(sys, "argv", [str(RECIPE), *words, "--output_dir", str(folder)])
        recipe.main()
        return folder

    return call


def test_a_fresh_run_and_one_that_goes_on(here, tmp_path: Path) -> None:
    first = here(tmp_path / "first", *TINY, "--steps", "2", "--d_model", "32", "--layers", "1")
    lines = [json.loads(line) for line in (first / "supervised.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all(line["text"] > 0 for line in lines)
    assert json.loads((first / "training.json").read_text())["d_model"] == 32

    second = here(tmp_path / "second", *TINY, "--init", str(first), "--max_seconds", "1")
    before, after = (UnifiedModel.from_pretrained(folder).state_dict() for folder in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    steps = json.loads((second / "training.json").read_text())["steps"]
    assert len((second / "supervised.jsonl").read_text().splitlines()) < steps  # the clock ended it


@pytest.mark.slow
def test_two_processes_do_what_one_does(here, tmp_path: Path) -> None:
    """The same losses and weights, to float32 noise; Muon and AdamW at small rates, since they enlarge it."""
    words = ["--task", "frozen_lake,countdown", "--tokenizers", str(ROOT / "tokenizers/unified"), "--text_length", "48"]
    words += ["--batch_size", "3", "--steps", "3", "--lr", "1e-3", "--lr_rest", "1e-4", "--d_model", "32"]
    words += ["--layers", "1", "--corpus", "12", "--warmup", "1", "--save_every", "2"]
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    two += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", str(RECIPE)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [*two, *words, "--output_dir", str(tmp_path / "two")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = []
    for folder in (here(tmp_path / "one", *words), tmp_path / "two"):
        lines = [json.loads(line) for line in (folder / "supervised.jsonl").read_text().splitlines()]
        found.append((lines, UnifiedModel.from_pretrained(folder).state_dict()))
    (lines, one), (both_lines, both) = found
    assert len(lines) == len(both_lines) == 2  # the first step and the last
    for first, second in zip(lines, both_lines):
        assert {k: v for k, v in first.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in second.items() if k != "seconds"}, abs=2e-4
        )
    for name, weight in one.items():
        torch.testing.assert_close(both[name], weight, rtol=0, atol=2e-4)


# ---------------------------------------------------------------------------------------------- its folder

SMALL = [*TINY, "--d_model", "32", "--layers", "1", "--steps", "4", "--save_every", "2"]


def results(folder: Path) -> tuple:
    lines = [{k: v for k, v in m.items() if k != "seconds"} for m in read_metrics(folder / "supervised.jsonl")]
    return (
        lines,
        (folder / "model.safetensors").read_bytes(),
        json.loads((folder / "summary.json").read_text())["steps"],
    )


@pytest.mark.slow
@pytest.mark.parametrize("moment", [1, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(here, tmp_path, monkeypatch, capsys, moment) -> None:
    """By the command that it prints, whose only settings are those of the folder. Then it is extended."""
    whole = here(tmp_path / "whole", *SMALL)

    def interrupt(*given, sample=torch.nn.utils.clip_grad_norm_):
        calls.append(1)
        if len(calls) == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return sample(*given)

    calls: list[int] = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    with pytest.raises(SystemExit) as ended:
        here(tmp_path / "run", *SMALL)
    assert ended.value.code == 130 and len(calls) == moment and not (tmp_path / "run" / "model.safetensors").exists()
    hint = capsys.readouterr().out.splitlines()[-1]
    assert hint.startswith("stopped; go on with ")
    assert hint.endswith(f"supervised.py --resume --output_dir {tmp_path / 'run'}")
    assert results(here(tmp_path / "run", "--resume")) == results(whole)
    assert results(here(tmp_path / "run", "--resume", "--steps", "6"))[2] == 6
    with pytest.raises(SystemExit, match="cannot be resumed with other settings: seed was 0, is 1"):
        here(tmp_path / "run", "--resume", "--seed", "1")


def test_what_it_refuses(here, tmp_path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("")
    for folder, words, message in (
        ("model", [], "model holds config.json but no run"),
        ("model", ["--resume"], "holds no run, so nothing can be resumed"),
        ("nothing", ["--resume"], "does not exist, so nothing can be resumed"),
        ("file", [], "is a file, not a folder"),
        ("run", ["--save_every", "-1"], "save_every is -1; it must be at least 0"),
        ("run", ["--lr", "inf"], "lr is 'inf'; it must be a finite number"),
        ("run", ["--init", str(tmp_path / "no")], str(tmp_path / "no")),
    ):
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            here(tmp_path / folder, *words)
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["config.json"]
