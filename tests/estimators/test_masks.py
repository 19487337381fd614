"""Views: what is masked, on what it depends, and how often. All keys are fixed, so nothing here is flaky."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tests.tables import each
from unidiff import estimators, noise
from unidiff.canvas import Canvas, render
from unidiff.estimators import Ask, Estimator, Place, View, draw_views, fading_out, ladder, make
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.spec import ModelSpec

NAMES = ["one_step", "random", "fading_out", "image_random"]
SPEC = ModelSpec(
    family="toy",
    mask=0,
    pad=1,
    bos=2,
    text_end=(3, 4),
    image_next=4,
    image_begin=(5,),
    image_end=(6,),
    text_range=(3, 20),
    image_offset=20,
    codebook_size=8,
    logit_rows=28,
    image_grid=(2, 3),
    text_length=12,
    max_positions=256,
)


def text(n: int, prompt: bool = False) -> Segment:
    return Segment(Modality.TEXT, torch.arange(n) % 9 + 7, prompt)


def image(rows: int, columns: int, prompt: bool = False, edited: str | None = None) -> Segment:
    mask = None if edited is None else torch.tensor([c == "x" for c in edited])
    return Segment(Modality.IMAGE, torch.arange(rows * columns) % 8 + 20, prompt, (rows, columns), mask)


SHORT = Interleaved([text(2, prompt=True), text(1)])
EDIT = Interleaved([text(3, True), image(2, 3, True), text(4), image(2, 3, edited="x.xx.."), text(5)])
LONG = Interleaved([text(6, True), image(2, 3, True), text(12), image(2, 3), text(7), image(4, 4), text(1)])
KEPT = Interleaved([image(2, 3, True), text(5), image(2, 3, edited="......"), text(3)])
ROWS = [SHORT, EDIT, LONG, KEPT]


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([noise.key(seed, i) for i in range(n)])


def copies(row: Interleaved, n: int) -> Canvas:
    return render([row], SPEC).rows(torch.zeros(n, dtype=torch.int64))


def only_views(canvas: Canvas, text: Estimator, image: Estimator, iterations: int, keys_B: torch.Tensor) -> list[View]:
    """The view of each iteration, of methods that have one."""
    draws = draw_views(canvas, text, image, iterations, keys_B)
    assert all(len(draw.views) == 1 for draw in draws)
    return [draw.views[0] for draw in draws]


def segments_with_samples(canvas: Canvas, b: int) -> set[int]:
    return set(canvas.segment[b][canvas.sampled[b]].tolist())


# ---------------------------------------------------------------- what is masked


def test_place_counts_sampled_tokens_of_each_segment() -> None:
    canvas = render(ROWS, SPEC)
    place = Place.of(canvas)
    for b, row in enumerate(ROWS):
        for ordinal, segment in enumerate(row):
            columns = canvas.segment[b] == ordinal
            n = int(segment.sampled.sum())
            assert set(place.length[b, columns].tolist()) == {n}
            assert place.rank[b, columns & canvas.sampled[b]].tolist() == list(range(n))
            assert len(set(place.run[b, columns].tolist())) == 1


@each(("text_name", "image_name"), zip(NAMES, [*NAMES[1:], NAMES[0]]))
def test_masks_are_sampled_tokens_and_no_segment_is_left_out(text_name: str, image_name: str) -> None:
    canvas = render(ROWS, SPEC)
    for view in only_views(canvas, make(text_name), make(image_name), 4, keys(len(ROWS))):
        assert not (view.mask & ~canvas.sampled).any()
        for b in range(len(ROWS)):
            masked = set(canvas.segment[b][view.mask[b]].tolist())
            assert masked == segments_with_samples(canvas, b)


@each(("name", "modality"), itertools.product(NAMES, list(Modality)))
def test_an_estimator_masks_its_modality_only(name: str, modality: Modality) -> None:
    canvas = render(ROWS, SPEC)
    (view,) = make(name).views(Ask(canvas, Place.of(canvas), modality, 0, 3, keys(len(ROWS))))
    mask = view.mask
    assert mask.dtype == torch.bool and mask.shape == canvas.shape
    assert mask.any() and not (mask & (canvas.modality != modality)).any()


def test_each_modality_has_its_own_estimator_in_one_view() -> None:
    canvas, k = render(ROWS, SPEC), keys(len(ROWS))
    views = only_views(canvas, make("fading_out"), make("one_step"), 3, k)
    for i, view in enumerate(views):
        is_text = canvas.modality == Modality.TEXT
        (words,) = make("fading_out").views(Ask(canvas, Place.of(canvas), Modality.TEXT, i, 3, k))
        assert torch.equal(view.mask & is_text, words.mask)
        assert torch.equal(view.mask & ~is_text, canvas.sampled & ~is_text)


def test_a_low_ratio_still_masks_one_token_the_nearest() -> None:
    canvas = copies(EDIT, 200)
    ask = Ask(canvas, Place.of(canvas), Modality.TEXT, 0, 10**6, keys(200))
    mask, uniform = make("random", min_ratio=0.0).views(ask)[0].mask, ask.uniform()
    for ordinal, n in ((2, 4), (4, 5)):
        columns = (canvas.segment[0] == ordinal).nonzero()[:, 0]
        assert len(columns) == n
        assert (mask[:, columns].sum(1) == 1).all()
        assert torch.equal(mask[:, columns].int().argmax(1), uniform[:, columns].argmin(1))


@each("name", NAMES)
def test_a_lone_token_is_masked(name: str) -> None:
    canvas = copies(Interleaved([text(2, True), text(1)]), 100)
    for view in only_views(canvas, make(name), make(name), 3, keys(100)):
        assert torch.equal(view.mask, canvas.sampled)


def test_nothing_sampled_gives_empty_views() -> None:
    canvas = render([Interleaved([text(3, True), image(2, 3, True)])], SPEC)
    for view in only_views(canvas, make("fading_out"), make("image_random"), 2, keys(1)):
        assert not view.mask.any()


def test_fading_out_always_masks_the_last_token() -> None:
    canvas = copies(EDIT, 300)
    place = Place.of(canvas)
    last = canvas.sampled & (place.rank == place.length - 1) & (canvas.modality == Modality.TEXT)
    for view in only_views(canvas, make("fading_out"), make("image_random"), 3, keys(300)):
        assert not (last & ~view.mask).any()


# ---------------------------------------------------------------- on what a view depends


def per_row(rows: list[Interleaved], k: torch.Tensor, name: str) -> list[list[torch.Tensor]]:
    """For each row its views' masks and hidden tokens, cut to the row's length."""
    canvas = render(rows, SPEC)
    lengths = canvas.clean.valid.sum(1).tolist()
    views = only_views(canvas, make(name), make(name), 3, k)
    fields = [f for v in views for f in (v.mask, v.hide) if f is not None]
    return [[f[b, : lengths[b]] for f in fields] for b in range(len(rows))]


@each("name", NAMES)
def test_views_do_not_depend_on_padding_order_or_batch(name: str) -> None:
    k = keys(len(ROWS))
    together = per_row(ROWS, k, name)
    order = [2, 0, 3, 1]
    shuffled = per_row([ROWS[i] for i in order], k[order], name)
    for b, row in enumerate(ROWS):
        alone = per_row([row], k[b : b + 1], name)[0]
        for x, y, z in zip(together[b], shuffled[order.index(b)], alone):
            assert torch.equal(x, y) and torch.equal(x, z)


@each("name", ["random", "fading_out", "image_random"])
def test_masks_do_not_depend_on_the_column(name: str) -> None:
    longer = Interleaved([text(6, True), *EDIT[1:]])  # the same segments, three columns further right
    a, b = (render([row], SPEC) for row in (EDIT, longer))
    k = keys(1)
    for x, y in zip(only_views(a, make(name), make(name), 4, k), only_views(b, make(name), make(name), 4, k)):
        assert torch.equal(x.mask[a.sampled], y.mask[b.sampled])


def test_keys_iterations_segments_and_modalities_have_their_own_numbers() -> None:
    row = Interleaved([text(1, True), text(12), image(3, 4), text(12)])
    canvas, k = render([row, row], SPEC), keys(2)
    place, random_mask = Place.of(canvas), make("random", min_ratio=0.5)

    def mask(modality: Modality, iteration: int) -> torch.Tensor:
        return random_mask.views(Ask(canvas, place, modality, iteration, 10**6, k))[0].mask

    first = mask(Modality.TEXT, 0)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, mask(Modality.TEXT, 1))
    parts = [first[0, canvas.segment[0] == s] for s in (1, 3)]
    parts.append(mask(Modality.IMAGE, 0)[0, (canvas.segment[0] == 2) & canvas.sampled[0]])
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(parts, 2))


@each("name", NAMES)
def test_views_are_repeatable_and_leave_global_random_states_alone(name: str) -> None:
    canvas, k = render(ROWS, SPEC), keys(len(ROWS))
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first = only_views(canvas, make(name), make(name), 2, k)
    second = only_views(canvas, make(name), make(name), 2, k)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(first, second))


def test_rows_of_a_view() -> None:
    canvas = render(ROWS, SPEC)
    view = only_views(canvas, make("one_step"), make("random"), 1, keys(4))[0]
    index = torch.tensor([3, 1])
    taken = view.rows(index)
    assert view.hide is not None and taken.hide is not None
    assert torch.equal(taken.mask, view.mask[index]) and torch.equal(taken.hide, view.hide[index])
    assert View(view.mask).rows(index).hide is None


# ---------------------------------------------------------------- how often


def closed_form(name: str, n: int, ratio: float) -> torch.Tensor:
    """[n] float64: probability that each token is drawn to be masked, written out anew."""
    if name == "fading_out":
        return torch.tensor([1 - min(1.0, 2 * (1 - ratio) * (1 - j / (n - 1))) for j in range(n)]).double()
    return torch.full((n,), ratio, dtype=torch.float64)


@pytest.mark.parametrize("name, min_ratio", [("random", 0.6), ("fading_out", 0.6), ("image_random", 0.8)])
@pytest.mark.parametrize("iteration", [0, 2])
def test_each_token_is_masked_as_often_as_the_closed_form_says(name: str, min_ratio: float, iteration: int) -> None:
    n, draws = 12, 4000
    row = Interleaved([text(1, True), image(3, 4) if name == "image_random" else text(n)])
    canvas = copies(row, draws)
    view = only_views(canvas, make(name), make(name), 3, keys(draws))[iteration]
    ratio = min(min_ratio + (1 - min_ratio) * (iteration + 1) / 3, 0.999)
    assert ladder.ratio(min_ratio, iteration, 3) == pytest.approx(ratio, abs=1e-12)
    p = closed_form(name, n, ratio)
    masked = view.mask[:, canvas.sampled[0]].double()
    error = (p * (1 - p) / draws).sqrt()
    assert ((masked.mean(0) - p).abs() <= 4.5 * error + 1 / draws * (error > 0)).all()
    total_error = (p * (1 - p)).sum().sqrt() / draws**0.5
    assert abs(masked.sum(1).mean() - p.sum()) <= 4 * total_error
    if name != "fading_out" or ratio >= 0.5:
        assert p.sum() == pytest.approx(n * ratio, abs=1e-5)


def test_fading_out_masks_later_tokens_more() -> None:
    for n in (1, 2, 3, 7, 60):
        for ratio in (0.1, 0.5, 0.7, 0.999):
            keep = fading_out.keep(torch.arange(n), torch.full((n,), n), ratio)
            assert (keep.diff() <= 0).all() and keep[-1] == 0 and (keep >= 0).all() and (keep <= 1).all()
            if ratio > 0.5:
                assert (keep.diff() < 0).all()


# ---------------------------------------------------------------- expectation on a toy vocabulary

WORDS, LENGTH = 3, 5
TOKENS = torch.tensor([2, 0, 1, 1, 0])
# A tabulated model: a distribution over the words at each place of each of the 4^5 partly masked sequences.
TABLE = torch.randn(
    (WORDS + 1) ** LENGTH, LENGTH, WORDS, generator=torch.Generator().manual_seed(5), dtype=torch.float64
).log_softmax(-1)


def model_log_probs(mask: torch.Tensor) -> torch.Tensor:
    """[K, LENGTH] bool masks -> log-probabilities of TOKENS at every place, given the visible ones."""
    state = (TOKENS.expand_as(mask) + 1).masked_fill(mask, 0)
    index = (state * (WORDS + 1) ** torch.arange(LENGTH)).sum(1)
    return TABLE[index].gather(2, TOKENS.expand_as(mask)[..., None])[..., 0]


def mask_probabilities(name: str, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """All masks [2^L, L] and their probabilities.

    A draw that masks nothing becomes a mask of one token: of any, where all have the same ratio; and fading_out
    never draws it.
    """
    masks = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))
    p = closed_form(name, LENGTH, ratio)
    weight = torch.where(masks, p, 1 - p).prod(1)
    single = masks.sum(1) == 1
    weight = weight + single * weight[0] / LENGTH
    weight[0] = 0
    return masks, weight


@each(("name", "min_ratio"), [("fading_out", 0.6), ("fading_out", 0.0), ("image_random", 0.3)])
def test_estimator_mean_is_that_of_exact_enumeration(name: str, min_ratio: float) -> None:
    draws, iterations = 6000, 3
    segment = image(1, LENGTH) if name == "image_random" else text(LENGTH)
    canvas = copies(Interleaved([text(1, True), segment]), draws)
    ratio = ladder.ratio(min_ratio, 0, iterations)
    estimator = make(name, min_ratio=min_ratio)
    drawn = only_views(canvas, estimator, estimator, iterations, keys(draws, seed=3))[0].mask
    drawn = drawn[:, canvas.sampled[0]]

    masks, weight = mask_probabilities(name, ratio)
    assert weight.sum() == pytest.approx(1)
    pattern = (drawn.long() * 2 ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    share = torch.bincount(pattern, minlength=2**LENGTH) / draws
    error = (weight * (1 - weight) / draws).sqrt()
    assert ((share - weight).abs() <= 4.5 * error + 1 / draws * (error > 0)).all()

    exact = (weight[:, None] * masks * model_log_probs(masks)).sum(0)
    estimate = drawn * model_log_probs(drawn)
    assert ((estimate.mean(0) - exact).abs() <= 4 * estimate.std(0) / draws**0.5 + 1e-12).all()


# ---------------------------------------------------------------- the perturbed prompt


def test_one_step_hides_prompt_content_only() -> None:
    canvas = copies(LONG, 3000)
    views = only_views(canvas, make("one_step"), make("image_random"), 2, keys(3000))
    hides = [v.hide for v in views if v.hide is not None]
    assert len(hides) == 2 and not torch.equal(hides[0], hides[1])
    prompt = (canvas.segment[0] < 2) & (canvas.clean.offset[0] >= 0)
    assert int(prompt.sum()) == 6 + 6  # text and image, without <bos> and the image's delimiters
    for hide in hides:
        assert not hide[:, ~prompt].any()
        share = hide[:, prompt].double().mean(0)
        assert ((share - 0.15).abs() < 4.5 * (0.15 * 0.85 / 3000) ** 0.5).all()


def test_a_kept_image_of_the_response_is_no_prompt() -> None:
    canvas = render([KEPT], SPEC)
    (view,) = only_views(canvas, make("one_step", hide_prompt=1.0), make("random"), 1, keys(1))
    hide = view.hide
    assert hide is not None and canvas.segment[0][hide[0]].unique().tolist() == [0] and int(hide.sum()) == 6


def test_two_one_step_estimators_hide_as_one_does() -> None:
    canvas, k, one = render(ROWS, SPEC), keys(4), make("one_step")
    both, text_only = (only_views(canvas, one, other, 2, k) for other in (one, make("random")))
    for a, b in zip(both, text_only):
        assert a.hide is not None and b.hide is not None and torch.equal(a.hide, b.hide)
    assert only_views(canvas, make("random"), make("image_random"), 1, k)[0].hide is None


# ---------------------------------------------------------------- registry and errors


def test_unknown_names_and_options_are_told_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"'fading_oot' is not known; known: .*image_random.*did you mean 'fading_out'"
    ):
        make("fading_oot")
    with pytest.raises(ValueError, match=r"no option 'min_ration'; known: min_ratio, start; did you mean 'min_ratio'"):
        make("random", min_ration=0.5)
    with pytest.raises(ValueError, match=r"min_ratio is 1\.5"):
        make("image_random", min_ratio=1.5)
    with pytest.raises(ValueError, match=r"hide_prompt is -1"):
        make("one_step", hide_prompt=-1)


def test_an_estimator_from_outside_the_package(registry: None) -> None:

    @estimators.register("first_token")
    @dataclass(frozen=True)
    class FirstToken(Estimator):
        skip: int = 0

        def views(self, ask: Ask) -> list[View]:
            return [View(ask.among & (ask.rank == self.skip))]

    canvas = render(ROWS, SPEC)
    view = only_views(canvas, make("first_token"), make("first_token"), 1, keys(4))[0]
    assert view.mask.sum(1).tolist() == [len(segments_with_samples(canvas, b)) for b in range(4)]


def test_draw_views_checks_its_arguments() -> None:
    canvas, one = render(ROWS, SPEC), make("one_step")
    with pytest.raises(ValueError, match=r"keys_B has shape \(1,\), but the canvas has 4 rows"):
        draw_views(canvas, one, one, 1, keys(1))
    with pytest.raises(ValueError, match="iterations is 0"):
        draw_views(canvas, one, one, 0, keys(4))
