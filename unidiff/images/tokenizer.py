"""Image tokenizers: the interface, and loading by kind. A decorator registers a kind by name; each kind has its own
file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from unidiff.config import nearest


@runtime_checkable
class ImageTokenizer(Protocol):
    """Converts pixels to a grid of codebook entries and back. It does not change the global random state.

    factor: pixels per token, along each side.
    codebook_size: K; ids are 0 to K-1, without the offset that a model's vocabulary adds.
    """

    @property
    def factor(self) -> int: ...

    @property
    def codebook_size(self) -> int: ...

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] float in [0, 1] -> ids [B, H / factor, W / factor] int64."""
        ...

    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] -> [B, 3, h * factor, w * factor] float in [0, 1]."""
        ...


KINDS: dict[str, Any] = {}
_Kind = TypeVar("_Kind", bound=type)


def register(kind: str) -> Callable[[_Kind], _Kind]:
    """Class decorator: `load(kind, folder)` then calls the class's `from_pretrained(folder)`."""

    def add(tokenizer: _Kind) -> _Kind:
        KINDS[kind] = tokenizer
        return tokenizer

    return add


def load(kind: str, folder: str | Path, codebook_size: int | None = None) -> ImageTokenizer:
    """The image tokenizer of a folder, frozen and in evaluation mode.

    kind: "patch_vq", "magvit2", "diffusers_vq", or another registered kind. codebook_size: the model's
    `ModelSpec.codebook_size`, to be checked. Raises ValueError for an unknown kind, damaged or unfitting files, and
    another codebook size; FileNotFoundError for missing files.
    """
    if kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise ValueError(f"image tokenizer {kind!r} is not known; known kinds: {known}{nearest(kind, KINDS)}")
    tokenizer: ImageTokenizer = KINDS[kind].from_pretrained(folder)
    if codebook_size is not None and tokenizer.codebook_size != codebook_size:
        raise ValueError(
            f"the image tokenizer in {folder} has {tokenizer.codebook_size} codes, ModelSpec.codebook_size is "
            f"{codebook_size}: it is not the one that this model was trained with"
        )
    return tokenizer


# Values (pixels × channels) that go through a tokenizer at once: four images of 512 x 512. A convolution at full
# resolution then needs 0.5 GB of float32 for each of its inputs and outputs.
_PIXELS_AT_ONCE = 3 << 20


def in_chunks(function: Callable[[Tensor], Tensor], rows: Tensor, size: int) -> Tensor:
    """function(rows) [B, ...], computed a few rows at a time. size: values (pixels × channels) per row."""
    return torch.cat([function(part) for part in rows.split(max(_PIXELS_AT_ONCE // max(size, 1), 1))])


def check_pixels(pixels: Tensor, factor: int) -> None:
    """Raises ValueError unless pixels are float [B, 3, H, W] with sides that are multiples of `factor`."""
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
        raise ValueError(f"pixels: expected float [B, 3, H, W], got {pixels.dtype} {list(pixels.shape)}")
    height, width = pixels.shape[2:]
    if not len(pixels):
        raise ValueError("pixels: expected at least one image, got none")
    if height < factor or width < factor:
        raise ValueError(f"pixels: one token is {factor} x {factor} pixels, got {height} x {width}; enlarge the image")
    if height % factor or width % factor:
        raise ValueError(f"pixels: sides must be multiples of {factor}, got {height} x {width}; resize it")


def check_ids(ids: Tensor, codebook_size: int) -> None:
    """Raises ValueError unless ids are integers [B, h, w] in 0..codebook_size-1."""
    if ids.ndim != 3 or ids.is_floating_point():
        raise ValueError(f"ids: expected integers [B, h, w], got {ids.dtype} {list(ids.shape)}")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < codebook_size:
        raise ValueError(
            f"ids: expected 0 to {codebook_size - 1}, got {int(ids.min())} to {int(ids.max())}; "
            "subtract the vocabulary's image offset first"
        )
