"""Folders in published layout, written by hand with the published numbers: vocabularies, names, tokens, tokenizers.

Everything here is typed from descriptions of the checkpoints, nothing is read from the families' own tables:
vocabularies have their published size, bodies one narrow layer. Such folders load, and what may be wrong with one is
said in words.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from unidiff import UnifiedModel, families
from unidiff.images.magvit2 import Magvit2

ROOT = Path(__file__).resolve().parents[2]
WIDTH = 16

# Vocabulary, model_type, class, tokens in the tokenizer.
FACTS: dict[str, tuple[int, str, str, int]] = {
    "llada": (126464, "llada", "LLaDAModelLM", 126349),
    "mmada": (134656, "mmada", "MMadaModelLM", 126349),
    "mmada_parallel": (134656, "mmada", "MMadaModelLM", 126349),
    "mmada_parallel_a": (134548, "llada", "LLaDAForMultiModalGeneration", 126356),
    "dimoo": (134548, "llada", "LLaDAForMultiModalGeneration", 126356),
}
CONFIG = """
{"activation_type": "silu", "alibi": false, "attention_dropout": 0.0, "attention_layer_norm": false,
 "bias_for_layer_norm": false, "block_group_size": 1, "block_type": "llama", "embedding_dropout": 0.0,
 "eos_token_id": 126081, "flash_attention": false, "include_bias": false, "include_qkv_bias": false,
 "init_fn": "mitchell", "input_emb_norm": false, "layer_norm_type": "rms", "layer_norm_with_affine": true,
 "mask_token_id": 126336, "max_sequence_length": 4096, "mlp_ratio": 4, "multi_query_attention": null, "n_layers": 1,
 "pad_token_id": 126081, "precision": "amp_bf16", "residual_dropout": 0.0, "rms_norm_eps": 1e-05, "rope": true,
 "rope_full_precision": true, "rope_theta": 500000.0, "scale_logits": false, "use_cache": false, "weight_tying": false}
"""


def write_by_hand(name: str, folder: Path) -> Path:
    vocabulary, model_type, architecture, words = FACTS[name]
    config = {**json.loads(CONFIG), "d_model": WIDTH, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 24}
    config |= {"vocab_size": vocabulary, "embedding_size": vocabulary}
    config |= {"model_type": model_type, "architectures": [architecture]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_body(folder, vocabulary)
    write_words(folder, name, words)
    if model_type == "mmada":
        write_magvit(folder / "magvitv2")
    elif name != "llada":
        write_vqmodel(folder / "vqvae")
    return folder


def write_body(folder: Path, vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(0)
    block = {"attn_norm": (WIDTH,), "ff_norm": (WIDTH,), "attn_out": (WIDTH, WIDTH), "ff_out": (WIDTH, 24)}
    block |= dict.fromkeys(("q_proj", "k_proj", "v_proj"), (WIDTH, WIDTH))
    block |= dict.fromkeys(("ff_proj", "up_proj"), (24, WIDTH))
    shapes: dict[str, tuple[int, ...]] = {"wte": (vocabulary, WIDTH), "ln_f": (WIDTH,), "ff_out": (vocabulary, WIDTH)}
    shapes |= {f"blocks.0.{name}": shape for name, shape in block.items()}
    weights = {f"model.transformer.{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    files = {f"model-0000{i + 1}-of-00002.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
    for file, part in files.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    table = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def write_words(folder: Path, name: str, count: int) -> None:
    vocabulary = {f"<|reserved_token_{i}|>": i for i in range(count)}
    named = {126336: "<|mdm_mask|>", 126080: "<|startoftext|>", 126081: "<|endoftext|>"}
    named |= {126346: "<|start_header_id|>", 126347: "<|end_header_id|>", 126348: "<|eot_id|>", 5: "find", 6: "go"}
    if FACTS[name][1] == "llada" and name != "llada":
        named |= {126349: "<IMAGE>", 126350: "</IMAGE>", 126351: "<uncondition>", 126354: "<answer>"}
        named |= {126355: "</answer>", 126084: "<end-of-line>"}
        named |= {100: "<system>", 101: "</system>", 102: "<user>", 103: "</user>"}
    for number, word in named.items():
        del vocabulary[f"<|reserved_token_{number}|>"]
        vocabulary[word] = number
    core = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<|reserved_token_0|>"}
    added = [
        {"id": i, "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, word in sorted(named.items())
        if word.startswith("<")
    ]
    parts = {"pre_tokenizer": {"type": "Whitespace"}, "normalizer": None, "post_processor": None, "decoder": None}
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, **parts, "model": core}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def write_magvit(folder: Path) -> None:
    """As showlab/magvitv2, but 32 channels wide: a weight file, and a config that says nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = Magvit2(channels=32).state_dict()
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")


