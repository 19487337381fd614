"""Fixtures: golden image tokenizers, whose weights are a formula of their names; small ones in published folders."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from unidiff.images.magvit2 import Magvit2

DATA = Path(__file__).parents[1] / "data"

# A whole VQModel of the aMUSEd type, but small.
SMALL_VQ = {
    "_class_name": "VQModel",
    "act_fn": "silu",
    "block_out_channels": [32, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "num_vq_embeddings": 64,
    "sample_size": 32,
    "mid_block_add_attention": False,
    "lookup_from_codebook": True,
}


@pytest.fixture(scope="session")
def golden() -> Callable[[str], SimpleNamespace]:
    """golden(name) -> facts and tensors of a file in tests/data."""

    def read(name: str) -> SimpleNamespace:
        facts = json.loads((DATA / f"{name}.json").read_text())
        return SimpleNamespace(**facts, **load_file(DATA / f"{name}.safetensors"))

    return read


@pytest.fixture(scope="session")
def fill_by_formula() -> Callable[..., None]:
    """Gives a module (on the meta device) weights that are a formula of each name: a wrong name is a wrong weight."""

    def value(name: str, shape: torch.Size, facts: SimpleNamespace) -> Tensor:
        seed = zlib.crc32(f"{facts.salt}:{name}".encode()) & 0x7FFFFFFF
        scale, shift = facts.conv_gain / math.sqrt(math.prod(shape[1:])), 0.0
        if name.endswith("bias"):
            scale = 0.02
        elif len(shape) == 1:
            scale, shift = 0.1, 1.0
        elif name == "quantize.embedding.weight":
            scale = facts.codebook_scale
        drawn = np.random.RandomState(seed).standard_normal(size=tuple(shape)).astype(np.float32)
        return torch.from_numpy(drawn * np.float32(scale) + np.float32(shift))

    def fill(module: nn.Module, facts: SimpleNamespace, **given: Tensor) -> None:
        weights = {n: given[n] if n in given else value(n, w.shape, facts) for n, w in module.state_dict().items()}
        module.load_state_dict(weights, assign=True)
        module.requires_grad_(False).eval()

    return fill


@pytest.fixture(scope="session")
def small_magvit() -> Magvit2:
    """32 channels instead of 128, 32 codes instead of 8,192."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Magvit2(channels=32, bits=5).requires_grad_(False).eval()


@pytest.fixture(scope="session")
def magvit_folder(small_magvit: Magvit2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("magvit")
    small_magvit.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as diffusers itself writes it."""
    from diffusers.models.autoencoders.vq_model import VQModel

    folder = tmp_path_factory.mktemp("vqvae")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vq = VQModel(**{name: value for name, value in SMALL_VQ.items() if name[0] != "_"})
    vq.save_pretrained(folder)
    return folder
