"""MAGVIT-v2: the lookup-free tokenizer trained by Show-o, used by MMaDA and MMaDA-Parallel-M (showlab/magvitv2).

Lookup-free quantization (Yu et al. 2023, arXiv 2310.05737): the encoder gives D numbers per position; the code is their
signs as a binary number, most significant first; the decoder sees ±1. So there is no learned codebook, and K = 2 ** D.
Attribute names below must match the published weight names.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from unidiff.files import write_json, write_whole
from unidiff.images.tokenizer import check_ids, check_pixels, in_chunks, register
from unidiff.images.weights import fill, find_file, read_weights

WEIGHTS = ("pytorch_model.safetensors", "pytorch_model.bin")

# (channels in units of the first convolution's, residual blocks) for each resolution, from pixels to codes. The
# published config.json does not contain them.
_ENCODER = ((1, 4), (2, 3), (2, 4), (4, 3), (4, 4))
_DECODER = ((1, 4), (1, 4), (2, 3), (2, 4), (4, 3))


@register("magvit2")
class Magvit2(nn.Module):
    """The tokenizer; an `ImageTokenizer`. channels: width at the pixels' resolution. bits: D.

    The published model has 128 channels and 13 bits (8,192 codes): 382 tensors, 95 million numbers. It works on
    pixels in [-1, 1]; `encode` and `decode` convert.
    """

    factor = 2 ** (len(_ENCODER) - 1)

    def __init__(self, channels: int = 128, bits: int = 13) -> None:
        super().__init__()
        self.encoder = _Encoder(channels, bits)
        self.decoder = _Decoder(channels, bits)
        self.quantize = _Signs(bits)

    @property
    def codebook_size(self) -> int:
        return len(self.quantize.embedding)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> ids [B, H / 16, W / 16]; ValueError for another shape."""
        check_pixels(pixels, self.factor)
        return in_chunks(lambda part: self.quantize.codes(self.latents(part)), pixels, pixels[0].numel())

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] -> [B, 3, 16 h, 16 w] in [0, 1], float32; ValueError for ids out of range."""
        check_ids(ids, self.codebook_size)
        pixels = 3 * ids.shape[1] * ids.shape[2] * self.factor**2
        return in_chunks(lambda part: self.paint(part).float().clamp(-1, 1) / 2 + 0.5, ids, pixels)

    def latents(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> [B, D, h, w]; the signs are the code."""
        weight = self.encoder.conv_in.weight
        return self.encoder(pixels.to(weight.device, weight.dtype) * 2 - 1)

    def paint(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] -> [B, 3, H, W] in about [-1, 1], not clamped."""
        signs = self.quantize.embedding
        return self.decoder(signs[ids.to(signs.device)].movedim(-1, 1).contiguous())

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and pytorch_model.safetensors with published names."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        write_whole(folder / WEIGHTS[0], lambda path: save_file(weights, path, metadata={"format": "pt"}))
        write_json(folder / "config.json", {"_class_name": "MAGVITv2"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Magvit2:
        """Loads a published folder (.safetensors, else .bin), in evaluation mode; config.json is not needed.

        Width and bits are read from the weights' shapes. Raises FileNotFoundError if there are no weights, ValueError
        if they cannot be read or do not fit.
        """
        path = find_file(Path(folder), WEIGHTS)
        weights = read_weights(path)
        first, powers = weights.get("encoder.conv_in.weight"), weights.get("quantize.power_vals")
        # if these are missing, use the published sizes, and `fill` raises a clear error
        sizes = (128, 13) if first is None or powers is None else (len(first), powers.numel())
        with torch.device("meta"):
            model = cls(*sizes)
        fill(model, weights, path)
        model.quantize.check(path)
        return model.requires_grad_(False).eval()


class _Signs(nn.Module):
    """The quantizer: codes and their ±1 vectors."""

    embedding: Tensor
    power_vals: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.register_buffer("power_vals", 2 ** torch.arange(bits - 1, -1, -1))
        self.register_buffer("embedding", _signs(self.power_vals))

    def codes(self, latents: Tensor) -> Tensor:
        """[B, D, h, w] -> [B, h, w]: Σ_i 2^(D-1-i) · [z_i > 0]."""
        return ((latents > 0).movedim(1, -1) * self.power_vals).sum(-1)

    def check(self, path: Path) -> None:
        """Raises ValueError unless the file's tables are the expected ones."""
        bits = self.power_vals.numel()
        powers = 2 ** torch.arange(bits - 1, -1, -1)
        if not torch.equal(self.power_vals, powers) or not torch.equal(self.embedding.float(), _signs(powers)):
            raise ValueError(f"{path}: quantize.embedding is not the ±1 of each code's {bits} bits, first bit first")


def _signs(powers: Tensor) -> Tensor:
    """[D] powers of two -> [2 ** D, D] float32: row c is +1 where the bit is set in c, else -1."""
    codes = torch.arange(2 ** powers.numel(), device=powers.device)
    return ((codes[:, None] // powers) % 2).float() * 2 - 1


class _Block(nn.Module):
    """Residual block: norm, SiLU, convolution, twice."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(before), nn.Conv2d(before, after, 3, padding=1)
        self.norm2, self.conv2 = _norm(after), nn.Conv2d(after, after, 3, padding=1)
        if before != after:
            self.nin_shortcut = nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class _Attention(nn.Module):
    """Self-attention over all positions, with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v = (nn.Conv2d(width, width, 1) for _ in range(3))
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (part(h).flatten(2).mT[:, None].contiguous() for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)[:, 0].mT.reshape(x.shape)  # of [B, 1, h w, width]
        return x + self.proj_out(mixed)


class _Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = _Block(width, width), _Attention(width), _Block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Resample(nn.Module):
    """Halves the resolution (by stride, with padding only at the right and bottom) or doubles it."""

    def __init__(self, width: int, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(width, width, 3, padding=1) if up else nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Stage(nn.Module):
    """The blocks of one resolution, and the resampling to the next one, if any."""

    def __init__(self, before: int, after: int, blocks: int, resample: str | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(_Block(before if i == 0 else after, after) for i in range(blocks))
        self.resample = resample
        if resample:
            self.add_module(resample, _Resample(after, up=resample == "upsample"))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.resample)(x) if self.resample else x


class _Encoder(nn.Module):
    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = nn.ModuleList()
        width = channels
        for level, (factor, blocks) in enumerate(_ENCODER):
            last = level == len(_ENCODER) - 1
            self.down.append(_Stage(width, factor * channels, blocks, None if last else "downsample"))
            width = factor * channels
        self.mid = _Middle(width)
        self.norm_out, self.conv_out = _norm(width), nn.Conv2d(width, bits, 3, padding=1)
        self.quant_conv = nn.Conv2d(bits, bits, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for stage in self.down:
            h = stage(h)
        return self.quant_conv(self.conv_out(F.silu(self.norm_out(self.mid(h)))))


class _Decoder(nn.Module):
    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        width = _DECODER[-1][0] * channels
        self.conv_in = nn.Conv2d(bits, width, 3, padding=1)
        self.mid = _Middle(width)
        stages = []
        for level, (factor, blocks) in reversed(list(enumerate(_DECODER))):
            stages.append(_Stage(width, factor * channels, blocks, "upsample" if level else None))
            width = factor * channels
        self.up = nn.ModuleList(reversed(stages))  # numbered by resolution, as in the encoder
        self.norm_out, self.conv_out = _norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mid(self.conv_in(self.post_quant_conv(x)))
        for stage in reversed(self.up):
            h = stage(h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, width, eps=1e-6)
