"""The trainer's steps: every combination of settings, what an update does to probabilities."""

import copy
import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import unidiff.grpo.update as update_module
from unidiff.estimators import ESTIMATORS
from unidiff.grpo.losses import LOSSES
from unidiff.rewards.reward import reward
from unidiff.rewards.router import ASSIGNMENTS, RewardRouter
from unidiff.sequence import Modality
from unidiff.tasks.order import endless
from unidiff.tasks.task import Place

LOSS_TYPES = tuple(name for name in LOSSES if name != "rtb")  # see test_balance


# ---------------------------------------------------------------------------------------------- a step


# Each estimator with two losses, each loss and assignment with several. All with all: test_estimator_updates.py.
STEPS = [
    (name, LOSS_TYPES[(i + 3 * k) % len(LOSS_TYPES)], list(ASSIGNMENTS)[(i + k) % len(ASSIGNMENTS)])
    for i, name in enumerate(ESTIMATORS)
    for k in range(2)
]


@pytest.mark.parametrize(
    ("estimator", "loss_type", "assignment"),
    [*STEPS[::2], *(pytest.param(*own, marks=pytest.mark.slow) for own in STEPS[1::2])],
)
def test_every_estimator_loss_and_assignment_runs_a_step(make_trainer, estimator, loss_type, assignment, weights):
    settings = {"text_estimator": estimator, "image_estimator": estimator, "loss_type": loss_type}
    trainer = make_trainer(assignment=assignment, num_iterations=2, **settings)
    before = weights(trainer)
    metrics, _ = trainer.step(0)
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    unchanged = [k for k, v in weights(trainer).items() if torch.equal(v, before[k])]
    assert not unchanged, assignment
    assert metrics["tokens/text"] > 0 and metrics["tokens/image"] > 0
    assert metrics["ratio_first_iteration_max_dev"] < 1e-4


def global_states():
    legacy = np.random.get_state()[1].tolist()  # noqa: NPY002
    return random.getstate(), legacy, torch.get_rng_state().tolist()


def test_nothing_touches_the_global_generators(make_trainer):
    before = global_states()
    trainer = make_trainer(num_iterations=2, beta=0.1, eval_steps=1, save_steps=1)
    trainer.train()
    assert global_states() == before
    resumed = make_trainer(num_iterations=2, beta=0.1, eval_steps=1, save_steps=1, resume=True)
    torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002 (as another library would)
    before = global_states()
    resumed.train()
    assert resumed.start == 2 and global_states() == before


def test_a_step_depends_on_seed_and_step_only(make_trainer, timeless):
    first, _ = make_trainer().step(3)
    torch.rand(7)
    again, _ = make_trainer().step(3)
    other, _ = make_trainer(seed=1).step(3)
    assert timeless(first) == timeless(again) != timeless(other)


def test_prompts_are_drawn_anew_in_each_step():
    drawn = [endless(Place(seed, step, p, 4 * step + p)) for seed in range(3) for step in range(20) for p in range(4)]
    assert len(set(drawn)) == len(drawn) and all(0 <= i < 1 << 30 for i in drawn)


