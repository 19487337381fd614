"""Rewards that fail in a run: it goes on with what is left, the table shows the fault and the metrics count it."""

import asyncio
import copy
import json
import os
import random
import re
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import unidiff.grpo.trainer as trainer_module
from tests.tables import each
from unidiff.report.page import write_page
from unidiff.rewards import runner
from unidiff.rewards.idle import silent_rewards
from unidiff.rewards.reward import Cause, Missing, RewardError, reward
from unidiff.rewards.table import RewardTable
from unidiff.scorers import math as math_answers
from unidiff.sequence import Modality


def raises_for_one(segment, **columns):
    if segment.index == 0:
        raise RuntimeError("this one")
    return 1.0


def raises(segments, **columns):
    raise RuntimeError("the scorer is down")


def hangs(segments, **columns):
    time.sleep(3)


async def hangs_for_ever(segments, **columns):
    await asyncio.sleep(600)


async def never_awaits(segments, **columns):
    time.sleep(3)


async def stops_its_loop(segments, **columns):
    asyncio.get_running_loop().stop()
    await asyncio.sleep(0.001)
    raise KeyboardInterrupt


async def interrupts_in_a_task(segments, **columns):
    async def task():
        raise KeyboardInterrupt

    await asyncio.create_task(task())


def raises_base(kind):
    def function(segments, **columns):
        raise kind

    return function


class Unspeakable:
    def __str__(self):
        raise GeneratorExit

    __repr__ = __float__ = __str__


def meddler(segments, log_extra, **columns):
    """Changes all that it can of the process, and logs what has no words."""
    os.chdir("/")
    random.seed(0), np.random.seed(0), torch.manual_seed(0)  # noqa: NPY002
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(True)
    torch.set_num_threads(torch.get_num_threads() + 1)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.alarm(1)
    log_extra("words", [Unspeakable()] * len(segments))
    return [0.5] * len(segments)


def vandal(segments, board, **columns):
    for s in segments:
        for view in (*s.before, s):
            view.tokens.zero_()
            if view.pixels is not None:
                view.pixels[:] = 0
        s.text = "gone"
        s.columns.clear()
        s.prompt.clear()
        vars(s.task).clear()
    count = len(segments)
    segments.clear()
    return [0.5] * count


FAULTS = {
    "raises_for_one": (reward(raises_for_one, batched=False, weight=0.0), Cause.RAISED),
    "raises": (reward(raises), Cause.RAISED),
    "hangs": (reward(hangs, timeout=0.05, breaker=None), Cause.TIMEOUT),
    "hangs_for_ever": (reward(hangs_for_ever, timeout=0.05), Cause.TIMEOUT),
    "never_awaits": (reward(never_awaits, timeout=0.05), Cause.TIMEOUT),
    "too_few": (reward(lambda s, **c: [1.0], name="too_few"), Cause.WRONG_LENGTH),
    "strings": (reward(lambda s, **c: ["good"] * len(s), name="strings"), Cause.WRONG_TYPE),
    "infinite": (reward(lambda s, **c: [float("inf")] * len(s), name="infinite"), Cause.NOT_FINITE),
    "complex": (reward(lambda s, **c: [1j] * len(s), name="complex"), Cause.WRONG_TYPE),
    "stops_its_loop": (reward(stops_its_loop), Cause.RAISED),
    "interrupts_in_a_task": (reward(interrupts_in_a_task), Cause.RAISED),
    "interrupts": (reward(raises_base(KeyboardInterrupt), name="interrupts"), Cause.RAISED),
    "leaves": (reward(raises_base(GeneratorExit), name="leaves"), Cause.RAISED),
    "cancels": (reward(raises_base(asyncio.CancelledError), name="cancels", timeout=20), Cause.RAISED),
    "unspeakable": (reward(lambda s, **c: [Unspeakable()] * len(s), name="unspeakable"), Cause.WRONG_TYPE),
    r"a$\frac{$ <b>&'\"%s{}": (reward(lambda s, **c: 1 / 0, name=r"a$\frac{$ <b>&'\"%s{}"), Cause.RAISED),
    "trips": (reward(lambda s, **c: 1 / 0, name="trips", breaker=1), Cause.RAISED),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 0.1)


