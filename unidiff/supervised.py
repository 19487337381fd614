"""Masked-diffusion supervised training on demonstrations of a task.

Every sampled segment of a sequence is hidden at its own ratio t ~ U(0, 1) and predicted from what is left, all
segments in one forward pass (clean sequence and noisy copy). Images come in two forms, since rollouts use both:
*edits*, in which only the tokens of the cells that the text names, and sometimes others, are denoised again; and
*full*, in which all are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from unidiff import noise
from unidiff.model import UnifiedModel
from unidiff.muon import Muon
from unidiff.sequence import Canvas, Interleaved, Modality

_FORM, _EXTRA, _RATIO, _MASK, _PICK = range(5)  # noise streams


class Demonstrated(Protocol):
    """A task that can show how it is done (see unidiff.tasks)."""

    def example(self, split: str, index: int): ...

    def demonstration(self, example, attempt: int = 0) -> list: ...

    def region(self, text: str, grid: tuple[int, int]): ...


@dataclass
class SupervisedConfig:
    """steps: optimizer steps. batch_size: sequences a step. lr: Muon's, for the matrices of the blocks.
    lr_rest: AdamW's, for everything else. warmup: first steps, over which both rise linearly.
    decay: last share of the steps, over which both fall linearly to 0.
    corpus: number of demonstrations. edit_extra: chance that an edit also denoises tokens outside its region.
    changed_weight: weight of an image token that differs from the picture before. seed: of data and masks."""

    steps: int = 3000
    batch_size: int = 32
    lr: float = 0.02
    lr_rest: float = 2e-3
    warmup: int = 50
    decay: float = 0.5
    corpus: int = 20_000
    edit_extra: float = 0.3
    changed_weight: float = 4.0
    seed: int = 0


def corpus(model: UnifiedModel, task: Demonstrated, indices: Sequence[int], split: str = "train") -> list[Interleaved]:
    """Demonstrations as token sequences, each image segment carrying its edit region in `edited`."""
    rows = []
    for index in indices:
        example = task.example(split, index)
        prompt = model.encode(example.prompt)
        parts = task.demonstration(example, attempt=0)
        pictures = [p for p in parts if not isinstance(p, str)]
        images = model.encode_images(pictures) if pictures else []
        response = list(_with_images(model, parts, images))
        for i, segment in enumerate(response):
            if segment.modality is Modality.IMAGE:
                region = torch.as_tensor(task.region(parts[i - 1], segment.grid)).flatten()
                response[i] = replace(segment, edited=region)
        rows.append(prompt + response)
    return rows


def _with_images(model: UnifiedModel, parts: list, images: list):
    """Encodes a response whose images are already tokens: one encoder pass for all of them."""
    tokens = iter(images)
    sequence = Interleaved.from_parts(parts, model.encode_text, lambda _: next(tokens), prompt=False)
    return model.ended(sequence)


def draw_forms(row: Interleaved, row_key: int, edit_extra: float) -> Interleaved:
    """One image of the sequence in full form, the others as edits, some of them wider than their region."""
    keys = torch.tensor([row_key])
    images = [i for i, s in enumerate(row) if s.modality is Modality.IMAGE and not s.prompt]
    pick = int(noise.uniform(keys, (_PICK,), 1) * len(images)) if images else -1
    out = list(row)
    for order, i in enumerate(images):
        segment = row[i]
        assert segment.edited is not None
        edited: Tensor | None = None
        if order != pick:
            wide, share = noise.uniform(keys, (_FORM, i), 2)[0].tolist()
            extra = noise.uniform(keys, (_EXTRA, i), len(segment))[0] < share * 0.25
            edited = segment.edited | extra if wide < edit_extra else segment.edited
        out[i] = replace(segment, edited=edited)
    return Interleaved(out)


def draw_mask(canvas: Canvas, keys_B: Tensor) -> Tensor:
    """[B, L] bool: in each sampled segment, each token hidden with the segment's own ratio t ~ U(0, 1)."""
    segment = canvas.segment.clamp(min=0)
    ratio = noise.uniform(keys_B, (_RATIO,), int(segment.max()) + 1).gather(1, segment)
    # At least 2 % so that a segment of 64 tokens is rarely left without any.
    counter = segment * canvas.shape[1] + canvas.clean.offset
    return canvas.sampled & (noise.uniform(keys_B, (_MASK,), counter) < ratio.clamp(min=0.02))


def supervised_loss(model: torch.nn.Module, canvas: Canvas, mask: Tensor, changed_weight: float) -> dict[str, Tensor]:
    """Mean cross-entropy of masked tokens for each modality; image tokens that change weigh more."""
    logp = model(canvas, mask)
    changed = (canvas.clean.previous >= 0) & (canvas.clean.previous != canvas.ids)
    weight = mask * (1 + (changed_weight - 1) * changed)
    losses = {}
    for modality in Modality:
        w = weight * (canvas.modality == modality)
        losses[modality.name.lower()] = -(logp * w).sum() / w.sum().clamp(min=1)
    return losses


def optimizers(model: UnifiedModel, config: SupervisedConfig) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the body's blocks, AdamW for embeddings, head and norms."""
    blocks = [p for p in model.backbone.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(blocks, config.lr),
        torch.optim.AdamW(rest, config.lr_rest, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def lr_factor(step: int, steps: int, warmup: int, decay: float) -> float:
    """Warm-up, plateau, linear fall to 0 over the last share `decay` of the steps."""
    return min((step + 1) / max(warmup, 1), 1.0, (steps - step) / max(decay * steps, 1))


def batch(
    model: UnifiedModel, rows: Sequence[Interleaved], config: SupervisedConfig, step: int
) -> tuple[Canvas, Tensor]:
    """The batch of one step and its mask; a function of (seed, step) alone."""
    order = noise.uniform(noise.keys(config.seed, step), (_PICK,), config.batch_size)[0]
    chosen = (order * len(rows)).long().tolist()
    keys = [noise.key(config.seed, step, i) for i in range(config.batch_size)]
    canvas = model.render([draw_forms(rows[j], k, config.edit_extra) for j, k in zip(chosen, keys)])
    return canvas, draw_mask(canvas, torch.tensor(keys, device=canvas.ids.device))
