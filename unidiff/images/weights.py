"""Loads published tensors into a module; names and shapes must agree, and errors name the difference."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
QUANTIZED = "quantized weights are not read, nor their scales: save the model in bfloat16 or float32"


def find_file(folder: Path, names: Sequence[str]) -> Path:
    """The first of these files that the folder has. Raises FileNotFoundError with all names."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no {' and no '.join(names)}: it is not this image tokenizer's folder")


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError if it is not an object, or has infinity, NaN or a duplicate key."""
    try:
        text = path.read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold an object, it holds {type(config).__name__}")
    return config


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is given twice")
        found[name] = value
    return found


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, or of a .bin or .pt file; only tensors are read, and no code is run.

    Raises ValueError if the file is damaged, contains anything but tensors, or would run code.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path} holds more than tensors and is not loaded: {error}") from error
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read, fetch it again: {error}") from error
    if isinstance(weights, dict):
        weights = weights.get("state_dict", weights)  # of a training checkpoint
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} must hold a table of tensors by name")
    return weights


def fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Loads weights into a module (built on the meta device), converted to the module's dtypes.

    Raises ValueError with the first weights that are missing, unexpected, of another shape, quantized or not finite.
    """
    wanted = module.state_dict()
    missing, extra = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    if missing or extra:
        raise ValueError(
            f"{path} does not fit {type(module).__name__}: {len(missing)} weights are missing {missing[:3]}, "
            f"{len(extra)} are unexpected {extra[:3]}"
        )
    for name, value in wanted.items():
        if value.shape != weights[name].shape:
            raise ValueError(
                f"{path} does not fit {type(module).__name__}: {name} is {list(weights[name].shape)}, "
                f"expected {list(value.shape)}"
            )
        floating = weights[name].dtype in FLOATING
        if floating != value.is_floating_point() or weights[name].is_complex():
            raise ValueError(f"{path}: {name} holds {weights[name].dtype} numbers; {QUANTIZED}")
    module.load_state_dict({name: weights[name].to(value.dtype) for name, value in wanted.items()}, assign=True)
    check_finite(module, path)


@torch.no_grad()
def check_finite(module: nn.Module, path: Path) -> None:
    """Raises ValueError with the first weight that has a NaN or an infinity; skips the meta device."""
    for name, value in module.state_dict().items():
        if not value.is_floating_point() or value.is_meta or value.sum(dtype=torch.float32).isfinite():
            continue  # a sum needs no copy; if it overflows, the values are checked
        if bad := int((~value.isfinite()).sum()):
            raise ValueError(f"{path}: {name} holds {bad} of {value.numel()} numbers that are NaN or infinite")
