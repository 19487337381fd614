"""Registry of model families, which convert published checkpoints to `UnifiedModel` and back.

A decorator registers a family by name; the rest of the package does not depend on single families. See
docs/families.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from unidiff.config import nearest
from unidiff.images import weights

if TYPE_CHECKING:
    import torch

    from unidiff.families.backbone import Backbone
    from unidiff.model import UnifiedModel


class Family(Protocol):
    """Interface of a family: recognises a config, loads a folder, saves with published names."""

    name: str

    def detect(self, config: dict[str, Any]) -> bool: ...

    def load(self, folder: Path, config: dict[str, Any], dtype: torch.dtype, **fields: Any) -> UnifiedModel: ...

    def save(self, model: UnifiedModel, folder: Path) -> None: ...


FAMILIES: dict[str, Family] = {}


_Class = TypeVar("_Class", bound=Callable[[], Any])


def register(family: _Class) -> _Class:
    """Class decorator: adds an instance of a family to the registry under its name."""
    instance: Family = family()
    FAMILIES[instance.name] = instance
    return family


def find(config: dict[str, Any], name: str | None = None) -> Family:
    """The family with this name, else the one that the config names (unidiff.family), else the one that recognises it.

    Raises ValueError with the known families, and the nearest.
    """
    known = ", ".join(sorted(FAMILIES))
    own = own_settings(config)
    if (name := name or own.get("family")) is not None:
        if name not in FAMILIES:
            raise ValueError(f"family {name!r} is not known; known families: {known}{nearest(name, FAMILIES, 0.0)}")
        return FAMILIES[name]
    for family in FAMILIES.values():
        if family.detect(config):
            return family
    raise ValueError(
        f"no family recognises model_type {config.get('model_type')!r}; known families: {known}; name one with family=…"
    )


def own_settings(config: dict[str, Any]) -> dict[str, Any]:
    """The object "unidiff" of config.json: family, image_tokenizer (a kind) and spec (fields of `ModelSpec`).

    Raises ValueError if a field has a wrong type. Unknown fields are ignored, with a warning.
    """
    own = config.get("unidiff", {})
    kinds = {"family": str, "image_tokenizer": str, "spec": dict}
    if not isinstance(own, dict):
        raise ValueError(f"config.json: unidiff is {own!r}; it must be an object with {', '.join(kinds)}")
    for name, value in own.items():
        if name not in kinds:
            warnings.warn(f"config.json: unidiff.{name} is not known, and not read{nearest(name, kinds)}", stacklevel=3)
        elif not isinstance(value, kinds[name]):
            wanted = "an object with fields of ModelSpec" if name == "spec" else "a name"
            raise ValueError(f"config.json: unidiff.{name} is {value!r}; it must be {wanted}")
    return own


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises FileNotFoundError or ValueError if it is not a checkpoint; for the
    folder of a run or an adapter the error names the right folder."""
    path = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds an adapter, not a model{_meant(folder.parent, folder.parent / 'model')}")
    if not path.is_file():
        meant = _meant(*(place / "model" for place in (folder, *folder.parents[:2])))  # of a run, of its checkpoint
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.json{meant}")
    config = weights.read_config(path)
    if "model_type" not in config and config.keys() >= {"output_dir", "max_steps"}:
        meant = _meant(folder / "model") or "; its model is written at the end of the run"
        raise ValueError(f"{folder} is the folder of a run, not a model{meant}")
    return config


def _meant(*folders: Path) -> str:
    """The end of a message, with the first of these folders that holds a model."""
    for folder in folders:
        path = folder / "config.json"
        if path.is_file() and "model_type" in weights.read_config(path):
            return f"; the model is in {folder}"
    return ""


def folder_of(path: str | Path) -> Path:
    """A checkpoint's folder. A repository of the Hugging Face hub, given by name, is downloaded.

    Raises FileNotFoundError if that fails.
    """
    folder = Path(path)
    if folder.exists() or len(folder.parts) != 2 or folder.is_absolute():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path)))
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path} is not a folder here, and not a repository to be had: {cause}") from error


def load(path: str | Path, family: str | None, dtype: torch.dtype, options: dict[str, Any]) -> UnifiedModel:
    """A whole checkpoint; see `UnifiedModel.from_pretrained`."""
    _check_dtype(dtype)
    folder = folder_of(path)
    config = read_config(folder)
    return find(config, family).load(folder, config, dtype, **options)


def _check_dtype(dtype: Any) -> None:
    if dtype not in weights.FLOATING:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(map(str, weights.FLOATING))}")


def load_backbone(
    path: str | Path,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    pad_policy: str | None = None,
    device_map: Any = None,
) -> Backbone:
    """The body of a published checkpoint, with `.logits(ids, valid=None)`; needs no text or image tokenizer.

    path: a folder, or a repository by name. family: needed if the config does not tell it. dtype: None = as stored.
    pad_policy: "hard" (default), "attend" or "additive_one"; see `attention.pad_bias`. device_map: as in transformers.
    Raises FileNotFoundError if a file is missing, ValueError if one is damaged, if the config lacks a field or means
    another architecture, or if config and weights disagree.
    """
    if dtype is not None:
        _check_dtype(dtype)
    folder = folder_of(path)
    config = read_config(folder)
    found = find(config, family)
    load = getattr(found, "load_backbone", None)
    if load is None:
        raise ValueError(f"family {found.name} has no body of its own to load; use UnifiedModel.from_pretrained")
    return load(folder, config, dtype, pad_policy, device_map)