def test_metrics_tell_what_happened(make_trainer):
    metrics, experience = make_trainer().step(0)
    rollouts = experience.rollouts
    for stop in {r.stop for r in rollouts}:
        assert metrics[f"stop/{stop.name.lower()}"] == pytest.approx(
            np.mean([r.stop is stop for r in rollouts]), abs=1e-5
        )
    forwards = np.mean([r.compute.total.token_forwards for r in rollouts])
    assert metrics["compute/total/token_forwards"] == pytest.approx(forwards, rel=1e-5)
    values = experience.table.present(experience.table.names.index("bright"))
    assert metrics["reward/bright"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert metrics["success"] == 0 and 0 <= metrics["zero_std/text"] <= 1
    phases = [v for k, v in metrics.items() if k.startswith("seconds/")]
    assert metrics["seconds"] == pytest.approx(sum(phases), rel=1e-3) and len(phases) == 6


def test_on_step_sees_every_step(make_trainer):
    seen = []
    trainer = make_trainer(options={"on_step": lambda *args: seen.append(args)})
    history = trainer.train()
    assert [step for step, _, _ in seen] == [0, 1] and [m for _, m, _ in seen] == history
    assert len(seen[0][2].rollouts) == 6


def test_evaluations_on_the_way(make_trainer):
    history = make_trainer(eval_steps=2, max_steps=5).train()
    assert ["eval/success" in m for m in history] == [False, True, False, True, False]


@pytest.mark.slow
def test_tracker_gets_the_metrics(make_trainer, tmp_path):
    trainer = make_trainer(tracker="tensorboard")
    trainer.train()
    trainer.accelerator.end_training()
    file = min(tmp_path.rglob("events.out.tfevents.*"), key=lambda path: len(path.parts))
    events = EventAccumulator(str(file)).Reload()
    assert {"grad_norm", "seconds"} <= set(events.Tags()["scalars"])
    shown = [tag for tag in events.Tags()["images"] if tag.startswith("rollouts/pictures")]
    assert shown and all(event.width >= 16 for event in events.Images(shown[0]))
    (text,) = events.Tensors("rollouts/texts/text_summary")[0].tensor_proto.string_val
    assert b"[picture]" in text


def test_learning_rate_schedule(make_trainer):
    linear = make_trainer(learning_rate=8.0, warmup_steps=4, lr_schedule="linear", max_steps=8)
    assert [linear.update.learning_rate(s) for s in range(9)] == [2.0, 3.5, 4.5, 5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    cosine = make_trainer(learning_rate=8.0, warmup_steps=0, lr_schedule="cosine", max_steps=4)
    half = 8 * math.cos(math.pi / 8) ** 2  # the cosine's half-angle form at a quarter
    assert [cosine.update.learning_rate(s) for s in range(6)] == pytest.approx([8.0, half, 4.0, 8 - half, 0.0, 0.0])
    constant = make_trainer(learning_rate=8.0, warmup_steps=2, lr_schedule="constant", max_steps=8)
    assert [constant.update.learning_rate(s) for s in range(4)] == [4.0, 8.0, 8.0, 8.0]
    trainer = make_trainer(learning_rate=1e-3, warmup_steps=4)
    assert trainer.step(1)[0]["lr"] == 5e-4 and trainer.optimizer.param_groups[0]["lr"] == 5e-4
    assert make_trainer(learning_rate=1.5e-9).step(0)[0]["lr"] == 1.5e-9  # metrics keep small numbers


# ---------------------------------------------------------------------------------------------- what an update does


def scores(trainer, experience, iteration=0):
    """Log-probabilities [B, L] under the policy as it is now, on the view of an iteration."""
    with torch.no_grad():
        return trainer.update.values(trainer.model, experience.micro_batch(iteration))


@pytest.mark.parametrize("modality", Modality)
def test_an_update_raises_what_was_rewarded_and_lowers_what_was_not(make_trainer, modality, rewards):
    chosen = rewards[0] if modality is Modality.TEXT else rewards[1]
    trainer = make_trainer([chosen], num_prompts=1, num_generations=4, max_grad_norm=math.inf, learning_rate=3e-4)
    fresh = make_trainer([chosen], num_prompts=1, num_generations=4)
    _, experience = trainer.step(0)
    change = scores(trainer, experience) - scores(fresh, experience)
    weight = experience.weight_BL(0) * (experience.canvas.modality == modality)
    for sign in (1, -1):
        rows = weight * (sign * experience.advantage_BL > 0)
        assert rows.sum() > 0 and sign * float((change * rows).sum() / rows.sum()) > 0


def test_old_log_probs_are_those_before_the_first_update(make_trainer, exact):
    trainer = make_trainer(num_iterations=3, learning_rate=1e-2, dtype=exact)
    fresh = make_trainer(num_iterations=3, dtype=exact)
    olds = []
    compute = trainer.update.old_values
    trainer.update.old_values = lambda *args: olds.append(compute(*args)) or olds[0]
    metrics, experience = trainer.step(0)
    for iteration in range(3):
        batches = experience.micro_batches(3, "block_causal", iteration, "segments")
        for batch, old in zip(batches, olds[0][iteration], strict=True):
            assert not old.requires_grad
            whole = scores(fresh, experience, iteration)[batch.rows] * (batch.advantage_RL != 0)
            torch.testing.assert_close(old, whole, atol=2e-6, rtol=0)
    assert metrics["kl/text"] > 1e-6 and metrics["kl/image"] > 1e-6


def test_one_iteration_scores_no_old_policy(make_trainer):
    trainer = make_trainer(check_ratio_every=0, micro_batch_size=6)
    calls = []
    values = trainer.update.values
    trainer.update.values = lambda *args: calls.append(args) or values(*args)
    metrics, _ = trainer.step(0)
    assert len(calls) == 1 and metrics["kl/text"] == 0 and "ratio_first_iteration_max_dev" not in metrics


@pytest.mark.parametrize(("count", "scored"), [(2, True), (1, False)])
def test_the_old_policy_is_scored_only_for_a_ratio(make_trainer, rewards, count, scored):
    """Of wd1's texts there is none; of pictures there is, where a reward trains them."""
    trainer = make_trainer(rewards[:count], num_iterations=2, text_estimator="wd1", assignment="factorized")
    seen, compute = [], trainer.update.old_values
    trainer.update.old_values = lambda *args: seen.append(compute(*args)) or seen[0]
    metrics, _ = trainer.step(0)
    assert [old is not None for old in seen] == [scored] and (metrics["tokens/image"] > 0) is scored


def test_kl_to_the_frozen_reference(make_trainer, weights, difference):
    trainer = make_trainer(beta=0.5, learning_rate=1e-3)
    start = weights(trainer)
    first, _ = trainer.step(0)
    second, _ = trainer.step(1)
    assert first["kl/text"] == pytest.approx(0, abs=1e-9) and first["kl/image"] == pytest.approx(0, abs=1e-9)
    assert second["kl/text"] > 1e-5 and second["kl/image"] > 1e-6
    assert difference(start, trainer.reference.copy.state_dict()) == 0
    assert difference(start, weights(trainer)) > 0
    assert not any(p.requires_grad for p in trainer.reference.copy.parameters())


def test_kl_holds_the_policy_back(make_trainer, rewards):
    @reward(on="text")
    def one_number(segments, **columns):
        return [0.0 for _ in segments]

    far = make_trainer(rewards, learning_rate=1e-2)
    far.step(0)
    pulled = make_trainer([one_number], beta=1.0, learning_rate=1e-3)
    pulled.model.load_state_dict(far.model.state_dict())  # nothing but the KL term has a gradient here
    gaps = [pulled.step(0)[0]["kl/text"] for _ in range(5)]
    assert gaps[-1] < gaps[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            {"epsilon_low": 0.2, "epsilon_high": 0.2, "delta": 3.0, "beta": 0.0, "level": "token", "loss_type": "grpo"},
        ),
        (
            {"epsilon": 0.1, "epsilon_high": 0.3, "delta": None},
            {"epsilon_low": 0.1, "epsilon_high": 0.3, "delta": None},
        ),
        ({"epsilon_high": 0.0}, {"epsilon_low": 0.2, "epsilon_high": 0.0}),
        ({"loss_type": "gspo"}, {"level": "sequence", "loss_type": "grpo"}),
        ({"loss_type": "gmpo"}, {"level": "geometric", "loss_type": "grpo"}),
        ({"image_estimator": "spg"}, {"level": "token", "without_ratio": [Modality.IMAGE]}),
        ({"loss_type": "dr_grpo", "beta": 0.25}, {"level": "token", "loss_type": "dr_grpo", "beta": 0.25}),
        ({"text_weight": 0.5, "image_weight": 2.0}, {"weights": {Modality.TEXT: 0.5, Modality.IMAGE: 2.0}}),
    ],
)
def test_settings_reach_the_loss(make_trainer, monkeypatch, settings, expected):
    given = []
    loss = update_module.modality_loss
    monkeypatch.setattr(update_module, "modality_loss", lambda *a, **k: given.append(k) or loss(*a, **k))
    make_trainer(**settings).step(0)
    assert given and all(k[name] == value for k in given for name, value in expected.items())


