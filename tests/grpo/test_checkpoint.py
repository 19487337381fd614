"""Run folders: claiming them, atomic writes, and runs that go on as if they had never been stopped."""

import json
import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from unidiff.grpo import checkpoint
from unidiff.grpo.checkpoint import RunFolder, read_metrics, write_json
from unidiff.grpo.config import GRPOConfig
from unidiff.grpo.experience import Experience
from unidiff.sequence import Modality


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


@pytest.mark.parametrize("moment", ["save_state", "write_json", "replace"])
def test_a_kill_while_a_checkpoint_is_written(make_trainer, monkeypatch, moment):
    """The checkpoint before it is what counts, and the next save clears what was left."""
    trainer = make_trainer()
    trainer.claim()
    trainer.folder.save(trainer.accelerator, 1)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    owner = {"save_state": trainer.accelerator, "write_json": checkpoint, "replace": checkpoint.os}[moment]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, moment, killed)
        trainer.folder.save(trainer.accelerator, 2)
    assert [p.name for p in trainer.folder.checkpoints()] == ["step-000001"]
    assert trainer.folder.load(trainer.accelerator) == 1
    trainer.folder.save(trainer.accelerator, 2)
    assert {p.name for p in (trainer.folder.path / "checkpoints").iterdir()} == {"step-000001", "step-000002"}
    assert trainer.folder.load(trainer.accelerator) == 2


def test_a_draft_left_behind_is_no_checkpoint(make_trainer):
    trainer = make_trainer()
    trainer.claim()
    whole = trainer.folder.save(trainer.accelerator, 1)
    draft = whole.with_name("step-000002.draft")
    draft.mkdir()
    (draft / "progress.json").write_text('{"step": 2}')
    (whole.with_name("step-000003")).mkdir()  # nothing in it
    assert trainer.folder.checkpoints() == [whole] and trainer.folder.load(trainer.accelerator) == 1


def test_old_checkpoints_go(make_trainer):
    trainer = make_trainer()
    trainer.claim()
    for step in (1, 2, 10):
        trainer.folder.save(trainer.accelerator, step)
    assert [p.name for p in trainer.folder.checkpoints()] == ["step-000002", "step-000010"]


def test_a_checkpoint_holds_nothing_of_the_global_generators(make_trainer):
    trainer = make_trainer()
    trainer.claim()
    saved = trainer.folder.save(trainer.accelerator, 1)
    assert {p.name for p in saved.iterdir()} == {"model.safetensors", "optimizer.bin", "progress.json"}


# ---------------------------------------------------------------------------------------------- going on


def lines(trainer, timeless):
    return [timeless(m) for m in read_metrics(trainer.folder.metrics)]


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2, "beta": 0.1, "assignment": "segment"}], ids=str)
def test_a_resumed_run_is_one_that_never_stopped(make_trainer, weights, difference, timeless, tmp_path, settings):
    settings = {"max_steps": 4, "lr_schedule": "linear", "warmup_steps": 2, **settings}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **settings)
    history = whole.train()

    def stop(step, metrics, experience):
        if step == 2:
            raise RuntimeError("killed")

    broken = make_trainer(save_steps=2, options={"on_step": stop}, **settings)
    with pytest.raises(RuntimeError, match="killed"):
        broken.train()
    assert len(lines(broken, timeless)) == 3  # one more than the checkpoint knows of
    resumed = make_trainer(save_steps=2, resume=True, **settings)
    again = resumed.train()
    assert resumed.start == 2 and [timeless(m) for m in again] == [timeless(m) for m in history]
    assert lines(resumed, timeless) == lines(whole, timeless)
    assert difference(weights(whole), weights(resumed)) == 0
    for first, second in zip(
        whole.optimizer.state_dict()["state"].values(), resumed.optimizer.state_dict()["state"].values()
    ):
        assert all(torch.equal(first[k], second[k]) for k in first)


def test_resuming_where_nothing_was_saved_starts_anew(make_trainer, timeless):
    trainer = make_trainer(resume=True)
    assert len(trainer.train()) == 2 and trainer.start == 0


def test_resuming_a_finished_run_does_nothing(make_trainer, weights, difference, timeless):
    done = make_trainer()
    history = done.train()
    again = make_trainer(resume=True)
    assert again.train() == history and difference(weights(done), weights(again)) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_the_step_in_progress(make_trainer, number):
    def interrupt(step, metrics, experience):
        if step == 1:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    trainer = make_trainer(max_steps=4, options={"on_step": interrupt})
    assert len(trainer.train()) == 2 and trainer.stopped
    assert [p.name for p in trainer.folder.checkpoints()] == ["step-000002"]
    assert signal.getsignal(number) is before
    resumed = make_trainer(max_steps=4, resume=True)
    assert len(resumed.train()) == 4 and not resumed.stopped


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT: a process started in the background by a script may have none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_ends_it_at_once(make_trainer, interruptible):
    def interrupt(step, metrics, experience):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    trainer = make_trainer(options={"on_step": interrupt})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.folder.checkpoints() == []


def test_training_off_the_main_thread(make_trainer):
    """Signals are the main thread's business there."""
    found = []
    thread = threading.Thread(target=lambda: found.extend(make_trainer().train()))
    thread.start()
    thread.join()
    assert len(found) == 2


def test_everything_is_written_inside_the_folder(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_trainer(output_dir="a/b").train()
    assert {str(p) for p in Path().iterdir()} == {"a"}


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(
    make_trainer, weights, difference, monkeypatch, tmp_path
):
    """And says where it came from; neither the weights nor a checkpoint hold it."""
    trainer = make_trainer(max_steps=3, save_steps=1, output_dir=str(tmp_path / "run"))
    values, kept = Experience.values, {}

    def broken_in_the_second_step(experience, logp_KBL, *given):
        value_BL = values(experience, logp_KBL, *given)
        if (tmp_path / "run" / "checkpoints" / "step-000001").exists() and torch.is_grad_enabled():
            kept.setdefault("weights", weights(trainer))
            text_BL = experience.canvas.rows(given[1].rows).modality == Modality.TEXT
            value_BL = torch.where(text_BL, value_BL * math.nan, value_BL)
        return value_BL

    monkeypatch.setattr(Experience, "values", broken_in_the_second_step)
    message = "step 1, iteration 0: the gradient's norm is nan; values of text tokens are not finite"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert difference(kept["weights"], weights(trainer)) == 0
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
