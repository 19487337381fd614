"""The body of the published families: transformers' Llama without a causal mask, and with rotary embedding in float32.

Nothing else changes, so sharded loading, attention kernels, gradient checkpointing, LoRA and FSDP are the library's
own. The reference implementations rotate queries and keys in float32; transformers rotates in the weights' dtype, which
changes bfloat16 logits.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from unidiff.attention import pad_bias
from unidiff.families import checkpoint
from unidiff.files import write_json


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates [B, heads, L, d] by float32 [B, L, d] in float32, and rounds to the input's dtype."""
    rotated = apply_rotary_pos_emb(query.float(), key.float(), cos, sin)
    return rotated[0].to(query.dtype), rotated[1].to(key.dtype)


class Float32RotaryEmbedding(LlamaRotaryEmbedding):
    """cos and sin in float32, from frequencies that stay float32 when a model is cast."""

    inv_freq: Tensor

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.new_empty(0, dtype=torch.float32), position_ids)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32RotaryEmbedding:
        exact = self.inv_freq
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != exact.dtype:
            self.inv_freq = exact.to(self.inv_freq.device)
        return self


class BidirectionalAttention(LlamaAttention):
    """Llama's attention without a causal mask, with `rotate`."""

    def __init__(self, config: LlamaConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = False

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # the cache's name up to transformers 5.23
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(hidden_states).view(heads).transpose(1, 2) for p in projections)
        query, key = rotate(query, key, *position_embeddings)
        if (store := past_key_values if cache is None else cache) is not None:
            key, value = store.update(key, value, self.layer_idx)
        kind = self.config._attn_implementation or "eager"
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
        out, weights = attend(self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class Backbone(LlamaForCausalLM):
    """A published body. `unidiff.families.load_backbone` makes it.

    published: the content of its config.json, which is saved again. ids: "mask", "pad", "bos", "eos" from config.json,
    else the family's. pad_policy, additive_to: see `ModelSpec`.
    """

    # A family sets these when it loads; the defaults are for a body that is built without a family.
    published: dict[str, Any] = {}  # noqa: RUF012
    ids: dict[str, int] = {}  # noqa: RUF012
    pad_policy: str = "hard"
    additive_to: str = "valid_pairs"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = BidirectionalAttention(config, index)
        self.model.rotary_emb = Float32RotaryEmbedding(config)

    def logits(self, ids: Tensor, valid: Tensor | None = None) -> Tensor:
        """[B, L] ids -> [B, L, V] logits in the weights' dtype, positions 0 … L-1 (pads included).

        valid: [B, L], False or 0 = pad; see `pad_policy`. Logits at pads are undefined.
        """
        mask = pad_bias(valid, self.pad_policy, self.additive_to, self.lm_head.weight.dtype)
        return self(input_ids=ids, attention_mask=mask, use_cache=False).logits

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:  # type: ignore[override]
        """Writes config.json and safetensors with published names. Old files stay until all new ones are written.

        kwargs: as in transformers. Raises ValueError if there are LoRA layers, whose names are not published: merge
        them first.
        """
        if strange := [name for name, _ in self.named_parameters() if "lora_" in name or "base_layer" in name]:
            raise ValueError(f"{strange[0]} belongs to an adapter: call merge_and_unload() of peft before saving")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as draft:
            super().save_pretrained(draft, **{"max_shard_size": "5GB", **kwargs})
            written = {p.name: p for p in Path(draft).iterdir() if p.name not in _LIBRARY_ONLY}
            for stale in {p.name: p for p in checkpoint.files_in(folder)}.keys() - written.keys():
                (folder / stale).unlink()
            for name, path in written.items():
                os.replace(path, folder / name)
        if self.published:
            dtype = str(self.dtype).removeprefix("torch.")
            named = {k: dtype for k in ("torch_dtype", "dtype") if k in self.published}
            write_json(folder / "config.json", {**self.published, **named})


# Files that transformers writes for its own Llama class. The published config.json is written instead.
_LIBRARY_ONLY = {"config.json", "generation_config.json"}
