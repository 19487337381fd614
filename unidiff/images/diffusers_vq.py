"""`diffusers.VQModel` as an `ImageTokenizer`: the aMUSEd-type VQ of Lumina-DiMOO and MMaDA-Parallel-A."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unidiff.config import convert
from unidiff.files import write_json, write_whole
from unidiff.images.tokenizer import check_ids, check_pixels, in_chunks, register
from unidiff.images.weights import fill, find_file, read_config, read_weights

CONFIG = "config.json"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# Required fields of a config: the sizes, and fields that the weights' shapes do not reveal.
_NEEDED = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "latent_channels")
_NEEDED += ("num_vq_embeddings", "norm_num_groups", "act_fn")


@register("diffusers_vq")
class DiffusersVQ(nn.Module):
    """The tokenizer; an `ImageTokenizer`. vq: a `diffusers.VQModel`, which works on pixels in [0, 1]."""

    def __init__(self, vq: Any) -> None:
        super().__init__()
        self.vq = vq

    @property
    def factor(self) -> int:
        return 2 ** (len(self.vq.config.block_out_channels) - 1)

    @property
    def codebook_size(self) -> int:
        return self.vq.config.num_vq_embeddings

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> ids [B, H / factor, W / factor]; ValueError for another shape."""
        check_pixels(pixels, self.factor)
        return in_chunks(self._encode, pixels, pixels[0].numel())

    def _encode(self, pixels: Tensor) -> Tensor:
        latents = self.latents(pixels)
        _, _, (_, _, ids) = self.vq.quantize(latents)
        return ids.reshape(len(latents), *latents.shape[2:])

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] -> [B, 3, h * factor, w * factor] in [0, 1], float32; ValueError for ids out of range."""
        check_ids(ids, self.codebook_size)
        pixels = 3 * ids.shape[1] * ids.shape[2] * self.factor**2
        return in_chunks(lambda part: self.paint(part).float().clamp(0, 1), ids, pixels)

    def latents(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D, h, w], before quantization."""
        return self.vq.encode(pixels.to(self.vq.device, self.vq.dtype)).latents

    def paint(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] -> [B, 3, H, W] in about [0, 1], not clamped."""
        shape = (*ids.shape, self.vq.quantize.vq_embed_dim)
        return self.vq.decode(ids.to(self.vq.device), force_not_quantize=True, shape=shape).sample

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and the weights in diffusers' layout."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.vq.state_dict().items()}
        write_whole(folder / WEIGHTS[0], lambda path: save_file(weights, path, metadata={"format": "pt"}))
        fields = {name: value for name, value in self.vq.config.items() if not name.startswith("_")}
        write_json(folder / CONFIG, {"_class_name": "VQModel", **fields})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> DiffusersVQ:
        """Loads a folder in diffusers' layout (`vqvae` of the published repositories), in evaluation mode.

        Raises FileNotFoundError if a file is missing, ValueError if the config is not a complete one of VQModel or the
        weights do not fit it, ImportError without diffusers.
        """
        folder = Path(folder)
        path = find_file(folder, [CONFIG])
        fields = _fields(read_config(path), path)
        place = find_file(folder, WEIGHTS)
        weights = read_weights(place)
        if fields["layers_per_block"] > len(weights):  # checked before the layers are built
            raise ValueError(f"{path}: layers_per_block is {fields['layers_per_block']}, of {len(weights)} weights")
        model = cls(empty_model(fields))
        fill(model.vq, weights, place)
        return model.requires_grad_(False).eval()


def _fields(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """A VQModel's fields from its config. Raises ValueError if fields are missing, ImportError without diffusers."""
    try:
        from diffusers.models.autoencoders.vq_model import VQModel
    except ImportError as error:
        raise ImportError("this image tokenizer needs diffusers: pip install 'unidiff[dimoo]'") from error
    kind = config.get("_class_name", "VQModel")
    if kind != "VQModel":
        raise ValueError(f"{path}: _class_name is {kind!r}, expected 'VQModel'")
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    if missing := [name for name in _NEEDED if name not in fields]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is not the config of a VQModel")
    if unknown := fields.keys() - inspect.signature(VQModel.__init__).parameters.keys():
        raise ValueError(f"{path}: VQModel of this diffusers knows no {', '.join(sorted(unknown))}; upgrade diffusers")
    convert(fields["layers_per_block"], int, f"{path}: layers_per_block", words=False)
    return fields


def empty_model(fields: dict[str, Any]) -> Any:
    """A VQModel without weights, on the meta device."""
    from diffusers.models.autoencoders.vq_model import VQModel

    with torch.device("meta"):
        # We decode ids, so the codebook lookup is always on
        return VQModel(**{**fields, "lookup_from_codebook": True})