def test_a_run_goes_on_as_if_faulty_rewards_were_not_there(make_trainer, weights, difference, rewards, tmp_path):
    meddling = [reward(meddler, weight=0.0), reward(meddler, name="meddler elsewhere", weight=0.0, timeout=20)]
    mutes = [reward(vandal, on="text", weight=0.0), *rewards, *meddling, *(one for one, _ in FAULTS.values())]
    tables = []
    trainer = make_trainer(mutes, options={"on_step": lambda s, m, e: tables.append(e.table)})
    history = trainer.train()
    sound = make_trainer(output_dir=str(tmp_path / "sound"))
    expected = sound.train()
    assert len(history) == len(expected) == 2
    assert difference(weights(trainer), weights(sound)) == 0
    for step, (metrics, reference, table) in enumerate(zip(history, expected, tables)):
        for name in ("reward/bright", "reward/short_words", "grad_norm", "advantage_correlation"):
            assert metrics[name] == reference[name]
        for name in ("vandal", "meddler", "meddler elsewhere"):
            assert metrics[f"reward/{name}"] == 0.5
            assert metrics[f"lost/{name}"] == 0
        for name, (_, cause) in FAULTS.items():
            cause = Cause.SKIPPED if name == "trips" and step else cause
            share = metrics[f"lost/{name}/{cause}"]
            assert share == metrics[f"lost/{name}"] and (0 < share < 1 if name == "raises_for_one" else share == 1)
            assert f"reward/{name}" not in metrics or name == "raises_for_one"
            assert {c for n, c in table.lost if n == name} == {cause}
            assert f"{name} has no value ({cause}: " in table.explain(0, 0)
        assert metrics["reward/raises_for_one"] == 1
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == history


@pytest.mark.parametrize("name", FAULTS)
def test_a_required_reward_with_this_fault_ends_the_run(make_trainer, rewards, tmp_path, name):
    """With a message that names reward, sample and cause, and a checkpoint to go on from."""
    fault, cause = FAULTS[name]
    needed = reward(fault.function, name=name, required=True, batched=fault.batched, timeout=fault.timeout)
    with pytest.raises(
        RewardError, match=rf"{re.escape(repr(name))} is required .* for sample \d, segment \d: {cause}: \w+"
    ):
        make_trainer([*rewards, needed]).train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]


def test_a_worker_killed_in_the_middle_costs_the_answers_that_it_was_at(make_trainer, rewards, monkeypatch, tmp_path):
    pytest.importorskip("math_verify")
    asked, ask = [], math_answers._Worker.ask

    def killing(worker, request, seconds):
        asked.append(request)
        if len(asked) == 3:
            worker.process.kill()  # as the kernel does when memory runs out
        return ask(worker, request, seconds)

    monkeypatch.setattr(math_answers._Worker, "ask", killing)
    tables = []
    distance = math_answers.math_answer("distance", which="all", workers=1, seconds=60)
    trainer = make_trainer([*rewards, distance], options={"on_step": lambda s, m, e: tables.append(e.table)})
    first, second = trainer.train()
    share = pytest.approx(1 / int(tables[0].asked_F[2]), 1e-5)
    assert first["lost/math_answer"] == first["lost/math_answer/raised"] == share
    assert second["lost/math_answer"] == 0 and first["grad_norm"] > 0
    (place,) = [(row, segment) for f, row, segment in tables[0].missing if f == 2]
    assert "math_answer has no value (raised: the worker that verified it has died)" in tables[0].explain(*place)


def test_a_required_reward_leaves_a_checkpoint(make_trainer, weights, difference, timeless, tmp_path, rewards):
    mended = False

    @reward(on="image", required=True, weight=0.0)
    def vital(segments, trainer_state, **columns):
        lost = trainer_state.global_step == 1 and not mended
        return [None if lost and i == 1 else 1.0 for i in range(len(segments))]

    settings = {"max_steps": 3, "save_steps": 0}
    trainer = make_trainer([*rewards, vital], **settings)
    with pytest.raises(
        RewardError, match=r"'vital' is required and has no value for sample \d, segment \d: none: returned None"
    ):
        trainer.train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]
    mended = True
    resumed = make_trainer([*rewards, vital], resume=True, **settings)
    history = resumed.train()
    assert resumed.start == 1 and len(history) == 3
    unbroken = make_trainer([*rewards, vital], output_dir=str(tmp_path / "unbroken"), **settings)
    assert [timeless(m) for m in history] == [timeless(m) for m in unbroken.train()]
    assert difference(weights(resumed), weights(unbroken)) == 0


def test_a_required_reward_that_fails_elsewhere_ends_every_process(make_trainer, rewards, monkeypatch, tmp_path):
    """No process may wait for one that has ended."""

    def with_another(own, _):
        if not isinstance(own, RewardTable):
            return [own]
        another = replace(own, missing={(1, 2, 3): Missing(Cause.TIMEOUT, "took longer than 5 s")})
        return [own, another]

    monkeypatch.setattr(trainer_module, "everybody", with_another)
    vital = [rewards[0], reward(rewards[1].function, on="image", name="vital", required=True)]
    with pytest.raises(RewardError, match=r"'vital' .* no value for sample 8, segment 3: timeout: took longer"):
        make_trainer(vital).train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]


