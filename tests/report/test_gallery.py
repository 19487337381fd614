"""The data behind a page: records agree with the rollouts, the rewards, the router and the compute meter."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from unidiff import noise
from unidiff.grpo.experience import segment_views
from unidiff.report.filters import FILTERS, edits_of
from unidiff.report.gallery import best_and_worst, records, side_by_side
from unidiff.report.record import png
from unidiff.report.regeneration import full_regeneration
from unidiff.rewards.router import ASSIGNMENTS, RewardRouter
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality


def test_records_hold_masks_steps_traces_and_changes(traced, model) -> None:
    for rollout, made in zip(traced.rollouts, records(model, traced), strict=True):
        before = rollout.sequence.prompt.last_image()
        assert before is not None
        for segment, shown in zip(rollout.segments, made.response, strict=True):
            assert shown.steps == int(segment.step.max()) + 1
            for row, kept in zip(segment.trace.tolist(), shown.trace, strict=True):
                assert [p is None for p in kept] == [math.isnan(p) for p in row]
                assert all(abs(p - q) < 1e-4 for p, q in zip(row, kept) if q is not None)
            if segment.modality is Modality.IMAGE:
                assert shown.edited == segment.edited.tolist() and shown.strays == 0
                assert shown.changed == (segment.tokens != before.tokens).tolist()
                before = segment


def test_the_picture_before_the_first_edit_is_what_the_model_read(traced, model, task) -> None:
    examples = [task.example("dev", i // 4) for i in range(8)]
    views = segment_views(model, traced.rollouts, examples)
    i = next(i for i, r in enumerate(traced.rollouts) if len(r.segments) > 1)
    made, bare = records(model, traced, [i], views=views)[0], records(model, traced, [i])[0]
    assert made.prompt[1].picture == png(examples[i].prompt[1])
    assert made.prompt[1].read == bare.prompt[1].picture != made.prompt[1].picture  # the file knows the tokens only
    assert bare.prompt[1].read is None
    for shown in (made, bare):
        assert edits_of(shown)[0].before.picture == bare.prompt[1].picture


def test_a_token_that_strays_from_the_mask_is_counted(traced, model) -> None:
    made = next(s for r in records(model, traced) for s in r.response if s.edited)
    outside = made.edited.index(False)
    changed = [c or i == outside for i, c in enumerate(made.changed)]
    assert replace(made, changed=changed).strays == 1


def test_advantages_side_by_side_are_the_routers(traced, model) -> None:
    compared = side_by_side(traced)
    assert list(compared) == list(ASSIGNMENTS)
    made = records(model, traced)
    for name in ASSIGNMENTS:
        routed = RewardRouter(assignment=name).route(traced.table, traced.groups_B)
        for i, one in enumerate(made):
            for s, shown in enumerate(one.response):
                valid = bool(routed.valid_BS[i, s])
                assert shown.advantages[name] == (float(routed.advantage_BS[i, s]) if valid else None)
    assert all(s.advantage == s.advantages["factorized"] for one in made for s in one.response)


def test_nothing_is_compared_without_rewards_or_groups(traced, model) -> None:
    assert side_by_side(replace(traced, table=None, routed=None)) == {}
    assert side_by_side(replace(traced, groups_B=torch.arange(8))) == {}
    assert records(model, replace(traced, table=None, routed=None), [2])[0].response[0].advantages == {}


def test_rows_are_chosen_and_wrong_ones_named(traced, model) -> None:
    assert [r.title for r in records(model, traced, [5, 0])] == ["board 1", "board 0"]
    with pytest.raises(ValueError, match="sample 8 does not exist: there are 8 rollouts, counted from 0"):
        records(model, traced, [8])


def test_best_and_worst_of_each_group(traced) -> None:
    total = traced.routed.advantage_BS.sum(1)
    chosen = best_and_worst(traced, 2)
    for group in (range(4), range(4, 8)):
        ranks = {row: title for row, title in chosen.items() if row in group}
        assert max(total[list(ranks)]) == max(total[list(group)])
        assert min(total[list(ranks)]) == min(total[list(group)])
        assert all(f"board {group[0] // 4}" in title for title in ranks.values())


@pytest.mark.parametrize("cache", [True, False])
def test_full_regeneration_costs_what_the_meter_measures(cache, model, task) -> None:
    """Of a rollout that did regenerate every picture, the analytic cost is the measured one."""
    sampler = InterleavedSampler(model, SamplerConfig(edit="full", image_steps=3, max_rounds=2, cache=cache))
    rollouts = sampler.sample([model.encode(task.example("dev", 0).prompt)], [noise.key(5, i) for i in range(6)])
    assert any(len(r.segments) > 2 for r in rollouts)
    for rollout in rollouts:
        analytic, measured = full_regeneration(model, rollout), rollout.compute
        for phase in ("text", "write_text", "image", "write_image"):
            if phase in analytic:
                assert analytic[phase].values()[:3] == pytest.approx(measured[phase].values()[:3]), phase
        assert bool(analytic) == any(s.modality is Modality.IMAGE for s in rollout.segments)
        if analytic:
            assert analytic.pictures.values()[:3] == pytest.approx(measured.pictures.values()[:3])


def test_full_regeneration_is_dearer_than_an_edit(traced, model) -> None:
    drawn = [r for r in traced.rollouts if len(r.segments) > 1]
    for rollout in drawn:
        full = full_regeneration(model, rollout)
        assert full["image"].token_forwards > rollout.compute["image"].token_forwards and "select" not in full
        assert full["text"] == rollout.compute["text"]


def test_interference_is_a_sign_that_differs_from_factorized(traced, model) -> None:
    made = records(model, traced)[0]

    def shown(joint: float, factorized: float) -> tuple[set[str], str]:
        advantages = {"joint": joint, "factorized": factorized}
        response = tuple(replace(s, advantages=advantages) for s in made.response)
        rows = FILTERS["credits"](replace(made, segments=(*made.prompt, *response)))
        assert len(rows) == len(response)
        return rows[0].opposed, FILTERS["interference"](rows)

    opposed, words = shown(-0.4, 0.3)
    assert opposed == {"joint"} and f"{len(made.response)} opposite ways" in words
    assert shown(0.4, 0.3)[0] == set() and f"{len(made.response)} the same way" in shown(0.4, 0.3)[1]
    assert shown(1e-9, -1e-9)[0] == set() and "every advantage is 0 or missing" in shown(1e-9, -1e-9)[1]
