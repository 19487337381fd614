"""Image samplers on a toy vocabulary: what they write is distributed as exact enumeration of all courses says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from unidiff import noise
from unidiff.sampling import image
from unidiff.sampling.draw import draw
from unidiff.sampling.schedules import SCHEDULES

WORDS, TOKENS, STEPS, NOISE = 2, 3, 3, 0.8
State = tuple[int, ...]  # a word of each token, WORDS = masked
TABLE = torch.randn((WORDS + 1) ** TOKENS, TOKENS, WORDS, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
"""A distribution over the words at each place of each partly masked image."""


def index(states: Tensor) -> Tensor:
    return (states * (WORDS + 1) ** torch.arange(TOKENS)).sum(-1)


def log_probs(state: State) -> Tensor:
    return TABLE[int(index(torch.tensor(state)))]


# ---------------------------------------------------------------- exact

Commits = Iterator[tuple[tuple[int, ...], float]]


def emerge(masked: list[int], confidence: dict[int, float], step: int, name: str) -> Commits:
    """Every set that a step may commit, with its probability: independently, each token."""
    kappa = SCHEDULES[name]
    last = step == STEPS - 1
    appears = 1.0 if last else 1 - float(kappa(torch.tensor((step + 1) / STEPS)) / kappa(torch.tensor(step / STEPS)))
    for size in range(len(masked) + 1):
        for chosen in itertools.combinations(masked, size):
            yield chosen, appears**size * (1 - appears) ** (len(masked) - size)


def maskgit(masked: list[int], confidence: dict[int, float], step: int, name: str) -> Commits:
    """Gumbel noise on log-probabilities draws tokens in proportion to p^(1/τ), without replacement."""
    s = (step + 1) / STEPS
    kept = max(int(TOKENS * float(SCHEDULES[name](torch.tensor(s, dtype=torch.float64))) + 1e-9), 1)
    count = len(masked) if step == STEPS - 1 else len(masked) - min(kept, len(masked) - 1)
    if count == len(masked):
        yield tuple(masked), 1.0
        return
    weight = {j: float(torch.tensor(confidence[j] / (NOISE * (1 - s))).exp()) for j in masked}
    for chosen in itertools.combinations(masked, count):
        total = 0.0
        for order in itertools.permutations(chosen):
            left, probability = sum(weight.values()), 1.0
            for j in order:
                probability *= weight[j] / left
                left -= weight[j]
            total += probability
        yield chosen, total


def distribution(commits: Callable[..., Commits], name: str) -> dict[State, float]:
    """Of finished images."""
    states: dict[State, float] = {(WORDS,) * TOKENS: 1.0}
    for step in range(STEPS):
        following: dict[State, float] = {}
        for state, mass in states.items():
            masked = [j for j in range(TOKENS) if state[j] == WORDS]
            if not masked:
                following[state] = following.get(state, 0.0) + mass
                continue
            logp = log_probs(state)
            for drawn in itertools.product(range(WORDS), repeat=len(masked)):
                confidence = {j: logp[j, w].item() for j, w in zip(masked, drawn)}
                values = mass * float(torch.tensor(sum(confidence.values())).exp())
                for chosen, probability in commits(masked, confidence, step, name):
                    if probability == 0:
                        continue
                    words = dict(zip(masked, drawn))
                    new = tuple(words[j] if j in chosen else state[j] for j in range(TOKENS))
                    following[new] = following.get(new, 0.0) + values * probability
        states = following
    return states


# ---------------------------------------------------------------- sampled


def sampled(sampler: str, name: str, rows: int) -> Tensor:
    """[rows, TOKENS] finished images, by the library's commit rules and draws."""
    keys = torch.tensor([noise.key(13, i) for i in range(rows)])
    steps, total, schedule = torch.full((rows,), STEPS), torch.full((rows,), TOKENS), SCHEDULES[name]
    state = torch.full((rows, TOKENS), WORDS)
    for step in range(STEPS):
        masked = state == WORDS
        drawn, log_prob = draw(TABLE[index(state)], noise.uniform(keys, (step, 0), TOKENS))
        if sampler == "emerge":
            commit = image.emerge_commit(masked, step, steps, schedule, noise.uniform(keys, (step, 1), TOKENS))
        else:
            gumbel = noise.gumbel(keys, (step, 1), TOKENS)
            commit = image.maskgit_commit(masked, log_prob, step, steps, total, schedule, NOISE, gumbel)
        state = torch.where(commit, drawn, state)
    return state


@pytest.mark.parametrize("name", list(SCHEDULES))
@pytest.mark.parametrize(("sampler", "commits"), [("emerge", emerge), ("maskgit", maskgit)])
def test_finished_images_follow_the_enumerated_distribution(
    sampler: str, commits: Callable[..., Commits], name: str
) -> None:
    rows = 8000
    exact = distribution(commits, name)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5) and len(exact) == WORDS**TOKENS
    found = index(sampled(sampler, name, rows)).bincount(minlength=(WORDS + 1) ** TOKENS)
    statistic = 0.0
    for state, probability in exact.items():
        expected = probability * rows
        assert expected > 5
        statistic += (float(found[int(index(torch.tensor(state)))]) - expected) ** 2 / expected
    freedom = torch.tensor((len(exact) - 1) / 2)
    assert torch.special.gammaincc(freedom, torch.tensor(statistic / 2)).item() > 1e-3  # Pearson's chi-square test


def test_the_two_samplers_differ_where_the_schedule_is_the_same() -> None:
    """So that the test above means something."""
    first, second = (distribution(commits, "cosine") for commits in (emerge, maskgit))
    assert max(abs(first[s] - second[s]) for s in first) > 0.02
