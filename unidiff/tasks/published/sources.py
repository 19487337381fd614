"""Where a published data set comes from: files, or the hub."""

from __future__ import annotations

from typing import Any


def splits(train: str | None, test: str | None, hub: dict[str, tuple[str, ...]]) -> Any:
    """What `Rows` takes. With `train` alone, the last tenth of that file is held out; with `test` alone, the task can
    be evaluated only. hub: split -> the arguments of `datasets.load_dataset`, where there is no file; its last one is
    the split there. Raises ImportError or OSError where the hub's data cannot be had."""
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
    except Exception as error:  # it has error types of its own for every fault
        raise OSError(f"{path} cannot be loaded ({error}); give files by --task.train and --task.test") from error
