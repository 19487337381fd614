"""Published families as `UnifiedModel`s: their specs, saving and loading, LoRA, and tokenizers that do not belong."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.tables import each
from unidiff import families
from unidiff.families import checkpoint
from unidiff.families.dimoo import DIMOO_TOKENS
from unidiff.families.mmada import MMADA_TOKENS
from unidiff.families.mmada_parallel import MmadaParallel
from unidiff.model import UnifiedModel
from unidiff.sampling.config import SamplerConfig
from unidiff.spec import ModelSpec

ALL = ("llada", "mmada", "mmada_parallel", "mmada_parallel_a", "dimoo")
WITH_IMAGES = ALL[1:]
Published = Callable[[str], Path]


@pytest.fixture
def folder(published: Published, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy, that a test may spoil, of the checkpoint of the family in request.param (or mmada)."""
    return Path(shutil.copytree(published(getattr(request, "param", "mmada")), tmp_path / "checkpoint"))


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: load_file(w.file)[k] for k, w in checkpoint.read_headers(folder).items()}


def some_ids(model: UnifiedModel, seed: int = 0) -> Tensor:
    return torch.randint(model.spec.logit_rows, (2, 12), generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- saving and loading


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_a_checkpoint_survives_loading_and_saving(
    rng_untouched: None, family: str, published: Published, tmp_path: Path
) -> None:
    """Invariant 10."""
    source = published(family)
    model = UnifiedModel.from_pretrained(source)
    assert model.spec.family == family.removesuffix("_a") and model.spec.attention == "bidirectional"
    model.save_pretrained(tmp_path / "saved")
    before, after = weights_of(source), weights_of(tmp_path / "saved")
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(name.startswith("model.transformer.") for name in after)
    old, new = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "saved"))
    assert {k: v for k, v in old.items() if k != "unidiff"} == {k: v for k, v in new.items() if k != "unidiff"}
    again = UnifiedModel.from_pretrained(tmp_path / "saved")
    assert again.spec == model.spec
    assert torch.equal(again.logits(some_ids(model)), model.logits(some_ids(model)))
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice/config.json").read_bytes() == (tmp_path / "saved/config.json").read_bytes()
    files = {p.relative_to(tmp_path / "twice") for p in (tmp_path / "twice").rglob("*") if p.is_file()}
    assert files == {p.relative_to(source) for p in source.rglob("*") if p.is_file()}


@torch.no_grad()
@pytest.mark.parametrize("family", ALL)
def test_lora_is_merged_and_saved_under_published_names(family: str, published: Published, tmp_path: Path) -> None:
    model = UnifiedModel.from_pretrained(published(family))
    ids = some_ids(model)
    plain = model.logits(ids)
    lora = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"], init_lora_weights=False)
    adapted = get_peft_model(model.backbone, lora)
    before = model.logits(ids)
    assert (before - plain).abs().max() > 1e-2
    with adapted.disable_adapter():  # the reference policy
        assert torch.allclose(model.logits(ids), plain, atol=1e-5)
    with pytest.raises(ValueError, match=r"belongs to an adapter: call merge_and_unload\(\)"):
        model.save_pretrained(tmp_path / "unmerged")
    assert not list((tmp_path / "unmerged").glob("*"))
    model.backbone = adapted.merge_and_unload()
    assert torch.allclose(model.logits(ids), before, atol=1e-4)
    model.save_pretrained(tmp_path / "merged")
    assert weights_of(tmp_path / "merged").keys() == weights_of(published(family)).keys()
    again = UnifiedModel.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.logits(ids), model.logits(ids)) and again.spec == model.spec


@torch.no_grad()
def test_both_ways_of_loading_agree(published: Published) -> None:
    ids = torch.arange(24).reshape(2, 12)
    valid = torch.ones_like(ids)
    valid[0, :5] = 0
    for policy in ("hard", "attend", "additive_one"):
        for family in ("mmada", "mmada_parallel"):
            body = families.load_backbone(published(family), pad_policy=policy)
            model = UnifiedModel.from_pretrained(published(family), pad_policy=policy)
            assert model.spec.pad_policy == policy and model.spec.additive_to == body.additive_to
            body, model = body.double(), model.double()  # where two ways differ by float64 noise
            assert (model.logits(ids, valid) - body.logits(ids, valid))[valid.bool()].abs().max() < 1e-6
            assert (model.logits(ids) - body.logits(ids)).abs().max() < 1e-6


