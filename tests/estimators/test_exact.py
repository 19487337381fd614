"""Estimators against exact enumeration on a tabulated toy model. All keys are fixed, so nothing here is flaky."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.covering import pairs
from tests.tables import each
from unidiff import noise
from unidiff.canvas import Canvas, render
from unidiff.estimators import Place, draw_views, make, parse, run_views, values_of
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.spec import ModelSpec

SPEC = ModelSpec(
    family="toy", mask=0, pad=1, bos=2, text_end=(3, 4), image_next=4, image_begin=(5,), image_end=(6,),
    text_range=(3, 20), image_offset=20, codebook_size=8, logit_rows=28, image_grid=(1, 4), text_length=6,
    max_positions=64,
)  # fmt: skip
FIRST = 7  # id of the first word


@dataclass(frozen=True)
class Toy:
    """A vocabulary of some words, a model of it that is a table, and the segment that is scored."""

    words: int
    story: tuple[int, ...]

    @property
    def length(self) -> int:
        return len(self.story)

    @cached_property
    def table(self) -> Tensor:
        """A distribution over the words at each place of each partly masked sequence."""
        generator = torch.Generator().manual_seed(11 + self.words)
        states = (self.words + 1) ** self.length
        return torch.randn(states, self.length, self.words, generator=generator, dtype=torch.float64).log_softmax(-1)

    def index(self, state: Tensor) -> Tensor:
        """[..., length] of words + 1, or 0 where masked -> row of the table."""
        return (state * (self.words + 1) ** torch.arange(self.length)).sum(-1)

    def model(
        self,
        canvas: Canvas,
        mask: Tensor,
        *others: Any,  # a toy knows no perturbed prompt, temperature or guidance
    ) -> Tensor:
        """[B, L] float64 log-probabilities of the masked tokens of the only sampled segment."""
        columns = canvas.sampled[0].nonzero()[:, 0]
        base = FIRST if canvas.modality[0, columns[0]] == Modality.TEXT else SPEC.image_offset
        word = canvas.ids[:, columns] - base
        index = self.index((word + 1).masked_fill(mask[:, columns], 0))
        logp = self.table[index].gather(2, word[..., None])[..., 0] * mask[:, columns]
        return torch.zeros(mask.shape, dtype=torch.float64).index_copy(1, columns, logp)

    def exact(self, masked: tuple[int, ...]) -> Tensor:
        """[length] log-probabilities of the story's words while these places are masked (of meaning at them only)."""
        state = torch.tensor([0 if j in masked else w + 1 for j, w in enumerate(self.story)])
        return self.table[self.index(state)].gather(1, torch.tensor(self.story)[:, None])[:, 0]

    def any_order_bound(self, places: range | None = None) -> float:
        """Mean over all orders of writing these places (default: all) of the joint log-probability; what stands behind
        them is masked."""
        places = range(self.length) if places is None else places
        behind = tuple(range(places.stop, self.length))
        total, orders = 0.0, list(itertools.permutations(places))
        for order in orders:
            for k, j in enumerate(order):
                total += self.exact((*order[k:], *behind))[j].item()
        return total / len(orders)

    def blocks(self, size: int) -> list[range]:
        return [range(s, min(s + size, self.length)) for s in range(0, self.length, size)]


STORY = (2, 0, 1, 1)
TOYS = [Toy(3, STORY), Toy(2, (1, 0, 0, 1, 1)), Toy(5, (4, 2)), Toy(4, (3,))]


@pytest.fixture(params=TOYS, ids=lambda t: f"{t.words} words, {t.length} tokens")
def toy(request: pytest.FixtureRequest) -> Toy:
    return request.param


def segment(modality: Modality, words: tuple[int, ...] = STORY, step: list[int] | None = None) -> Segment:
    steps = None if step is None else torch.tensor(step, dtype=torch.int32)
    if modality is Modality.TEXT:
        return Segment(modality, torch.tensor(words) + FIRST, step=steps)
    return Segment(modality, torch.tensor(words) + SPEC.image_offset, grid=(1, len(words)), step=steps)


def canvas_of(rows: list[Segment]) -> Canvas:
    return render([Interleaved([Segment(Modality.TEXT, torch.tensor([9, 9]), prompt=True), s]) for s in rows], SPEC)