def write_vqmodel(folder: Path) -> None:
    """By diffusers itself, as Lumina-DiMOO publishes it, but narrow."""
    from diffusers.models.autoencoders.vq_model import VQModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 5, "up_block_types": ("UpDecoderBlock2D",) * 5}
        sizes = {"block_out_channels": (32,) * 5, "layers_per_block": 1, "latent_channels": 8, "vq_embed_dim": 8}
        VQModel(**kinds, **sizes, num_vq_embeddings=8192, lookup_from_codebook=True).save_pretrained(folder)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """by_hand(name) -> the folder; tests do not change it."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = write_by_hand(name, tmp_path_factory.mktemp("by_hand") / name)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def inspected(program: Callable[[str], ModuleType]) -> Callable[[Path], tuple[int, str]]:
    """inspected(folder) -> exit status of tools/inspect_checkpoint.py, and what it said."""
    tool = program("tools/inspect_checkpoint.py")

    def run(folder: Path, *more: str) -> tuple[int, str]:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            status = tool.main([str(folder), *more])
        return status, said.getvalue()

    return run


# ---------------------------------------------------------------- they load


EXPECTED: dict[str, dict[str, Any]] = {
    "llada": {"codebook_size": 0, "text_end": (126081, 126348), "image_next": None},
    "mmada": {"image_offset": 126349, "image_begin": (126084,), "image_end": (126085,), "row_separator": None},
    "mmada_parallel": {"image_offset": 126349, "image_begin": (126084,), "row_separator": None},
    "mmada_parallel_a": {"image_offset": 126356, "image_begin": (126349,), "row_separator": 126084},
    "dimoo": {"image_offset": 126356, "image_begin": (126349,), "image_end": (126350,), "row_separator": 126084},
}


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", FACTS)
def test_a_folder_by_hand_loads_and_is_saved_as_it_was(
    name: str, by_hand: Callable[[str], Path], inspected: Callable[..., Any], tmp_path: Path
) -> None:
    folder = by_hand(name)
    given = "mmada_parallel" if "parallel" in name else None
    model = UnifiedModel.from_pretrained(folder, family=given)
    assert model.spec.family == (given or name) and model.spec.mask == 126336 and model.spec.bos == 126080
    assert {field: getattr(model.spec, field) for field in EXPECTED[name]} == EXPECTED[name]
    assert model.spec.logit_rows == FACTS[name][0]
    status, said = inspected(folder, *(["--family", given] if given else []))
    assert status == 0 and "WRONG" not in said, said
    ids = torch.tensor([[126080, 5, 126336, 6]])
    body = families.load_backbone(folder, family=given)
    assert (model.logits(ids) - body.logits(ids)).abs().max() < 1e-5
    if model.images is not None:
        pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
        row = model.encode(["find", Image.fromarray(pixels)])
        assert row[1].grid == (2, 3) and model.decode(row)[1].size == (48, 32)
        assert bool(((row[1].tokens >= model.spec.image_offset) & (row[1].tokens < model.spec.image_range[1])).all())
    model.save_pretrained(tmp_path / "saved")
    again = UnifiedModel.from_pretrained(tmp_path / "saved")  # the family's name is in it now, where it has to be
    assert again.spec == model.spec and torch.equal(again.logits(ids), model.logits(ids))
    before = {k: v for file in folder.glob("model-*") for k, v in load_file(file).items()}
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_parallel_is_told_from_its_relatives_by_name_only(by_hand: Callable[[str], Path]) -> None:
    for name, without in (("mmada_parallel", "mmada"), ("mmada_parallel_a", "dimoo")):
        assert families.find(families.read_config(by_hand(name))).name == without


# ---------------------------------------------------------------- what may be wrong with one


def config(folder: Path, **fields: Any) -> None:
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**known, **fields}))


def add_word(folder: Path) -> None:
    """One token more, at the end, where image codes would begin."""
    words = json.loads((folder / "tokenizer.json").read_text())
    words["model"]["vocab"]["zebra"] = max(words["model"]["vocab"].values()) + 1
    (folder / "tokenizer.json").write_text(json.dumps(words))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def exchange(folder: Path, other: Path, place: str) -> None:
    """Another family's image tokenizer where this family's should be."""
    shutil.rmtree(folder / place)
    shutil.copytree(other, folder / place)


SHARD = "model-00002-of-00002.safetensors"
SPOILED: dict[str, tuple[str, Callable[..., object], str]] = {
    "truncated": ("mmada", lambda f, _: cut(f / SHARD), r"00002-of-00002.* cannot be read, it is damaged or cut off"),
    "shard missing": ("dimoo", lambda f, _: (f / SHARD).unlink(), f"lacks {SHARD}, 1 of the 2 shards"),
    "vocabulary": (
        "mmada",
        lambda f, _: config(f, vocab_size=134657, embedding_size=134657),
        r"vocab_size is 134657, but model\.transformer\.wte\.weight has 134656 rows",
    ),
    "token too many": ("mmada", lambda f, _: add_word(f), "image_offset is 126349, but .*: 1 token too many"),
    "token too many, dimoo": ("dimoo", lambda f, _: add_word(f), "among the image codes: 1 token too many"),
    "wrong VQ, mmada": (
        "mmada",
        lambda f, other: exchange(f, other("dimoo") / "vqvae", "magvitv2"),
        r"magvitv2 has no pytorch_model\.safetensors and no pytorch_model\.bin: .* not this image tokenizer's folder",
    ),
    "wrong VQ, dimoo": (
        "dimoo",
        lambda f, other: exchange(f, other("mmada") / "magvitv2", "vqvae"),
        "lacks .*: it is not the config of a VQModel",
    ),
    "VQ truncated": (
        "dimoo",
        lambda f, _: cut(f / "vqvae" / "diffusion_pytorch_model.safetensors"),
        "diffusion_pytorch_model.safetensors cannot be read",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SPOILED)
def test_what_is_wrong_is_said_when_loading_and_by_the_tool(
    what: str, by_hand: Callable[[str], Path], inspected: Callable[..., Any], tmp_path: Path
) -> None:
    name, spoil, message = SPOILED[what]
    folder = Path(shutil.copytree(by_hand(name), tmp_path / name))
    spoil(folder, by_hand)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        UnifiedModel.from_pretrained(folder)
    status, said = inspected(folder)
    assert status == 1
    assert any(line.startswith("WRONG") for line in said.splitlines())
    assert said.count("Traceback") == 0
    assert re.search(message, said), said


@pytest.mark.parametrize("name", ["mmada", "dimoo"])
def test_images_that_do_not_fit(name: str, by_hand: Callable[[str], Path]) -> None:
    model = UnifiedModel.from_pretrained(by_hand(name))
    with pytest.raises(ValueError, match="sides must be multiples of 16, got 40 x 48; resize it"):
        model.encode(["find", Image.new("RGB", (48, 40))])
    picture = Image.new("RGB", (48, 32))
    length = sum(map(len, model.encode(["find", picture])))
    model.spec = dataclasses.replace(model.spec, max_positions=length + 3)
    message = rf"the prompt has \d+ tokens, its response \d+, and the model {length + 3} positions"
    with pytest.raises(ValueError, match=message):
        model.encode(["find", picture, picture])
