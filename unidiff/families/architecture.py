"""The architecture of LLaDA and related families: names and shapes of weights, and conversion of config.json to Llama.

Their published code is one architecture. With the renaming of `KEYS` it equals transformers' Llama without a causal
mask: the same weights give the same logits.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from unidiff.families import checkpoint

# ---------------------------------------------------------------- names of the weights

# Published name of a weight -> transformers' name, and its shape: v rows, d width, k width of the keys, m of the MLP.
_OUTSIDE = {"wte": ("model.embed_tokens", "vd"), "ln_f": ("model.norm", "d"), "ff_out": ("lm_head", "vd")}
_INSIDE = {
    "q_proj": ("self_attn.q_proj", "dd"),
    "k_proj": ("self_attn.k_proj", "kd"),
    "v_proj": ("self_attn.v_proj", "kd"),
    "attn_out": ("self_attn.o_proj", "dd"),
    "attn_norm": ("input_layernorm", "d"),
    "ff_norm": ("post_attention_layernorm", "d"),
    "ff_proj": ("mlp.gate_proj", "md"),
    "up_proj": ("mlp.up_proj", "md"),
    "ff_out": ("mlp.down_proj", "dm"),
}
# The same as patterns; transformers uses them for loading and saving.
KEYS = {rf"^model\.transformer\.{theirs}\.": f"{ours}." for theirs, (ours, _) in _OUTSIDE.items()}
KEYS |= {
    rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
    for theirs, (ours, _) in _INSIDE.items()
}


def published_shapes(llama: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Published name -> shape of every weight."""
    d, heads = llama.hidden_size, llama.num_attention_heads
    side = {"v": llama.vocab_size, "d": d, "m": llama.intermediate_size}
    side["k"] = d // heads * (llama.num_key_value_heads or heads)
    sides = {name: each for name, (_, each) in _OUTSIDE.items() if name != "ff_out" or not llama.tie_word_embeddings}
    for i in range(llama.num_hidden_layers):
        sides |= {f"blocks.{i}.{name}": each for name, (_, each) in _INSIDE.items()}
    return {f"model.transformer.{name}.weight": tuple(side[x] for x in each) for name, each in sides.items()}


# ---------------------------------------------------------------- config.json

# Required values: with any other value the published code computes something else than our Llama.
_FIXED: dict[str, tuple[Any, ...]] = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "bias_for_layer_norm": (False, None),
    "rope": (True,),
    "rope_full_precision": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False, None),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
}
_DROPOUTS = ("attention_dropout", "residual_dropout", "embedding_dropout")
# Known fields that do not affect a forward pass: initialisation, run settings, and parameters of disabled parts.
_PASSIVE = {"embedding_size", "alibi_bias_max", "attention_layer_norm_with_affine", "flash_attention", "mlp_ratio"}
_PASSIVE |= {"multi_query_attention", "init_device", "init_fn", "init_std", "init_cutoff_factor", "precision"}
_PASSIVE |= {"use_cache", "train_max_sequence_length", "model_type", "auto_map", "torch_dtype", "unidiff"}
_PASSIVE |= {"mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "_name_or_path", "_attn_implementation"}
_PASSIVE |= {"llm_vocab_size", "codebook_size", "num_vq_tokens", "num_new_special_tokens", "new_vocab_size"}
_PASSIVE |= {"text_vocab_size", "llm_model_path", "transformers_version", "w_clip_vit", "gradient_checkpointing"}


def _field(config: dict[str, Any], name: str, kind: type | tuple[type, ...]) -> Any:
    if name not in config:
        raise ValueError(f"config.json: field {name} is missing; every field of the architecture must be stated")
    value = config[name]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    positive = not isinstance(value, (int, float)) or isinstance(value, bool) or 0 < value < 1 << 62
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds) or not positive:
        raise ValueError(f"config.json: {name} is {value!r}, which is not a value for it")
    return value


