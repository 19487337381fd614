"""Run folders: who may take them, what is kept of a run that ended badly, and where it goes on."""

from __future__ import annotations

import json
import os

import pytest

from unidiff.files import write_json
from unidiff.grpo.config import GRPOConfig
from unidiff.run_folder import RunFolder, read_metrics


def config(folder, **settings) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), **settings)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """A folder in which three steps were made."""
    folder = RunFolder(tmp_path / "run")
    folder.open(config(folder.path))
    for step in range(3):
        folder.append({"step": step, "loss": 0.5})
    return folder


# ---------------------------------------------------------------------------------------------- claiming


def test_a_folder_that_holds_a_run_is_not_taken(folder):
    with pytest.raises(ValueError, match="holds another run; go on with it"):
        folder.open(config(folder.path))
    folder.open(config(folder.path, resume=True))


def test_resuming_with_other_settings_names_them(folder):
    with pytest.raises(ValueError, match=r"seed was 0, is 1, learning_rate was 0\.0002, is 0\.1"):
        folder.open(config(folder.path, resume=True, seed=1, learning_rate=0.1))
    with pytest.raises(ValueError, match="max_steps was 80, is 41"):
        folder.open(config(folder.path, resume=True, max_steps=41))


def test_resuming_with_another_speed_or_display(folder):
    folder.open(config(folder.path, resume=True, micro_batch_size=1, save_steps=3, quiet=True, cache=False))


def test_a_run_that_never_began_leaves_the_folder_free(tmp_path):
    """So that a mistaken setting can be mended without another folder."""
    folder = RunFolder(tmp_path / "run")
    folder.open(config(folder.path, seed=0))
    folder.open(config(folder.path, seed=1))
    assert json.loads((folder.path / "config.json").read_text())["seed"] == 1


@pytest.mark.parametrize("left", ["summary.json", "checkpoints/step-000002/progress.json"])
def test_evaluations_and_checkpoints_are_runs_too(tmp_path, left):
    folder = RunFolder(tmp_path)
    (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / left).write_text("{}")
    with pytest.raises(ValueError, match="holds another run"):
        folder.open(config(folder.path))


# ---------------------------------------------------------------------------------------------- metrics


def test_rewinding_drops_the_steps_that_are_done_again(folder):
    assert [m["step"] for m in folder.rewind(2)] == [0, 1]
    folder.append({"step": 2, "loss": 0.25})
    assert [m["loss"] for m in read_metrics(folder.metrics)] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step"', "{", "\n", '{"step": 3, "loss": 0.5}\n{"st'])
def test_a_line_that_was_cut_off(folder, rest):
    with folder.metrics.open("a") as file:
        file.write(rest)
    kept = [m["step"] for m in read_metrics(folder.metrics)]
    assert kept[:3] == [0, 1, 2] and len(kept) == (4 if "\n{" in rest else 3)
    folder.rewind(3)
    folder.append({"step": 3})
    assert [m["step"] for m in read_metrics(folder.metrics)] == [0, 1, 2, 3]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []


# ---------------------------------------------------------------------------------------------- atomic writes


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
