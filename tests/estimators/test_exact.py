"""Estimators against exact enumeration on a tabulated toy model. All keys are fixed, so nothing here is flaky."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from unidiff import noise
from unidiff.estimators import Place, combine, draw_views, make, parse, run_view, score
from unidiff.sequence import Canvas, Interleaved, Modality, Segment, render
from unidiff.spec import ModelSpec

SPEC = ModelSpec(
    family="toy", mask=0, pad=1, bos=2, text_end=(3, 4), image_next=4, image_begin=(5,), image_end=(6,),
    text_range=(3, 20), image_offset=20, codebook_size=8, logit_rows=28, image_grid=(1, 4), text_length=6,
    max_positions=64,
)  # fmt: skip
WORDS, LENGTH, FIRST = 3, 4, 7
TABLE = torch.randn(
    (WORDS + 1) ** LENGTH, LENGTH, WORDS, generator=torch.Generator().manual_seed(11), dtype=torch.float64
).log_softmax(-1)
"""A distribution over the words at each place of each partly masked sequence."""
STORY = (2, 0, 1, 1)


def toy(canvas: Canvas, mask: Tensor, hide: Tensor | None = None, temperature: tuple[float, float] = (1, 1)) -> Tensor:
    """A model: [B, L] float64 log-probabilities of the masked tokens of the only sampled segment."""
    columns = canvas.sampled[0].nonzero()[:, 0]
    base = FIRST if canvas.modality[0, columns[0]] == Modality.TEXT else SPEC.image_offset
    word = canvas.ids[:, columns] - base
    state = (word + 1).masked_fill(mask[:, columns], 0)
    index = (state * (WORDS + 1) ** torch.arange(LENGTH)).sum(1)
    logp = TABLE[index].gather(2, word[..., None])[..., 0] * mask[:, columns]
    return torch.zeros(mask.shape, dtype=torch.float64).index_copy(1, columns, logp)


def exact(masked: tuple[int, ...]) -> Tensor:
    """[LENGTH] log-probabilities of the story's words while these places are masked (of meaning at them only)."""
    state = [0 if j in masked else w + 1 for j, w in enumerate(STORY)]
    index = sum(s * (WORDS + 1) ** j for j, s in enumerate(state))
    return TABLE[index].gather(1, torch.tensor(STORY)[:, None])[:, 0]


def segment(modality: Modality, words: tuple[int, ...] = STORY, step: list[int] | None = None) -> Segment:
    steps = None if step is None else torch.tensor(step, dtype=torch.int32)
    if modality is Modality.TEXT:
        return Segment(modality, torch.tensor(words) + FIRST, step=steps)
    return Segment(modality, torch.tensor(words) + SPEC.image_offset, grid=(1, LENGTH), step=steps)


def canvas_of(rows: list[Segment]) -> Canvas:
    return render([Interleaved([Segment(Modality.TEXT, torch.tensor([9, 9]), prompt=True), s]) for s in rows], SPEC)


def values(name: str, canvas: Canvas, advantage: float = 1.0, iteration: int = 0, **options) -> Tensor:
    """[B, LENGTH] what a method makes of the toy model, one row a key."""
    rows, method = canvas.shape[0], make(name, **options)
    keys = torch.tensor([noise.key(31, i) for i in range(rows)])
    draw = draw_views(canvas, method, method, 2, keys)[iteration]
    got = score(toy, canvas, draw, method, method, torch.full(canvas.shape, advantage))
    return got[:, canvas.sampled[0]]


def copies(modality: Modality, count: int, step: list[int] | None = None) -> Canvas:
    return canvas_of([segment(modality, step=step)]).rows(torch.zeros(count, dtype=torch.int64))


def subsets(places: range) -> list[tuple[int, ...]]:
    return [c for n in range(1, len(places) + 1) for c in itertools.combinations(places, n)]


def close(found: Tensor, expected: Tensor | float) -> bool:
    """Whether a sample's mean lies within 4.5 of its standard errors."""
    return bool(((found.mean(0) - expected).abs() <= 4.5 * found.std(0) / len(found) ** 0.5 + 1e-9).all())


# ---------------------------------------------------------------- exact methods


@pytest.mark.parametrize("modality", Modality)
def test_left_to_right_is_the_joint_probability(modality: Modality) -> None:
    """Of every sequence of the toy vocabulary: they sum to 1, and each is the product of its conditionals."""
    stories = list(itertools.product(range(WORDS), repeat=LENGTH))
    canvas = canvas_of([segment(modality, words) for words in stories])
    found = values("left_to_right", canvas).sum(1)
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)
    for words, logp in zip(stories, found):
        expected = 0.0
        for j, word in enumerate(words):
            state = sum((w + 1) * (WORDS + 1) ** i for i, w in enumerate(words[:j]))
            expected += TABLE[state, j, word].item()
        assert logp.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("modality", Modality)
