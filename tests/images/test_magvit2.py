"""MAGVIT-v2 against the golden data, and small models of the same layout."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from unidiff.images import ImageTokenizer, to_pixels
from unidiff.images.magvit2 import Magvit2


@pytest.mark.slow
def test_golden(golden, fill_by_formula):
    """The published architecture: names, codes and pixels, on a picture that is not a square."""
    facts = golden("vq_magvit")
    with torch.device("meta"):
        model = Magvit2()
    powers = 2 ** torch.arange(12, -1, -1)
    bits = (torch.arange(8192)[:, None] & powers) > 0
    fill_by_formula(model, facts, **{"quantize.embedding": bits * 2.0 - 1, "quantize.power_vals": powers})
    assert len(model.state_dict()) == facts.weights == 382
    assert (model.factor, model.codebook_size) == (16, 8192)
    pixels = facts.image / 2 + 0.5
    torch.testing.assert_close(model.latents(pixels), facts.latent, rtol=0, atol=1e-4)
    ids = model.encode(pixels)
    assert torch.equal(ids.flatten(1), facts.codes) and list(ids.shape[1:]) == facts.grid
    given = facts.given_codes.view(1, *facts.grid)
    torch.testing.assert_close(model.paint(given), facts.decoded_given, rtol=0, atol=1e-4)
    shown = (facts.decoded_given.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(model.decode(given), shown, rtol=0, atol=1e-4)


def test_protocol_on_pictures(small_magvit, task, rng_untouched):
    assert isinstance(small_magvit, ImageTokenizer) and small_magvit.codebook_size == 32
    board = task.example("train", 0).prompt[1].resize((96, 64))
    pixels = to_pixels([board, board.transpose(0)])
    ids = small_magvit.encode(pixels)
    assert (ids.shape, ids.dtype) == ((2, 4, 6), torch.int64) and len(ids.unique()) > 2
    assert not torch.equal(ids[0], ids[1])
    painted = small_magvit.decode(ids)
    assert (painted.shape, painted.dtype) == ((2, 3, 64, 96), torch.float32)
    assert painted.min() >= 0 and painted.max() <= 1 and not painted.requires_grad


def test_codes_are_signs_with_the_first_bit_first(small_magvit):
    latents = torch.tensor([1.0, -1.0, 0.0, -2.0, 3.0]).view(1, 5, 1, 1)  # 10001, and 0 is not a positive number
    assert small_magvit.quantize.codes(latents).item() == 0b10001
    assert small_magvit.quantize.embedding[0b10001].tolist() == [1, -1, -1, -1, 1]


def test_batches_are_cut_into_chunks(small_magvit, monkeypatch):
    """In float64: a convolution of two pictures may round otherwise than one of three."""
    small_magvit = copy.deepcopy(small_magvit).double()
    pixels = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, painted = small_magvit.encode(pixels), small_magvit.decode(small_magvit.encode(pixels))
    seen = []
    monkeypatch.setattr("unidiff.images.tokenizer._PIXELS_AT_ONCE", 2 * 3 * 32 * 32)
    hook = small_magvit.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    other = small_magvit.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert torch.equal(small_magvit.encode(pixels), whole)
    assert (small_magvit.decode(whole) - painted).abs().max() < 1e-12
    hook.remove(), other.remove()
    assert seen == [2, 1, 2, 1]


def test_other_dtypes(small_magvit, magvit_folder):
    model = Magvit2.from_pretrained(magvit_folder).to(torch.bfloat16)
    ids = model.encode(torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert ids.dtype == torch.int64 and model.decode(ids).dtype == torch.float32


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_and_load(small_magvit, magvit_folder, rng_untouched):
    assert sorted(path.name for path in magvit_folder.iterdir()) == ["config.json", "pytorch_model.safetensors"]
    assert json.loads((magvit_folder / "config.json").read_text()) == {"_class_name": "MAGVITv2"}
    loaded = Magvit2.from_pretrained(magvit_folder)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    mine, theirs = small_magvit.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_other_file_name(small_magvit, tmp_path):
    torch.save(small_magvit.state_dict(), tmp_path / "pytorch_model.bin")
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Magvit2.from_pretrained(tmp_path).encode(pixels), small_magvit.encode(pixels))


def test_tables_of_another_code(small_magvit, tmp_path):
    weights = small_magvit.state_dict()
    weights["quantize.embedding"] = weights["quantize.embedding"].flip(1)
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="embedding is not the ±1 of each code's 5 bits, first bit first"):
        Magvit2.from_pretrained(tmp_path)


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_pixels(small_magvit):
    with pytest.raises(ValueError, match="sides must be multiples of 16, got 32 x 40; resize it"):
        small_magvit.encode(torch.zeros(1, 3, 32, 40))
    with pytest.raises(ValueError, match="one token is 16 x 16 pixels, got 8 x 32; enlarge the image"):
        small_magvit.encode(torch.zeros(1, 3, 8, 32))
    with pytest.raises(ValueError, match="at least one image"):
        small_magvit.encode(torch.zeros(0, 3, 32, 32))
    with pytest.raises(ValueError, match=r"expected float \[B, 3, H, W\], got torch.float32 \[1, 1, 32, 32\]"):
        small_magvit.encode(torch.zeros(1, 1, 32, 32))


def test_bad_ids(small_magvit):
    with pytest.raises(ValueError, match="ids: expected 0 to 31, got 32 to 32"):
        small_magvit.decode(torch.full((1, 2, 2), 32))
    with pytest.raises(ValueError, match=r"ids: expected integers \[B, h, w\]"):
        small_magvit.decode(torch.zeros(1, 4, dtype=torch.int64))
