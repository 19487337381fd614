"""Text behind a prompt of ids, by a published body alone: no tokenizer, no pictures.

    body = load_backbone("path/to/LLaDA-8B-Instruct", dtype=torch.bfloat16)
    done = complete(body, prompt_ids, length=128, steps=128, block=32)

The same sampler as that of rollouts, greedy: with cache="none" LLaDA's (arXiv 2502.09992), with one of its caches or
a threshold Fast-dLLM's (arXiv 2505.22618).
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
    """ids: [B, length] int64. step: [B, length] int64, the denoising step of its row that committed each token.
    forwards: [B] passes through the model (with guidance a pass with each prompt)."""

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
    """Fills `length` masks behind each prompt, block by block, the most probable token each time.

    body: of `load_backbone`. prompts: ids, [B, P] or a list of different lengths. steps: for the whole length, shared
    out evenly among its blocks of `block` tokens; each commits its share, the most confident first. guidance: s of
    (1 + s) c − s u, u with the prompt masked. threshold: instead of a number of steps, commit all of at least this
    probability, and the most confident one. text_end: ids behind which a text does not go on (what is left stays
    masked). cache, refresh: see `approximate_cache` and `cache_refresh` of `SamplerConfig`. Raises ValueError for a
    value out of its range, where length, steps and blocks do not divide, or a prompt leaves too few positions.
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
