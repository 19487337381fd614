"""The wrapper of diffusers' VQModel: golden data, folders that diffusers wrote, bad configs."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file

from unidiff.images import ImageTokenizer, to_pixels
from unidiff.images.diffusers_vq import DiffusersVQ, empty_model


@pytest.fixture(scope="module")
def model(vq_folder) -> DiffusersVQ:
    return DiffusersVQ.from_pretrained(vq_folder)


@pytest.mark.slow
def test_golden(golden, fill_by_formula):
    """The published configuration: names, codes and pixels, on a picture that is not a square."""
    facts = golden("vq_vqmodel")
    vq = empty_model(facts.config)
    fill_by_formula(vq, facts)
    model = DiffusersVQ(vq)
    assert len(vq.state_dict()) == facts.weights == 277
    assert (model.factor, model.codebook_size) == (16, 8192)
    torch.testing.assert_close(model.latents(facts.image), facts.latent, rtol=0, atol=1e-4)
    ids = model.encode(facts.image)
    assert torch.equal(ids.flatten(1), facts.codes) and list(ids.shape[1:]) == facts.grid
    given = facts.given_codes.view(1, *facts.grid)
    torch.testing.assert_close(model.paint(given), facts.decoded_given, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.decode(given), facts.decoded_given.clamp(0, 1), rtol=0, atol=1e-4)


def test_same_as_diffusers_itself(model, vq_folder, task):
    from diffusers.models.autoencoders.vq_model import VQModel

    theirs = VQModel.from_pretrained(vq_folder)
    pixels = to_pixels([task.example("train", 0).prompt[1].resize((96, 64))])
    with torch.no_grad():
        wanted = theirs.quantize(theirs.encode(pixels).latents)[2][2].view(1, 16, 24)
        painted = theirs.decode(wanted, force_not_quantize=True, shape=(1, 16, 24, 8)).sample.clip(0, 1)
    assert isinstance(model, ImageTokenizer) and (model.factor, model.codebook_size) == (4, 64)
    ids = model.encode(pixels)
    assert torch.equal(ids, wanted) and ids.dtype == torch.int64
    assert torch.equal(model.decode(ids), painted)


def test_ids_are_decoded_whatever_the_config_was_written_for(model, vq_folder, tmp_path):
    folder = shutil.copytree(vq_folder, tmp_path / "vq")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"lookup_from_codebook": False}))
    ids = torch.arange(24).view(1, 4, 6)
    assert torch.equal(DiffusersVQ.from_pretrained(folder).decode(ids), model.decode(ids))


def test_rows_of_a_batch_do_not_mix(model):
    pixels = torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    ids = model.encode(pixels)
    assert ids.shape == (3, 4, 6)
    assert torch.equal(ids, torch.cat([model.encode(row[None]) for row in pixels]))


def test_save_and_load(model, vq_folder, tmp_path, rng_untouched):
    model.save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(vq_folder / name), load_file(tmp_path / name)
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = DiffusersVQ.from_pretrained(tmp_path)
    assert dict(again.vq.config) == dict(model.vq.config) and not again.training
    assert not any(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL', expected 'VQModel'"),
        ({"num_vq_embeddings": None}, "lacks num_vq_embeddings: it is not the config of a VQModel"),
        ({"wavelets": 3}, "VQModel of this diffusers knows no wavelets; upgrade diffusers"),
        ({"num_vq_embeddings": 32}, r"quantize.embedding.weight is \[64, 8\], expected \[32, 8\]"),
        ({"layers_per_block": 2}, r"does not fit VQModel: \d+ weights are missing \['decoder.up_blocks.0.resnets.2"),
    ],
)
def test_configs_that_do_not_fit(vq_folder, tmp_path, change, message):
    folder = shutil.copytree(vq_folder, tmp_path / "vq")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k[0] == "v"}))
    with pytest.raises(ValueError, match=message):
        DiffusersVQ.from_pretrained(folder)


def test_without_diffusers(vq_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.autoencoders.vq_model", None)
    with pytest.raises(ImportError, match=r"pip install 'unidiff\[dimoo\]'"):
        DiffusersVQ.from_pretrained(vq_folder)


def test_bad_pixels(model):
    with pytest.raises(ValueError, match="sides must be multiples of 4, got 16 x 18"):
        model.encode(torch.zeros(1, 3, 16, 18))
