"""Gradient checkpointing: a layer's activations are dropped, and computed again when they are needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from unidiff.model import UnifiedModel


def enable(model: UnifiedModel) -> None:
    """Once for a model; it then happens inside `recomputed`."""
    body = model.backbone
    enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable  # older name
    enable({"use_reentrant": False})


@contextlib.contextmanager
def recomputed(model: UnifiedModel, on: bool = True) -> Iterator[None]:
    """Inside, layers keep their inputs only. Values and gradients are the same, bit by bit.

    transformers does so in layers in training mode alone. That is their own flag here, not that of their parts: nothing
    else about them changes, dropout for one. Sampling must not be inside, where a layer would lose its cache.
    """
    layers = model.backbone.model.layers if on else ()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
