"""The meter: FLOPs by formula, and the cost of whole rollouts by hand count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.covering import slow_after
from unidiff.model import UnifiedModel
from unidiff.sampling.compute import PICTURE_PHASES, Compute, ComputeMeter, Cost, ModelFlops
from unidiff.sampling.rollout import Rollout
from unidiff.sequence import Interleaved, Modality

Sample = Callable[..., list[Rollout]]
TINY = ModelFlops(parameters=100, layers=2, d_model=8)


# ---------------------------------------------------------------- parts


def test_costs_add_and_scale() -> None:
    a, b = Cost(1, 2, 3, 4), Cost(10, 20, 30, 40)
    assert (a + b).values() == (11, 22, 33, 44) and a.scaled(0.5).values() == (0.5, 1, 1.5, 2)
    assert a.to_dict() == {"forwards": 1, "token_forwards": 2, "flops": 3, "seconds": 4}
    one, other = Compute(text=a, image=b), Compute(text=a, select=a)
    assert {k: v.forwards for k, v in (one + other).items()} == {"text": 2, "image": 10, "select": 1}
    assert one.total == a + b and Compute().total == Cost() and one.scaled(2)["image"] == b + b


def test_pictures_cost_choosing_denoising_and_writing_them() -> None:
    each = Compute({p: Cost(1, 10**i) for i, p in enumerate(("prompt", "text", "write_text", *PICTURE_PHASES))})
    assert each.pictures == Cost(3, 111_000) and each.total.token_forwards == 111_111
    assert Compute(text=Cost(1, 2, 3, 4)).pictures == Cost()


def test_flops_are_the_formula() -> None:
    tokens, keys, positions = torch.tensor([3, 0]), torch.tensor([10, 7]), torch.tensor([2, 0])
    expected = 2 * 100 * 3 + 4 * 2 * 8 * 3 * 10 + 2 * 8 * 50 * 2
    assert TINY.forward(tokens, keys, positions, 50).tolist() == [expected, 0]


def test_parameters_of_the_blocks_are_counted(model: UnifiedModel) -> None:
    flops = ModelFlops.of(model.backbone)
    attention, mlp, norms = 4 * 32 * 32, 3 * 32 * 48, 2 * 32
    assert (flops.parameters, flops.layers, flops.d_model) == (2 * (attention + mlp + norms), 2, 32)


def test_the_meter_adds_by_row_and_phase() -> None:
    meter = ComputeMeter(TINY, 3, torch.device("cpu"))
    rows, four, none = torch.tensor([2, 0]), torch.tensor([4, 4]), torch.tensor([0, 0])
    meter.add("text", rows, four, four, none, 0, torch.tensor([True, False]))
    meter.add("text", rows, four, four, four, 10, torch.tensor([True, True]))
    with meter.clock("image"):
        pass
    first, second, third = meter.rows()
    body, head = 2 * 100 * 4 + 4 * 2 * 8 * 4 * 4, 2 * 8 * 10 * 4
    assert first["text"].values()[:3] == (1, 4, body + head) and second["text"].values()[:3] == (0, 0, 0)
    assert third["text"].values()[:3] == (2, 8, 2 * body + head)
    assert first["image"].seconds == second["image"].seconds > 0 and first["image"].forwards == 0


def test_a_shared_cost_is_spread_over_groups() -> None:
    meter = ComputeMeter(TINY, 4, torch.device("cpu"))
    tokens = torch.tensor([6, 8])
    meter.add("prompt", torch.tensor([0, 2]), tokens, tokens, tokens * 0, 0, torch.tensor([True, True]))
    meter.share("prompt", 2)
    meter.share("nothing", 2)
    assert [c["prompt"].token_forwards for c in meter.rows()] == [3, 3, 4, 4]
    assert [c["prompt"].forwards for c in meter.rows()] == [0.5] * 4


# ---------------------------------------------------------------- whole rollouts


def forward(flops: ModelFlops, tokens: int, keys: int, positions: int = 0, rows: int = 0) -> float:
    return 2 * flops.parameters * tokens + 4 * flops.layers * 32 * tokens * keys + 2 * 32 * rows * positions


def by_hand(model: UnifiedModel, row: Interleaved, cache: bool, image_steps: int) -> dict[str, list[float]]:
    """[forwards, tokens, flops] of each phase of a rollout whose texts were drawn in one step each."""
    flops, spec = ModelFlops.of(model.backbone), model.spec
    words, codes = spec.text_range[1] - spec.text_range[0], spec.codebook_size
    cost: dict[str, list[float]] = {}
    context = sum(len(s) + (1 if s.modality is Modality.TEXT else 2) for s in row.prompt)

    def add(phase: str, tokens: int, logits: int = 0) -> None:
        keys = context + tokens
        ran = tokens if cache else keys
        one = [1, ran, forward(flops, ran, keys, tokens if logits else 0, logits)]
        cost[phase] = [a + b for a, b in zip(cost.get(phase, [0, 0, 0]), one)]

    if cache:
        length, context = context, 0
        add("prompt", length)
        context = length
    for at, segment in enumerate(row.response):
        if segment.modality is Modality.TEXT:
            add("text", spec.text_length, words)
            whole = len(segment)
        else:
            for _ in range(image_steps):
                add("image", int(segment.sampled.sum()), codes)
            whole = len(segment) + 2
        if cache and at < len(row.response) - 1:
            add(f"write_{segment.modality.name.lower()}", whole)
        context += whole
    return cost


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize(("edit", "image_steps", "taken"), [("full", 2, 2), ("random", 16, 2), ("random", 4, 1)])
def test_costs_are_a_hand_count(
    cache: bool, edit: str, image_steps: int, taken: int, model: UnifiedModel, sample: Sample
) -> None:
    settings = {"text_threshold": None, "text_steps": 1, "edit": edit, "edit_share": 0.125, "cache": cache}
    rollouts = sample(image_steps=image_steps, **settings)
    assert max(len(r.segments) for r in rollouts) == 5
    for rollout in rollouts:
        expected = by_hand(model, rollout.sequence, cache, taken)
        for phase, cost in rollout.compute.items():
            assert list(cost.values()[:3]) == pytest.approx(expected.pop(phase, [0, 0, 0])), phase
        assert not expected


@pytest.mark.parametrize("edit", ["region", "confidence", "full"])
def test_a_cache_saves_token_forwards(edit: str, sample: Sample) -> None:
    cached, plain = sample(edit=edit), sample(edit=edit, cache=False)
    for a, b in zip(cached, plain):
        assert a.compute.total.token_forwards < b.compute.total.token_forwards
        assert a.compute.total.flops < b.compute.total.flops
        assert {k for k, v in b.compute.items() if v.forwards} <= {"text", "image", "select"}
        assert a.compute["text"].forwards == b.compute["text"].forwards


@pytest.mark.parametrize(
    "settings", slow_after(1, [{"edit": "confidence", "text_threshold": None}, {}, {"text_block": 3}])
)
def test_a_rollout_costs_the_same_in_any_batch(
    settings: dict[str, Any], prompts: list[Interleaved], sample: Sample
) -> None:
    keys = list(range(100, 108))
    together = sample(prompts[:2] * 4, keys, **settings)
    assert len({r.compute.total.token_forwards for r in together}) > 2
    for i, rollout in enumerate(together):
        (alone,) = sample([prompts[i % 2]], keys[i : i + 1], **settings)
        for phase in {*alone.compute, *rollout.compute}:
            expected = alone.compute.get(phase, Cost()).values()[:3]
            assert rollout.compute.get(phase, Cost()).values()[:3] == pytest.approx(expected), phase


def test_a_group_reads_its_prompt_once(prompts: list[Interleaved], sample: Sample) -> None:
    group = sample(prompts[:2], list(range(8)))
    alone = sample(prompts[:2], [0, 4])
    for i in range(2):
        mine = group[4 * i : 4 * i + 4]
        assert sum(r.compute["prompt"].token_forwards for r in mine) == alone[i].compute["prompt"].token_forwards
        assert [r.compute["prompt"].forwards for r in mine] == [0.25] * 4


def test_edits_cost_less_than_regeneration(sample: Sample) -> None:
    edited, full = (sample(edit=edit, edit_share=0.125, image_steps=8) for edit in ("random", "full"))
    for a, b in zip(edited, full):
        if len(a.segments) > 1:
            assert a.compute["image"].token_forwards < b.compute["image"].token_forwards / 8