def values(toy: Toy, name: str, canvas: Canvas, advantage: float = 1.0, iteration: int = 0, **options: Any) -> Tensor:
    """[B, length] what a method makes of the toy model, one row a key."""
    rows, method = canvas.shape[0], make(name, **options)
    keys = torch.tensor([noise.key(31, i) for i in range(rows)])
    draw = draw_views(canvas, method, method, 2, keys)[iteration]
    logp = torch.stack([toy.model(canvas, view.mask) for view in draw.views])
    got = values_of(canvas, draw, logp, method, method, torch.full(canvas.shape, advantage))
    return got[:, canvas.sampled[0]]


def copies(modality: Modality, count: int, step: list[int] | None = None, story: tuple[int, ...] = STORY) -> Canvas:
    return canvas_of([segment(modality, story, step)]).rows(torch.zeros(count, dtype=torch.int64))


def subsets(places: range) -> list[tuple[int, ...]]:
    return [c for n in range(1, len(places) + 1) for c in itertools.combinations(places, n)]


def close(found: Tensor, expected: Tensor | float) -> bool:
    """Whether a sample's mean lies within 4.5 of its standard errors."""
    return bool(((found.mean(0) - expected).abs() <= 4.5 * found.std(0) / len(found) ** 0.5 + 1e-6).all())


# ---------------------------------------------------------------- exact methods


@each("modality", Modality)
def test_left_to_right_is_the_joint_probability(toy: Toy, modality: Modality) -> None:
    """Of every sequence of the toy vocabulary: they sum to 1, and each is the product of its conditionals."""
    stories = list(itertools.product(range(toy.words), repeat=toy.length))
    canvas = canvas_of([segment(modality, words) for words in stories])
    found = values(toy, "left_to_right", canvas).sum(1)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for words, logp in zip(stories, found):
        expected = 0.0
        for j, word in enumerate(words):
            state = sum((w + 1) * (toy.words + 1) ** i for i, w in enumerate(words[:j]))
            expected += toy.table[state, j, word].item()
        assert logp.item() == pytest.approx(expected, abs=1e-12)


