"""PatchVQ: a small VQ tokenizer whose tokens depend only on the pixels of their own patch.

The encoder's convolutions do not overlap (kernel = stride). So a local change of pixels changes only the tokens of the
patches that it touches. (In a trial with overlapping kernels, edits leaked into neighbouring cells on 65 % of boards.)
The decoder's kernels overlap.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from unidiff.config import check_fields
from unidiff.files import write_json, write_whole
from unidiff.images.tokenizer import check_ids, check_pixels, register
from unidiff.images.weights import fill, read_config, read_weights

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class PatchVQConfig:
    """codebook_size: number of codes K. dim: D, width of a code. widths: channels after each halving of the
    resolution, so the tokenizer's factor is 2 ** len(widths)."""

    codebook_size: int = 128
    dim: int = 32
    widths: tuple[int, ...] = (40, 64, 112)

    def __post_init__(self) -> None:
        check_fields(self, "PatchVQConfig.")
        if min(self.codebook_size, self.dim, *self.widths) < 1:
            raise ValueError(f"{self}: every size must be at least 1")


@register("patch_vq")
class PatchVQ(nn.Module):
    """The tokenizer; an `ImageTokenizer`. Weights are fp32."""

    codebook: Tensor

    def __init__(self, config: PatchVQConfig | None = None) -> None:
        super().__init__()
        self.config = config or PatchVQConfig()
        self.encoder = _encoder(self.config)
        self.decoder = _decoder(self.config)
        self.register_buffer("codebook", torch.zeros(self.config.codebook_size, self.config.dim))

    @property
    def factor(self) -> int:
        return 2 ** len(self.config.widths)

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> ids [B, H / factor, W / factor]; ValueError for another shape."""
        check_pixels(pixels, self.factor)
        return self.nearest(self.features(pixels))

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] -> [B, 3, h * factor, w * factor] in [0, 1]; ValueError for ids out of range."""
        check_ids(ids, self.codebook_size)
        return self.paint(self.codebook[ids]).clamp(0, 1)

    def features(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, h, w, D], before quantization; each is normalised to mean 0 and variance 1.

        Without the norm, the features of an untrained encoder are too close together for codes to separate them.
        """
        features = self.encoder(pixels.to(self.codebook.dtype) * 2 - 1).movedim(1, -1)
        return F.layer_norm(features, features.shape[-1:])

    def nearest(self, features: Tensor) -> Tensor:
        """[..., D] -> ids [...]: argmin over codes e of |z - e|², which equals that of |e|² - 2 z·e."""
        return ((self.codebook**2).sum(-1) - 2 * features @ self.codebook.T).argmin(-1)

    def paint(self, codes: Tensor) -> Tensor:
        """[B, h, w, D] -> [B, 3, H, W], not clamped to [0, 1]."""
        return self.decoder(codes.movedim(-1, 1)) / 2 + 0.5

    def loss(self, pixels: Tensor, commitment: float = 0.25) -> tuple[Tensor, Tensor, Tensor]:
        """The training loss |x - x̂|² + commitment · |z - sg(e)|², with a straight-through gradient from e to z.

        Returns (loss, features [B, h, w, D] detached, ids [B, h, w]); the last two feed `CodebookEMA.update`.
        """
        features = self.features(pixels)
        ids = self.nearest(features.detach())
        codes = self.codebook[ids]
        painted = self.paint(features + (codes - features).detach())
        loss = F.mse_loss(painted, pixels) + commitment * F.mse_loss(features, codes)
        return loss, features.detach(), ids

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors, each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        write_json(folder / CONFIG, {"tokenizer": "patch_vq", **asdict(self.config)})
        write_whole(folder / WEIGHTS, lambda path: save_file(weights, path))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PatchVQ:
        """Loads a folder of `save_pretrained`, in evaluation mode.

        Raises FileNotFoundError if a file is missing and ValueError if one is unreadable or the two disagree.
        """
        folder = Path(folder)
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name} is missing; PatchVQ needs {CONFIG} and {WEIGHTS}")
        # weights on the meta device are not initialised, so loading draws no random numbers
        with torch.device("meta"):
            model = cls(_read_config(folder / CONFIG))
        fill(model, read_weights(folder / WEIGHTS), folder / WEIGHTS)
        return model.requires_grad_(False).eval()


class CodebookEMA:
    """Moves codes to the running mean of the features that chose them, and revives unused codes.

    N_k <- decay · N_k + (1 - decay) · n_k;  S_k <- decay · S_k + (1 - decay) · Σ z;  e_k = S_k / N_k.
    A code with N_k below `dead` is moved to a feature of the batch, drawn in proportion to its squared error, so that
    rare patches get their own codes. The first update does this to all codes.
    """

    def __init__(self, model: PatchVQ, decay: float = 0.97, dead: float = 0.25) -> None:
        self.model, self.decay, self.dead = model, decay, dead
        self.counts = torch.zeros_like(model.codebook[:, 0])
        self.sums = torch.zeros_like(model.codebook)

    @torch.no_grad()
    def update(self, features: Tensor, ids: Tensor, generator: torch.Generator, revive: bool = True) -> None:
        """Updates with one batch: features [B, h, w, D] and ids [B, h, w] of `PatchVQ.loss`."""
        features, chosen = features.flatten(0, -2), ids.flatten()
        onehot = F.one_hot(chosen, self.model.codebook_size).to(features.dtype)
        self.counts.lerp_(onehot.sum(0), 1 - self.decay)
        self.sums.lerp_(onehot.T @ features, 1 - self.decay)
        dead = self.counts < self.dead
        if revive and dead.any():
            errors = (features - self.model.codebook[chosen]).square().sum(-1)
            drawn = torch.multinomial(errors + 1e-12, int(dead.sum()), replacement=True, generator=generator)
            self.counts[dead], self.sums[dead] = 1.0, features[drawn]
        used = self.counts > 1e-6
        self.model.codebook[used] = self.sums[used] / self.counts[used, None]


def _encoder(config: PatchVQConfig) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip((3, *config.widths), config.widths):
        layers += [nn.Conv2d(before, after, kernel_size=2, stride=2), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(config.widths[-1], config.dim, kernel_size=1))


def _decoder(config: PatchVQConfig) -> nn.Sequential:
    widths = config.widths[::-1]
    layers: list[nn.Module] = [nn.Conv2d(config.dim, widths[0], kernel_size=3, padding=1), nn.SiLU()]
    for before, after in pairwise(widths):
        layers += [nn.ConvTranspose2d(before, after, kernel_size=4, stride=2, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.ConvTranspose2d(widths[-1], 3, kernel_size=4, stride=2, padding=1))


def _read_config(path: Path) -> PatchVQConfig:
    settings = read_config(path)
    kind = settings.pop("tokenizer", None)
    names = {field.name for field in fields(PatchVQConfig)}
    if kind != "patch_vq" or set(settings) != names:
        raise ValueError(
            f"{path}: expected tokenizer 'patch_vq' with {sorted(names)}, got {kind!r} with {sorted(settings)}"
        )
    return PatchVQConfig(**settings)
