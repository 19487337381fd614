"""Image tokenizers, one file per kind, and conversion of pictures to pixels."""

from unidiff.images import diffusers_vq, magvit2, patch_vq
from unidiff.images.pixels import to_pil, to_pixels
from unidiff.images.tokenizer import KINDS, ImageTokenizer, load, register

__all__ = [
    "KINDS",
    "ImageTokenizer",
    "diffusers_vq",
    "load",
    "magvit2",
    "patch_vq",
    "register",
    "to_pil",
    "to_pixels",
]
