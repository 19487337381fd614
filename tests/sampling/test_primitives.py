"""Schedules, drawing, commit rules: closed forms, references by loops, golden numbers. All keys are fixed."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.tables import each
from unidiff import noise
from unidiff.sampling import image, text
from unidiff.sampling.draw import draw
from unidiff.sampling.schedules import ANNEALING, SCHEDULES, cosine, linear

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "sampler_probs.json").read_text())
END = torch.tensor([3, 4])


def keys(n: int, seed: int = 0) -> Tensor:
    return torch.tensor([noise.key(seed, i) for i in range(n)])


def p_value(count: Tensor, probability: Tensor) -> float:
    """Of Pearson's chi-square test of counts against probabilities; cells expected to hold < 5 are pooled."""
    expected = probability.double() * count.sum()
    assert not count[expected == 0].any()
    small = expected < 5
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    observed = torch.cat([count[~small], count[small].sum()[None]])
    used = expected > 0
    statistic = ((observed - expected)[used] ** 2 / expected[used]).sum()
    freedom = torch.tensor((int(used.sum()) - 1) / 2).double()
    return torch.special.gammaincc(freedom, statistic / 2).item()


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_schedules_fall_from_one_to_zero(name: str) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    kappa = SCHEDULES[name](u)
    assert kappa[0] == 1 and abs(kappa[-1]) < 1e-15 and (kappa.diff() < 0).all()


def test_schedules_take_floats_and_tensors() -> None:
    for schedule in (linear, cosine):
        assert isinstance(schedule(0.3), float)
        assert schedule(torch.tensor(0.3, dtype=torch.float64)).item() == pytest.approx(schedule(0.3), abs=1e-15)
    assert linear(0.25) == 0.75 and cosine(2 / 3) == pytest.approx(0.5)


# ---------------------------------------------------------------- draw


def test_draws_follow_the_probabilities() -> None:
    probability = torch.tensor([0.0, 0.4, 0.0, 0.001, 0.25, 0.0, 0.299, 0.05, 0.0])
    n = 20000
    uniform = noise.uniform(keys(1), (1,), n)[0]
    index, log_prob = draw(probability.log().expand(n, -1), uniform)
    assert index.dtype == torch.int64 and log_prob.dtype == torch.float32
    assert torch.equal(log_prob, probability.log()[index])
    assert p_value(index.bincount(minlength=9), probability) > 1e-3


def test_no_uniform_number_draws_an_impossible_index() -> None:
    probability = torch.tensor([0.0, 0.5, 0.0, 0.0, 0.5, 0.0])
    levels = [5e-324, 2.0**-54, 0.5, math.nextafter(0.5, 0), 1 - 2.0**-53, 1.0, 0.0]
    edges = torch.tensor(levels, dtype=torch.float64)
    index, log_prob = draw(probability.log().expand(len(edges), -1), edges)
    assert probability[index].all() and log_prob.isfinite().all()
    assert index[:2].tolist() == [1, 1] and index[-3] == 4


def test_draw_keeps_leading_shape_and_needs_no_normalisation() -> None:
    logits = torch.randn(2, 3, 4, 11, generator=torch.Generator().manual_seed(0))
    uniform = noise.uniform(keys(2), (0,), 12).reshape(2, 3, 4)
    index, value = draw(logits, uniform)
    assert index.shape == value.shape == (2, 3, 4)
    assert torch.equal(index, draw(logits.log_softmax(-1), uniform)[0])
    assert torch.equal(index[1, 2], draw(logits[1, 2], uniform[1, 2])[0])
    cdf = logits.double().softmax(-1).cumsum(-1)
    assert (cdf.gather(-1, index[..., None])[..., 0] >= uniform - 1e-6).all()


def test_greedy_takes_the_mode_whatever_the_noise() -> None:
    log_probs = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    for level in (0.01, 0.99):
        index, value = draw(log_probs, torch.full((5,), level, dtype=torch.float64), greedy=True)
        assert torch.equal(index, log_probs.argmax(-1)) and torch.equal(value, log_probs.amax(-1))


def test_draw_reaches_the_tail_of_a_large_vocabulary() -> None:
    words, each = 126_000, math.exp(-30)
    log_probs = torch.full((2, words), -30.0)
    log_probs[:, 0] = 0.0
    level = 1 - torch.tensor([0.5, 2.0]).double() * words * each  # in the middle of the tail, and outside it
    assert level[0] > 1 - 2.0**-24  # above the largest float32 below 1
    index, _ = draw(log_probs, level)
    assert index[0].item() == pytest.approx(words / 2, rel=1e-2) and index[1] == 0


# ---------------------------------------------------------------- text: where a block may commit