def test_dtype_and_device_map(published: Published) -> None:
    model = UnifiedModel.from_pretrained(published("dimoo"), dtype=torch.bfloat16, device_map="cpu")
    assert model.dtype == torch.bfloat16 and model.images.codebook.dtype == torch.float32
    assert model.backbone.model.rotary_emb.inv_freq.dtype == torch.float32


def test_texts_and_images_are_encoded(published: Published) -> None:
    from PIL import Image

    model = UnifiedModel.from_pretrained(published("dimoo"))
    size = model.images.factor * 4
    row = model.encode(["find a safe way", Image.new("RGB", (size, size), "red")])
    canvas = model.render([row])
    ids, spec = canvas.ids[0].tolist(), model.spec
    assert spec.bos not in ids and ids.count(spec.row_separator) == 4  # no bos in this family's prompts
    marks = [spec.special[name] for name in ("system_start", "system_end", "user_start")]
    assert [i for i in ids if i in marks] == marks and ids[-2:] == [
        spec.special["user_end"],
        spec.special["answer_start"],
    ]
    assert "find a safe way" in model.decode(row)[0] and model.decode(row)[1].size == (size, size)
    text = UnifiedModel.from_pretrained(published("llada"))
    text.to(torch.float32)
    said = text.tokenizer.decode(text.render([text.encode(["go up"])]).ids[0])
    assert text.images is None and said.startswith("<|startoftext|>") and said.count("<|startoftext|>") == 1
    assert "user" not in text.tokenizer.get_vocab() and "go up <|eot_id|>" in said
    with pytest.raises(ValueError, match="family llada is one of text alone: it takes no images"):
        text.encode([Image.new("RGB", (8, 8))])


# ---------------------------------------------------------------- specs


