"""Who sees whom, against loops over pairs; and the cache, against reading everything again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch

from tests.tables import each
from unidiff.attention import (
    Context,
    SegmentCache,
    additive,
    like_lengths,
    seen_block_causal,
    seen_clean_and_noisy,
)
from unidiff.canvas import Tokens, render
from unidiff.model import UnifiedModel
from unidiff.sequence import Interleaved
from unidiff.spec import ModelSpec

RandomRows = Callable[..., list[Interleaved]]
Spec = Callable[..., ModelSpec]


@each("seed", range(6))
def test_a_token_sees_its_own_and_earlier_segments(seed: int, toy_spec: Spec, random_rows: RandomRows) -> None:
    clean = render(random_rows(toy_spec(), 4, seed), toy_spec()).clean
    seen = seen_block_causal(clean, clean)
    for b in range(clean.shape[0]):
        segment = clean.segment[b].tolist()
        expected = [[key >= 0 and key <= query for key in segment] for query in segment]
        assert seen[b].tolist() == expected


@each("seed", range(6))
def test_a_noisy_token_sees_what_it_saw_when_sampled(seed: int, toy_spec: Spec, random_rows: RandomRows) -> None:
    canvas = render(random_rows(toy_spec(), 4, seed), toy_spec())
    seen = seen_clean_and_noisy(canvas.clean, canvas.noisy, torch.zeros_like(canvas.noisy.ids))
    for b in range(canvas.shape[0]):
        clean = [(s, False) for s in canvas.segment[b].tolist()]
        both = clean + [(s, True) for s in canvas.noisy.segment[b].tolist()]

        def sees(query: tuple[int, bool], key: tuple[int, bool]) -> bool:
            if key[0] < 0:
                return False
            if query[1]:
                return key[0] == query[0] if key[1] else key[0] < query[0]
            return not key[1] and key[0] <= query[0]

        assert seen[b].tolist() == [[sees(query, key) for key in both] for query in both]


@each("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masks_hide_and_never_overflow(dtype: torch.dtype) -> None:
    seen = torch.tensor([[[True, False, True], [False, False, False]]])
    mask = additive(seen, dtype)
    assert mask.shape == (1, 1, 2, 3) and mask.dtype == dtype and mask.isfinite().all()
    weight = (mask + torch.tensor([5.0, 40.0, -5.0], dtype=dtype)).float().softmax(-1)[0, 0]
    assert weight[0, 1] == 0 and weight.isfinite().all()  # a pad's row, which sees nothing, is not NaN


# ---------------------------------------------------------------- the cache


def random_keys(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_cache_keeps_what_is_advanced_over() -> None:
    cache = SegmentCache(layers=2, capacity=6)
    first, second, third = (random_keys(3, 2, n, 4, seed=n) for n in (2, 3, 4))
    for layer in range(2):
        keys, values = cache.update(first + layer, -first, layer)
        assert torch.equal(keys, first + layer) and torch.equal(values, -first)
    assert cache.get_seq_length() == 0
    cache.advance(2)
    cache.update(second, second, 1)  # read, not kept
    keys, _ = cache.update(third, third, 1)
    assert torch.equal(keys, torch.cat([first + 1, third], 2)) and cache.get_seq_length() == 2
    with pytest.raises(ValueError, match="holds 6 tokens, and 7 are needed"):
        cache.update(random_keys(3, 2, 5, 4, seed=0), third, 0)
    cache.rows(torch.tensor([2, 0, 0, 1]))
    keys, _ = cache.update(third[:1].expand(4, -1, -1, -1), third[:1].expand(4, -1, -1, -1), 1)
    assert torch.equal(keys[:, :, :2], (first + 1)[[2, 0, 0, 1]])


def test_rows_of_an_unused_cache() -> None:
    cache = SegmentCache(2, 4)
    cache.rows(torch.tensor([0, 0]))
    assert cache.layers == [None, None]


def blocks_of(tokens: Tokens) -> list[Tokens]:
    """The segments of a batch, in columns: what a sampler reads and writes one after the other."""
    return [tokens.columns((tokens.segment == s).any(0).nonzero()[:, 0]) for s in range(int(tokens.segment.max()) + 1)]


def aligned(model: UnifiedModel, prompts: list[Interleaved], random_rows: RandomRows, seed: int) -> Tokens:
    """Rows of the same segments in the same columns, with other tokens and pads inside one block."""
    spec = model.spec
    tail = next(r for s in range(100) if len(r := random_rows(spec, 1, seed + 100 * s)[0].response) > 2)
    clean = model.render([prompts[0] + tail]).clean.rows(torch.zeros(3, dtype=torch.int64))
    shift = torch.arange(3)[:, None] * (clean.offset >= 0) * (clean.modality == 0)
    clean = clean.with_ids((clean.ids + shift).clamp(max=spec.text_range[1] - 1).where(clean.modality == 0, clean.ids))
    clean.valid, clean.segment = clean.valid.clone(), clean.segment.clone()
    clean.valid[1, 3], clean.segment[1, 3] = False, -1
    return clean


@pytest.mark.parametrize("seed", range(4))
def test_cached_reading_is_reading_it_all(
    seed: int, model: UnifiedModel, prompts: list[Interleaved], random_rows: RandomRows
) -> None:
    """Invariant 5, of the model: keys and values of a finished segment never change."""
    tokens = aligned(model, prompts, random_rows, seed)
    with torch.no_grad():
        whole = model.hidden(tokens, additive(seen_block_causal(tokens, tokens), torch.float32))
    cached, plain = (model.begin(tokens.shape[1], cache) for cache in (True, False))
    start = 0
    for number in range(int(tokens.segment.max()) + 1):
        block = blocks_of(tokens)[number]
        masked = block.with_ids(torch.full_like(block.ids, model.spec.mask))
        torch.testing.assert_close(model.read(cached, masked), model.read(plain, masked), rtol=1e-4, atol=1e-5)
        found, expected = model.read(cached, block), whole[:, start : start + block.shape[1]]
        torch.testing.assert_close(found[block.valid], expected[block.valid], rtol=1e-4, atol=1e-5)
        model.write(cached, block)
        model.write(plain, block)
        start += block.shape[1]
        assert torch.equal(cached.lengths, tokens.valid[:, :start].sum(1)) and cached.cache.length == start
        if number == 1:  # a row leaves, another comes twice
            index = torch.tensor([2, 1, 1])
            cached.rows(index)
            plain.rows(index)
            tokens, whole = tokens.rows(index), whole[index]


def test_reading_leaves_the_context_as_it_was(model: UnifiedModel, prompts: list[Interleaved]) -> None:
    clean = model.render(prompts[:1]).clean
    context = model.begin(3 * clean.shape[1])
    model.write(context, clean)
    block = clean.columns(slice(0, 8))
    block.segment = torch.full_like(block.segment, 2)
    first = model.read(context, block)
    model.read(context, block.with_ids(block.ids.flip(1)))
    assert torch.equal(model.read(context, block), first) and context.tokens.shape == clean.shape


def test_a_context_without_cache_has_none() -> None:
    assert Context(2, 10, cache=False).cache is None


@each(
    ("lengths", "groups"),
    [
        ([7], [[0]]),
        ([5, 5, 5], [[0, 1, 2]]),
        ([100, 98, 97, 99], [[0, 1, 2, 3]]),  # a further group would save less than 5 %
        ([10, 100, 11, 99], [[0, 2], [1, 3]]),
        ([1, 10, 100, 1000, 2000], [[0, 1], [2], [3], [4]]),
    ],
)
def test_rows_of_like_length_run_together(lengths: list[int], groups: list[list[int]]) -> None:
    assert like_lengths(lengths) == groups


def test_no_other_groups_run_fewer_tokens() -> None:
    chance = random.Random(0)
    for _ in range(60):
        lengths = [chance.choice((3, 5, 8, 13, 21, 34)) for _ in range(chance.randint(1, 7))]
        for most in (1, 2, 3):
            found = like_lengths(lengths, most)
            assert sorted(row for group in found for row in group) == list(range(len(lengths))) and len(found) <= most
            cost = sum(len(group) * max(lengths[row] for row in group) for group in found)
            known = sorted(set(lengths))
            ways = itertools.combinations(known, min(most, len(known)))
            best = min(tokens(lengths, ends) for ends in ways if ends[-1] == known[-1])
            assert best <= cost <= best / 0.95 ** (most - 1) + 1e-9


def tokens(lengths: list[int], ends: tuple[int, ...]) -> int:
    """Of groups that end at these lengths."""
    return sum(min(end for end in ends if end >= length) for length in lengths)
