"""Noise: uniform, independent, a function of key and counter alone. Keys are fixed, so nothing here is flaky."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from tests.tables import each
from unidiff import noise

WORD, GAMMA = (1 << 64) - 1, 0x9E3779B97F4A7C15
ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))


def mixed(x: int) -> int:
    """SplitMix64's mixer, in whole numbers of 64 bits."""
    for shift, factor in ROUNDS:
        x &= WORD
        x = (x ^ x >> shift) * factor & WORD
    return x


def unmixed(x: int) -> int:
    """The number that `mixed` makes x of."""
    for shift, factor in reversed(ROUNDS):
        x = x * pow(factor, -1, WORD + 1) & WORD
        x ^= x >> shift ^ x >> 2 * shift
    return x


def base(key: int, stream: tuple[int, ...]) -> int:
    return mixed(mixed(key) + noise.key(*stream))


def signed(x: int) -> int:
    return (x + (1 << 63) & WORD) - (1 << 63)


def chi_square_p(count: Tensor) -> float:
    """p-value of counts against equal probabilities."""
    expected = count.sum() / count.numel()
    statistic = ((count - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((count.numel() - 1) / 2).double(), statistic.double() / 2).item()


def keys(n: int, *parts: int) -> Tensor:
    return torch.tensor([noise.key(*parts, i) for i in range(n)])


# ---------------------------------------------------------------- distribution


@pytest.mark.parametrize("stream", [(0,), (3, 1, 4), (1, 0, 0)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 20_000), (20_000, 1), (100, 200)])
def test_numbers_are_uniform(stream: tuple[int, ...], rows: int, columns: int) -> None:
    u = noise.uniform(keys(rows, 7), stream, columns).flatten()
    assert chi_square_p((u * 64).long().bincount(minlength=64)) > 1e-3
    distance = (u.sort().values - (torch.arange(len(u)) + 0.5) / len(u)).abs().max()
    assert distance * len(u) ** 0.5 < 1.95  # Kolmogorov-Smirnov, p = 0.001
    assert chi_square_p((u * 2**20).long().remainder(64).bincount(minlength=64)) > 1e-3  # lower bits too


NEIGHBOURS = {
    "counters": lambda i, n: (noise.uniform(keys(1), (i,), n), noise.uniform(keys(1), (i,), torch.arange(n) + 1)),
    "keys": lambda i, n: (noise.uniform(keys(n), (i,), 1), noise.uniform(keys(n + 1)[1:], (i,), 1)),
    "streams": lambda i, n: (noise.uniform(keys(1), (0, i), n), noise.uniform(keys(1), (0, i + 1), n)),
    "levels": lambda i, n: (noise.uniform(keys(1), (i,), n), noise.uniform(keys(1), (i, 0), n)),
    "seeds": lambda i, n: (noise.uniform(keys(n, i), (0,), 1), noise.uniform(keys(n, i + 1), (0,), 1)),
}


@each(("name", "seed"), itertools.product(NEIGHBOURS, range(3)))
def test_neighbours_are_independent(name: str, seed: int) -> None:
    a, b = (u.flatten() for u in NEIGHBOURS[name](seed, 20_000))
    assert not (a == b).any()
    cells = (a * 12).long() * 12 + (b * 12).long()
    assert chi_square_p(cells.bincount(minlength=144)) > 1e-3
    differ = ((a * 2**52).long() ^ (b * 2**52).long())[:, None] >> torch.arange(52) & 1
    assert (differ.double().mean(0) - 0.5).abs().max() < 4.5 * 0.5 / 20_000**0.5  # half of the bits flip, each


def test_gumbel_is_the_transform_of_the_uniform_numbers() -> None:
    u, g = noise.uniform(keys(4), (1, 2), 50_000), noise.gumbel(keys(4), (1, 2), 50_000)
    assert g.dtype == torch.float32
    torch.testing.assert_close(g.double(), -(-u.log()).log(), rtol=1e-6, atol=1e-6)
    assert g.mean().item() == pytest.approx(0.5772, abs=0.015)
    assert g.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