def sparse_tokenizer(tokens: dict[str, Any], last: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the published ids of a family, and few words: what lies between is left out."""
    vocabulary = {"a": 0, "b": last}
    for place, token in enumerate(tokens.values()):
        vocabulary[token.text] = 1000 + place if token.id is None else token.id
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="a")))


def published_spec(name: str, rows: int, last: int, variant: str = "", **config: Any) -> ModelSpec:
    family: Any = families.FAMILIES[name]
    if variant:
        family = getattr(MmadaParallel, variant)
    stated = {"max_sequence_length": 4096, "vocab_size": rows, "eos_token_id": 126081, "pad_token_id": 126081}
    return family.build_spec({**stated, **config}, sparse_tokenizer(family.tokens, last), rows)


def test_llada_as_published() -> None:
    spec = published_spec("llada", 126464, 126348, mask_token_id=126336)
    assert (spec.mask, spec.bos, spec.pad) == (126336, 126080, 126081)
    assert spec.text_end == (126081, 126348) and spec.image_next is None and spec.codebook_size == 0
    assert spec.text_range == (0, 126464) and spec.max_positions == 4096


@pytest.mark.parametrize("variant", ["", "M"])
def test_mmada_as_published(variant: str) -> None:
    spec = published_spec("mmada", 134656, 126348, variant, mask_token_id=126336)
    assert spec.image_range == (126349, 134541) and spec.logit_rows == 134656 and spec.row_separator is None
    assert spec.image_begin == (126084,) and spec.image_end == (126085,) and spec.image_grid == (32, 32)
    assert spec.text_range == (0, 126349)
    assert {spec.special[n] for n in ("t2i", "mmu", "ipad", "r2i")} == {126088, 126089, 126093, 126094}
    assert spec.special.get("interleave") == (126095 if variant else None)
    assert spec.additive_to == ("valid_keys" if variant else "valid_pairs")


@pytest.mark.parametrize("variant", ["", "A"])
def test_dimoo_as_published(variant: str) -> None:
    spec = published_spec("dimoo", 134548, 126355, variant)
    assert spec.image_range == (126356, 134548) and spec.row_separator == 126084 and spec.mask == 126336
    assert spec.image_begin == (126349,) and spec.image_end == (126350,) and spec.max_positions == 5120
    assert spec.special["uncondition"] == 126351 and spec.special["answer_end"] == 126355
    assert spec.special["filler"] == 126339 and spec.special["system_start"] >= 1000  # the tokenizer's


@each("family", ALL)
def test_sampler_defaults_are_settings_of_the_sampler(family: str, published: Published) -> None:
    spec = UnifiedModel.from_pretrained(published(family)).spec
    names = {f.name for f in fields(SamplerConfig)}
    assert spec.sampler and set(spec.sampler) <= names
    assert SamplerConfig(**spec.sampler).text_steps in (128, 256)


def test_one_token_too_many_in_a_published_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"image_offset is 126349, but .* would begin at 126350: 1 token too many"):
        published_spec("mmada", 134656, 126349)
    with pytest.raises(ValueError, match=r"would begin at 126348: 1 token too few"):
        tokens = {k: t for k, t in MMADA_TOKENS.items() if k != "eot"}
        families.FAMILIES["mmada"].build_spec(  # type: ignore[attr-defined]
            {"max_sequence_length": 4096, "vocab_size": 134656}, sparse_tokenizer(tokens, 126347), 134656
        )
    with pytest.raises(ValueError, match=r"goes on to id 126356, among the image codes: 1 token too many"):
        published_spec("dimoo", 134548, 126356)
    with pytest.raises(ValueError, match=r"ids up to 126464, the head 126464 rows"):
        published_spec("llada", 126464, 126464)


def test_ids_that_the_config_states_win_and_are_checked() -> None:
    with pytest.raises(ValueError, match=r"ModelSpec\.mask is 5, but the tokenizer has '<\|mdm_mask\|>' at 126336"):
        published_spec("mmada", 134656, 126348, mask_token_id=5)
    with pytest.raises(ValueError, match="ModelSpec has no field imge_grid"):
        published_spec("mmada", 134656, 126348, unidiff={"spec": {"imge_grid": [1, 1]}})
    assert published_spec("mmada", 134656, 126348, unidiff={"spec": {"image_grid": [16, 16]}}).image_grid == (16, 16)


@each("token", ["uncondition", "system_start", "mask"])
def test_tokens_that_a_prompt_is_cut_at_must_be_tokens(token: str) -> None:
    tokens = {k: t for k, t in DIMOO_TOKENS.items() if k != token}
    with pytest.raises(ValueError, match=r"the tokenizer has no '<.*: it is not one of family dimoo"):
        families.FAMILIES["dimoo"].build_spec(  # type: ignore[attr-defined]
            {"max_sequence_length": 4096, "vocab_size": 134548}, sparse_tokenizer(tokens, 126355), 134548
        )


def test_vocabularies_of_another_size_follow_the_tokenizer(
    folder: Path, published: Published, checkpoints: ModuleType
) -> None:
    """A tiny checkpoint written by hand, without the key "unidiff" but for the kind of its image tokenizer."""

    def bare(folder: Path, **own: Any) -> dict[str, Any]:
        edit(
            folder, lambda c: c.update(unidiff={"image_tokenizer": "patch_vq"}, codebook_size=checkpoints.CODES, **own)
        )
        return json.loads((folder / "config.json").read_text())

    expected = UnifiedModel.from_pretrained(folder).spec
    bare(folder)
    with pytest.warns(UserWarning, match=r"image_offset is taken from the tokenizer \(\d+\)"):
        spec = UnifiedModel.from_pretrained(folder).spec
    assert spec.image_range == expected.image_range and spec.text_end == expected.text_end
    other = Path(shutil.copytree(published("dimoo"), folder.parent / "dimoo"))
    expected = UnifiedModel.from_pretrained(other).spec
    bare(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its offset follows from the head's rows
        assert UnifiedModel.from_pretrained(other).spec.image_range == expected.image_range


# ---------------------------------------------------------------- what can be wrong with a folder


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def add_token(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    assert tokenizer.add_tokens(["zebra"]) == 1
    tokenizer.save_pretrained(folder)


def rename_token(folder: Path) -> None:
    for path in folder.glob("tokenizer*.json"):
        path.write_text(path.read_text().replace("<|soi|>", "<|other|>"))


SPOILED: dict[str, tuple[str, Callable[[Path], object], type[Exception], str]] = {
    "no tokenizer": ("llada", lambda f: (f / "tokenizer.json").unlink(), FileNotFoundError, "lacks tokenizer.json"),
    "token too many": ("mmada", add_token, ValueError, "image_offset is .* 1 token too many"),
    "token too many, M": ("mmada_parallel", add_token, ValueError, "1 token too many"),
    "token too many, A": ("mmada_parallel_a", add_token, ValueError, "1 token too many"),
    "token too many, dimoo": ("dimoo", add_token, ValueError, "among the image codes: 1 token too many"),
    "no soi": ("mmada", rename_token, ValueError, r"no '<\|soi\|>', and with \d+ rows .* state it .*special\.soi"),
    "mask id": (
        "mmada",
        lambda f: edit(f, lambda c: c.update(mask_token_id=20)),
        ValueError,
        r"ModelSpec\.mask is 20, but the tokenizer has '<\|mdm_mask\|>' at 0",
    ),
    "mask id of another token": (
        "mmada",
        lambda f: edit(f, lambda c: c.update(mask_token_id=9)),
        ValueError,
        r"ModelSpec\.special\['mmu'\]: 9 is the mask",
    ),
    "own settings": (
        "mmada",
        lambda f: edit(f, lambda c: c.update(unidiff=None)),
        ValueError,
        r"unidiff is None; it must be an object with family, image_tokenizer, spec",
    ),
    "a number as spec": (
        "mmada",
        lambda f: edit(f, lambda c: c["unidiff"].update(spec=3)),
        ValueError,
        r"config\.json: unidiff\.spec is 3; it must be an object with fields of ModelSpec",
    ),
    "no spec": (
        "llada",
        lambda f: edit(f, lambda c: c["unidiff"].update(spec=None)),
        ValueError,
        r"config\.json: unidiff\.spec is None; it must be an object",
    ),
    "special ids that are none": (
        "dimoo",
        lambda f: edit(f, lambda c: c["unidiff"]["spec"].update(special=3)),
        ValueError,
        r"ModelSpec\.special is 3; it must be a mapping",
    ),
    "family of another type": (
        "mmada",
        lambda f: edit(f, lambda c: c["unidiff"].update(family=["mmada"])),
        ValueError,
        r"unidiff\.family is \['mmada'\]; it must be a name",
    ),
    "field of the spec that does not exist": (
        "mmada",
        lambda f: edit(f, lambda c: c["unidiff"]["spec"].update(image_gird=[2, 2])),
        ValueError,
        "ModelSpec has no field image_gird; did you mean 'image_grid'",
    ),
    "adapter": (
        "llada",
        lambda f: (f / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere/model"}'),
        ValueError,
        "checkpoint holds an adapter, not a model",
    ),
    "codes beyond the head": (
        "dimoo",
        lambda f: edit(f, lambda c: c["unidiff"]["spec"].update(codebook_size=65)),
        ValueError,
        r"image_range .* is not inside the \d+ logit rows",
    ),
    "no image tokenizer": (
        "mmada",
        lambda f: shutil.rmtree(f / "magvitv2"),
        FileNotFoundError,
        r"magvitv2 does not exist: family mmada needs its image tokenizer \(patch_vq\).*image_tokenizer=",
    ),
    "image tokenizer of another size": (
        "mmada",
        lambda f: edit(f, lambda c: c["unidiff"]["spec"].update(codebook_size=32)),
        ValueError,
        r"has 64 codes, ModelSpec\.codebook_size is 32",
    ),
    "unknown kind": (
        "mmada",
        lambda f: edit(f, lambda c: c["unidiff"].update(image_tokenizer="patchvq")),
        ValueError,
        "image tokenizer 'patchvq' is not known; known kinds: .*patch_vq.*; did you mean 'patch_vq'",
    ),
    "wrong kind for the files": (
        "mmada",
        lambda f: (f / "magvitv2/config.json").write_text('{"_class_name": "VQModel"}'),
        ValueError,
        "expected tokenizer 'patch_vq'",
    ),
    "pad policy": (
        "mmada",
        lambda f: edit(f, lambda c: c["unidiff"]["spec"].update(pad_policy="soft")),
        ValueError,
        "pad_policy is 'soft'; choose one of",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_folders_are_named(name: str, published: Published, tmp_path: Path) -> None:
    family, spoil, error, message = SPOILED[name]
    folder = Path(shutil.copytree(published(family), tmp_path / "checkpoint"))
    spoil(folder)
    with pytest.raises(error, match=message):
        UnifiedModel.from_pretrained(folder)


@each(
    ("family", "fields", "message"),
    [
        ("mmada", {"image_offset": +1}, r"image_offset is \d+, but the tokenizer ends .* 1 token too few"),
        ("mmada", {"image_offset": -1}, "image_offset|image code"),
        ("dimoo", {"image_offset": +1}, r"image_range .* is not inside"),
        ("dimoo", {"image_offset": -1}, "among the image codes|image code"),
        ("mmada", {"mask": 5}, r"ModelSpec\..* is the mask"),
        ("mmada", {"mask": 20}, r"ModelSpec\.mask is 20, but the tokenizer has '<\|mdm_mask\|>' at 0"),
        ("llada", {"bos": 20}, r"ModelSpec\.bos is 20, but the tokenizer has '<\|startoftext\|>'"),
        ("mmada_parallel", {"special": {"soi": 20}}, r"special\['soi'\] is 20, but the tokenizer has '<\|soi\|>'"),
        ("mmada", {"attention": "bidirectionnal"}, "attention is 'bidirectionnal'; .* did you mean 'bidirectional'"),
        ("mmada_parallel", {"additive_to": "keys"}, "additive_to is 'keys'; choose one of"),
        ("mmada_parallel_a", {"pad_policy": "soft"}, "pad_policy is 'soft'; choose one of"),
        ("mmada", {"image_begin": ()}, r"image_begin is \(\); the templates of mmada need it"),
        ("dimoo", {"image_end": ()}, r"image_end is \(\); the templates of dimoo need it"),
        ("mmada", {"image_grid": (2, 2, 2)}, "image_grid is .* it must be 2 values"),
        ("mmada", {"text_length": "8"}, "text_length is '8'; it must be a whole number"),
        ("mmada", {"codebook_size": 32}, r"has 64 codes, ModelSpec\.codebook_size is 32"),
        ("mmada", {"logit_rows": 500}, "logit_rows is 500, but the head has"),
        ("mmada", {"sampler": {"image_temperature": float("nan")}}, "image_temperature is nan; .* finite"),
        ("mmada", {"txt_length": 9}, "has no field txt_length; did you mean 'text_length'"),
    ],
)
def test_fields_that_are_given_are_checked_as_the_config_s(
    family: str, fields: dict[str, Any], message: str, published: Published
) -> None:
    if "image_offset" in fields:
        plain = UnifiedModel.from_pretrained(published(family)).spec
        fields = {"image_offset": plain.image_offset + fields["image_offset"]}
    with pytest.raises(ValueError, match=message):
        UnifiedModel.from_pretrained(published(family), **fields)


@each("family", ALL)
def test_any_field_of_the_spec_may_be_given(family: str, published: Published) -> None:
    given = {"text_length": 16, "max_positions": 400, "sampler": {"text_steps": 3}, "pad_policy": "attend"}
    spec = UnifiedModel.from_pretrained(published(family), **given).spec
    assert {name: getattr(spec, name) for name in given} == given


def test_settings_that_are_not_known_are_named(folder: Path) -> None:
    edit(folder, lambda c: c["unidiff"].update(image_tokeniser="patch_vq"))
    with pytest.warns(UserWarning, match=r"unidiff\.image_tokeniser is not known, and not read; did you mean"):
        UnifiedModel.from_pretrained(folder)


def test_an_image_tokenizer_elsewhere(folder: Path) -> None:
    (folder / "magvitv2").rename(folder.parent / "elsewhere")
    model = UnifiedModel.from_pretrained(folder, image_tokenizer=folder.parent / "elsewhere")
    assert model.images.codebook_size == 64


def test_pictures_are_prepared_by_the_family_s_rule(published: Published) -> None:
    from PIL import Image

    photo = Image.new("RGB", (700, 300), "red")
    sizes = {name: UnifiedModel.from_pretrained(published(name)).prepare(photo).size for name in ("mmada", "dimoo")}
    assert sizes["mmada"] == (512, 512) and sizes["dimoo"] == (736, 320)
    understand = UnifiedModel.from_pretrained(published("dimoo")).prepare(photo, "understand").size
    assert understand[0] * understand[1] > 900_000 and understand[0] % 32 == understand[1] % 32 == 0
    with pytest.raises(ValueError, match="family llada is one of text alone: it takes no images"):
        UnifiedModel.from_pretrained(published("llada")).prepare(photo)
    model = UnifiedModel.from_pretrained(published("mmada"))
    with pytest.raises(ValueError, match="sides must be multiples of"):
        model.encode(["what is it ?", photo.crop((0, 0, 33, 32))])
