"""Atomic writes: if a run is killed or the disk is full, the old files remain."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

DRAFT = ".draft"  # suffix of an unfinished file or folder


def draft_of(path: Path) -> Path:
    """The path at which a file or folder is written before it is complete."""
    return path.with_name(f"{path.name}{DRAFT}")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a draft path, then renames the draft. Removes a failed draft. Raises WriteError."""
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
    """Yields a draft folder, which then replaces `path`. Removes a failed draft. Raises WriteError."""
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
    """A path could not be written; the message has the cause and the free disk space."""


@contextlib.contextmanager
def named(path: Path) -> Iterator[None]:
    """Converts errors of writing (also those of torch and safetensors) to a WriteError."""
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
    """The content of a JSON file; None if it is missing, truncated or garbled."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
