"""The native family: its embedding by loops, saving and loading, and every way in which a folder can be wrong."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from tests.tables import each
from unidiff import families
from unidiff.families import native
from unidiff.images.patch_vq import PatchVQ
from unidiff.model import UnifiedModel
from unidiff.sequence import Interleaved, Modality
from unidiff.spec import ModelSpec

RandomRows = Callable[..., list[Interleaved]]


@pytest.fixture(scope="module")
def rows(model: UnifiedModel, random_rows: RandomRows) -> list[Interleaved]:
    return random_rows(model.spec, 6, 3)


@pytest.fixture(scope="module")
def saved(model: UnifiedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of a saved checkpoint that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def scores(model: UnifiedModel, rows: list[Interleaved]) -> Tensor:
    canvas = model.render(rows)
    return model.score(canvas, canvas.sampled).detach()


# ---------------------------------------------------------------- the model


def test_embedding_is_its_formula(model: UnifiedModel, rows: list[Interleaved]) -> None:
    clean, parts = model.render(rows).clean, model.embedding
    table = model.backbone.get_input_embeddings().weight
    found, kinds = model.embed(clean).detach(), set()
    for b, n in clean.valid.nonzero().tolist():
        token, offset, previous = (int(getattr(clean, f)[b, n]) for f in ("ids", "offset", "previous"))
        expected = table[token]
        if offset >= 0 and clean.modality[b, n] == Modality.TEXT:
            expected = expected + parts.offset.weight[min(offset, 7)] + parts.segment.weight[clean.segment[b, n]]
        elif offset >= 0:
            row, column = divmod(offset, 8)
            expected = expected + parts.row.weight[row // 2] + parts.column.weight[column // 2]
            expected = expected + parts.parity.weight[2 * (row % 2) + column % 2]
            if previous >= 0:
                expected = expected + parts.previous.weight @ table[previous]
        kinds.add((int(clean.modality[b, n]), offset >= 0, previous >= 0))
        torch.testing.assert_close(found[b, n], expected.detach(), rtol=1e-5, atol=1e-5)
    assert len(kinds) == 5  # words, picture tokens with and without one before, delimiters of both


def test_rotary_positions_are_ordinals_of_segments(
    model: UnifiedModel, plain_model: UnifiedModel, rows: list[Interleaved]
) -> None:
    canvas = model.render(rows)
    for tokens in (canvas.clean, canvas.noisy):
        assert torch.equal(model.positions(tokens)[tokens.valid], tokens.segment[tokens.valid])
        assert model.positions(tokens).min() >= 0
    assert torch.equal(plain_model.positions(canvas.clean), canvas.clean.position)


def test_build_depends_on_its_seed_alone(
    rng_untouched: None, tokenizer: PreTrainedTokenizerBase, images: PatchVQ
) -> None:
    def weights(seed: int) -> list[Tensor]:
        model = native.build(tokenizer, images, d_model=16, layers=1, heads=2, d_mlp=16, seed=seed)
        return list(model.state_dict().values())

    first = weights(1)
    torch.rand(3, generator=torch.Generator())  # no matter what was drawn before
    assert all(torch.equal(a, b) for a, b in zip(first, weights(1)))
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(2)))


def test_spec_follows_from_the_tokenizers(tokenizer: PreTrainedTokenizerBase) -> None:
    spec = native.build_spec(tokenizer, 128, (8, 8), text_length=8, max_positions=64)
    words = len(tokenizer)
    assert spec.text_range == (tokenizer.convert_tokens_to_ids("<eos>"), words) and spec.image_range == (
        words,
        words + 128,
    )
    assert all(tokenizer.convert_ids_to_tokens(i) in ("<eos>", "<eot>") for i in spec.text_end)
    for token in ("<pad>", "<mask>", "<bos>", "<soi>", "<eoi>", "<unk>"):
        assert tokenizer.convert_tokens_to_ids(token) < spec.text_range[0], f"{token} could be drawn"


# ---------------------------------------------------------------- saving and loading


def test_a_checkpoint_survives_saving_and_loading(
    rng_untouched: None, model: UnifiedModel, saved: Path, rows: list[Interleaved], tmp_path: Path
) -> None:
    """Invariant 10."""
    loaded = UnifiedModel.from_pretrained(saved)
    assert loaded.spec == model.spec and not loaded.training
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    assert torch.equal(scores(loaded, rows), scores(model, rows))
    loaded.save_pretrained(tmp_path / "again")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "image/model.safetensors", "image/config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (saved / name).read_bytes(), name


def test_names_in_the_file_are_published_ones(model: UnifiedModel, saved: Path) -> None:
    with safe_open(saved / "model.safetensors", "pt") as file:
        names = set(file.keys())
    body = {f"model.layers.{i}.{n}.weight" for i in range(2) for n in LAYER}
    assert names == body | {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} | EMBEDDING
    assert json.loads((saved / "config.json").read_text())["model_type"] == "unidiff_native"
    assert not list(saved.rglob("*.draft"))


LAYER = ["input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LAYER += [f"self_attn.{x}_proj" for x in "qkvo"]
EMBEDDING = {f"embedding.{x}.weight" for x in ("row", "column", "parity", "offset", "segment", "previous")}


@pytest.mark.parametrize("kind", ["str", "relative", "relative_str", "family"])
def test_paths_of_every_kind(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent.parent)
    relative = folder.relative_to(folder.parent.parent)
    assert len(relative.parts) == 2  # as the name of a repository has
    path = {"str": str(folder), "relative": relative, "relative_str": str(relative), "family": folder}[kind]
    loaded = UnifiedModel.from_pretrained(path, family="native" if kind == "family" else None)
    assert loaded.spec.family == "native"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_in_float32(
    dtype: torch.dtype, saved: Path, model: UnifiedModel, rows: list[Interleaved]
) -> None:
    loaded = UnifiedModel.from_pretrained(saved, dtype=dtype)
    assert loaded.dtype == dtype and loaded.images.codebook.dtype == torch.float32
    found, expected = scores(loaded, rows), scores(model, rows)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert (found - expected).abs().mean() < 0.1 < expected.abs().mean()


def test_a_save_that_is_cut_off_leaves_the_old_one(
    folder: Path, build_model: Callable[..., UnifiedModel], rows: list[Interleaved], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = scores(UnifiedModel.from_pretrained(folder), rows)

    def killed(weights: dict[str, Tensor], path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(native, "save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        build_model(seed=5).save_pretrained(folder)
    assert torch.equal(scores(UnifiedModel.from_pretrained(folder), rows), before)


# ---------------------------------------------------------------- what can be wrong with a folder


def set_backbone(name: str, value: object, folder: Path) -> None:
    edit_config(folder, lambda c: c["backbone"].update({name: value}))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"]["zebra"] = max(content["model"]["vocab"].values()) + 1
    path.write_text(json.dumps(content))


def tokenizer_without_soi(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(path.read_text().replace("<soi>", "<other>"))


SPOILED: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, "checkpoint is not a checkpoint: it has no config.json"),
    "no config": (lambda f: (f / "config.json").unlink(), FileNotFoundError, "it has no config.json"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ValueError, "config.json is not JSON"),
    "config no object": (lambda f: (f / "config.json").write_text("[]"), ValueError, "must hold an object, .* list"),
    "unknown model": (
        lambda f: edit_config(f, lambda c: c.update(model_type="gpt9")),
        ValueError,
        "no family recognises model_type 'gpt9'; known families: .*native.*family=",
    ),
    "no spec": (lambda f: edit_config(f, lambda c: c.pop("spec")), ValueError, "config.json lacks spec"),
    "no sizes": (lambda f: edit_config(f, lambda c: c.pop("backbone")), ValueError, "config.json lacks backbone"),
    "wrong field": (
        lambda f: edit_config(f, lambda c: c["spec"].update(masks=1)),
        ValueError,
        "ModelSpec has no field masks",
    ),
    "wrong embedding": (
        lambda f: edit_config(f, lambda c: c["embedding"].update(colour=1)),
        ValueError,
        "config.json: .*colour",
    ),
    "wrong mask id": (
        lambda f: edit_config(f, lambda c: c["spec"].update(mask=5)),
        ValueError,
        "spec.mask is 5, but the tokenizers say 1",
    ),
    "mask that is bos": (
        lambda f: edit_config(f, lambda c: c["spec"].update(mask=2)),
        ValueError,
        r"ModelSpec\.bos: 2 is the mask",
    ),
    "spec null": (
        lambda f: edit_config(f, lambda c: c.update(spec=None)),
        ValueError,
        "lacks spec, or it is",
    ),
    "body a list": (lambda f: edit_config(f, lambda c: c.update(backbone=[])), ValueError, "lacks backbone, or it is"),
    "a width of ten to the twelve": (
        lambda f: edit_config(f, lambda c: c["backbone"].update(hidden_size=10**12, head_dim=10**12)),
        ValueError,
        "config",
    ),
    "a vocabulary of ten to the nine": (
        lambda f: edit_config(f, lambda c: c["backbone"].update(vocab_size=10**9)),
        ValueError,
        r"(embed_tokens|lm_head)\.weight is .*the config says \(1000000000, 32\)",
    ),
    "an embedding of ten to the nine": (
        lambda f: edit_config(f, lambda c: c["embedding"].update(text_length=10**9)),
        ValueError,
        r"embedding\.offset\.weight is .*the config says \(1000000000, 32\)",
    ),
    "a key that is given twice": (
        lambda f: (f / "config.json").write_text(
            (f / "config.json").read_text().replace('"mask":', '"mask": 2, "mask":')
        ),
        ValueError,
        "config.json is not JSON: 'mask' is given twice",
    ),
    **{
        f"{name} of the body": (partial(set_backbone, name, value), ValueError, rf"config\.json: {message}")
        for name, value, message in (
            ("quantization_config", {"quant_method": "fp8"}, r"backbone\.quantization_config is not a field"),
            ("attn_implementation", "kernels-community/flash-attn", r"backbone\.attn_implementation is not a field"),
            ("auto_map", {"AutoConfig": "evil.Config"}, r"backbone\.auto_map is not a field"),
            ("num_hidden_layers", 10**6, r"backbone\.num_hidden_layers is 1000000, but the file holds \d+ weights"),
            ("hidden_act", "silly", ".*silly"),
            ("rms_norm_eps", -1e-6, r"backbone\.rms_norm_eps is -1e-06; it must be above 0"),
            ("num_attention_heads", 0, r"backbone\.num_attention_heads is 0; it must be above 0"),
            ("rope_parameters", {"rope_theta": -1}, r"backbone\.rope_theta is -1; it must be above 0"),
            ("tie_word_embeddings", True, "backbone.tie_word_embeddings is True; it must be false: the file holds a"),
        )
    },
    "a NaN in the config": (
        lambda f: edit_config(f, lambda c: c["backbone"].update(rms_norm_eps=float("nan"))),
        ValueError,
        r"config\.json is not JSON: NaN is not a finite number",
    ),
    "a NaN in the weights": (
        lambda f: edit_weights(f, lambda w: w["model.norm.weight"].fill_(float("nan"))),
        ValueError,
        r"model\.norm\.weight holds 32 of 32 numbers that are NaN or infinite",
    ),
    "int8 weights": (
        lambda f: edit_weights(f, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.int8)})),
        ValueError,
        r"lm_head\.weight holds I8 numbers; quantized weights are not read",
    ),
    "float8 weights": (
        lambda f: edit_weights(f, lambda w: w.update({"lm_head.weight": w["lm_head.weight"].to(torch.float8_e4m3fn)})),
        ValueError,
        r"lm_head\.weight holds F8_E4M3 numbers",
    ),
    "an infinity in the image tokenizer": (
        lambda f: edit_weights(f / "image", lambda w: w["codebook"][0].fill_(float("inf"))),
        ValueError,
        r"image/model\.safetensors: codebook holds \d+ of \d+ numbers that are NaN or infinite",
    ),
    "shards of another model beside the weights": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        ValueError,
        r"holds two models, model\.safetensors and the shards of .*delete the one",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), FileNotFoundError, r"lacks model\.safetensors"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, r"lacks tokenizer\.json"),
    "tokenizer cut off": (
        lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes()[:500]),
        ValueError,
        r"tokenizer\.json cannot be read",
    ),
    "no image tokenizer": (lambda f: shutil.rmtree(f / "image"), FileNotFoundError, r"lacks image/model\.safetensors"),
    "truncated": (truncate, ValueError, r"model\.safetensors cannot be read"),
    "no safetensors": (
        lambda f: (f / "model.safetensors").write_bytes(b"abc"),
        ValueError,
        r"model\.safetensors cannot be read",
    ),
    "weight missing": (
        lambda f: edit_weights(f, lambda w: w.pop("lm_head.weight")),
        ValueError,
        r"missing weights \['lm_head.weight'\]",
    ),
    "weight too many": (
        lambda f: edit_weights(f, lambda w: w.update(extra=torch.zeros(1))),
        ValueError,
        r"unexpected weights \['extra'\]",
    ),
    "weight of another shape": (
        lambda f: edit_weights(f, lambda w: w.update({"model.norm.weight": torch.zeros(31)})),
        ValueError,
        r"model\.norm\.weight is \(31,\), the config says \(32,\)",
    ),
    "other tokenizer": (other_tokenizer, ValueError, "do not belong to this checkpoint"),
    "tokenizer without <soi>": (tokenizer_without_soi, ValueError, "text tokenizer has no <soi>"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folders_are_named(name: str, folder: Path) -> None:
    spoil, error, message = SPOILED[name]
    spoil(folder)
    with pytest.raises(error, match=message):
        UnifiedModel.from_pretrained(folder)


@each(
    ("fields", "message"),
    [
        ({"text_lenght": 16}, "ModelSpec has no field text_lenght; did you mean 'text_length'"),
        ({"device_map": "auto"}, "family native takes no device_map"),
        ({"text_length": 0}, "text_length is 0; it must be at least 1"),
        ({"image_grid": (4, 4)}, r"image_grid is \(4, 4\), but the weights embed \(8, 8\)"),
        ({"attention": "causal"}, r"attention is 'causal'; choose one of block_causal"),
        ({"mask": 5}, "spec.mask is 5, but the tokenizers say 1"),
        ({"image_offset": 95}, "image"),
        ({"logit_rows": 300}, "spec.logit_rows is 300, but the tokenizers say"),
        ({"sampler": {"text_stepz": 3}}, "text_stepz"),
        ({"sampler": {"text_steps": 2.5}}, r"text_steps is 2\.5; it must be a whole number"),
    ],
)
def test_fields_of_the_spec_that_contradict_the_checkpoint(fields: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        UnifiedModel.from_pretrained(folder, **fields)


def test_any_field_of_the_spec_may_be_given(folder: Path) -> None:
    given = {"text_length": 16, "max_positions": 2048, "sampler": {"text_steps": 3}, "pad_policy": "attend"}
    model = UnifiedModel.from_pretrained(folder, **given)
    assert {name: getattr(model.spec, name) for name in given} == given
    assert model.spec.sampler_config().text_steps == 3 and model.encode(["find the goal"])
    assert len(model.encode(["find the goal " * 3], prompt=False)[0]) == 10


def test_the_folder_that_was_meant_is_named(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/step-000002").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"output_dir": "x", "max_steps": 3, "model": "recipes/base"}))
    with pytest.raises(ValueError, match=r"run is the folder of a run, not a model; its model is written at the end"):
        UnifiedModel.from_pretrained(run)
    shutil.copytree(folder, run / "model")
    (run / "model/adapter").mkdir()
    (run / "model/adapter/adapter_config.json").write_text("{}")
    for place in ("", "checkpoints/step-000002", "checkpoints", "modle", "model/adapter"):
        with pytest.raises((ValueError, FileNotFoundError), match=rf"the model is in {re.escape(str(run / 'model'))}$"):
            UnifiedModel.from_pretrained(run / place)
    assert UnifiedModel.from_pretrained(run / "model").spec.family == "native"


def test_head_and_spec_must_agree(model: UnifiedModel) -> None:
    spec = ModelSpec.from_dict({**model.spec.to_dict(), "logit_rows": model.spec.logit_rows + 1})
    with pytest.raises(ValueError, match="logit_rows is 225, but the head has 224 rows"):
        UnifiedModel(model.backbone, spec, model.tokenizer, model.images)


def test_unknown_families_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"family 'mmadaa' is not known; known families: .*native"):
        UnifiedModel.from_pretrained(folder, family="mmadaa")


def test_a_repository_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"someone/model is not a folder here, and not a repository to be had: no network"
    ):
        UnifiedModel.from_pretrained("someone/model")


# ---------------------------------------------------------------- a family from outside


def test_a_family_can_be_added_from_outside(
    folder: Path, model: UnifiedModel, rows: list[Interleaved], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(families.registry, "FAMILIES", dict(families.FAMILIES))

    @families.register
    class Toy:
        name = "toy"

        def detect(self, config: dict[str, Any]) -> bool:
            return config.get("model_type") == "toy"

        def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> UnifiedModel:
            return native.Native().load(folder, config, dtype)

        def save(self, model: UnifiedModel, folder: Path) -> None: ...

    edit_config(folder, lambda c: c.update(model_type="toy"))
    assert torch.equal(scores(UnifiedModel.from_pretrained(folder), rows), scores(model, rows))
    assert families.find({}, "toy").name == "toy" and isinstance(Toy, type)
