"""Writing in one piece or not at all: a run that is killed, or finds the disk full, leaves what was there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

DRAFT = ".draft"  # ends the name of what is still being written


def draft_of(path: Path) -> Path:
    """Where a file or folder is written before it is whole."""
    return path.with_name(f"{path.name}{DRAFT}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make the file under another name, and renames it when it is whole; a failed draft is removed.
    Raises WriteError."""
    draft = draft_of(path)
    try:
        with named(path):
            write(draft)
            os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Gives a new folder to write to, which takes the place of `path` when it is whole; a failed draft is removed.
    Raises WriteError."""
    draft, old = draft_of(path), draft_of(path.with_name(f"{path.name}.old"))
    try:
        with named(path):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            yield draft
            if path.exists():
                os.replace(path, old)  # a folder cannot be renamed onto another
            os.replace(draft, path)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


class WriteError(OSError):
    """A path that could not be written, with the cause and the space that is left."""


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Turns errors of writing, those of torch and safetensors too, into a WriteError."""
    try:
        yield
    except WriteError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error).splitlines()[0]
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        free = shutil.disk_usage(place).free / 1e6
        raise WriteError(f"{path} could not be written: {cause} ({free:,.1f} MB are free on its disk)") from error


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds; None if it is missing, cut off or garbled."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