@each(
    ("modality", "steps", "merge"),
    [
        (Modality.TEXT, (2, 0, 2, 5, 1), 1),
        (Modality.IMAGE, (2, 0, 2, 5, 1), 2),
        (Modality.TEXT, (3, 1, 0, 7, 3), 3),
        (Modality.IMAGE, (0, 0, 0, 0, 0), 1),
    ],
)
def test_trace_replays_the_steps(toy: Toy, modality: Modality, steps: tuple[int, ...], merge: int) -> None:
    step = list(steps[: toy.length])
    found = values(toy, "trace", copies(modality, 2, step, toy.story), merge=merge)
    distinct = sorted(set(step))
    which = [distinct.index(s) // merge for s in step]
    for j in range(toy.length):
        masked = tuple(i for i in range(toy.length) if which[i] >= which[j])
        assert found[:, j].tolist() == pytest.approx([toy.exact(masked)[j].item()] * 2, abs=1e-12)


def test_trace_merged_to_one_slice_is_one_step_and_unmerged_in_order_is_left_to_right(toy: Toy) -> None:
    canvas = copies(Modality.TEXT, 1, list(range(toy.length)), toy.story)
    assert torch.equal(values(toy, "trace", canvas), values(toy, "left_to_right", canvas))
    assert torch.equal(values(toy, "trace", canvas, merge=5), values(toy, "one_step", canvas, hide_prompt=0.0))


@each("name", ["trace", "two_times", "transition"])
def test_a_replay_needs_steps(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: a sampled text segment has no steps"):
        values(TOYS[0], name, copies(Modality.TEXT, 1))


@each(("modality", "steps"), zip([*Modality, Modality.TEXT], [(2, 0, 2, 5, 1), (0, 0, 0, 0, 0), (4, 3, 2, 1, 0)]))
def test_two_times_sees_one_state_of_the_rollout(toy: Toy, modality: Modality, steps: tuple[int, ...]) -> None:
    """Each value is that of all masked, or of a state; every state of the rollout occurs, and no other."""
    step = list(steps[: toy.length])
    distinct = sorted(set(step))
    found = values(toy, "two_times", copies(modality, 60, step, toy.story))
    expected = []
    for cut in distinct[1:] or [max(distinct) + 1]:
        late = tuple(i for i in range(toy.length) if step[i] >= cut)
        start, state = toy.exact(tuple(range(toy.length))), toy.exact(late)
        expected.append(torch.tensor([state[i] if i in late else start[i] for i in range(toy.length)]))
    matches = torch.stack([(found - row).abs().amax(1) < 1e-12 for row in expected])
    assert bool((matches.sum(0) == 1).all()) and bool(matches.any(1).all())


@each(("samples", "mean", "modality"), pairs((1, 2, 9), (False, True), Modality))
def test_transition_is_the_probability_of_a_step(toy: Toy, modality: Modality, samples: int, mean: bool) -> None:
    """Of one drawn from the rollout's; of all of them, where more are drawn than there are. Its mean is the joint
    log-probability over the number of steps."""
    step = [2, 0, 2, 5, 1][: toy.length]
    distinct = sorted(set(step))
    late = [tuple(i for i in range(toy.length) if step[i] >= s) for s in distinct]
    now = [[i for i in range(toy.length) if step[i] == s] for s in distinct]
    logp = torch.tensor([toy.exact(m)[n].sum().item() for m, n in zip(late, now)])
    found = values(toy, "transition", copies(modality, 3000, step, toy.story), samples=samples, mean=mean)
    value = found.min(1).values
    assert bool(((found == 0) | ((found - value[:, None]).abs() < 1e-12)).all())
    if samples >= len(distinct):
        assert torch.allclose(value.float(), (logp.sum() / (toy.length if mean else 1)).expand(3000), atol=1e-5)
    elif samples == 1:
        each = logp / torch.tensor([len(n) for n in now]) if mean else logp
        assert close(value[:, None], each.double().mean())
        assert bool((value[:, None] - each).abs().amin(1).lt(1e-5).all())


def test_weighted_elbo_is_elbo_with_the_weights_of_the_group(toy: Toy) -> None:
    canvas = copies(Modality.TEXT, 20, story=toy.story)
    assert torch.equal(values(toy, "weighted_elbo", canvas, samples=4), values(toy, "elbo", canvas, samples=4))
    advantage, group = torch.tensor([1.0, -1.0, 0.5, 0.0, 0.0, 2.0, 0.0]), torch.tensor([4, 4, 4, 9, 9, 1, 1])
    credit = make("weighted_elbo", temperature=0.5).credit(advantage, group)
    assert credit[:3].tolist() == pytest.approx((torch.tensor([2.0, -2.0, 1.0]).softmax(0) * 3).tolist())
    assert credit[3:5].tolist() == [0.0, 0.0] and credit[5:].sum().item() == pytest.approx(2.0) and credit[6] > 0


@each("modality", Modality)
def test_one_step_and_wd1(toy: Toy, modality: Modality) -> None:
    canvas, expected = copies(modality, 3, story=toy.story), toy.exact(tuple(range(toy.length)))
    assert torch.allclose(values(toy, "one_step", canvas), expected.expand(3, -1))
    assert torch.allclose(values(toy, "wd1", canvas), expected.mean().expand(3, toy.length))


# ---------------------------------------------------------------- bounds


@each(("samples", "modality"), pairs((1, 2, 3), Modality))
def test_elbo_at_the_nodes_of_a_quadrature(toy: Toy, samples: int, modality: Modality) -> None:
    """Its mean is the weighted sum of the exact means over all sets of the nodes' sizes."""
    nodes = {1: [(0.5, 1.0)], 2: [(0.5 - 12**-0.5, 0.5), (0.5 + 12**-0.5, 0.5)]}
    nodes[3] = [(0.5 - 0.15**0.5, 5 / 18), (0.5, 8 / 18), (0.5 + 0.15**0.5, 5 / 18)]
    n, expected = toy.length, 0.0
    for node, weight in nodes[samples]:
        sets = list(itertools.combinations(range(n), max(1, round(node * n))))
        expected += weight * sum(toy.exact(m)[list(m)].mean().item() for m in sets) / len(sets)
    options = {"samples": samples, "antithetic": False, "quadrature": True}
    found = values(toy, "elbo", copies(modality, 4000, story=toy.story), **options)
    assert close(found.min(1).values, expected)
    with pytest.raises(ValueError, match="quadrature gives each view a mask ratio of its own: set antithetic=no"):
        make("elbo", quadrature=True)


@each(("views", "modality", "iteration"), pairs([(1, False), (3, False), (2, True), (4, True)], Modality, (0, 1)))
def test_elbo_is_unbiased(toy: Toy, views: tuple[int, bool], modality: Modality, iteration: int) -> None:
    """Its mean is the any-order bound, which is what t ~ U(0, 1) with weights 1/t gives as well."""
    samples, antithetic = views
    options = {"iteration": iteration, "samples": samples, "antithetic": antithetic}
    found, n = values(toy, "elbo", copies(modality, 4000, story=toy.story), **options), toy.length
    value = found.min(1, keepdim=True).values
    assert bool(((found == 0) | ((found - value).abs() < 1e-12)).all())  # one for a segment; 0 where no view scored
    assert bool((found != 0).all()) or not antithetic
    bound = toy.any_order_bound() / n
    continuous = sum(  # the integral of t^(k-1) (1-t)^(n-k) over t is a Beta function
        math.gamma(len(m)) * math.gamma(n - len(m) + 1) / math.gamma(n + 1) * toy.exact(m)[list(m)].sum().item()
        for m in subsets(range(n))
    )
    assert continuous == pytest.approx(bound * n, abs=1e-12)
    assert close(value[:, 0], bound)


@pytest.mark.parametrize("toy", [t for t in TOYS if t.length > 1], ids=str)
def test_more_views_have_less_variance_and_strata_no_more_than_independent_ones(toy: Toy) -> None:
    canvas = copies(Modality.IMAGE, 4000, story=toy.story)
    deviation = {
        (n, a): values(toy, "elbo", canvas, samples=n, antithetic=a).min(1).values.std().item()
        for n, a in ((1, False), (2, False), (4, False), (2, True), (4, True))
    }
    assert deviation[4, True] < deviation[2, True] < deviation[1, False]
    for n in (2, 4):
        assert deviation[n, False] < 1.03 * deviation[1, False] / n**0.5  # 3 % is what 4,000 draws leave open


@each(("block", "samples"), [(2, 1), (3, 3), (32, 1)])
def test_spg_lower_bound_is_unbiased(toy: Toy, block: int, samples: int) -> None:
    found = values(toy, "spg", copies(Modality.TEXT, 4000, story=toy.story), samples=samples, block=block)
    assert close(found.min(1).values, sum(map(toy.any_order_bound, toy.blocks(block))) / toy.length)


@pytest.mark.slow
@pytest.mark.parametrize(("block", "power", "mix"), [(2, 1.5, 1.0), (4, 1.0, 1.0), (4, 2.0, 0.25)])
def test_spg_upper_bound(toy: Toy, block: int, power: float, mix: float) -> None:
    """With many views the mean inside the logarithm is the exact one."""
    options = {"block": block, "power": power, "samples": 200}
    found = values(toy, "spg", copies(Modality.TEXT, 8, story=toy.story), advantage=-1.0, mix=mix, **options)[:, 0]
    lower, upper = 0.0, 0.0
    for inside in toy.blocks(block):
        lower += toy.any_order_bound(inside)
        behind = tuple(range(inside.stop, toy.length))
        for j in inside:
            mean = 0.0  # over the sizes of the set, of the mean over sets of that size that hold j
            for size in range(1, len(inside) + 1):
                held = [m for m in itertools.combinations(inside, size) if j in m]
                mean += sum(math.exp(power * toy.exact((*m, *behind))[j].item()) for m in held) / len(held)
            upper += math.log(mean / len(inside)) / power
    assert lower < upper or toy.length == 1
    assert close(found, (mix * upper + (1 - mix) * lower) / toy.length)
    assert found.std() < 0.15


def test_spg_takes_the_lower_bound_unless_the_advantage_is_negative() -> None:
    canvas = copies(Modality.TEXT, 4)
    up, still, down = (values(TOYS[0], "spg", canvas, advantage=a, samples=100) for a in (2.0, 0.0, -0.1))
    assert torch.equal(up, still) and bool((down > up).all())


def test_coupled_has_the_mean_that_its_formula_says(toy: Toy) -> None:
    found, n = values(toy, "coupled", copies(Modality.IMAGE, 6000, story=toy.story)), toy.length
    grid = torch.linspace(0.2, 0.8, 601, dtype=torch.float64)
    expected = toy.exact(tuple(range(n))) / 2
    for j in range(n):
        for chosen in itertools.product([False, True], repeat=n):
            count = sum(chosen)
            weight = torch.trapezoid(
                grid**count * (1 - grid) ** (n - count) / torch.where(torch.tensor(chosen[j]), grid, 1 - grid), grid
            )
            masked = tuple(i for i in range(n) if chosen[i] == chosen[j])
            expected[j] += weight / 0.6 * toy.exact(masked)[j] / 2
    assert close(found, expected)


@each("name", ["random", "fading_out", "image_random"])
def test_ladder_methods_score_each_masked_token_in_its_state(toy: Toy, name: str) -> None:
    canvas = copies(Modality.IMAGE, 50, story=toy.story)
    found = values(toy, name, canvas)
    keys = torch.tensor([noise.key(31, i) for i in range(50)])
    masks = draw_views(canvas, make(name), make(name), 2, keys)[0].mask[:, canvas.sampled[0]]
    for row, mask in zip(found, masks):
        expected = toy.exact(tuple(mask.nonzero()[:, 0].tolist())) * mask
        assert torch.allclose(row, expected)


# ---------------------------------------------------------------- several segments and methods in one draw


def test_methods_with_different_numbers_of_views_share_them() -> None:
    """Each modality's values are those that its method gives alone."""
    words, picture = segment(Modality.TEXT, step=[1, 0, 2, 2]), segment(Modality.IMAGE)
    both = render([Interleaved([words, picture])], SPEC)
    keys, ones = torch.tensor([noise.key(31, 0)]), torch.ones(both.shape)

    def model(canvas: Canvas, mask: Tensor, *others: Any) -> Tensor:
        return torch.where(mask, -1.0 - canvas.clean.offset - 0.1 * mask.sum(1, keepdim=True), 0.0)

    def found(text: str, image: str) -> Tensor:
        pair = make(text), make(image)
        (draw,) = draw_views(both, *pair, 1, keys)
        assert len(draw.views) == max({"trace": 3, "left_to_right": 4, "random": 1}[n] for n in (text, image))
        assert bool((draw.weight > 0).eq(draw.mask).all())
        logp = torch.stack([model(both, view.mask) for view in draw.views])
        return values_of(both, draw, logp, *pair, ones)

    mixed = found("trace", "left_to_right")
    scored = (mixed != 0) == both.sampled
    assert bool(scored.all())
    # in view k: 4, 3, 2 masked words (one each, then two) beside 4, 3, 2, 1 masked image tokens
    assert mixed[0, both.sampled[0]].tolist() == pytest.approx(
        [-1 - 0.6, -1 - 0.8 - 1.0, -1 - 2 - 0.4, -1 - 3 - 0.4, -1.8, -2.6, -3.4, -4.1], abs=1e-5
    )


def test_a_row_is_run_only_in_views_that_score_it() -> None:
    canvas = canvas_of([segment(Modality.TEXT, (0, 1)), segment(Modality.TEXT)])
    method = make("left_to_right")
    (draw,) = draw_views(canvas, method, method, 1, torch.tensor([1, 2]))
    rows: list[int] = []

    def model(canvas: Canvas, mask: Tensor, *others: Any) -> Tensor:
        rows.extend(mask.shape[:2])
        return torch.full(mask.shape, 7.0)

    for view in draw.views:
        run_views(model, canvas, [view])
    assert rows == [1, 2, 1, 2, 1, 1, 1, 1]
    rows.clear()
    logp = run_views(model, canvas.rows(torch.tensor([0])), draw.rows(torch.tensor([0])).views)
    assert rows == [2, 1] and len(logp) == 4 and not logp[2:].any() and bool(logp[:2].all())


def test_order_ranks_chosen_tokens_inside_their_segments() -> None:
    canvas = render([Interleaved([segment(Modality.TEXT), segment(Modality.IMAGE), segment(Modality.TEXT)])] * 50, SPEC)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(canvas.shape, generator=generator).mul(6).floor()  # with ties
    among = canvas.sampled & (torch.rand(canvas.shape, generator=generator) < 0.7)
    order = Place.of(canvas).order(numbers, among)
    for b in range(50):
        for s in range(3):
            columns = (among[b] & (canvas.segment[b] == s)).nonzero()[:, 0].tolist()
            expected = sorted(columns, key=lambda c: (numbers[b, c].item(), c))
            assert [order[b, c].item() for c in expected] == list(range(len(columns)))


@each("name", ["elbo:samples=1:antithetic=no", "elbo", "spg:block=2", "wd1"])
def test_a_segment_counts_as_if_all_of_its_tokens_were_scored(name: str) -> None:
    canvas, method = copies(Modality.TEXT, 40), parse(name)
    (draw,) = draw_views(canvas, method, method, 1, torch.tensor([noise.key(31, i) for i in range(40)]))
    weight = draw.weight[:, canvas.sampled[0]]
    assert weight.sum(1).tolist() == pytest.approx([len(STORY)] * 40)
    assert all(len(row[row > 0].unique()) == 1 for row in weight)
    if "samples=1" in name or "block" in name:
        assert bool((weight == 0).any())  # some tokens are scored by no view
