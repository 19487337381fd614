"""Checkpoints of a trainer, and runs that go on as if they had never been stopped."""

import math
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from unidiff import run_folder
from unidiff.grpo.checkpoint import save
from unidiff.run_folder import read_metrics, step_of
from unidiff.sequence import Modality


@pytest.mark.parametrize("moment", ["save_state", "write_json", "replace"])
def test_a_kill_while_a_checkpoint_is_written(make_trainer, monkeypatch, moment):
    """The checkpoint before it is what counts, and the next save clears what was left."""
    trainer = make_trainer()
    trainer.claim()
    save(trainer.folder, trainer.accelerator, 1)

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    owner = {"save_state": trainer.accelerator, "write_json": run_folder, "replace": os}[moment]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, moment, killed)
        save(trainer.folder, trainer.accelerator, 2)
    assert [p.name for p in trainer.folder.checkpoints()] == ["step-000001"]
    assert step_of(trainer.folder.last(9)) == 1
    save(trainer.folder, trainer.accelerator, 2)
    assert {p.name for p in (trainer.folder.path / "checkpoints").iterdir()} == {"step-000001", "step-000002"}
    assert step_of(trainer.folder.last(9)) == 2


def test_a_draft_left_behind_is_no_checkpoint(make_trainer):
    trainer = make_trainer()
    trainer.claim()
    whole = save(trainer.folder, trainer.accelerator, 1)
    draft = whole.with_name("step-000002.draft")
    draft.mkdir()
    (draft / "progress.json").write_text('{"step": 2}')
    (whole.with_name("step-000003")).mkdir()  # nothing in it
    assert trainer.folder.checkpoints() == [whole]
    with pytest.warns(UserWarning, match=r"step-000003.progress\.json is missing; it is kept as step-000003\.damaged"):
        assert trainer.folder.last(9) == whole


def test_old_checkpoints_go(make_trainer):
    trainer = make_trainer()
    trainer.claim()
    for step in (1, 2, 10):
        save(trainer.folder, trainer.accelerator, step)
    assert [p.name for p in trainer.folder.checkpoints()] == ["step-000002", "step-000010"]


def test_a_checkpoint_holds_nothing_of_the_global_generators(make_trainer):
    trainer = make_trainer()
    trainer.claim()
    saved = save(trainer.folder, trainer.accelerator, 1)
    assert {p.name for p in saved.iterdir()} == {"model.safetensors", "optimizer.bin", "progress.json"}


# ---------------------------------------------------------------------------------------------- going on


def lines(trainer, timeless):
    return [timeless(m) for m in read_metrics(trainer.folder.metrics)]


MORE = {"num_iterations": 2, "beta": 0.1, "assignment": "segment"}


@pytest.mark.parametrize("settings", [{}, pytest.param(MORE, marks=pytest.mark.slow)], ids=str)
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


def test_resuming_a_run_that_saved_nothing_starts_anew(make_trainer):
    make_trainer().claim()
    trainer = make_trainer(resume=True)
    assert len(trainer.train()) == 2 and trainer.start == 0


def test_resuming_where_there_is_no_run(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="run does not exist, so nothing can be resumed; to begin, leave out"):
        make_trainer(resume=True).train()
    assert not (tmp_path / "run").exists()


def test_a_finished_run_can_be_extended(make_trainer, weights, difference, timeless, tmp_path):
    """With a constant rate, the longer run is the one that was longer from the start."""
    whole = make_trainer(max_steps=4, output_dir=str(tmp_path / "whole"))
    history = whole.train()
    make_trainer(max_steps=2).train()
    longer = make_trainer(max_steps=4, resume=True)
    assert [timeless(m) for m in longer.train()] == [timeless(m) for m in history] and longer.start == 2
    assert difference(weights(whole), weights(longer)) == 0
    with pytest.raises(ValueError, match="max_steps was 4, is 3"):
        make_trainer(max_steps=3, resume=True).train()


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


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_weights(make_trainer, weights, difference, tmp_path):
    """And says where it came from; neither the weights nor a checkpoint hold it."""
    trainer = make_trainer(max_steps=3, save_steps=1, output_dir=str(tmp_path / "run"))
    combined, kept = trainer.update.combined, {}

    def broken_in_the_second_step(logp_KRL, batch):
        value_RL = combined(logp_KRL, batch)
        if (tmp_path / "run" / "checkpoints" / "step-000001").exists() and torch.is_grad_enabled():
            kept.setdefault("weights", weights(trainer))
            value_RL = torch.where(batch.canvas.modality == Modality.TEXT, value_RL * math.nan, value_RL)
        return value_RL

    trainer.update.combined = broken_in_the_second_step
    message = "step 1, iteration 0: the gradient's norm is nan; values of text tokens are not finite"
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert difference(kept["weights"], weights(trainer)) == 0
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
