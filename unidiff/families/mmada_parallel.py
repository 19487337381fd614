"""MMaDA-Parallel: text and image denoised side by side. Two variants, distinguished by their config.

-M is based on MMaDA: its vocabulary, two more task tokens, MAGVIT-v2. -A is based on Lumina-DiMOO: its vocabulary, row
separators, VQ tokenizer. Neither config names the family, so users must give `family="mmada_parallel"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from unidiff.families.backbone import Backbone
from unidiff.families.dimoo import EDIT, Dimoo
from unidiff.families.llada import Llada, Token
from unidiff.families.mmada import MMADA_TOKENS, Mmada
from unidiff.families.registry import register
from unidiff.images.preprocess import Preprocess
from unidiff.model import UnifiedModel
from unidiff.spec import ModelSpec


class ParallelM(Mmada):
    name: ClassVar[str] = "mmada_parallel"
    tokens: ClassVar[dict[str, Token]] = MMADA_TOKENS | {"interleave": Token("<|interleave|>", 126095)}
    additive_to: ClassVar[str] = "valid_keys"
    preprocessing: ClassVar[dict[str, Preprocess]] = {"default": Preprocess("squash", 512)}
    parallel: ClassVar[str | None] = "interleave"

    def layout(self, ids: dict[str, int], offset: int, rows: int, positions: int) -> dict[str, Any]:
        fields = super().layout(ids, offset, rows, positions)
        sampler = {**fields["sampler"], "text_steps": 128, "text_block": None}
        sampler |= {"image_steps": 30, "image_guidance": 4.0, "image_annealing": "linear"}
        return {**fields, "text_length": 256, "sampler": sampler}


class ParallelA(Dimoo):
    name: ClassVar[str] = "mmada_parallel"
    preprocessing: ClassVar[dict[str, Preprocess]] = {"default": Preprocess("buckets", 512, 32)}
    systems: ClassVar[dict[str, str]] = Dimoo.systems | {"parallel": EDIT}

    def layout(self, ids: dict[str, int], offset: int, rows: int, positions: int) -> dict[str, Any]:
        fields = super().layout(ids, offset, rows, positions)
        sampler = {**fields["sampler"], "text_steps": 128, "text_block": None, "image_guidance": 0.0}
        sampler |= {"image_annealing": "linear"}
        return {**fields, "image_grid": (32, 32), "text_length": 256, "sampler": sampler}


@register
class MmadaParallel:
    """Delegates everything to the variant of a config."""

    name = "mmada_parallel"
    M, A = ParallelM(), ParallelA()

    def detect(self, config: dict[str, Any]) -> bool:
        return False

    def variant(self, config: dict[str, Any]) -> Llada:
        return self.M if config.get("model_type") == "mmada" else self.A

    def load_backbone(self, folder: Path, config: dict[str, Any], *args: Any, **kwargs: Any) -> Backbone:
        return self.variant(config).load_backbone(folder, config, *args, **kwargs)

    def build_spec(self, config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, rows: int) -> ModelSpec:
        return self.variant(config).build_spec(config, tokenizer, rows)

    def spec_of(self, folder: Path, config: dict[str, Any]) -> ModelSpec:
        return self.variant(config).spec_of(folder, config)

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype, **kwargs: Any) -> UnifiedModel:
        return self.variant(config).load(folder, config, dtype, **kwargs)

    def save(self, model: UnifiedModel, folder: Path) -> None:
        self.variant(model.backbone.published).save(model, folder)

    def checks(self, folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
        return self.variant(config).checks(folder, config)