def test_later_iterations_are_clipped(make_trainer):
    metrics, _ = make_trainer(num_iterations=3).step(0)
    assert metrics["clip_low/text"] > 0 and metrics["clip_high/text"] > 0
    free, _ = make_trainer(num_iterations=3, epsilon=100.0, delta=None).step(0)
    assert free["clip_high/text"] == free["clip_high/image"] == 0


def test_gradients_are_clipped(make_trainer, weights, difference):
    before = weights(make_trainer())
    moved = {}
    for limit in (1e-12, 1.0):
        trainer = make_trainer(max_grad_norm=limit)
        metrics, _ = trainer.step(0)
        moved[limit] = difference(before, weights(trainer))
        assert metrics["grad_norm"] > 0.1  # as it was before clipping
    assert moved[1e-12] < 0.1 * moved[1.0]


@pytest.fixture
def accelerate_with():
    """accelerate_with(**options) -> an accelerator with other options than the others of this process."""

    def make(**options):
        for state in (GradientState, AcceleratorState):
            state._reset_state()
        return Accelerator(**options)

    yield make
    for state in (GradientState, AcceleratorState):
        state._reset_state()


def test_accumulation_that_accelerate_was_told_of_changes_nothing(make_trainer, accelerate_with):
    expected, _ = make_trainer().step(0)
    accelerator = accelerate_with(gradient_accumulation_steps=4)
    metrics, _ = make_trainer(options={"accelerator": accelerator}).step(0)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5)


