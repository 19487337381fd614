"""The source of a published data set: files, or the hub."""

from __future__ import annotations

from typing import Any


def splits(train: str | None, test: str | None, hub: dict[str, tuple[str, ...]]) -> Any:
    """The `splits` of `Rows`. With only `train`, the last tenth of that file is held out; with only `test`, the task
    can only be evaluated. hub: split -> arguments of `datasets.load_dataset`, used without files; the last argument is
    the hub's split. Raises ImportError or OSError if the hub's data cannot be loaded."""
    if train is not None and test is None:
        return train
    if train is None and test is None:
        return {name: _loaded(*where) for name, where in hub.items()}
    return {name: path for name, path in (("train", train), ("test", test)) if path is not None}


def _loaded(path: str, *words: str) -> Any:
    *config, split = words
    try:
        from datasets import load_dataset  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError(
            f'{path} is loaded by the package datasets: pip install "unidiff[data]", or give files by --task.train '
            "and --task.test"
        ) from error
    try:
        return load_dataset(path, *config, split=split)
    except Exception as error:  # it raises many error types
        raise OSError(f"{path} cannot be loaded ({error}); give files by --task.train and --task.test") from error