def test_eligible_stops_at_the_first_end_token() -> None:
    ids = torch.tensor([[7, 3, 8, 4], [7, 7, 7, 7], [3, 7, 7, 7], [7, 4, 7, 3]])
    masked = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 1, 1, 1], [1, 0, 1, 1]]).bool()
    expected = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(text.eligible(ids, masked, END), expected)


def test_finished_reads_committed_end_tokens_only() -> None:
    ids = torch.tensor([[7, 3, 7], [7, 3, 7], [3, 3, 7], [7, 7, 7], [7, 7, 4], [3, 7, 7]])
    masked = torch.tensor([[0, 0, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 1], [1, 0, 0]]).bool()
    assert text.finished(ids, masked, END).tolist() == [True, False, True, True, False, False]


def test_eligible_and_finished_agree_with_loops_over_all_small_blocks() -> None:
    blocks = list(itertools.product(itertools.product([3, 7], repeat=4), itertools.product([0, 1], repeat=4)))
    ids, masked = torch.tensor([b[0] for b in blocks]), torch.tensor([b[1] for b in blocks]).bool()
    eligible, finished = text.eligible(ids, masked, END), text.finished(ids, masked, END)
    for row, (block, hole) in enumerate(blocks):
        first = next((j for j, token in enumerate(block) if token == 3), 4)
        assert eligible[row].tolist() == [bool(hole[j]) and j <= first for j in range(4)]
        committed = next((j for j in range(4) if block[j] == 3 and not hole[j]), 4)
        assert finished[row].item() == (not any(hole[:committed]))


def test_confidence_kinds() -> None:
    p = torch.tensor([[[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25]]])
    drawn, uniform = torch.tensor([[1, 3]]), torch.tensor([[0.1, 0.9]], dtype=torch.float64)
    want = {
        "confidence": [0.3, 0.25],
        "margin": [0.2, 0.0],
        "entropy": [sum(x * math.log(x) for x in (0.5, 0.3, 0.2)), -math.log(4)],
        "random": [0.1, 0.9],
    }
    for kind, expected in want.items():
        value = text.confidence(kind, p.log(), drawn, uniform)
        assert value.dtype == torch.float32 and value[0].tolist() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="'sure' is not known; known: confidence"):
        text.confidence("sure", p.log(), drawn, uniform)


# ---------------------------------------------------------------- text: how much and what to commit


@each("steps", [1, 2, 3, 5, 8])
def test_commit_count_spreads_tokens_as_published(steps: int) -> None:
    sizes = torch.arange(20)
    masked = torch.arange(20) < sizes[:, None]
    for step in range(steps):
        count = text.commit_count(masked, step, steps)
        assert torch.equal(count, sizes // steps + (step < sizes % steps))
        masked = torch.arange(20) < (masked.sum(1) - count)[:, None]
    assert not masked.any()
    assert torch.equal(text.commit_count(torch.ones(1, 4).bool(), steps, steps), torch.tensor([4]))


def test_commit_top_prefers_high_then_left() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0, 9.0], [5.0, 5.0, 5.0, 5.0], [-torch.inf, 2.0, -torch.inf, -torch.inf]])
    eligible = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [0, 1, 1, 1]]).bool()
    commit = text.commit_top(score, eligible, torch.tensor([1, 2, 2]))
    assert commit.int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]
    assert torch.equal(text.commit_top(score, eligible, torch.tensor([9, 3, 4])), eligible)
    assert not text.commit_top(score, eligible, torch.tensor([0, 0, -1])).any()


def test_commit_threshold_takes_at_least_the_best() -> None:
    p = torch.tensor([[0.9, 0.95, 0.5, 0.99], [0.1, 0.3, 0.3, 0.99], [0.99, 0.99, 0.99, 0.99]])
    eligible = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    commit = text.commit_threshold(p, eligible, 0.9)
    assert commit.int().tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]]


@each("factor", [0.1, 0.5, 1.0, 2.0])
def test_commit_factor_agrees_with_a_loop(factor: float) -> None:
    p = noise.uniform(keys(200), (3,), 6).float() ** 0.3
    eligible = noise.uniform(keys(200), (4,), 6) < 0.7
    commit = text.commit_factor(p, eligible, factor)
    for row in range(200):
        best = sorted((x for x, e in zip(p[row].tolist(), eligible[row].tolist()) if e), reverse=True)
        n = max((n for n in range(1, len(best) + 1) if best[n - 1] >= 1 - factor / (n + 1)), default=1)
        assert sorted(p[row][commit[row]].tolist(), reverse=True) == best[:n]
        assert not (commit[row] & ~eligible[row]).any()


