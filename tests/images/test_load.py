"""`images.load`: kinds by name, and files that are missing, damaged, or of something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from unidiff import images
from unidiff.images import KINDS, load, register
from unidiff.images.diffusers_vq import DiffusersVQ
from unidiff.images.magvit2 import Magvit2
from unidiff.images.patch_vq import PatchVQ

ROOT = Path(__file__).resolve().parents[2]


def test_kinds(magvit_folder, vq_folder):
    assert isinstance(load("patch_vq", ROOT / "tokenizers/native/image"), PatchVQ)
    assert isinstance(load("magvit2", magvit_folder, codebook_size=32), Magvit2)
    assert isinstance(load("diffusers_vq", str(vq_folder), codebook_size=64), DiffusersVQ)


def test_a_kind_from_outside(monkeypatch, magvit_folder):
    monkeypatch.setattr(images.tokenizer, "KINDS", dict(KINDS))

    @register("mine")
    class Mine(Magvit2):
        pass

    assert isinstance(load("mine", magvit_folder), Mine)


def test_half_precision_files_are_run_in_float32(magvit_folder, vq_folder, tmp_path):
    for kind, folder in (("magvit2", magvit_folder), ("diffusers_vq", vq_folder)):
        copy = shutil.copytree(folder, tmp_path / kind)
        path = next(copy.glob("*.safetensors"))
        weights = load_file(path)
        save_file({name: w.half() if w.is_floating_point() else w for name, w in weights.items()}, path)
        found = next(v for v in load(kind, copy).state_dict().values() if v.is_floating_point())
        assert found.dtype == torch.float32


def test_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match=r"'magvit' is not known; known kinds: .*patch_vq; did you mean 'magvit2'\?"):
        load("magvit", tmp_path)
    with pytest.raises(ValueError, match=r"known kinds: diffusers_vq, magvit2, patch_vq$"):
        load("#", tmp_path)


def test_the_tokenizer_of_another_family(magvit_folder):
    with pytest.raises(ValueError, match=r"has 32 codes, ModelSpec.codebook_size is 8192: it is not the one"):
        load("magvit2", magvit_folder, codebook_size=8192)


def test_missing_files(tmp_path, vq_folder):
    with pytest.raises(FileNotFoundError, match=r"has no pytorch_model.safetensors and no pytorch_model.bin"):
        load("magvit2", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load("diffusers_vq", tmp_path)
    shutil.copy(vq_folder / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"has no diffusion_pytorch_model.safetensors"):
        load("diffusers_vq", tmp_path)


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_truncated_files(share, magvit_folder, vq_folder, tmp_path):
    for kind, folder in (("magvit2", magvit_folder), ("diffusers_vq", vq_folder)):
        copy = shutil.copytree(folder, tmp_path / kind)
        path = next(copy.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(ValueError, match=f"{path.name} cannot be read, fetch it again"):
            load(kind, copy)


def test_truncated_bin(small_magvit, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save(small_magvit.state_dict(), path)
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"pytorch_model.bin cannot be read, fetch it again"):
        load("magvit2", tmp_path)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_bin_that_would_run_code(tmp_path):
    torch.save({"encoder.conv_in.weight": _Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds more than tensors and is not loaded"):
        load("magvit2", tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_bin_of_something_else(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="must hold a table of tensors by name"):
        load("magvit2", tmp_path)


def test_weights_of_another_kind(vq_folder, tmp_path):
    shutil.copy(vq_folder / "diffusion_pytorch_model.safetensors", tmp_path / "pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit Magvit2: \d+ weights are missing \['decoder.mid.*unexpected"):
        load("magvit2", tmp_path)


def test_config_that_is_no_object(vq_folder, tmp_path):
    folder = shutil.copytree(vq_folder, tmp_path / "vq")
    for text, message in (("{", "is not JSON"), ("[]", "must hold an object, it holds list")):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load("diffusers_vq", folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: w.fill_(float("nan")), r"holds \d+ of \d+ numbers that are NaN or infinite"),
        (
            lambda w: w.index_fill(0, torch.tensor([0]), float("inf")),
            r"holds \d+ of \d+ numbers that are NaN or infinite",
        ),
        (lambda w: w.to(torch.int8), r"holds torch\.int8 numbers; quantized weights are not read"),
        (lambda w: w.to(torch.float8_e4m3fn), r"holds torch\.float8_e4m3fn numbers; quantized"),
    ],
)
def test_weights_that_are_no_numbers(spoil, message, magvit_folder, vq_folder, tmp_path):
    native = ROOT / "tokenizers/native/image"
    for kind, folder in (("magvit2", magvit_folder), ("diffusers_vq", vq_folder), ("patch_vq", native)):
        copy = Path(shutil.copytree(folder, tmp_path / kind))
        path = next(copy.glob("*.safetensors"))
        weights = load_file(path)
        name = next(n for n, w in weights.items() if w.ndim == 4)
        weights[name] = spoil(weights[name]).contiguous()
        save_file(weights, path)
        with pytest.raises(ValueError, match=message):
            load(kind, copy)


def test_a_million_layers(vq_folder, tmp_path):
    copy = Path(shutil.copytree(vq_folder, tmp_path / "vq"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "layers_per_block": 10**6}))
    with pytest.raises(ValueError, match=r"layers_per_block is 1000000, of \d+ weights"):
        load("diffusers_vq", copy)
