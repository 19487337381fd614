"""Model families: how a published checkpoint becomes a `UnifiedModel`, and back.

A family is registered by name with a decorator; nothing else in the package knows one. See docs/families.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from unidiff.model import UnifiedModel


class Family(Protocol):
    """What a family file gives: recognising a config, loading a folder, saving it under published names."""

    name: str

    def detect(self, config: dict[str, Any]) -> bool: ...

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> UnifiedModel: ...

    def save(self, model: UnifiedModel, folder: Path) -> None: ...


FAMILIES: dict[str, Family] = {}


def register(family: Callable[[], Family]) -> Callable[[], Family]:
    """Class decorator: adds an instance of a family to the registry under its name."""
    instance = family()
    FAMILIES[instance.name] = instance
    return family


def find(config: dict[str, Any], name: str | None = None) -> Family:
    """The family by name, or the one that recognises the config. Raises ValueError naming the known ones."""
    known = ", ".join(sorted(FAMILIES))
    if name is not None:
        if name not in FAMILIES:
            raise ValueError(f"family {name!r} is not known; known families: {known}")
        return FAMILIES[name]
    for family in FAMILIES.values():
        if family.detect(config):
            return family
    raise ValueError(
        f"no family recognises model_type {config.get('model_type')!r}; known families: {known}; name one with family=…"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises FileNotFoundError or ValueError with the path if it is not one."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, it holds {type(config).__name__}")
    return config


from unidiff.families import native as native  # noqa: E402  (registers itself)
