"""Approximate caches of bidirectional models: what they run, and that with one layer they are exact.

In a body of one layer keys and values depend on the token alone. A token that is not run again and has not changed
then has the right keys and values, so that every kind of cache must give the same tokens: unless a column is missed,
or stored in a wrong place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.covering import pairs, slow_after
from tests.families.checkpoints import make_checkpoint
from tests.sampling.test_bidirectional import GUIDED, drawing, load, parts
from unidiff import noise
from unidiff.model import UnifiedModel
from unidiff.report.regeneration import full_regeneration
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.fill import fill
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Modality
from unidiff.templates import Guided, Picture

KINDS = ("prefix", "dual", "delayed")
EACH_KIND = pytest.mark.parametrize("kind", KINDS)
FAMILIES = ("mmada", "mmada_parallel", "dimoo")
BASE: dict[str, Any] = {"text_threshold": None, "text_steps": 8, "text_block": 4, "max_rounds": 2, "image_steps": 6}
SETTINGS: dict[str, dict[str, Any]] = {
    "edits": {"edit": "random", "edit_share": 0.4},
    "whole": {"edit": "full", "image_schedule": "linear"},
    "emerge": {"edit": "full", "image_sampler": "emerge", "text_threshold": 0.3, "text_steps": 8},
    "guided": {"edit": "confidence", "edit_share": 0.5, **GUIDED},
}
EACH_SETTING = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture(scope="module", params=FAMILIES)
def flat(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UnifiedModel:
    """A body of one layer, which writes texts of several lengths with pictures between."""
    folder = make_checkpoint(request.param, tmp_path_factory.mktemp("flat"), n_layers=1)
    return drawing(UnifiedModel.from_pretrained(folder).double())


@pytest.fixture(scope="module", params=FAMILIES[1:])
def deep(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> UnifiedModel:
    return drawing(load(request.param, tmp_path_factory))


def sample(model: UnifiedModel, only: int | None = None, **settings: Any) -> list[Rollout]:
    config = SamplerConfig(**{**BASE, **settings})
    words = ["find a safe way", "go to the goal then", "find"]
    rows = range(6) if only is None else [only]
    prompts = [model.encode_prompt(parts(model, ("red", "blue")[i % 2], words[i % 3]), config.guides) for i in rows]
    return InterleavedSampler(model, config).sample(prompts, [noise.key(7, i) for i in rows])


def same(ours: list[Rollout], theirs: list[Rollout], tolerance: float) -> None:
    """The same tokens in the same steps, and with the same probabilities to the tolerance."""
    for one, other in zip(ours, theirs, strict=True):
        assert len(one.segments) == len(other.segments)
        for a, b in zip(one.segments, other.segments):
            assert torch.equal(a.tokens, b.tokens)
            if a.step is not None and a.probability is not None:
                assert b.step is not None and torch.equal(a.step, b.step)
                assert (a.probability - b.probability).abs().max() <= tolerance


def pictured(rollouts: list[Rollout]) -> list[Rollout]:
    """Those that have a picture of their own."""
    own = [r for r in rollouts if any(s.modality is Modality.IMAGE for s in r.segments)]
    assert own
    return own


def cost(rollouts: list[Rollout], phase: str) -> float:
    return sum(r.compute[phase].token_forwards for r in rollouts)


@pytest.mark.parametrize(("kind", "name"), slow_after(4, pairs(KINDS, SETTINGS)))
def test_one_layer_is_exact(flat: UnifiedModel, kind: str, name: str) -> None:
    refresh = 2 if name in ("whole", "guided") else None
    exact = sample(flat, **SETTINGS[name])
    kept = sample(flat, approximate_cache=kind, cache_refresh=refresh, **SETTINGS[name])
    assert sum(s.modality is Modality.IMAGE for r in exact for s in r.segments) >= 6
    same(kept, exact, 1e-6)
    for phase in ("text", "image"):
        assert cost(kept, phase) < cost(exact, phase)


@EACH_SETTING
def test_refreshed_in_every_step_nothing_changes(deep: UnifiedModel, name: str) -> None:
    exact = sample(deep, **SETTINGS[name])
    refreshed = sample(deep, approximate_cache="dual", cache_refresh=1, **SETTINGS[name])
    same(refreshed, exact, 0.0)
    assert [r.compute.total.values()[:3] for r in refreshed] == [r.compute.total.values()[:3] for r in exact]


@pytest.mark.parametrize(("kind", "name"), slow_after(3, pairs(KINDS, SETTINGS)))
def test_a_row_does_not_depend_on_the_others(deep: UnifiedModel, kind: str, name: str) -> None:
    settings = {"approximate_cache": kind, "cache_refresh": 3, **SETTINGS[name]}
    together = sample(deep, **settings)
    for i, rollout in enumerate(together):
        alone = sample(deep, only=i, **settings)
        same(alone, [rollout], 1e-5)
        assert alone[0].compute.total.values()[:3] == pytest.approx(rollout.compute.total.values()[:3])


def test_what_an_edit_runs(deep: UnifiedModel) -> None:
    """The first step the whole sequence, the others the edited tokens; of a delayed cache fewer and fewer of them."""
    settings = {"edit": "random", "edit_share": 0.5, "image_steps": 8, "max_rounds": 1, "text_steps": 1}
    for kind, cells in (("none", None), ("dual", [8, 8, 8]), ("delayed", [8, 7, 5])):
        for rollout in pictured(sample(deep, approximate_cache=kind, **settings)):
            canvas = deep.render([rollout.sequence])
            picture = max(i for i, s in enumerate(rollout.sequence) if s.modality is Modality.IMAGE)
            whole = int((canvas.clean.valid & (canvas.segment <= picture)).sum())
            expected = 4 * whole if cells is None else whole + sum(cells)
            assert rollout.compute["image"].forwards == 4
            assert rollout.compute["image"].token_forwards == expected


@EACH_KIND
@pytest.mark.parametrize(("refresh", "guided"), [(None, {}), (2, GUIDED)], ids=["plain", "refreshed-guided"])
def test_the_count_of_full_regeneration_is_the_meter_s(
    deep: UnifiedModel, kind: str, refresh: int | None, guided: dict[str, Any]
) -> None:
    for rollout in pictured(sample(deep, edit="full", approximate_cache=kind, cache_refresh=refresh, **guided)):
        counted = full_regeneration(deep, rollout).total.values()[:3]
        assert counted == pytest.approx(rollout.compute.total.values()[:3])


LAYOUTS: dict[str, Callable[[Any], Guided]] = {
    "text_to_image": lambda t: t.text_to_image("red cube", Picture.blank(4, 4)),
    "understand": lambda t: t.understand("what is red ?", [Picture(tuple(range(16)), (4, 4))], 8),
}


@EACH_KIND
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_one_layer_are_exact(kind: str, name: str, tmp_path: Path) -> None:
    model = UnifiedModel.from_pretrained(
        make_checkpoint("mmada", tmp_path, n_layers=1, max_sequence_length=1024)
    ).double()
    layouts = [LAYOUTS[name](model.template)] * 3
    keys = [noise.key(5, i) for i in range(3)]
    settings = {k: v for k, v in BASE.items() if k != "max_rounds"}
    for guidance in (0.0, 1.5):
        config = SamplerConfig(text_guidance=guidance, image_guidance=guidance, **settings)
        exact = fill(model, layouts, keys, config)
        kept = fill(model, layouts, keys, dataclasses.replace(config, approximate_cache=kind))
        for one, other in zip(kept, exact, strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.step, other.step)


def test_layouts_run_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = UnifiedModel.from_pretrained(make_checkpoint("mmada", tmp_path, max_sequence_length=1024))
    ran: list[int] = []
    hidden = UnifiedModel.hidden

    def spy(self: UnifiedModel, tokens: Any, *args: Any) -> torch.Tensor:
        ran.append(tokens.shape[1])
        return hidden(self, tokens, *args)

    monkeypatch.setattr(UnifiedModel, "hidden", spy)
    layout = LAYOUTS["text_to_image"](model.template)
    fill(model, [layout], [noise.key(1)], SamplerConfig(image_steps=4, approximate_cache="dual"))
    assert ran == [len(layout.conditional), 16, 16, 16]


def test_what_is_refused(deep: UnifiedModel) -> None:
    with pytest.raises(ValueError, match="cache_refresh is 0; it must be at least 1, or None"):
        SamplerConfig(approximate_cache="dual", cache_refresh=0)
    with pytest.raises(ValueError, match="cache_refresh is 4, but approximate_cache is none: nothing is kept"):
        SamplerConfig(cache_refresh=4)
    with pytest.raises(ValueError, match="approximate_cache is 'half'; choose one of none, prefix, dual, delayed"):
        SamplerConfig(approximate_cache="half")  # type: ignore[arg-type]
