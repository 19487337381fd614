"""What a rollout would have cost without edits: the same texts, with every picture regenerated as a whole."""

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
    """The rollout's cost with all tokens of each picture denoised in `image_steps` steps, and nothing to select; empty
    for a rollout without pictures.

    Analytic, counted as the sampler's meter counts: a second rollout would be measured, but it would write other texts
    after its first picture. Phases that do not change are the rollout's own; nobody waited for the pictures, so their
    seconds are 0.
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
    """How many tokens each step of a whole picture runs. before: tokens before it. own: [W] places in the picture of
    its columns, -1 for delimiters. Where `cache_refresh` plays a part, see `unidiff.kept_keys`."""
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
        else:  # what was still masked in the step before
            share = SCHEDULES[settings.image_schedule](torch.tensor((step - 1) / steps, dtype=torch.float64))
            runs.append(max(1, int(n * float(share) + 1e-9)))
    return runs


def _compared(model: UnifiedModel, rollout: Rollout) -> list[Interleaved]:
    """The sequence, and where its pictures were guided the same response behind each of the other prompts."""
    scales = rollout.settings.scales
    guided = any(pair[Modality.IMAGE] for pair in scales.values())
    others = [rollout.without[name] for name in scales if name in rollout.without] if guided else []
    return [rollout.sequence, *(prompt + rollout.segments for prompt in others)]
