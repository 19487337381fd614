"""Completes a prompt of ids with a published body: no tokenizer, no pictures.

    body = load_backbone("path/to/LLaDA-8B-Instruct", dtype=torch.bfloat16)
    done = complete(body, prompt_ids, length=128, steps=128, block=32)

It is the sampler of rollouts in greedy mode. With cache="none" it equals LLaDA's sampler (arXiv 2502.09992), with a
cache or a threshold Fast-dLLM's (arXiv 2505.22618).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unidiff import noise
from unidiff.config import checked, convert
from unidiff.kept_keys import Kind
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.sampling.sampler import InterleavedSampler
from unidiff.sequence import Interleaved, Modality, Prompt, Segment, hidden
from unidiff.spec import ModelSpec


@dataclass
class Completion:
    """ids: [B, length] int64. step: [B, length] int64, the row's denoising step that committed each token. forwards:
    [B] passes through the model (guidance adds one pass per step)."""

    ids: Tensor
    step: Tensor
    forwards: Tensor


def complete(
    body: Any,
    prompts: Tensor | Sequence[Sequence[int]],
    length: int,
    steps: int,
    block: int,
    *,
    guidance: float = 0.0,
    threshold: float | None = None,
    cache: Kind = "none",
    refresh: int | None = None,
    text_end: Sequence[int] = (),
) -> Completion:
    """Fills `length` masks after each prompt, block by block, with the most probable tokens.

    body: from `load_backbone`. prompts: ids, [B, P] or a list of different lengths. steps: for the whole length,
    divided evenly among blocks of `block` tokens; a step commits its share, most confident first. guidance: s of
    (1 + s) c − s u, where u has the prompt masked. threshold: instead of following `steps`, commit all tokens of at
    least this probability, and always the most confident one. text_end: ids that end a text; the rest stays masked.
    cache, refresh: see `approximate_cache` and `cache_refresh` of `SamplerConfig`. Raises ValueError for a value out of
    range, if length, steps and block do not divide evenly, or if a prompt leaves too few positions.
    """
    given = checked(locals(), complete)
    for name in ("length", "steps", "block"):
        if given[name] < 1:
            raise ValueError(f"{name} is {given[name]}; it must be at least 1")
    if length % block or steps % (length // block):
        raise ValueError(f"{steps} steps and blocks of {block} do not divide {length} tokens evenly")
    spec = _spec(body, length, tuple(text_end))
    config = SamplerConfig(
        text_steps=steps,
        text_block=block,
        text_threshold=threshold,
        text_guidance=guidance,
        greedy=True,
        approximate_cache=cache,
        cache_refresh=refresh,
    )
    rows = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    rows = convert(rows, list[tuple[int, ...]], "prompts", words=False)
    whole = [Interleaved([Segment(Modality.TEXT, torch.tensor(row), prompt=True)]) for row in rows]  # type: ignore[arg-type]
    given = [Prompt(p, {"text": hidden(p, Modality.TEXT, spec.mask)}) for p in whole]
    sampler = InterleavedSampler(UnifiedModel(body, spec, None, None), config)
    rollouts = sampler.sample(given, [noise.key(i) for i in range(len(given))])
    ids, step = torch.full((len(rows), length), spec.mask), torch.full((len(rows), length), -1)
    for i, rollout in enumerate(rollouts):
        (segment,) = rollout.segments
        assert segment.step is not None
        ids[i, : len(segment)], step[i, : len(segment)] = segment.tokens, segment.step.long()
    return Completion(ids, step, torch.tensor([round(r.compute["text"].forwards) for r in rollouts]))


def _spec(body: Any, length: int, text_end: tuple[int, ...]) -> ModelSpec:
    if "mask" not in body.ids:
        raise ValueError("the body knows no mask token; state mask_token_id in its config.json")
    rows = body.lm_head.weight.shape[0]
    return ModelSpec(
        family="llada",
        mask=body.ids["mask"],
        pad=body.ids.get("pad", body.ids["mask"]),
        bos=None,
        text_end=text_end,
        image_next=None,
        image_begin=(),
        image_end=(),
        text_range=(0, rows),
        image_offset=rows,
        codebook_size=0,
        logit_rows=rows,
        image_grid=(0, 0),
        text_length=length,
        max_positions=body.config.max_position_embeddings,
        attention="bidirectional",
    )
