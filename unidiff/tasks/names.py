"""Tasks by name: what ships, a data file, or the user's own.

frozen_lake                 one that ships
prompts.jsonl               a data file (.jsonl, .json, .csv, .parquet): `Rows`
my_tasks.py:puzzle          a task, or a function or class that makes one, in a file
package.module:puzzle       the same in a module
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unidiff import plugins
from unidiff.config import convert, nearest
from unidiff.tasks.rows import Rows
from unidiff.tasks.sources import SUFFIXES
from unidiff.tasks.task import Task, check_task

TASKS = {  # name: where it is
    "frozen_lake": "unidiff.tasks.frozen_lake:FrozenLake",
    "countdown": "unidiff.tasks.countdown:Countdown",
    "functions": "unidiff.tasks.functions:Functions",
    "shapes": "unidiff.tasks.shapes.task:Shapes",
    "edit_shapes": "unidiff.tasks.shapes.task:EditShapes",
}


def resolve(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task of a name. options: its settings by name, as texts or values. Raises ValueError for an unknown name or
    setting (with the nearest known one), FileNotFoundError for a file, TypeError for what is no task."""
    given = dict(options or {})
    path, colon, attribute = name.rpartition(":")
    if Path(name).suffix.lower() in SUFFIXES:
        return _made(_file, name, {"path": name, **given})
    if colon and path.endswith(".py"):
        return _made(plugins.imported(f"{_module(Path(path))}:{attribute}"), name, given)
    if not plugins.is_path(name) and name not in TASKS:
        hint = nearest(name, TASKS) or f"; known: {', '.join(TASKS)}."
        raise ValueError(
            f"unknown task {name!r}{hint} Others are named as file.py:name, package.module:name, data.jsonl"
        )
    return _made(plugins.imported(TASKS.get(name, name)), name, given)


def _file(path: str, test: str | None = None, **options: Any) -> Rows:
    """A data file. test: the file of the held-out split."""
    return Rows(path if test is None else {"train": path, "test": test}, **options)


def _module(path: Path) -> str:
    """Makes a file importable. Raises FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if (loaded := sys.modules.get(path.stem)) is not None and Path(str(loaded.__file__)).resolve() != path.resolve():
        raise ValueError(f"{path}: a module named {path.stem!r} is loaded already; give the file another name")
    importlib.invalidate_caches()
    return path.stem


def _made(found: Any, name: str, options: dict[str, Any]) -> Task:
    """The task, made with its options if it is a class or a function."""
    if isinstance(found, Task):
        if options:
            raise ValueError(f"task {name!r} is made already and takes no options; name what makes it")
        return found
    if not callable(found):
        raise TypeError(f"{name!r} is a {type(found).__name__}; it must be a Task, or make one")
    known = dict(inspect.signature(found if found is not _file else Rows).parameters)
    if found is _file:
        known |= dict(inspect.signature(_file).parameters)
    for key, value in options.items():
        if key not in known:
            raise ValueError(f"task {name!r} has no setting {key!r}{nearest(key, known)}")
        hint = inspect.get_annotations(found, eval_str=True).get(key) if inspect.isclass(found) else None
        if hint is not None and isinstance(value, str):
            options[key] = convert(value, hint, f"task.{key}")
    return check_task(found(**options))
