"""Token losses and their aggregation against the golden numbers, closed forms and every cut of a batch."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tables import each
from unidiff.grpo.losses import Denominators, LossStats, aggregate, k3, modality_loss, token_losses
from unidiff.sequence import Modality

DATA = Path(__file__).parent.parent / "data"
CASES = json.loads((DATA / "losses.json").read_text())["cases"]
GOLDEN = load_file(DATA / "losses.safetensors")
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")


@each("case", CASES)
def test_golden_loss_and_gradient(case):
    logp_new = GOLDEN["logps_new"].clone().requires_grad_()
    mask = GOLDEN["mask"]
    loss_BL, stats = token_losses(
        logp_new,
        GOLDEN["logps_old"],
        GOLDEN[case["advantages"]],
        mask,
        epsilon_low=case["epsilon_low"],
        epsilon_high=case["epsilon_high"],
        beta=case["beta"],
        logp_ref_BL=GOLDEN["logps_ref"] if case["beta"] else None,
        level=case["importance_sampling_level"],
    )
    step = Denominators.of(mask, case["max_completion_length"])
    if case["loss_type"] == "dapo":  # its count of tokens is global; DDP's mean over processes is undone
        step = Denominators(step.rows, step.scored_rows, case["num_items_in_batch"], step.max_length)
        factor = case["num_processes"]
    else:
        factor = 1 / case["gradient_accumulation_steps"]
    loss = aggregate(loss_BL, mask, case["loss_type"], step) * factor
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    torch.testing.assert_close(logp_new.grad, GOLDEN[f"grad_{case['index']}"], atol=1e-5, rtol=0)
    means = stats.means()
    if "kl" in case["metrics"]:
        assert means["kl_ref"] == pytest.approx(case["metrics"]["kl"], abs=1e-5)
    for name, value in clip_shares(case, stats).items():
        assert value == pytest.approx(case["metrics"][f"clip_ratio/{name}"], abs=1e-6), name


def clip_shares(case, stats):
    """The reference's figures: shares of tokens, or of rows where a row has one ratio and one advantage; and extremes
    of the rows, each of which is a call of ours."""
    rows = []
    for b in range(len(GOLDEN["mask"])):
        row = slice(b, b + 1)
        _, one = token_losses(
            GOLDEN["logps_new"][row], GOLDEN["logps_old"][row], GOLDEN[case["advantages"]][row], GOLDEN["mask"][row],
            epsilon_low=case["epsilon_low"], epsilon_high=case["epsilon_high"], level=case["importance_sampling_level"],
        )  # fmt: skip
        rows.append(one.means())
    low, high = (stats.means()[f"clip_{side}"] for side in ("low", "high"))
    if case["importance_sampling_level"] == "sequence" and case["advantages"] == "adv_seq":
        low, high = (sum(row[f"clip_{side}"] for row in rows) / len(rows) for side in ("low", "high"))
    extremes = {"low_min": min(row["clip_low"] for row in rows), "high_max": max(row["clip_high"] for row in rows)}
    return {"low_mean": low, "high_mean": high, "region_mean": low + high, **extremes}


def batch(rows=6, length=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(rows, length, generator=generator) * 0.4 - 1
    old = new + torch.randn(rows, length, generator=generator) * 0.3
    ref = new + torch.randn(rows, length, generator=generator) * 0.3
    advantage = torch.randn(rows, length, generator=generator)
    weight = (torch.rand(rows, length, generator=generator) < 0.7).float()
    weight[2] = 0
    modality = torch.randint(-1, 2, (rows, length), generator=generator)
    return new, old, ref, advantage, weight, modality


def step_gradient(loss_type, level, slices):
    """Loss, gradient and statistics of one optimizer step whose rows are cut by `slices`."""
    new, old, ref, advantage, weight, modality = batch()
    new.requires_grad_()
    lambdas = {Modality.TEXT: 1.0, Modality.IMAGE: 0.5}
    total = {}
    for m in lambdas:
        counts = [Denominators.of(weight[s] * (modality[s] == m), 12) for s in slices]
        total[m] = sum(counts[1:], counts[0])
        reduced = torch.stack([count.tensor() for count in counts]).sum(0)
        assert Denominators.from_tensor(reduced, 12) == total[m]
    value, stats = 0.0, {}
    for s in slices:
        loss, part = modality_loss(
            new[s], old[s], advantage[s], weight[s], modality[s],
            loss_type=loss_type, denominators=total, weights=lambdas,
            delta=3.0, beta=0.1, logp_ref_BL=ref[s], level=level,
        )  # fmt: skip
        loss.backward()
        value += loss.item()
        stats = {m: stats[m] + part[m] if stats else part[m] for m in part}
    return value, new.grad, {m: s.means() for m, s in stats.items()}


@each(("loss_type", "level"), itertools.product(LOSS_TYPES, ["token", "sequence", "geometric"]))
def test_same_step_however_the_batch_is_cut(loss_type, level):
    whole = step_gradient(loss_type, level, [slice(0, 6)])
    for cut in (
        [slice(0, 3), slice(3, 6)],
        [slice(0, 1), slice(1, 5), slice(5, 6)],
        [slice(i, i + 1) for i in range(6)],
    ):
        value, gradient, stats = step_gradient(loss_type, level, cut)
        assert value == pytest.approx(whole[0], abs=1e-6)
        torch.testing.assert_close(gradient, whole[1], atol=1e-7, rtol=1e-5)
        for m in stats:
            assert stats[m] == pytest.approx(whole[2][m], abs=1e-9)


def test_definitions_by_hand():
    loss = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    weight = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    step = Denominators.of(weight, 5)
    assert step == Denominators(rows=3, scored_rows=2, weight=3, max_length=5)
    expected = {"grpo": (1.5 + 4) / 2, "bnpo": 7 / 3, "dapo": 7 / 3, "dr_grpo": 7 / 15}
    for loss_type, value in expected.items():
        assert aggregate(loss, weight, loss_type, step).item() == pytest.approx(value)


def test_clip_and_dual_clip():
    logp_old = torch.zeros(1, 4)
    logp_new = torch.tensor([[1.5, 0.5, 5.0, -5.0]]).requires_grad_()
    ratio = logp_new.detach().exp()
    advantage = torch.tensor([[-2.0, -2.0, 1.0, -1.0]])
    loss, stats = token_losses(logp_new, logp_old, advantage, torch.ones(1, 4), delta=3.0, epsilon_high=0.3)
    torch.testing.assert_close(loss, torch.tensor([[6.0, 2 * ratio[0, 1].item(), -1.3, 0.8]]))
    loss.sum().backward()
    torch.testing.assert_close(logp_new.grad, torch.tensor([[0.0, 2 * ratio[0, 1].item(), 0.0, 0.0]]))
    means = stats.means()
    assert means["clip_low"] == 0.25 and means["clip_high"] == 0.25 and means["tokens"] == 4
    assert means["ratio_max_dev"] == pytest.approx(ratio[0, 2].item() - 1)
    assert means["ratio"] == pytest.approx(ratio.mean().item())


def test_gmpo_is_the_geometric_mean_of_clipped_ratios():
    """Clipped one by one before the mean, and only on the side that the advantage asks for."""
    change = torch.tensor([[0.1, 0.5, -0.6, 7.0], [0.1, 0.5, -0.6, 7.0], [0.2, 0.0, 0.0, 0.0]]).requires_grad_()
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    advantage = torch.tensor([2.0, -1.0, 1.0])
    options = {"epsilon_low": 0.3, "epsilon_high": 0.4, "level": "geometric"}
    loss, stats = token_losses(change, torch.zeros(3, 4), advantage, weight, **options)
    high, low = math.log(1.4), math.log(0.7)
    up, down = math.exp((0.1 + high - 0.6) / 3), math.exp((0.1 + 0.5 + low) / 3)
    expected = torch.tensor([[-2 * up] * 3 + [0.0], [down] * 3 + [0.0], [-math.exp(0.2), 0.0, 0.0, 0.0]])
    torch.testing.assert_close(loss, expected)
    aggregate(loss, weight, "grpo", Denominators.of(weight, 4)).backward()
    # d/dΔ_j of −A exp(mean) is −A exp(mean) / n, and 0 where Δ_j was clipped
    gradient = torch.tensor([[-2 * up / 3, 0.0, -2 * up / 3], [down / 3, down / 3, 0.0], [-math.exp(0.2), 0.0, 0.0]])
    torch.testing.assert_close(change.grad[:, :3], gradient / 3)
    means = stats.means()
    assert means["clip_high"] == pytest.approx(1 / 7) and means["clip_low"] == pytest.approx(1 / 7)


def test_gmpo_within_the_clip_range_is_gspo():
    new, old, _, advantage, weight, _ = batch()
    near, row = old + 0.1 * (new - old), advantage[:, 0]
    losses = [token_losses(near, old, row, weight, level=level)[0] for level in ("geometric", "sequence")]
    torch.testing.assert_close(*losses)


def test_without_a_ratio_the_loss_is_the_weighted_log_probability():
    new, old, ref, advantage, weight, modality = batch()
    new.requires_grad_()
    loss, stats = token_losses(new, old, advantage, weight, ratio=False, level="sequence", delta=1.3)
    held, free = (s.means() for s in (token_losses(new, old, advantage, weight)[1], stats))
    assert held["clip_low"] + held["clip_high"] > 0 == free["clip_low"] + free["clip_high"]
    torch.testing.assert_close(loss, torch.where(weight > 0, -advantage * new, 0.0))
    (loss * weight).sum().backward()
    torch.testing.assert_close(new.grad, -advantage * weight)
    held, _ = token_losses(new, old, advantage, weight, ratio=False, beta=0.1, logp_ref_BL=ref)
    torch.testing.assert_close(held - loss, torch.where(weight > 0, 0.1 * k3(new, ref, weight > 0), 0.0))
    counts = {m: Denominators.of(weight * (modality == m), 11) for m in Modality}
    options = {"loss_type": "dapo", "denominators": counts, "weights": dict.fromkeys(Modality, 1.0)}
    whole, _ = modality_loss(new, old, advantage, weight, modality, without_ratio=[Modality.IMAGE], **options)
    parts = [
        modality_loss(new, old, advantage, weight * (modality == m), modality, without_ratio=without, **options)[0]
        for m, without in ((Modality.TEXT, ()), (Modality.IMAGE, tuple(Modality)))
    ]
    torch.testing.assert_close(whole, parts[0] + parts[1])


def test_unchanged_policy_has_ratio_one_and_the_policy_gradient():
    new, _, _, advantage, weight, _ = batch()
    new.requires_grad_()
    loss, stats = token_losses(new, new.detach(), advantage, weight)
    (loss * weight).sum().backward()
    torch.testing.assert_close(new.grad, -advantage * weight)
    assert stats.means()["ratio_max_dev"] == 0 and stats.means()["kl_old"] == 0


@each(("level", "junk"), itertools.product(["token", "sequence", "segment"], [float("nan"), float("-inf"), 1e30]))
def test_unscored_tokens_have_no_influence(level, junk):
    results = []
    for filler in (0.0, junk):
        new, old, ref, advantage, weight, _ = batch()
        hidden = weight == 0
        new, old, ref, advantage = (x.masked_fill(hidden, filler) for x in (new, old, ref, advantage))
        leaf = new.requires_grad_()
        segment = torch.arange(11).expand(6, 11) // 4
        loss, stats = token_losses(
            leaf, old, advantage, weight, beta=0.1, logp_ref_BL=ref, level=level, segment_BL=segment
        )
        assert (loss[hidden] == 0).all()
        aggregate(loss, weight, "grpo", Denominators.of(weight, 11)).backward()
        results.append((loss, leaf.grad, stats.means()))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]
    assert (results[1][1][hidden] == 0).all()


def test_runaway_ratio_stays_finite():
    new = torch.tensor([[300.0, 300.0, 300.0]]).requires_grad_()
    advantage = torch.tensor([[0.0, 1.0, -1.0]])
    loss, stats = token_losses(
        new, torch.zeros(1, 3), advantage, torch.ones(1, 3), beta=0.1, logp_ref_BL=torch.zeros(1, 3)
    )
    loss.sum().backward()
    assert loss.isfinite().all() and new.grad.isfinite().all()
    assert all(value < float("inf") for value in stats.means().values())


def test_segment_level_shares_a_ratio_inside_a_segment():
    change = torch.tensor([[0.1, 0.3, -0.2, 9.0, 0.4]])
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]])
    segment = torch.tensor([[0, 0, 1, -1, 1]])
    loss, _ = token_losses(
        change, torch.zeros(1, 5), torch.ones(1), weight,
        level="segment", segment_BL=segment, epsilon_low=0.9, epsilon_high=9.0,
    )  # fmt: skip
    expected = torch.tensor([[0.2, 0.2, 0.1, 0.0, 0.1]]).exp() * -weight
    torch.testing.assert_close(loss, expected)


def test_modalities_are_averaged_on_their_own():
    length, images = 100, 96
    modality = (torch.arange(length) < images).long()[None]
    logp = torch.zeros(1, length)
    advantage = torch.where(modality == Modality.IMAGE, 1.0, -2.0)
    weight = torch.ones(1, length)
    counts = {m: Denominators.of(weight * (modality == m), length) for m in Modality}
    loss, stats = modality_loss(
        logp, logp, advantage, weight, modality, loss_type="dapo", denominators=counts,
        weights={Modality.TEXT: 1.0, Modality.IMAGE: 0.5},
    )  # fmt: skip
    assert loss.item() == pytest.approx(1.0 * 2.0 - 0.5 * 1.0)
    assert stats[Modality.IMAGE].means()["tokens"] == images


def test_nothing_scored_gives_zero_and_a_gradient_of_zero():
    new = torch.randn(2, 3).requires_grad_()
    weight = torch.zeros(2, 3)
    loss, stats = token_losses(new, new.detach(), torch.ones(2), weight)
    for loss_type in LOSS_TYPES:
        value = aggregate(loss, weight, loss_type, Denominators.of(weight, 3))
        assert value.item() == 0
        value.backward(retain_graph=True)
    assert (new.grad == 0).all()
    assert stats.means() == dict.fromkeys(LossStats.NAMES, 0.0) | {"ratio_max_dev": 0.0, "tokens": 0.0}


def test_bad_options_are_named():
    x, weight = torch.zeros(1, 2), torch.ones(1, 2)
    with pytest.raises(ValueError, match=r"delta=1\.1 must be above"):
        token_losses(x, x, torch.ones(1), weight, delta=1.1)
    with pytest.raises(ValueError, match=r"beta=0\.1 needs logp_ref_BL"):
        token_losses(x, x, torch.ones(1), weight, beta=0.1)
    with pytest.raises(ValueError, match="level='words'"):
        token_losses(x, x, torch.ones(1), weight, level="words")
    with pytest.raises(ValueError, match="needs segment_BL"):
        token_losses(x, x, torch.ones(1), weight, level="segment")
    with pytest.raises(ValueError, match="loss_type='gspo'"):
        aggregate(x, weight, "gspo", Denominators.of(weight, 2))
    with pytest.raises(ValueError, match="max_length differs"):
        Denominators.of(weight, 2) + Denominators.of(weight, 3)


@each(("gap", "cut"), [(-80.0, False), (-30.0, False), (-21.0, False), (-1.0, False), (5.0, False), (30.0, True)])
def test_k3_is_cut_only_where_it_would_overflow(gap, cut):
    """e^d − d − 1, gradient 1 − e^d: what the reference hardly knows is held back, however far it is."""
    logp = torch.tensor([[-0.5]], requires_grad=True)
    value = k3(logp, logp.detach() + gap, torch.ones(1, 1, dtype=torch.bool))
    value.backward()
    assert value.item() == pytest.approx(math.exp(20.0) - 21 if cut else math.exp(gap) - gap - 1, rel=1e-5)
    assert logp.grad.item() == pytest.approx(0.0 if cut else 1 - math.exp(gap), rel=1e-5)
