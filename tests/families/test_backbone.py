"""Published bodies: the references' logits, float32 rotation, names in files, and ways a folder can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from tests.tables import each
from unidiff import families
from unidiff.attention import pad_bias
from unidiff.families import architecture, backbone, checkpoint
from unidiff.families.backbone import Float32RotaryEmbedding, rotate

# fixture -> family to name, None where the config tells it
FIXTURES = {"llada": None, "mmada": None, "parallel_m": "mmada_parallel", "dimoo": "dimoo", "gqa": None}


@pytest.fixture(scope="module")
def golden(
    checkpoints: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, dict[str, Tensor]]]:
    """name -> folder with the weights in two shards, and the reference's numbers."""
    found = {}
    for name in FIXTURES:
        folder = tmp_path_factory.mktemp(name)
        found[name] = folder, checkpoints.write_golden(f"backbone_{name}_s1", folder, shards=2)
    return found


@pytest.fixture
def folder(checkpoints: ModuleType, tmp_path: Path) -> Path:
    """A body alone that a test may spoil."""
    checkpoints.write_golden("backbone_llada_s1", tmp_path / "body", shards=3)
    return tmp_path / "body"


# ---------------------------------------------------------------- numbers


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_logits_are_the_references(name: str, golden: dict[str, tuple[Path, dict[str, Tensor]]]) -> None:
    folder, expected = golden[name]
    ids, valid = expected["input_ids"], expected["attention_mask"]
    body = families.load_backbone(folder, FIXTURES[name])
    assert not body.training and body.dtype == torch.float32 and body.ids["mask"] == 2
    body = body.double()  # so that the float32 noise is the reference's alone, the same on every machine
    assert (body.logits(ids) - expected["logits_nomask"]).abs().max() < 1e-5
    found, rows = body.logits(ids, valid), valid.bool()
    assert (found - expected["logits_hard"])[rows].abs().max() < 1e-5
    body.pad_policy = "attend"
    assert (body.logits(ids, valid) - expected["logits_nomask"]).abs().max() < 1e-5
    body.pad_policy = "additive_one"
    for soft in expected.keys() & {"logits_soft_outer", "logits_soft_key"}:
        assert (body.logits(ids, valid) - expected[soft]).abs().max() < 1e-5
        assert (body.logits(ids, valid) - expected["logits_nomask"]).abs().max() > 0.5  # it is another function


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_bfloat16_logits_are_the_references(
    name: str, golden: dict[str, tuple[Path, dict[str, Tensor]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits alone cannot tell bfloat16 from float32 rotation: a change of kernel moves them as much."""
    folder, expected = golden[name]
    body = families.load_backbone(folder, FIXTURES[name], dtype=torch.bfloat16)
    turned = []

    def spy(*given: Tensor) -> tuple[Tensor, Tensor]:
        turned.append([t.dtype for t in given])
        return rotate(*given)

    monkeypatch.setattr(backbone, "rotate", spy)
    found = body.logits(expected["input_ids"])
    assert turned == [[torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]] * 2  # a layer each
    off = (found.float() - expected["logits_bf16"].float()).abs()
    assert found.dtype == torch.bfloat16 and off.mean() < 1.5e-2 and off.max() < 0.15


def test_rotation_is_the_references(checkpoints: ModuleType) -> None:
    fixture, expected = checkpoints.read_golden("rope")
    q, k = (
        checkpoints.formula(fixture["salt"], n, fixture["shape"], fixture["scale"], fixture["shift"])
        for n in ("q", "k")
    )
    _, heads, length, dim = fixture["shape"]
    config = LlamaConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        rope_parameters={"rope_type": "default", "rope_theta": fixture["rope_theta"]},
    )
    rotary = Float32RotaryEmbedding(config).to(torch.bfloat16).bfloat16()  # a cast leaves its frequencies alone
    for dtype, name, allowed in ((torch.float32, "fp32", 0.0), (torch.bfloat16, "bf16", 0.005)):
        cos, sin = rotary(q.to(dtype), torch.arange(length)[None])
        assert cos.dtype == torch.float32
        for found, wanted in zip(rotate(q.to(dtype), k.to(dtype), cos, sin), ("q", "k")):
            wanted = expected[f"{wanted}_rot_{name}"]
            assert found.dtype == dtype and (found - wanted).abs().max() < (1e-6 if dtype == torch.float32 else 0.04)
            assert allowed == 0.0 or (found != wanted).float().mean() <= allowed


def test_a_body_is_stored_and_loaded_in_any_dtype(checkpoints: ModuleType, tmp_path: Path) -> None:
    checkpoints.write_golden("backbone_gqa_s1", tmp_path, torch.bfloat16)
    assert families.load_backbone(tmp_path).dtype == torch.bfloat16  # as stored
    body = families.load_backbone(tmp_path, dtype=torch.float32, device_map="cpu")
    assert body.dtype == torch.float32 and body.model.rotary_emb.inv_freq.dtype == torch.float32


def test_pads_by_policy() -> None:
    valid = torch.tensor([[0, 1, 1]])
    assert pad_bias(None, "hard", "valid_pairs", torch.float32) is None
    assert pad_bias(valid, "attend", "valid_pairs", torch.float32) is None
    hard = pad_bias(valid, "hard", "valid_pairs", torch.float32)
    assert hard is not None and hard.shape == (1, 1, 1, 3) and hard[0, 0, 0, 0] < -1e30 and not hard[..., 1:].any()
    pairs = pad_bias(valid, "additive_one", "valid_pairs", torch.float32)
    keys = pad_bias(valid, "additive_one", "valid_keys", torch.float32)
    assert pairs is not None and pairs[0, 0].tolist() == [[0, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert keys is not None and keys[0, 0].tolist() == [[0, 1, 1]]
    with pytest.raises(ValueError, match="pad_policy is 'soft'; choose one of hard, attend, additive_one"):
        pad_bias(valid, "soft", "valid_keys", torch.float32)


def test_gradients_reach_every_weight_and_checkpointing_changes_none(folder: Path) -> None:
    body = families.load_backbone(folder)
    ids = torch.arange(3, 15)[None]

    def gradients() -> dict[str, Tensor]:
        body.zero_grad()
        body.logits(ids).square().mean().backward()
        return {name: p.grad.clone() for name, p in body.named_parameters() if p.grad is not None}

    plain = gradients()
    assert plain.keys() == dict(body.named_parameters()).keys() and all(g.any() for g in plain.values())
    body.gradient_checkpointing_enable()
    body.train()  # dropout is off: training gives the same
    again = gradients()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


# ---------------------------------------------------------------- saving


@torch.no_grad()
@pytest.mark.parametrize("name", FIXTURES)
def test_published_names_are_written_back(
    name: str, golden: dict[str, tuple[Path, dict[str, Tensor]]], tmp_path: Path
) -> None:
    """Invariant 10."""
    source, expected = golden[name]
    body = families.load_backbone(source, FIXTURES[name])
    body.save_pretrained(tmp_path)
    before, after = weights_of(source), weights_of(tmp_path)
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    config = json.loads((tmp_path / "config.json").read_text())
    own = config.pop("unidiff", {})
    assert config == json.loads((source / "config.json").read_text())
    assert own == ({"family": FIXTURES[name]} if FIXTURES[name] else {})
    again = families.load_backbone(tmp_path)  # the family needs no naming any more
    assert torch.equal(again.logits(expected["input_ids"]), body.logits(expected["input_ids"]))
    assert again.additive_to == body.additive_to
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: load_file(w.file)[k] for k, w in checkpoint.read_headers(folder).items()}


def test_saving_over_a_checkpoint_leaves_no_stale_shard(folder: Path) -> None:
    body = families.load_backbone(folder)
    body.save_pretrained(folder, max_shard_size="40KB")
    assert (folder / "model.safetensors.index.json").is_file() and len(list(folder.glob("model-*"))) > 3
    assert torch.equal(families.load_backbone(folder).lm_head.weight, body.lm_head.weight)
    body.save_pretrained(folder)
    assert [p.name for p in checkpoint.files_in(folder)] == ["model.safetensors"]
    assert torch.equal(families.load_backbone(folder).lm_head.weight, body.lm_head.weight)


# ---------------------------------------------------------------- config.json


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in config.items() if v != "(gone)"}))


WRONG_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"block_type": "sequential"}, "block_type is 'sequential'; only 'llama' is supported"),
    ({"block_type": "block_groups"}, "block_type is 'block_groups'"),
    ({"block_group_size": 2}, "block_group_size is 2; only 1"),
    ({"activation_type": "swiglu"}, "activation_type is 'swiglu'"),
    ({"layer_norm_type": "default"}, "layer_norm_type is 'default'"),
    ({"attention_layer_norm": True}, "attention_layer_norm is True"),
    ({"rope": False}, "rope is False"),
    ({"rope_full_precision": False}, "rope_full_precision is False"),
    ({"alibi": True}, "alibi is True"),
    ({"include_bias": True}, "include_bias is True"),
    ({"scale_logits": True}, "scale_logits is True"),
    ({"n_layers": "two"}, "n_layers is 'two', which is not a value"),
    ({"n_layers": True}, "n_layers is True, which is not a value"),
    ({"d_model": -64}, "d_model is -64"),
    ({"n_heads": 5}, "d_model 64, n_heads 5 and n_kv_heads 4 do not divide"),
    ({"n_kv_heads": 3}, "n_heads 4 and n_kv_heads 3 do not divide"),
    ({"n_kv_heads": 4, "multi_query_attention": True}, "n_kv_heads is 4, but multi_query_attention True means 1"),
    ({"mask_token_id": 192}, "mask_token_id is 192, no id below vocab_size 192"),
    ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\], no id"),
    ({"unidiff": "mmada"}, "unidiff is 'mmada'; it must be an object"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG_FIELDS, ids=[str(f) for f, _ in WRONG_FIELDS])
def test_other_architectures_are_refused_by_name(fields: dict[str, Any], message: str, folder: Path) -> None:
    edit(folder, **fields)
    with pytest.raises(ValueError, match=message):
        families.load_backbone(folder)


REQUIRED = ["d_model", "n_heads", "n_kv_heads", "n_layers", "mlp_hidden_size", "vocab_size", "embedding_size"]
REQUIRED += ["max_sequence_length", "rms_norm_eps", "rope_theta", "weight_tying", "block_type", "activation_type"]
REQUIRED += ["rope", "rope_full_precision", "attention_dropout", "residual_dropout", "scale_logits", "alibi"]


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_fields_are_named(name: str, folder: Path) -> None:
    edit(folder, **{name: "(gone)"})
    with pytest.raises(ValueError, match=f"field {name} is missing; every field of the architecture must be stated"):
        families.load_backbone(folder)


def test_dropout_is_switched_off_aloud(folder: Path) -> None:
    edit(folder, attention_dropout=0.1)
    with pytest.warns(UserWarning, match=r"attention_dropout is 0\.1; dropout is switched off"):
        body = families.load_backbone(folder).train()
    ids = torch.arange(12)[None]
    assert torch.equal(body.logits(ids), body.logits(ids))
    assert body.published["attention_dropout"] == 0.1  # what is saved is what was published


def test_fields_that_are_not_known_are_named(folder: Path) -> None:
    edit(folder, qk_gain=2.0)
    with pytest.warns(UserWarning, match="not known, and not read: qk_gain"):
        families.load_backbone(folder)


def test_sizes_that_follow_from_others(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert architecture.read_architecture({**config, "n_kv_heads": None}).num_key_value_heads == 4
    shared = {**config, "n_kv_heads": None, "multi_query_attention": True}
    assert architecture.read_architecture(shared).num_key_value_heads == 1
    assert architecture.read_architecture({**config, "mlp_hidden_size": None}).intermediate_size == 256


def test_ids_of_the_config_win(folder: Path) -> None:
    edit(folder, mask_token_id=7, bos_token_id=3, pad_token_id=5)
    assert families.load_backbone(folder).ids == {"mask": 7, "bos": 3, "pad": 5, "eos": 1}
    edit(folder, mask_token_id="(gone)", pad_token_id="(gone)", bos_token_id="(gone)")
    assert families.load_backbone(folder).ids == {"pad": 1, "eos": 1}  # published ids have no row here


# ---------------------------------------------------------------- files


def respell(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = weights_of(folder)
    for path in checkpoint.files_in(folder):
        path.unlink()
    change(weights)
    save_file(weights, folder / "model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def misplace(folder: Path) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.transformer.wte.weight"] = "model-00003-of-00003.safetensors"
    path.write_text(json.dumps(index))


SHARD = "model-00002-of-00003.safetensors"
SPOILED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "it has no config.json"),
    "no weights": (lambda f: [p.unlink() for p in checkpoint.files_in(f)], FileNotFoundError, "has neither model.safe"),
    "shard missing": (lambda f: (f / SHARD).unlink(), FileNotFoundError, f"lacks {SHARD}, 1 of the 3 shards"),
    "index missing": (
        lambda f: (f / "model.safetensors.index.json").unlink(),
        FileNotFoundError,
        "there are shards, but they need their index",
    ),
    "index no JSON": (lambda f: (f / checkpoint.INDEX).write_text("{"), ValueError, "is not an index of weights"),
    "index out of the folder": (
        lambda f: (f / checkpoint.INDEX).write_text('{"weight_map": {"a": "../b.safetensors"}}'),
        ValueError,
        "'../b.safetensors' is not a file of this folder",
    ),
    "index of other shards": (misplace, ValueError, "wte.weight, which model.safetensors.index.json looks for in"),
    "shard cut off": (lambda f: cut(f / SHARD), ValueError, f"{SHARD} cannot be read, it is damaged or cut off"),
    "header cut off": (lambda f: (f / SHARD).write_bytes(b"abc"), ValueError, f"{SHARD} cannot be read"),
    "pickle": (
        lambda f: [*(p.unlink() for p in checkpoint.files_in(f)), (f / "pytorch_model.bin").touch()],
        FileNotFoundError,
        "pickled weights are not read: convert them to safetensors",
    ),
    "vocabulary too large": (
        lambda f: edit(f, vocab_size=200),
        ValueError,
        "vocab_size is 200, but model.transformer.wte.weight has 192 rows",
    ),
    "vocabulary too small": (lambda f: edit(f, vocab_size=190), ValueError, "vocab_size is 190, but .* has 192 rows"),
    "layers": (
        lambda f: edit(f, n_layers=3),
        ValueError,
        r"9 weights are missing \['model.transformer.blocks.2.attn_n",
    ),
    "mlp": (lambda f: edit(f, mlp_hidden_size=97), ValueError, r"ff_.*weight is \(.*96.*\), config.json says \(.*97"),
    "kv heads": (
        lambda f: edit(f, n_kv_heads=2),
        ValueError,
        r"k_proj.weight is \(64, 64\), config.json says \(32, 64",
    ),
    "weight missing": (
        lambda f: respell(f, lambda w: w.pop("model.transformer.ln_f.weight")),
        ValueError,
        r"1 weights are missing \['model.transformer.ln_f.weight'\], 0 are unexpected",
    ),
    "weight too many": (
        lambda f: respell(f, lambda w: w.update({"model.transformer.wpe.weight": torch.zeros(2)})),
        ValueError,
        r"0 weights are missing \[\], 1 are unexpected \['model.transformer.wpe.weight'\]",
    ),
    "a million layers": (
        lambda f: edit(f, n_layers=10**6),
        ValueError,
        r"n_layers is 1000000, but the files hold \d+ weights",
    ),
    "a width of ten to the twelve": (lambda f: edit(f, d_model=10**12), ValueError, "config.json says .*1000000000000"),
    "a vocabulary of ten to the fifteen": (lambda f: edit(f, vocab_size=10**15), ValueError, "has 192 rows"),
    "more than a number holds": (lambda f: edit(f, rope_theta=10**400), ValueError, "rope_theta is 1000"),
    "an infinite number": (lambda f: edit(f, rms_norm_eps=float("inf")), ValueError, "Infinity is not a finite number"),
    "int8": (
        lambda f: respell(f, lambda w: w.update({k: v.to(torch.int8) for k, v in w.items() if "q_proj" in k})),
        ValueError,
        r"model\.safetensors: model\.transformer\.blocks\.0\.q_proj\.weight holds I8 numbers; quantized weights",
    ),
    "float8": (
        lambda f: respell(f, lambda w: w.update({k: v.to(torch.float8_e5m2) for k, v in w.items() if "wte" in k})),
        ValueError,
        r"wte\.weight holds F8_E5M2 numbers",
    ),
    "NaN": (
        lambda f: respell(f, lambda w: w["model.transformer.ln_f.weight"][3].fill_(float("nan"))),
        ValueError,
        r"model\.norm\.weight holds 1 of 64 numbers that are NaN or infinite",
    ),
    "infinity": (
        lambda f: respell(f, lambda w: w["model.transformer.wte.weight"][0].fill_(-float("inf"))),
        ValueError,
        r"embed_tokens\.weight holds 64 of \d+ numbers",
    ),
    "another model beside the shards": (
        lambda f: save_file({k: v + 1 for k, v in weights_of(f).items()}, f / "model.safetensors"),
        ValueError,
        r"holds two models, model\.safetensors and the shards",
    ),
    "family": (
        lambda f: edit(f, unidiff={"family": "mmada_paralel"}),
        ValueError,
        "family 'mmada_paralel' is not known; known families: .*; did you mean 'mmada_parallel'?",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folders_are_named(name: str, folder: Path) -> None:
    spoil, error, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(error, match=message):
        families.load_backbone(folder)


def test_weights_whose_sum_overflows_are_finite(folder: Path) -> None:
    respell(folder, lambda w: w["model.transformer.wte.weight"][:4].fill_(3e38))
    assert families.load_backbone(folder).get_input_embeddings().weight.isfinite().all()


def test_a_config_cannot_choose_what_code_runs(folder: Path) -> None:
    """No kernel is fetched, no class of the checkpoint's imported, no adapter or quantization looked for."""
    plain = families.load_backbone(folder).config._attn_implementation
    code = {"auto_map": {"AutoModel": "evil.Model"}, "trust_remote_code": True, "torch_dtype": "float8_e4m3fn"}
    kernels = {"attn_implementation": "evil/kernel", "_attn_implementation": "evil/kernel", "use_kernels": True}
    edit(folder, **code, **kernels, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.warns(UserWarning, match="not known, and not read: .*attn_implementation.*quantization_config"):
        body = families.load_backbone(folder)
    assert body.config._attn_implementation == plain and body.dtype == torch.float32


def test_other_mistakes_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"family 'lada' is not known; .*did you mean 'llada'"):
        families.load_backbone(folder, family="lada")
    with pytest.raises(ValueError, match="pad_policy is 'soft'; choose one of"):
        families.load_backbone(folder, pad_policy="soft")
    with pytest.raises(ValueError, match="family native has no body of its own to load"):
        families.load_backbone(Path(__file__).parents[2] / "recipes" / "base")


def test_a_tied_head_is_the_token_table(folder: Path) -> None:
    respell(folder, lambda w: w.pop("model.transformer.ff_out.weight"))
    edit(folder, weight_tying=True)
    body = families.load_backbone(folder)
    assert body.lm_head.weight is body.model.embed_tokens.weight
    body.save_pretrained(folder)
    assert "model.transformer.ff_out.weight" not in checkpoint.read_headers(folder)


@each(
    ("config", "name"),
    [
        ({"model_type": "llada", "vocab_size": 126464}, "llada"),
        ({"model_type": "mmada", "vocab_size": 134656}, "mmada"),
        ({"model_type": "llada", "vocab_size": 134548}, "dimoo"),
        ({"model_type": "llada", "architectures": ["LLaDAForMultiModalGeneration"]}, "dimoo"),
        ({"model_type": "mmada", "unidiff": {"family": "mmada_parallel"}}, "mmada_parallel"),
        ({"model_type": "unidiff_native"}, "native"),
    ],
)
def test_families_are_told_from_the_config(config: dict[str, Any], name: str) -> None:
    assert families.find(config).name == name
    assert sum(f.detect(config) for f in families.FAMILIES.values()) == 1
