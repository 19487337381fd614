"""Model families: how a published checkpoint becomes a `UnifiedModel`, and back.

A family is registered by name with a decorator; nothing else in the package knows one. See docs/families.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    import torch

    from unidiff.families.backbone import Backbone
    from unidiff.model import UnifiedModel


class Family(Protocol):
    """What a family file gives: recognising a config, loading a folder, saving it under published names."""

    name: str

    def detect(self, config: dict[str, Any]) -> bool: ...

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype) -> UnifiedModel: ...

    def save(self, model: UnifiedModel, folder: Path) -> None: ...


FAMILIES: dict[str, Family] = {}


_Class = TypeVar("_Class", bound=Callable[[], Any])


def register(family: _Class) -> _Class:
    """Class decorator: adds an instance of a family to the registry under its name."""
    instance: Family = family()
    FAMILIES[instance.name] = instance
    return family


def find(config: dict[str, Any], name: str | None = None) -> Family:
    """The family by name, or the one that the config names (under unidiff.family) or that recognises it.

    Raises ValueError naming the known ones, and the nearest.
    """
    known = ", ".join(sorted(FAMILIES))
    own = config.get("unidiff", {})
    if not isinstance(own, dict):
        raise ValueError(f"config.json: unidiff is {own!r}; it must be an object with family, spec or image_tokenizer")
    if (name := name or own.get("family")) is not None:
        if name not in FAMILIES:
            nearest = get_close_matches(name, FAMILIES, 1, 0.0)
            raise ValueError(f"family {name!r} is not known; known families: {known}; did you mean {nearest[0]!r}?")
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


def folder_of(path: str | Path) -> Path:
    """A checkpoint's folder; a repository of the Hugging Face hub, by name, is downloaded.

    Raises FileNotFoundError if it cannot be had.
    """
    folder = Path(path)
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path)))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{path} is no folder, and no repository that can be had: {error}") from error


def load_backbone(
    path: str | Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    pad_policy: str | None = None,
    device_map: Any = None,
) -> Backbone:
    """The body of a published checkpoint, with `.logits(ids, valid=None)`; needs no tokenizer of text or images.

    path: a folder, or a repository by name. family: where the config does not tell it. dtype: None = as stored.
    pad_policy: what a pad does, "hard" (default), "attend" or "additive_one"; see `attention.pad_bias`. device_map:
    of transformers. Raises FileNotFoundError if a file is missing, ValueError if one is damaged, if the config
    lacks a field or means another architecture, or if config and weights disagree.
    """
    folder = folder_of(path)
    config = read_config(folder)
    found = find(config, family)
    load = getattr(found, "load_backbone", None)
    if load is None:
        raise ValueError(f"family {found.name} has no body of its own to load; use UnifiedModel.from_pretrained")
    return load(folder, config, dtype, pad_policy, device_map)


# Each registers itself.
from unidiff.families import dimoo as dimoo  # noqa: E402
from unidiff.families import llada as llada  # noqa: E402
from unidiff.families import mmada as mmada  # noqa: E402
from unidiff.families import mmada_parallel as mmada_parallel  # noqa: E402
from unidiff.families import native as native  # noqa: E402
