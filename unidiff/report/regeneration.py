"""The cost of a rollout without edits: the same texts, with every picture regenerated as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from unidiff.model import UnifiedModel
from unidiff.sampling.compute import Compute, Cost, ModelFlops
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.rollout import Rollout
from unidiff.sampling.schedules import SCHEDULES
from unidiff.sequence import Interleaved, Modality


def full_regeneration(model: UnifiedModel, rollout: Rollout) -> Compute:
    """The rollout's cost if all tokens of each picture were denoised in `image_steps` steps, without selection; empty
    for a rollout without pictures.

    It is computed, with the formulas of the sampler's meter. A second rollout could be measured, but it would write
    other texts after its first picture. Phases that do not change are copied from the rollout; the seconds of pictures
    are 0.
    """
    flops, settings = ModelFlops.of(model.backbone), rollout.settings
    bidirectional = model.spec.attention == "bidirectional"
    image = Cost()
    for whole in _compared(model, rollout):
        canvas = model.render([whole])
        for ordinal, segment in enumerate(whole):
            if segment.prompt or segment.modality is not Modality.IMAGE:
                continue
            before = int((canvas.clean.valid & (canvas.segment < ordinal)).sum())
            own = (
                canvas.clean.offset[0, (canvas.segment == ordinal)[0]] if bidirectional else torch.arange(len(segment))
            )
            for run in _tokens_run(before, own, settings, bidirectional):
                tokens, seen, positions = (torch.tensor(x) for x in (run, before + len(own), len(segment)))
                one = flops.forward(tokens, seen, positions, model.spec.codebook_size)
                image += Cost(1, run, float(one))
    same = {phase: cost for phase, cost in rollout.compute.items() if phase not in ("image", "select")}
    return Compute({**same, "image": image}) if image.forwards else Compute()


def _tokens_run(before: int, own: Tensor, settings: SamplerConfig, bidirectional: bool) -> list[int]:
    """The number of tokens that each step of a whole picture runs. before: tokens before it. own: [W] offsets of its
    columns in the picture, -1 for delimiters. For `cache_refresh` see `unidiff.kept_keys`."""
    inside = (own >= 0).nonzero()[:, 0]
    n, steps, kind = len(inside), settings.image_steps, settings.approximate_cache
    if not bidirectional:
        return [n if settings.cache else before + n] * steps
    runs = []
    for step in range(steps):
        if kind == "none" or step % (settings.cache_refresh or steps) == 0:
            runs.append(before + len(own))
        elif kind == "prefix":
            runs.append(len(own) - int(inside[0]))
        elif kind == "dual":
            runs.append(n)
        else:  # the tokens that were still masked in the step before
            share = SCHEDULES[settings.image_schedule](torch.tensor((step - 1) / steps, dtype=torch.float64))
            runs.append(max(1, int(n * float(share) + 1e-9)))
    return runs


def _compared(model: UnifiedModel, rollout: Rollout) -> list[Interleaved]:
    """The sequence; if its pictures were guided, also the same response after each of the other prompts."""
    scales = rollout.settings.scales
    guided = any(pair[Modality.IMAGE] for pair in scales.values())
    others = [rollout.without[name] for name in scales if name in rollout.without] if guided else []
    return [rollout.sequence, *(prompt + rollout.segments for prompt in others)]