def read_architecture(config: dict[str, Any]) -> LlamaConfig:
    """The Llama config of a published config.json. Every field of the architecture is read.

    Raises ValueError with the field that is missing, has a wrong type, or means another architecture. Dropout is
    switched off, with a warning if the config asks for it, because importance ratios need a deterministic model.
    """
    for name, allowed in _FIXED.items():
        if name not in config:
            raise ValueError(f"config.json: field {name} is missing; every field of the architecture must be stated")
        if not any(config[name] is a or (config[name] == a and type(config[name]) is type(a)) for a in allowed):
            raise ValueError(f"config.json: {name} is {config[name]!r}; only {allowed[0]!r} is supported")
    for name in _DROPOUTS:
        if name not in config:
            raise ValueError(f"config.json: field {name} is missing; every field of the architecture must be stated")
        if config[name]:
            warnings.warn(f"config.json: {name} is {config[name]!r}; dropout is switched off", stacklevel=2)
    d, heads = _field(config, "d_model", int), _field(config, "n_heads", int)
    kv_heads = _kv_heads(config, heads)
    if d % heads or heads % kv_heads:
        raise ValueError(f"config.json: d_model {d}, n_heads {heads} and n_kv_heads {kv_heads} do not divide")
    mlp = _field(config, "mlp_hidden_size", (int, type(None))) or d * _field(config, "mlp_ratio", int)
    _field(config, "embedding_size", (int, type(None)))  # not trusted: see `check_weights`
    return LlamaConfig(
        vocab_size=_field(config, "vocab_size", int),
        hidden_size=d,
        intermediate_size=mlp,
        num_hidden_layers=_field(config, "n_layers", int),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=_field(config, "max_sequence_length", int),
        rms_norm_eps=_field(config, "rms_norm_eps", float),
        rope_parameters={"rope_type": "default", "rope_theta": float(_field(config, "rope_theta", (int, float)))},
        tie_word_embeddings=_field(config, "weight_tying", bool),
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        # Not the published pad: it is also the end token here, and Llama gives its pad's embedding no gradient.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        is_causal=False,  # type: ignore[call-arg]  (a field of every config, but of no signature)
    )


def _kv_heads(config: dict[str, Any], heads: int) -> int:
    stated = _field(config, "n_kv_heads", (int, type(None)))
    shared = config.get("multi_query_attention")
    if stated is None:
        shared = _field(config, "multi_query_attention", (bool, type(None)))
    implied = stated if shared is None else (1 if shared else heads)
    if stated is not None and implied != stated:
        raise ValueError(f"config.json: n_kv_heads is {stated}, but multi_query_attention {shared!r} means {implied}")
    return implied or heads


def unread_fields(config: dict[str, Any]) -> list[str]:
    """Unknown fields of config.json, which are ignored."""
    read = {*_FIXED, *_DROPOUTS, *_PASSIVE, "d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size"}
    read |= {"vocab_size", "max_sequence_length", "rms_norm_eps", "rope_theta", "weight_tying"}
    return sorted(set(config) - read - set(LlamaConfig().to_dict()))


def check_weights(folder: Path, llama: LlamaConfig) -> dict[str, checkpoint.Weight]:
    """The headers of a folder's weights, checked against the config. Raises FileNotFoundError or ValueError."""
    found = checkpoint.read_headers(folder)
    if llama.num_hidden_layers > len(found):  # checked before the layers are built
        raise ValueError(f"config.json: n_layers is {llama.num_hidden_layers}, but the files hold {len(found)} weights")
    wanted = published_shapes(llama)
    table, rows = "model.transformer.wte.weight", llama.vocab_size
    if table in found and found[table].shape[:1] != (rows,):
        raise ValueError(
            f"config.json: vocab_size is {rows}, but {table} has {found[table].shape[0]} rows; "
            "the weights and the config are not of one checkpoint, or the vocabulary was resized without saving it"
        )
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing {missing[:3]}, {len(extra)} are unexpected {extra[:3]}"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(f"{found[name].file}: {name} is {found[name].shape}, config.json says {shape}")
    return found
