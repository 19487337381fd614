"""Writing a file in one piece or not at all: a run that is killed leaves the one that was there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

DRAFT = ".draft"  # ends the name of what is still being written


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make the file under another name, and renames it when it is whole; a failed draft is removed."""
    draft = path.with_name(f"{path.name}{DRAFT}")
    try:
        write(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")
