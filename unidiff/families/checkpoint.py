"""The weight files of a checkpoint folder: one safetensors file, or shards with an index. Only headers are read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerFast

from unidiff.images.weights import QUANTIZED

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Weight:
    """A tensor's file, shape and dtype."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype


def files_in(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder, and the index."""
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    return [p for p in (folder / WEIGHTS, folder / INDEX) if p.is_file()] + shards


def read_headers(folder: Path) -> dict[str, Weight]:
    """Every tensor of a checkpoint by its published name.

    Raises FileNotFoundError if a file is missing, ValueError if one is damaged, quantized or disagrees with the index.
    Also raises ValueError if the folder has both a single-file model and shards, because it is ambiguous.
    """
    if (folder / INDEX).is_file() and (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds two models, {WEIGHTS} and the shards of {INDEX}; delete the one that is not meant"
        )
    if (folder / INDEX).is_file():
        return _sharded(folder)
    if (folder / WEIGHTS).is_file():
        return _header(folder / WEIGHTS)
    pickled = " (pickled weights are not read: convert them to safetensors)" if list(folder.glob("*.bin")) else ""
    shards = " (there are shards, but they need their index)" if files_in(folder) else ""
    raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}{pickled}{shards}")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The text tokenizer of a checkpoint. Raises FileNotFoundError without one, ValueError for damaged files."""
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder} lacks tokenizer.json; load_backbone needs no tokenizer")
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # tokenizers has one error type for every kind of damage
        raise ValueError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from error


def _sharded(folder: Path) -> dict[str, Weight]:
    try:
        table = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(table.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} is not an index of weights: {error!r}") from error
    if wrong := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
        raise ValueError(f"{folder / INDEX}: {wrong[0]!r} is not a file of this folder")
    if missing := [n for n in names if not (folder / n).is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}, {len(missing)} of the {len(names)} shards that {INDEX} names; "
            "fetch the checkpoint again"
        )
    found: dict[str, Weight] = {}
    for name in names:
        for key, weight in _header(folder / name).items():
            if table.get(key) != name:
                raise ValueError(f"{folder / name} holds {key}, which {INDEX} looks for in {table.get(key)}")
            found[key] = weight
    if lost := sorted(set(table) - set(found)):
        raise ValueError(f"{folder / table[lost[0]]} does not hold {lost[0]}, as {INDEX} says it does")
    return found


def _header(path: Path) -> dict[str, Weight]:
    try:
        with safe_open(path, "pt") as file:  # checks that the data are as long as the header says
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118  (safe_open is not a dict)
            found = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except Exception as error:  # safetensors has one error type for every kind of damage
        raise ValueError(f"{path} cannot be read, it is damaged or cut off: {error}") from error
    for key, (_, kind) in found.items():
        if kind not in _DTYPES:
            raise ValueError(f"{path}: {key} holds {kind} numbers; {QUANTIZED}")
    return {key: Weight(path, shape, _DTYPES[kind]) for key, (shape, kind) in found.items()}