def test_logged_numbers_reach_the_metrics(make_trainer, tmp_path, rewards):
    def logs(completions, trainer_state, log_metric, log_extra, **kwargs):  # as TRL has them
        log_metric("accuracy", trainer_state.global_step + 0.5)
        log_metric("lr", 3.0)  # names that the trainer has
        log_metric("seconds", 4.0)
        log_extra("length", [len(c) for c in completions])
        return [0.0] * len(completions)

    tables = []
    trainer = make_trainer([*rewards, logs], options={"on_step": lambda s, m, e: tables.append(e.table)})
    trainer.train()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [m["accuracy"] for m in written] == [0.5, 1.5] and [m["log/lr"] for m in written] == [3.0, 3.0]
    assert all(m["lr"] == 1e-3 and m["log/seconds"] == 4 != m["seconds"] for m in written)
    assert "  length: " in tables[0].explain(0, 0) and len(tables[0].extra["length"]) == 6


def test_rewards_without_a_segment_to_look_at_are_said_once(make_trainer, model, rewards, caplog, tmp_path):
    policy = copy.deepcopy(model)
    policy.spec = replace(policy.spec, image_next=None)  # so it writes texts alone
    drawn = reward(lambda responses, **columns: [1.0] * len(responses), on="sequence", credit="image", name="drawn")
    history = make_trainer([*rewards, drawn], policy=policy).train()
    said = [r.getMessage() for r in caplog.records if "NONE OF THE" in r.getMessage()]
    assert len(history) == 2 and len(said) == 1
    assert said[0].startswith("STEP 1: NONE OF THE 6 RESPONSES CONTAINS A PICTURE, so nothing is learnt from rewards ")
    assert "'bright', 'drawn'. Check max_rounds" in said[0]
    for metrics in history:
        assert metrics["not_applicable/bright"] == 1 and "reward/bright" not in metrics and "lost/bright" not in metrics
        assert metrics["reward/drawn"] == 1 and metrics["not_applicable/short_words"] == 0
    kinds = {one.name: one.on for one in (*rewards, drawn)}
    (warning,) = silent_rewards(history, kinds)
    assert warning.startswith("Reward 'bright' gave no value in the run's 2 steps: no response contains a picture. ")
    write_page(tmp_path / "report.html", title="t", metrics=history, kinds=kinds)
    assert warning.replace("'", "&#39;") in (tmp_path / "report.html").read_text()


@each(
    ("rows", "sentence"),
    [
        ([], None),
        ([{"reward/a": 0.0}, {}], None),
        ([{"step": 0}], "Reward 'a' gave no value in the run's 1 step: no response contains a text. Check whether"),
        ([{"lost/a": 0.0}] * 3, "Reward 'a' gave no value in the run's 3 steps: it always said that it does not apply"),
        (
            [{"lost/a": 1.0}, {"lost/a": 0.5}],
            "Reward 'a' gave no value in the run's 2 steps: 75 % of its",
        ),
    ],
)
def test_the_report_says_which_reward_never_had_a_value(rows, sentence):
    said = silent_rewards(rows, {"a": "text"})
    assert said == [] if sentence is None else said[0].startswith(sentence)


def test_a_module_moves_to_the_runs_device(make_trainer, rewards):
    class Judge(nn.Module):
        def __init__(self):
            super().__init__()
            self.level = nn.Parameter(torch.tensor(0.5))

        def forward(self, segments, **columns):
            return self.level * torch.ones(len(segments), device=self.level.device)

    judge = reward(Judge(), on="text")
    moved = []
    judge.function.to = lambda device: moved.append(device)
    trainer = make_trainer([*rewards, judge])
    assert moved == [trainer.accelerator.device]
    metrics, _ = trainer.step(0)
    assert metrics["reward/Judge"] == 0.5 and metrics["lost/Judge"] == 0


def test_rewards_of_the_task_are_known_by_name(make_trainer):
    trainer = make_trainer(["success=0.25", "picture_cells"])
    assert [(r.name, r.weight) for r in trainer.rewards] == [("success", 0.25), ("picture_cells", 0.5)]
    with pytest.raises(ValueError, match="unknown reward 'sucess'; did you mean 'success'"):
        make_trainer(["sucess"])


def test_experience_keeps_the_account_of_its_rows(make_trainer):
    _, experience = make_trainer(assignment="joint").step(0)
    table, routed = experience.table, experience.routed
    assert len(table.modality_BS) == len(routed.advantage_BS) == 6
    tokens = experience.canvas.modality == Modality.TEXT
    assert tokens.any() and "joint (sum of the row's means): " in table.explain(5, 0, routed)
