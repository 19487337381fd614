"""Image samplers on a toy vocabulary: what they write is distributed as exact enumeration of all courses says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch
from torch import Tensor

from tests.covering import pairs
from unidiff import noise
from unidiff.sampling import image
from unidiff.sampling.draw import draw
from unidiff.sampling.schedules import SCHEDULES

State = tuple[int, ...]  # a word of each token, as many as there are words = masked


@dataclass(frozen=True)
class Toy:
    """A vocabulary and images of so many tokens, sampled in so many steps; noise: of MaskGIT."""

    words: int
    tokens: int
    steps: int
    noise: float

    @cached_property
    def table(self) -> Tensor:
        """A distribution over the words at each place of each partly masked image."""
        generator = torch.Generator().manual_seed(self.words)
        states = (self.words + 1) ** self.tokens
        return torch.randn(states, self.tokens, self.words, generator=generator).log_softmax(-1)

    def index(self, states: Tensor) -> Tensor:
        return (states * (self.words + 1) ** torch.arange(self.tokens)).sum(-1)

    def log_probs(self, state: State) -> Tensor:
        return self.table[int(self.index(torch.tensor(state)))]


TOYS = [Toy(2, 3, 3, 0.8), Toy(3, 2, 4, 1.7), Toy(2, 4, 2, 0.4)]


# ---------------------------------------------------------------- exact

Commits = Iterator[tuple[tuple[int, ...], float]]


def emerge(toy: Toy, masked: list[int], confidence: dict[int, float], step: int, name: str) -> Commits:
    """Every set that a step may commit, with its probability: independently, each token."""
    kappa, last = SCHEDULES[name], step == toy.steps - 1
    now, then = (float(kappa(torch.tensor(s / toy.steps))) for s in (step, step + 1))
    appears = 1.0 if last else 1 - then / now
    for size in range(len(masked) + 1):
        for chosen in itertools.combinations(masked, size):
            yield chosen, appears**size * (1 - appears) ** (len(masked) - size)


def maskgit(toy: Toy, masked: list[int], confidence: dict[int, float], step: int, name: str) -> Commits:
    """Gumbel noise on log-probabilities draws tokens in proportion to p^(1/τ), without replacement."""
    s = (step + 1) / toy.steps
    kept = max(int(toy.tokens * float(SCHEDULES[name](torch.tensor(s, dtype=torch.float64))) + 1e-9), 1)
    count = len(masked) if step == toy.steps - 1 else len(masked) - min(kept, len(masked) - 1)
    if count == len(masked):
        yield tuple(masked), 1.0
        return
    weight = {j: float(torch.tensor(confidence[j] / (toy.noise * (1 - s))).exp()) for j in masked}
    for chosen in itertools.combinations(masked, count):
        total = 0.0
        for order in itertools.permutations(chosen):
            left, probability = sum(weight.values()), 1.0
            for j in order:
                probability *= weight[j] / left
                left -= weight[j]
            total += probability
        yield chosen, total


def distribution(toy: Toy, commits: Callable[..., Commits], name: str) -> dict[State, float]:
    """Of finished images."""
    states: dict[State, float] = {(toy.words,) * toy.tokens: 1.0}
    for step in range(toy.steps):
        following: dict[State, float] = {}
        for state, mass in states.items():
            masked = [j for j in range(toy.tokens) if state[j] == toy.words]
            if not masked:
                following[state] = following.get(state, 0.0) + mass
                continue
            logp = toy.log_probs(state)
            for drawn in itertools.product(range(toy.words), repeat=len(masked)):
                confidence = {j: logp[j, w].item() for j, w in zip(masked, drawn)}
                values = mass * float(torch.tensor(sum(confidence.values())).exp())
                for chosen, probability in commits(toy, masked, confidence, step, name):
                    if probability == 0:
                        continue
                    words = dict(zip(masked, drawn))
                    new = tuple(words[j] if j in chosen else state[j] for j in range(toy.tokens))
                    following[new] = following.get(new, 0.0) + values * probability
        states = following
    return states


# ---------------------------------------------------------------- sampled


def sampled(toy: Toy, sampler: str, name: str, rows: int) -> Tensor:
    """[rows, toy.tokens] finished images, by the library's commit rules and draws."""
    keys = torch.tensor([noise.key(13, i) for i in range(rows)])
    steps, total, schedule = torch.full((rows,), toy.steps), torch.full((rows,), toy.tokens), SCHEDULES[name]
    state = torch.full((rows, toy.tokens), toy.words)
    for step in range(toy.steps):
        masked = state == toy.words
        drawn, log_prob = draw(toy.table[toy.index(state)], noise.uniform(keys, (step, 0), toy.tokens))
        if sampler == "emerge":
            commit = image.emerge_commit(masked, step, steps, schedule, noise.uniform(keys, (step, 1), toy.tokens))
        else:
            gumbel = noise.gumbel(keys, (step, 1), toy.tokens)
            commit = image.maskgit_commit(masked, log_prob, step, steps, total, schedule, toy.noise, gumbel)
        state = torch.where(commit, drawn, state)
    return state


SAMPLERS = {"emerge": emerge, "maskgit": maskgit}


@pytest.mark.parametrize(("toy", "name", "sampler"), pairs(TOYS, SCHEDULES, SAMPLERS), ids=str)
def test_finished_images_follow_the_enumerated_distribution(toy: Toy, name: str, sampler: str) -> None:
    rows, commits = 40_000, SAMPLERS[sampler]
    exact = distribution(toy, commits, name)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5) and len(exact) == toy.words**toy.tokens
    found = toy.index(sampled(toy, sampler, name, rows)).bincount(minlength=(toy.words + 1) ** toy.tokens)
    statistic = 0.0
    for state, probability in exact.items():
        expected = probability * rows
        assert expected > 5
        statistic += (float(found[int(toy.index(torch.tensor(state)))]) - expected) ** 2 / expected
    freedom = torch.tensor((len(exact) - 1) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)).item() > 1e-3  # Pearson's chi-square test


def test_the_two_samplers_differ_where_the_schedule_is_the_same() -> None:
    """So that the test above means something."""
    first, second = (distribution(TOYS[0], commits, "cosine") for commits in (emerge, maskgit))
    assert max(abs(first[s] - second[s]) for s in first) > 0.02
