"""PatchVQ and the conversions between PIL images and pixels."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from unidiff.images import ImageTokenizer, to_pil, to_pixels
from unidiff.images.patch_vq import CodebookEMA, PatchVQ, PatchVQConfig

SMALL = PatchVQConfig(codebook_size=16, dim=8, widths=(8, 8, 16))


@pytest.fixture
def model() -> PatchVQ:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vq = PatchVQ(SMALL).eval()
        vq.codebook.normal_()
    return vq


def _noise(batch: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_shapes_and_protocol(model):
    assert isinstance(model, ImageTokenizer)
    assert (model.factor, model.codebook_size) == (8, 16)
    ids = model.encode(_noise(2, 32))
    assert (ids.shape, ids.dtype) == ((2, 4, 4), torch.int64)
    pixels = model.decode(ids)
    assert pixels.shape == (2, 3, 32, 32)
    assert 0 <= pixels.min() <= pixels.max() <= 1


def test_a_token_depends_on_its_own_patch_only(model):
    before = _noise(1, 32)
    after = before.clone()
    after[:, :, 8:16, 16:24] = _noise(1, 8, seed=1)
    changes = (model.features(before) != model.features(after)).any(-1)[0]
    assert changes.nonzero().tolist() == [[1, 2]]


def test_nearest_is_the_nearest_code(model):
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    assert torch.equal(model.nearest(features), torch.cdist(features, model.codebook).argmin(-1))


def test_loss_reaches_every_weight_and_leaves_the_codebook_to_the_average(model):
    loss, features, ids = model.loss(_noise(2, 16))
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert not features.requires_grad and not model.codebook.requires_grad
    assert features.shape == (2, 2, 2, 8) and ids.shape == (2, 2, 2)


def test_codebook_moves_to_the_mean_of_its_features(model):
    generator = torch.Generator().manual_seed(0)
    average = CodebookEMA(model, decay=0.5, dead=0.0)
    features = torch.randn(4, 1, 1, 8, generator=generator)
    average.update(features, torch.tensor([3, 3, 3, 5]).view(4, 1, 1), generator)
    torch.testing.assert_close(model.codebook[3], features[:3].mean((0, 1, 2)))
    torch.testing.assert_close(model.codebook[5], features[3, 0, 0])


def test_dead_codes_are_put_onto_features_with_large_errors(model):
    generator = torch.Generator().manual_seed(0)
    features = model.codebook[:4].clone().view(4, 1, 1, 8)
    features[3] += 10  # the only feature that its code is far from
    average = CodebookEMA(model, decay=0.5, dead=0.25)
    average.update(features, torch.arange(4).view(4, 1, 1), generator)
    revived = model.codebook[4:]
    torch.testing.assert_close(revived, features[3, 0].expand_as(revived))
    untouched = model.codebook.clone()
    CodebookEMA(model).update(features[:1], torch.zeros(1, 1, 1, dtype=torch.long), generator, revive=False)
    assert torch.equal(model.codebook[1:], untouched[1:])


def test_inference_leaves_the_global_random_state_alone(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = PatchVQ.from_pretrained(tmp_path)
    loaded.decode(loaded.encode(_noise(1, 16)))
    assert torch.equal(torch.get_rng_state(), before)


# --- files ----------------------------------------------------------------------------------------


def test_save_and_load(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = PatchVQ.from_pretrained(tmp_path)
    assert loaded.config == SMALL and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    pixels = _noise(3, 24)
    assert torch.equal(loaded.encode(pixels), model.encode(pixels))
    assert torch.equal(loaded.decode(loaded.encode(pixels)), model.decode(model.encode(pixels)))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(model, tmp_path, name):
    model.save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        PatchVQ.from_pretrained(tmp_path)


def test_files_that_disagree(model, tmp_path):
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"codebook_size": 32}))
    with pytest.raises(ValueError, match=r"(?s)model\.safetensors does not fit .*codebook"):
        PatchVQ.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(settings | {"codebook": 32}))
    with pytest.raises(ValueError, match="expected tokenizer 'patch_vq' with"):
        PatchVQ.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "content"), [("config.json", "{"), ("model.safetensors", "not weights")])
def test_unreadable_file(model, tmp_path, name, content):
    model.save_pretrained(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=name):
        PatchVQ.from_pretrained(tmp_path)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 32, 32, 3)])
def test_encode_refuses_other_shapes(model, shape):
    with pytest.raises(ValueError, match=r"pixels: expected float \[B, 3, H, W\]"):
        model.encode(torch.zeros(shape))


def test_encode_refuses_integers_and_odd_sides(model):
    with pytest.raises(ValueError, match="uint8"):
        model.encode(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match="multiples of 8, got 32 x 30"):
        model.encode(torch.zeros(1, 3, 32, 30))


@pytest.mark.parametrize("bad", [-1, 16, 126349])
def test_decode_refuses_ids_out_of_range(model, bad):
    with pytest.raises(ValueError, match="ids: expected 0 to 15"):
        model.decode(torch.tensor([[[0, bad]]]))


def test_decode_refuses_other_shapes(model):
    with pytest.raises(ValueError, match=r"ids: expected integers \[B, h, w\]"):
        model.decode(torch.zeros(2, 4, dtype=torch.long))


# --- PIL ------------------------------------------------------------------------------------------


def test_pil_round_trip():
    arrays = np.random.default_rng(0).integers(256, size=(3, 4, 6, 3), dtype=np.uint8)
    images = [Image.fromarray(array) for array in arrays]
    pixels = to_pixels(images)
    assert (pixels.shape, pixels.dtype) == ((3, 3, 4, 6), torch.float32)
    assert 0 <= pixels.min() <= pixels.max() <= 1
    assert [image.tobytes() for image in to_pil(pixels)] == [image.tobytes() for image in images]
    assert to_pil(torch.full((1, 3, 1, 1), 1.7))[0].getpixel((0, 0)) == (255, 255, 255)


def test_pil_errors():
    with pytest.raises(ValueError, match="at least one image"):
        to_pixels([])
    with pytest.raises(ValueError, match=r"one size, got \(8, 8\) and \(8, 16\)"):
        to_pixels([Image.new("RGB", (8, 8)), Image.new("RGB", (8, 16))])
    with pytest.raises(ValueError, match=r"pixels: expected \[B, 3, H, W\]"):
        to_pil(torch.zeros(3, 8, 8))