@pytest.mark.parametrize("bits", [0, WORD])
def test_the_interval_is_open(bits: int) -> None:
    """With the counter at which all of a number's bits are 0, and the one at which all are 1."""
    key, stream = noise.key(3), (4, 5)
    steps = (unmixed(bits) - base(key, stream)) * pow(GAMMA, -1, WORD + 1)
    counter, keys_B = torch.tensor([signed(steps - 1)]), torch.tensor([key])
    u = noise.uniform(keys_B, stream, counter).item()
    assert 0 < u < 1 and u == pytest.approx(float(bits > 0))
    assert noise.gumbel(keys_B, stream, counter).isfinite().all()


# ---------------------------------------------------------------- keys


def test_keys_differ() -> None:
    parts = [p for n in (1, 2, 3, 4) for p in itertools.product((-1, 0, 1, 2, 3, 1 << 40), repeat=n)]
    found = {noise.key(*p) for p in parts}
    assert len(found) == len(parts)  # order, length and sign matter
    assert all(-(1 << 63) <= k < 1 << 63 for k in found)
    assert noise.keys(1, 2).tolist() == [noise.key(1, 2)] and noise.keys(1, 2).dtype == torch.int64


def test_a_key_and_a_stream_of_the_same_numbers_do_not_cancel() -> None:
    a, b = (0, 0, 1, 2), (0, 0, 1, 3)
    assert not (noise.uniform(noise.keys(*a), b, 100) == noise.uniform(noise.keys(*b), a, 100)).any()
    rows = [
        noise.uniform(noise.keys(*key), stream, 4) for key, stream in itertools.product([a, b, (1,), (2,)], repeat=2)
    ]
    assert torch.cat(rows).unique().numel() == 64


def test_numbers_never_change() -> None:
    """recipes/base and every published run rest on these."""
    assert noise.key() == 0
    assert [noise.key(0), noise.key(0, 1, 2, 3), noise.key(-5)] == GOLDEN_KEYS
    found = noise.uniform(torch.tensor([noise.key(0, 1, 2, 3)]), (4, 5), torch.tensor([0, 1, 2**40]))
    assert found.flatten().tolist() == GOLDEN_NUMBERS


GOLDEN_KEYS = [-4616330145664149646, 1579779486438882565, 8676617629008921179]
GOLDEN_NUMBERS = [0.0158895271497691, 0.3162801329318906, 0.4562524534868829]


def test_numbers_are_those_of_splitmix64() -> None:
    numbers = [noise.key(9, i) for i in range(200)] + [0, -1, (1 << 63) - 1, -(1 << 63)]
    found = noise.uniform(torch.tensor(numbers), (1, 2), 3)
    for row, key in zip(found.tolist(), numbers):
        bits = [mixed(base(key, (1, 2)) + (i + 1) * GAMMA) >> 12 for i in range(3)]
        assert row == [(b + 0.5) * 2.0**-52 for b in bits]


# ---------------------------------------------------------------- invariance


def test_a_row_depends_on_its_key_and_counters_alone() -> None:
    rows, stream = keys(6, 3), (2, 7)
    whole = noise.uniform(rows, stream, 40)
    assert torch.equal(whole, noise.uniform(rows, stream, torch.arange(40)))
    assert torch.equal(whole, noise.uniform(rows, stream, torch.arange(40).expand(6, -1)))
    for i in range(6):
        assert torch.equal(whole[i : i + 1], noise.uniform(rows[i : i + 1], stream, 40))
    order, places = torch.tensor([4, 1, 1, 5]), torch.tensor([[3, 39, 0]] * 4)
    assert torch.equal(whole[order][:, places[0]], noise.uniform(rows[order], stream, places))


def test_global_random_state_stays(rng_untouched: None) -> None:
    noise.gumbel(noise.keys(1), (2,), 10)
