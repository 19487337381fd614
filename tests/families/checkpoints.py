"""Tiny checkpoints of the published families in their published layout: config.json, safetensors, tokenizer files.

`make_checkpoint(family, folder)` writes one and returns the folder; `write_golden(name, folder)` writes the body of a
golden fixture. Weights are a function of their name, so nothing of them is stored.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from unidiff.families.architecture import published_shapes, read_architecture
from unidiff.families.dimoo import DIMOO_TOKENS
from unidiff.families.llada import LLADA_TOKENS, Token
from unidiff.families.mmada import MMADA_TOKENS
from unidiff.families.mmada_parallel import ParallelM
from unidiff.images.patch_vq import PatchVQ, PatchVQConfig

DATA = Path(__file__).resolve().parents[1] / "data" / "backbones"
FAMILIES = ("llada", "mmada", "mmada_parallel", "mmada_parallel_a", "dimoo")

# Every field of a published config.json; sizes are tiny.
CONFIG: dict[str, Any] = {
    **{"d_model": 32, "n_heads": 4, "n_kv_heads": 4, "n_layers": 2, "mlp_hidden_size": 48, "mlp_ratio": 4},
    **{"activation_type": "silu", "block_type": "llama", "block_group_size": 1, "layer_norm_type": "rms"},
    **{"layer_norm_with_affine": True, "rms_norm_eps": 1e-05, "attention_layer_norm": False},
    **{"attention_layer_norm_with_affine": True, "rope": True, "rope_full_precision": True, "rope_theta": 500000.0},
    **{"alibi": False, "alibi_bias_max": 8.0, "flash_attention": False, "attention_dropout": 0.0},
    **{"residual_dropout": 0.0, "embedding_dropout": 0.0, "include_bias": False, "include_qkv_bias": False},
    **{"bias_for_layer_norm": False, "input_emb_norm": False, "scale_logits": False, "weight_tying": False},
    **{"max_sequence_length": 512, "multi_query_attention": None, "init_fn": "mitchell", "init_std": 0.02},
    **{"init_cutoff_factor": None, "precision": "amp_bf16", "use_cache": False},
}

WORDS = ["find", "a", "safe", "way", "to", "the", "goal", "go", "from", "right", "left", "up", "down", "what", "then"]
WORDS += ["red", "blue", "cube", "ball", "on", "is", ".", ",", "?"]
WORDS += ["answer", *(f"{row}{column}" for row in "abcd" for column in range(1, 5))]  # of FrozenLake
CODES = 64

_SETTINGS: dict[str, tuple[str, str, dict[str, Token], str | None]] = {  # model_type, class, tokens, image folder
    "llada": ("llada", "LLaDAModelLM", LLADA_TOKENS, None),
    "mmada": ("mmada", "MMadaModelLM", MMADA_TOKENS, "magvitv2"),
    "mmada_parallel": ("mmada", "MMadaModelLM", ParallelM.tokens, "magvitv2"),
    "mmada_parallel_a": ("llada", "LLaDAForMultiModalGeneration", DIMOO_TOKENS, "vqvae"),
    "dimoo": ("llada", "LLaDAForMultiModalGeneration", DIMOO_TOKENS, "vqvae"),
}


def make_checkpoint(
    family: str, folder: Path, seed: int = 0, shards: int = 1, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """A checkpoint with random weights, a tokenizer of some 40 words and, but for llada, a PatchVQ of 64 codes.

    family: of `FAMILIES`; "mmada_parallel" is the variant M. sizes: other values for fields of config.json. Load
    with `UnifiedModel.from_pretrained(folder)`.
    """
    model_type, architecture, tokens, image_folder = _SETTINGS[family]
    folder.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(folder, [t.text for t in tokens.values()])
    spare = 0 if family in ("dimoo", "mmada_parallel_a") else 5
    rows = size + spare + (CODES if image_folder else 0)
    spec: dict[str, Any] = {"text_length": 8}
    own: dict[str, Any] = {"spec": spec}
    if family.startswith("mmada_parallel"):
        own["family"] = "mmada_parallel"
    if image_folder:
        spec |= {"image_offset": size, "codebook_size": CODES, "image_grid": [4, 4]}
        own["image_tokenizer"] = "patch_vq"
        write_image_tokenizer(folder / image_folder, seed)
    words = [t.text for t in tokens.values()] + WORDS
    ids = {"mask_token_id": words.index("<|mdm_mask|>"), "eos_token_id": words.index("<|endoftext|>")}
    ids["pad_token_id"] = ids["eos_token_id"]
    stated = {"vocab_size": rows, "embedding_size": rows, "model_type": model_type, "architectures": [architecture]}
    config = {**CONFIG, **stated, **ids, **sizes, "unidiff": own}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = {n: _weight(f"{family}-{seed}", n, s) for n, s in published_shapes(read_architecture(config)).items()}
    write_weights(folder, {name: w.to(dtype) for name, w in weights.items()}, shards)
    return folder


def write_tokenizer(folder: Path, special: list[str]) -> int:
    """A word-level tokenizer: special tokens first, then `WORDS`. Returns its size."""
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "[UNK]"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.add_special_tokens(special)
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]").save_pretrained(folder)
    return len(vocabulary)


def write_image_tokenizer(folder: Path, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vq = PatchVQ(PatchVQConfig(codebook_size=CODES, dim=4, widths=(4, 4)))
        vq.codebook.normal_()
    vq.save_pretrained(folder)


def _weight(salt: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """Far from uniform: every token, position and mask counts."""
    if len(shape) == 1:
        return formula(salt, name, shape, 0.1, 1.0)
    gain = {"wte": 0.5, "transformer.ff_out": 2.0 * shape[1] ** -0.5}
    return formula(salt, name, shape, next((g for k, g in gain.items() if k in name), shape[1] ** -0.5), 0.0)


def formula(salt: str, name: str, shape: tuple[int, ...] | list[int], scale: float, shift: float) -> Tensor:
    """Normal numbers, seeded by the name."""
    seed = zlib.crc32(f"{salt}:{name}".encode()) & 0x7FFFFFFF
    drawn = np.random.RandomState(seed).standard_normal(size=tuple(shape))
    return torch.from_numpy(drawn.astype(np.float32) * np.float32(scale) + np.float32(shift))


def write_weights(folder: Path, weights: dict[str, Tensor], shards: int = 1) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    table = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, folder / name, metadata={"format": "pt"})
        table |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(w.nbytes for w in weights.values())}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_golden(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a golden fixture."""
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    return json.loads((DATA / f"{name}.json").read_text()), tensors


def write_golden(name: str, folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1) -> dict[str, Tensor]:
    """Writes the body of a golden fixture as a checkpoint folder, and returns the fixture's tensors."""
    fixture, tensors = read_golden(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fixture["config"]))
    write_weights(
        folder,
        {
            k["name"]: formula(fixture["salt"], k["name"], k["shape"], k["scale"], k["shift"]).to(dtype)
            for k in fixture["keys"]
        },
        shards,
    )
    return tensors