@each("bound", [0.0, 0.1, 0.7, 3.0])
def test_commit_entropy_agrees_with_a_loop(bound: float) -> None:
    entropy = noise.uniform(keys(200), (5,), 6).float() ** 2
    eligible = noise.uniform(keys(200), (6,), 6) < 0.7
    commit = text.commit_entropy(entropy, eligible, bound)
    for row in range(200):
        least = sorted(x for x, e in zip(entropy[row].tolist(), eligible[row].tolist()) if e)
        n = max((n for n in range(1, len(least) + 1) if sum(least[: n - 1]) <= bound), default=0)
        assert sorted(entropy[row][commit[row]].tolist()) == least[:n]
        assert not (commit[row] & ~eligible[row]).any()


@each("size", [1, 2, 3, 6, 8, 32, 33])
def test_dilated_steps_halve_the_distance(size: int) -> None:
    steps = text.dilated_steps(size)
    assert steps == max(math.ceil(math.log2(size)), 1)
    left = torch.ones(1, size).bool()
    for step in range(steps):
        commit = text.commit_dilated(left, step)
        place = commit[0].nonzero()[:, 0]
        stride = 2 ** (steps - 1 - step)
        assert (place % stride == 0).all() and (place.diff() >= (stride if step == 0 else 2 * stride)).all()
        left = left & ~commit
    assert not left.any()
    assert torch.equal(text.commit_dilated(torch.ones(1, size).bool(), steps + 3), torch.ones(1, size).bool())


def test_spaced_tokens_agree_with_a_loop() -> None:
    score = noise.uniform(keys(200), (7,), 9).float()
    commit = noise.uniform(keys(200), (8,), 9) < 0.7
    gap = torch.arange(200) % 4 + 2
    found = text.spaced(commit, score, gap)
    for row in range(200):
        kept: list[int] = []
        for i in score[row].argsort(descending=True).tolist():
            if commit[row, i] and all(abs(i - j) >= gap[row] for j in kept):
                kept.append(i)
        assert found[row].nonzero()[:, 0].tolist() == sorted(kept)


# ---------------------------------------------------------------- image: steps of an edit


def test_edit_steps_scale_with_the_mask() -> None:
    for total, steps in itertools.product((1, 16, 64), (1, 7, 12)):
        edited = torch.arange(total + 1)
        expected = [max(1, math.ceil(steps * m / total)) for m in range(total + 1)]
        assert image.edit_steps(edited, total, steps).tolist() == expected
        assert image.edit_steps(edited, total, steps)[-1] == steps


# ---------------------------------------------------------------- image: MaskGIT


def maskgit_counts(totals: list[int], steps: list[int], name: str, width: int) -> Tensor:
    """[steps, B] how many tokens are masked after each step."""
    steps_B, total_B = torch.tensor(steps), torch.tensor(totals)
    masked = torch.arange(width) < total_B[:, None]
    log_prob = noise.uniform(keys(len(totals)), (5,), width).log().float()
    counts = []
    for step in range(max(steps)):
        gumbel = noise.gumbel(keys(len(totals)), (6, step), width)
        commit = image.maskgit_commit(masked, log_prob, step, steps_B, total_B, SCHEDULES[name], 1.0, gumbel)
        assert not (commit & ~masked).any()
        masked = masked & ~commit
        counts.append(masked.sum(1))
    return torch.stack(counts)


def test_maskgit_counts_match_the_reference() -> None:
    for case in GOLDEN["maskgit"]:
        after = maskgit_counts([case["N"]], [case["T"]], case["schedule"], case["N"])[:, 0].tolist()
        expected = [*case["keep_masked_mmada"][:-1], 0]  # the last step commits all
        for i, (mine, theirs) in enumerate(zip(after, expected)):
            assert abs(mine - theirs) <= (i in case["boundary_steps"]), (case["schedule"], case["N"], case["T"], i)
        s = [1 - (i + 1) / case["T"] for i in range(case["T"])]
        assert s == pytest.approx(case["temperature_linear"])


def test_maskgit_rows_go_their_own_pace() -> None:
    totals, steps = [16, 5, 1, 0, 16, 3], [8, 3, 2, 1, 1, 12]
    for name in SCHEDULES:
        together = maskgit_counts(totals, steps, name, 16)
        for b, (total, n) in enumerate(zip(totals, steps)):
            alone = maskgit_counts([total], [n], name, 16)[:, 0]
            assert torch.equal(together[:n, b], alone) and not together[n - 1 :, b].any()
            course = [total, *alone.tolist()]
            assert all(later < earlier or earlier == 0 for earlier, later in itertools.pairwise(course))


def test_the_last_step_is_the_first_to_leave_nothing() -> None:
    def steep(u: Tensor) -> Tensor:
        return (1 - u) ** 4  # 4·κ(1/3) < 1: the plan would be finished in the first of three steps

    def late(u: Tensor) -> Tensor:
        return 1 - u / 2  # κ(1) is not 0

    masked, log_prob, three = torch.ones(1, 4).bool(), torch.zeros(1, 4), torch.tensor([3])
    commit = image.maskgit_commit(masked, log_prob, 0, three, torch.tensor([4]), steep, 0.0, log_prob)
    assert commit.int().tolist() == [[1, 1, 1, 0]]
    for step in (2, 3, 7):
        high = torch.full((1, 4), 0.999, dtype=torch.float64)
        assert image.emerge_commit(masked, step, three, late, high).all()
        assert image.maskgit_commit(masked, log_prob, step, three, torch.tensor([4]), late, 0.0, log_prob).all()