def test_mixed_precision_is_the_same_for_policy_old_policy_and_reference(make_trainer, accelerate_with):
    accelerator = accelerate_with(mixed_precision="bf16")
    settings = {"beta": 0.1, "num_iterations": 2, "learning_rate": 1e-12, "check_ratio_every": 0}
    metrics, _ = make_trainer(**settings, options={"accelerator": accelerator}).step(0)
    assert metrics["ratio_first_iteration_max_dev"] == 0
    assert metrics["kl/text"] == pytest.approx(0, abs=1e-9) and metrics["kl/image"] == pytest.approx(0, abs=1e-9)


# ---------------------------------------------------------------------------------------------- nothing to learn from


@reward(on="text")
def same_text(segments, **columns):
    return [0.5 for _ in segments]


@reward(on="image")
def same_image(segments, **columns):
    return [0.5 for _ in segments]


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_groups_without_variance_train_nothing(make_trainer, assignment, weights, difference):
    trainer = make_trainer([same_text, same_image], assignment=assignment, scale_rewards="batch")
    before = weights(trainer)
    metrics, _ = trainer.step(0)
    assert metrics["zero_std/text"] == 1 and metrics["grad_norm"] == 0
    assert difference(before, weights(trainer)) == 0


def first_prompt_only(function):
    """A reward that says the same of every rollout of all prompts but one."""

    def judged(segments, **columns):
        first = segments[0].task.index
        return [v if s.task.index == first else 0.5 for s, v in zip(segments, function(segments))]

    return judged


@pytest.mark.parametrize(("num_iterations", "loss_type"), [(1, "grpo"), (2, "dapo")])
def test_rollouts_without_advantage_are_not_run_and_change_nothing(
    make_trainer, num_iterations, loss_type, weights, difference, rewards, exact
):
    rewards = [
        reward(first_prompt_only(rewards[0]), on="text", name="a"),
        reward(first_prompt_only(rewards[1]), on="image", name="b"),
    ]
    outcome = {}
    for everything in (False, True):
        settings = {"num_iterations": num_iterations, "loss_type": loss_type, "check_ratio_every": 0}
        trainer = make_trainer(rewards, dtype=exact, **settings)
        update = trainer.update
        if everything:  # as if all rollouts had to be run
            update.batches = lambda experience, i: experience.micro_batches(3, "block_causal", i)
        rows, values = [], update.values
        update.values = lambda model, batch, f=values, seen=rows: seen.append(len(batch.rows)) or f(model, batch)
        trainer.step(0)
        outcome[everything] = weights(trainer), sum(rows)
    assert difference(outcome[True][0], outcome[False][0]) < 1e-10
    assert outcome[False][1] == outcome[True][1] / 2


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_segments_without_advantage_are_not_run_and_change_nothing(
    make_trainer, loss_type, weights, difference, rewards, exact
):
    """Rounds whose texts are all judged alike. A ratio of the whole sequence needs all of its tokens."""
    first = reward(lambda s: [v if t.round == 0 else 0.5 for t, v in zip(s, rewards[0](s))], on="text", name="a")
    outcome = {}
    for leave_out in ("rows", "segments"):
        settings = {"num_iterations": 2, "loss_type": loss_type, "check_ratio_every": 0, "assignment": "segment"}
        trainer = make_trainer([first, rewards[1]], dtype=exact, **settings)
        update, tokens = trainer.update, []
        if leave_out == "rows":
            update.batches = lambda experience, i: experience.micro_batches(3, "block_causal", i, "rows")
        values = update.values
        update.values = lambda model, batch, f=values, seen=tokens: (
            seen.append(sum(int(view.scored.sum()) for view in batch.draw.views)) or f(model, batch)
        )
        trainer.step(0)
        outcome[leave_out] = weights(trainer), sum(tokens)
    assert difference(outcome["rows"][0], outcome["segments"][0]) < 1e-10
    assert (outcome["segments"][1] < outcome["rows"][1]) is (loss_type == "dapo")


