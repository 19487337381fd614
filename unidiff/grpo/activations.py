"""Gradient checkpointing: activations inside a layer are dropped and recomputed in the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from unidiff.model import UnifiedModel


def enable(model: UnifiedModel) -> None:
    """Prepares a model, once. Checkpointing is active only inside `recomputed`."""
    body = model.backbone
    enable = getattr(body, "activation_checkpointing_enable", None) or body.gradient_checkpointing_enable  # older name
    enable({"use_reentrant": False})


@contextlib.contextmanager
def recomputed(model: UnifiedModel, on: bool = True) -> Iterator[None]:
    """While open, layers keep only their inputs. Values and gradients are bit-identical.

    transformers checkpoints only layers in training mode. So the flag is set on each layer but not on its submodules,
    and dropout stays off. Do not sample inside: a checkpointed layer drops its cache.
    """
    layers = model.backbone.model.layers if on else ()
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
