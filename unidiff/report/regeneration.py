"""What a rollout would have cost without edits: the same texts, with every picture regenerated as a whole."""

from __future__ import annotations

import torch

from unidiff.model import UnifiedModel
from unidiff.sampling.compute import Compute, Cost, ModelFlops
from unidiff.sampling.rollout import Rollout
from unidiff.sequence import Interleaved, Modality


def full_regeneration(model: UnifiedModel, rollout: Rollout) -> Compute:
    """The rollout's cost with all tokens of each picture denoised in `image_steps` steps, and nothing to select; empty
    for a rollout without pictures.

    Analytic, counted as the sampler's meter counts: a second rollout would be measured, but it would write other texts
    after its first picture. Phases that do not change are the rollout's own; nobody waited for the pictures, so their
    seconds are 0.
    """
    flops, steps = ModelFlops.of(model.backbone), rollout.settings.image_steps
    bidirectional = model.spec.attention == "bidirectional"
    image = Cost()
    for whole in _compared(model, rollout):
        canvas = model.render([whole])
        for ordinal, segment in enumerate(whole):
            if segment.prompt or segment.modality is not Modality.IMAGE:
                continue
            before = int((canvas.clean.valid & (canvas.segment < ordinal)).sum())
            n = len(segment)
            keys = before + (int((canvas.segment == ordinal).sum()) if bidirectional else n)
            run = n if rollout.settings.cache and not bidirectional else keys
            tokens, seen, positions = (torch.tensor(x) for x in (run, keys, n))
            one = flops.forward(tokens, seen, positions, model.spec.codebook_size)
            image += Cost(steps, run * steps, float(one) * steps)
    same = {phase: cost for phase, cost in rollout.compute.items() if phase not in ("image", "select")}
    return Compute({**same, "image": image}) if image.forwards else Compute()


def _compared(model: UnifiedModel, rollout: Rollout) -> list[Interleaved]:
    """The sequence, and where its pictures were guided the same response behind each of the other prompts."""
    scales = rollout.settings.scales
    guided = any(pair[Modality.IMAGE] for pair in scales.values())
    others = [rollout.without[name] for name in scales if name in rollout.without] if guided else []
    return [rollout.sequence, *(prompt + rollout.segments for prompt in others)]