def test_maskgit_commits_the_likeliest_with_noise_that_fades() -> None:
    masked, steps, total = torch.ones(1, 4).bool(), torch.tensor([4]), torch.tensor([4])
    log_prob = torch.tensor([[-1.0, -2.0, -3.0, -4.0]])
    gumbel = torch.tensor([[0.0, 0.0, 0.0, 8.0]])

    def commit(step: int, temperature: float, left: Tensor = masked) -> list[int]:
        return image.maskgit_commit(left, log_prob, step, steps, total, linear, temperature, gumbel)[0].int().tolist()

    assert commit(0, 0.0) == [1, 0, 0, 0]
    assert commit(0, 1.0) == [0, 0, 0, 1]  # -4 + 8·3/4 is the best
    two_left = torch.tensor([[True, False, False, True]])
    assert commit(2, 1.0, two_left) == [1, 0, 0, 0]  # -4 + 8·1/4 is less than -1
    assert commit(3, 1.0, two_left) == [1, 0, 0, 1] and commit(9, 1.0, two_left) == [1, 0, 0, 1]


# ---------------------------------------------------------------- image: emerge


def test_stay_probability_matches_the_reference() -> None:
    for case in GOLDEN["emerge"]:
        schedule, steps = SCHEDULES[case["schedule"]], torch.tensor([case["T"]])
        stay = [image.stay_probability(i, steps, schedule).item() for i in range(case["T"])]
        assert stay == pytest.approx(case["stay_probability"], abs=1e-9)
        left = list(itertools.accumulate(stay, initial=case["N"], func=lambda n, p: n * p))
        assert left[1:] == pytest.approx(case["expected_masked_after"], abs=1e-9 * case["N"])
        assert [a - b for a, b in itertools.pairwise(left)] == pytest.approx(case["expected_revealed"], abs=1e-6)


def emerge_steps(rows: int, width: int, steps_B: Tensor, name: str) -> Tensor:
    """[B, N] the step in which each token appears."""
    masked = torch.ones(rows, width).bool()
    when = torch.full((rows, width), -1)
    for step in range(int(steps_B.max())):
        uniform = noise.uniform(keys(rows), (7, step), width)
        commit = image.emerge_commit(masked, step, steps_B, SCHEDULES[name], uniform)
        assert not (commit & ~masked).any()
        when[commit] = step
        masked = masked & ~commit
    assert not masked.any()
    return when


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize("steps", [2, 3, 5])
def test_emerge_agrees_with_exact_enumeration(name: str, steps: int) -> None:
    rows, schedule = 6000, SCHEDULES[name]
    when = emerge_steps(rows, 3, torch.full((rows,), steps), name)
    kappa = schedule(torch.arange(steps + 1).double() / steps).clamp(min=0)
    marginal = -kappa.diff()
    for token in range(3):
        assert p_value(when[:, token].bincount(minlength=steps), marginal) > 1e-3
    # All courses of three tokens: independent, so the product of the marginals.
    joint = torch.einsum("a,b,c->abc", marginal, marginal, marginal).flatten()
    course = (when * torch.tensor([steps**2, steps, 1])).sum(1)
    assert p_value(course.bincount(minlength=steps**3), joint) > 1e-3


def test_emerge_rows_go_their_own_pace() -> None:
    steps = torch.tensor([1, 4, 9, 4])
    when = emerge_steps(4, 40, steps, "cosine")
    assert (when < steps[:, None]).all() and when[0].max() == 0 and len(when[2].unique()) > 4
    for row in range(4):
        uniform = [noise.uniform(keys(4)[row : row + 1], (7, s), 40) for s in range(int(steps[row]))]
        masked = torch.ones(1, 40).bool()
        for step, u in enumerate(uniform):
            commit = image.emerge_commit(masked, step, steps[row : row + 1], cosine, u)
            assert torch.equal(commit[0], when[row] == step)
            masked = masked & ~commit


@each("name", ["cumulative", "linear", "constant"])
def test_the_noise_is_annealed_as_the_references_do(name: str) -> None:
    for case in GOLDEN["maskgit"]:
        steps_B = torch.tensor([case["T"], case["T"]])
        found = torch.stack([ANNEALING[name](i, steps_B) for i in range(case["T"])], 1)
        expected = torch.tensor(case[f"temperature_{name}"], dtype=torch.float64)
        torch.testing.assert_close(found, expected.expand(2, -1), rtol=0, atol=1e-9)