@pytest.mark.parametrize(
    ("step", "merge"), [([2, 0, 2, 5], 1), ([2, 0, 2, 5], 2), ([3, 1, 0, 7], 3), ([0, 0, 0, 0], 1)]
)
def test_trace_replays_the_steps(modality: Modality, step: list[int], merge: int) -> None:
    found = values("trace", copies(modality, 2, step), merge=merge)
    distinct = sorted(set(step))
    which = [distinct.index(s) // merge for s in step]
    for j in range(LENGTH):
        masked = tuple(i for i in range(LENGTH) if which[i] >= which[j])
        assert found[:, j].tolist() == pytest.approx([exact(masked)[j].item()] * 2, abs=1e-12)


def test_trace_merged_to_one_slice_is_one_step_and_unmerged_in_order_is_left_to_right() -> None:
    canvas = copies(Modality.TEXT, 1, [0, 1, 2, 3])
    assert torch.equal(values("trace", canvas), values("left_to_right", canvas))
    assert torch.equal(values("trace", canvas, merge=4), values("one_step", canvas, hide_prompt=0.0))


def test_trace_needs_steps() -> None:
    with pytest.raises(ValueError, match="trace: a sampled text segment has no steps"):
        values("trace", copies(Modality.TEXT, 1))


@pytest.mark.parametrize("modality", Modality)
def test_one_step_and_wd1(modality: Modality) -> None:
    expected = exact(tuple(range(LENGTH)))
    assert torch.allclose(values("one_step", copies(modality, 3)), expected.expand(3, -1))
    assert torch.allclose(values("wd1", copies(modality, 3)), expected.mean().expand(3, LENGTH))


# ---------------------------------------------------------------- bounds


def any_order_bound(places: range = range(LENGTH)) -> float:
    """Mean over all orders of writing these places of the joint log-probability; what stands behind them is masked."""
    behind = tuple(range(places.stop, LENGTH))
    total, orders = 0.0, list(itertools.permutations(places))
    for order in orders:
        for k, j in enumerate(order):
            total += exact((*order[k:], *behind))[j].item()
    return total / len(orders)


@pytest.mark.parametrize("modality", Modality)
@pytest.mark.parametrize(("samples", "antithetic"), [(1, False), (3, False), (2, True), (4, True)])
@pytest.mark.parametrize("iteration", [0, 1])
def test_elbo_is_unbiased(modality: Modality, samples: int, antithetic: bool, iteration: int) -> None:
    """Its mean is the any-order bound, which is what t ~ U(0, 1) with weights 1/t gives as well."""
    found = values("elbo", copies(modality, 4000), iteration=iteration, samples=samples, antithetic=antithetic)
    value = found.min(1, keepdim=True).values
    assert bool(((found == 0) | ((found - value).abs() < 1e-12)).all())  # one for a segment; 0 where no view scored
    assert bool((found != 0).all()) or not antithetic
    bound = any_order_bound() / LENGTH
    continuous = sum(  # the integral of t^(n-1) (1-t)^(L-n) over t is a Beta function
        math.gamma(len(m)) * math.gamma(LENGTH - len(m) + 1) / math.gamma(LENGTH + 1) * exact(m)[list(m)].sum().item()
        for m in subsets(range(LENGTH))
    )
    assert continuous == pytest.approx(bound * LENGTH, abs=1e-12)
    assert close(value[:, 0], bound)


def test_more_views_have_less_variance_and_strata_less_than_independent_ones() -> None:
    canvas = copies(Modality.IMAGE, 4000)
    deviation = {
        (n, a): values("elbo", canvas, samples=n, antithetic=a).min(1).values.std().item()
        for n, a in ((1, False), (2, False), (4, False), (2, True), (4, True))
    }
    assert deviation[4, True] < deviation[2, True] < deviation[1, False]
    for n in (2, 4):
        assert deviation[n, False] < deviation[1, False] / n**0.5


@pytest.mark.parametrize("block", [2, 3, 32])
@pytest.mark.parametrize("samples", [1, 3])
def test_spg_lower_bound_is_unbiased(block: int, samples: int) -> None:
    found = values("spg", copies(Modality.TEXT, 4000), samples=samples, block=block)
    blocks = [range(s, min(s + block, LENGTH)) for s in range(0, LENGTH, block)]
    assert close(found.min(1).values, sum(map(any_order_bound, blocks)) / LENGTH)


@pytest.mark.parametrize(("block", "power", "mix"), [(2, 1.5, 1.0), (4, 1.0, 1.0), (4, 2.0, 0.25)])
def test_spg_upper_bound(block: int, power: float, mix: float) -> None:
    """With many views the mean inside the logarithm is the exact one."""
    options = {"block": block, "power": power, "samples": 200}
    found = values("spg", copies(Modality.TEXT, 8), advantage=-1.0, mix=mix, **options)[:, 0]
    lower, upper = 0.0, 0.0
    for start in range(0, LENGTH, block):
        inside = range(start, min(start + block, LENGTH))
        lower += any_order_bound(inside)
        behind = tuple(range(inside.stop, LENGTH))
        for j in inside:
            mean = 0.0  # over the sizes of the set, of the mean over sets of that size that hold j
            for size in range(1, len(inside) + 1):
                held = [m for m in itertools.combinations(inside, size) if j in m]
                mean += sum(math.exp(power * exact((*m, *behind))[j].item()) for m in held) / len(held)
            upper += math.log(mean / len(inside)) / power
    assert lower < upper
    assert close(found, (mix * upper + (1 - mix) * lower) / LENGTH)
    assert found.std() < 0.05


def test_spg_takes_the_lower_bound_unless_the_advantage_is_negative() -> None:
    canvas = copies(Modality.TEXT, 4)
    up, still, down = (values("spg", canvas, advantage=a, samples=100) for a in (2.0, 0.0, -0.1))
    assert torch.equal(up, still) and bool((down > up).all())


def test_coupled_has_the_mean_that_its_formula_says() -> None:
    found = values("coupled", copies(Modality.IMAGE, 6000))
    grid = torch.linspace(0.2, 0.8, 601, dtype=torch.float64)
    expected = exact(tuple(range(LENGTH))) / 2
    for j in range(LENGTH):
        for chosen in itertools.product([False, True], repeat=LENGTH):
            n = sum(chosen)
            weight = torch.trapezoid(
                grid**n * (1 - grid) ** (LENGTH - n) / torch.where(torch.tensor(chosen[j]), grid, 1 - grid), grid
            )
            masked = tuple(i for i in range(LENGTH) if chosen[i] == chosen[j])
            expected[j] += weight / 0.6 * exact(masked)[j] / 2
    assert close(found, expected)


@pytest.mark.parametrize("name", ["random", "fading_out", "image_random"])
def test_ladder_methods_score_each_masked_token_in_its_state(name: str) -> None:
    canvas = copies(Modality.IMAGE, 50)
    found = values(name, canvas)
    keys = torch.tensor([noise.key(31, i) for i in range(50)])
    masks = draw_views(canvas, make(name), make(name), 2, keys)[0].mask[:, canvas.sampled[0]]
    for row, mask in zip(found, masks):
        expected = exact(tuple(mask.nonzero()[:, 0].tolist())) * mask
        assert torch.allclose(row, expected)


# ---------------------------------------------------------------- several segments and methods in one draw


def test_methods_with_different_numbers_of_views_share_them() -> None:
    """Each modality's values are those that its method gives alone."""
    words, picture = segment(Modality.TEXT, step=[1, 0, 2, 2]), segment(Modality.IMAGE)
    both = render([Interleaved([words, picture])], SPEC)
    keys, ones = torch.tensor([noise.key(31, 0)]), torch.ones(both.shape)

    def model(canvas: Canvas, mask: Tensor, hide: Tensor | None, temperature: tuple[float, float]) -> Tensor:
        return torch.where(mask, -1.0 - canvas.clean.offset - 0.1 * mask.sum(1, keepdim=True), 0.0)

    def found(text: str, image: str) -> Tensor:
        pair = make(text), make(image)
        (draw,) = draw_views(both, *pair, 1, keys)
        assert len(draw.views) == max({"trace": 3, "left_to_right": 4, "random": 1}[n] for n in (text, image))
        assert bool((draw.weight > 0).eq(draw.mask).all())
        logp = torch.stack([run_view(model, both, view) for view in draw.views])
        return combine(both, draw, logp, *pair, ones)

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

    def model(canvas: Canvas, mask: Tensor, hide: Tensor | None, temperature: tuple[float, float]) -> Tensor:
        rows.append(len(mask))
        return torch.zeros(mask.shape)

    for view in draw.views:
        run_view(model, canvas, view)
    assert rows == [2, 2, 1, 1]
    assert len(draw.rows(torch.tensor([0])).views) == 2


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


@pytest.mark.parametrize("name", ["elbo:samples=1:antithetic=no", "elbo", "spg:block=2", "wd1"])
def test_a_segment_counts_as_if_all_of_its_tokens_were_scored(name: str) -> None:
    canvas, method = copies(Modality.TEXT, 40), parse(name)
    (draw,) = draw_views(canvas, method, method, 1, torch.tensor([noise.key(31, i) for i in range(40)]))
    weight = draw.weight[:, canvas.sampled[0]]
    assert weight.sum(1).tolist() == pytest.approx([LENGTH] * 40)
    assert all(len(row[row > 0].unique()) == 1 for row in weight)
    if "samples=1" in name or "block" in name:
        assert bool((weight == 0).any())  # some tokens are scored by no view