def test_rollouts_without_advantage_are_run_for_their_kl(make_trainer, rewards):
    halves = [reward(first_prompt_only(rewards[0]), on="text", name="a")]
    metrics, experience = make_trainer(halves, beta=0.1).step(0)
    assert (experience.advantage_BL[3:] == 0).all() and (experience.advantage_BL[:3] != 0).any()
    weight = experience.weight_BL(0) * (experience.canvas.modality == Modality.TEXT)
    assert metrics["tokens/text"] == weight.sum() and weight[3:].sum() > 0
    alone, _ = make_trainer(halves).step(0)
    assert alone["tokens/text"] == (weight * (experience.advantage_BL != 0)).sum()


# ---------------------------------------------------------------------------------------------- what users give


def test_a_custom_reward_in_ten_lines(make_trainer):
    @reward(on="image", weight=2.0)
    def redder_than_before(segments, board, **columns):
        """A picture of the right size that has more red than the one before it."""
        return [
            float(np.asarray(s.image)[..., 0].mean() > np.asarray(s.image_before)[..., 0].mean())
            if s.image.size == (16 * b.size, 16 * b.size)
            else None
            for s, b in zip(segments, board)
        ]

    def length(prompts, completions, **columns):  # as TRL has them
        return [-float(len(c)) for c in completions]

    metrics, experience = make_trainer([redder_than_before, length]).step(0)
    assert 0 <= metrics["reward/redder_than_before"] <= 1 and metrics["reward/length"] <= 0
    assert metrics["lost/redder_than_before"] == metrics["lost/length"] == 0
    assert experience.table.credit == (("image",), ("text",))


def test_a_router_of_ones_own(make_trainer):
    router = RewardRouter(assignment=lambda values, segments: torch.full(values.shape[:2], 0.25))
    _, experience = make_trainer(options={"router": router}).step(0)
    assert set(experience.advantage_BL[experience.canvas.sampled].tolist()) == {0.25}


def test_settings_that_do_not_fit(make_trainer, task, rewards):
    with pytest.raises(ValueError, match="num_prompts is 2; it must be a multiple of the 3 processes"):
        make_trainer(options={"accelerator": SimpleNamespace(num_processes=3)})
    with pytest.raises(ValueError, match="rewards is empty"):
        make_trainer([])
    with pytest.raises(ValueError, match="two rewards are named 'bright'"):
        make_trainer([rewards[1], rewards[1]])
    with pytest.raises(ValueError, match="no_such"):
        make_trainer(["no_such.module:function"])
    with pytest.raises(TypeError, match="mark the function"):
        make_trainer([lambda segments: []])


def test_a_prompt_that_is_too_long(make_trainer, model):
    trainer = make_trainer(max_rounds=50)
    with pytest.raises(ValueError, match=r"50 images of .* need \d+ positions, the model has 1024"):
        trainer.step(0)


def test_the_reference_is_no_part_of_the_policy(make_trainer, model):
    assert make_trainer(beta=0.0).reference is None
    trainer = make_trainer(beta=0.1, policy=copy.deepcopy(model))
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}
    assert not trained & {id(p) for p in trainer.reference.copy.parameters()}
    assert not any(m.training for m in itertools.chain(trainer.model.modules(), trainer.reference.copy.modules()))


def test_a_tracker_that_would_not_be_written_to(make_trainer, monkeypatch):
    with pytest.raises(ValueError, match=r"tracker is 'tensorboard', but the accelerator was made without it"):
        make_trainer(tracker="tensorboard", options={"accelerator": Accelerator()})
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ImportError, match=r'tracker wandb is not installed: pip install "unidiff\[tracking\]"'):
        make_trainer(tracker="wandb")
