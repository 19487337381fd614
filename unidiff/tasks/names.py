"""Tasks by name: shipped tasks, data files, or the user's own.

frozen_lake                 a shipped task
shapes,countdown            several at once: `mix`
prompts.jsonl               a data file (.jsonl, .json, .csv, .parquet): `Rows`
my_tasks.py:puzzle          a task, or a function or class that makes one, in a file
package.module:puzzle       the same in a module
"""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unidiff import plugins
from unidiff.config import convert, nearest
from unidiff.tasks.mix import Mix
from unidiff.tasks.rows import Rows
from unidiff.tasks.sources import SUFFIXES
from unidiff.tasks.task import Task, check_task

TASKS = {  # name: module and attribute
    "frozen_lake": "unidiff.tasks.frozen_lake:FrozenLake",
    "maze": "unidiff.tasks.maze:Maze",
    "sokoban": "unidiff.tasks.sokoban:Sokoban",
    "sliding_puzzle": "unidiff.tasks.sliding_puzzle:SlidingPuzzle",
    "jigsaw": "unidiff.tasks.jigsaw:Jigsaw",
    "countdown": "unidiff.tasks.countdown:Countdown",
    "functions": "unidiff.tasks.functions:Functions",
    "shapes": "unidiff.tasks.shapes.task:Shapes",
    "edit_shapes": "unidiff.tasks.shapes.task:EditShapes",
    "gsm8k": "unidiff.tasks.published.math:gsm8k",
    "math500": "unidiff.tasks.published.math:math500",
    "countdown_3to4": "unidiff.tasks.published.math:countdown",
    "sudoku": "unidiff.tasks.published.math:sudoku",
    "reasoning_gym": "unidiff.tasks.published.gym:ReasoningGym",
    "acecode": "unidiff.tasks.published.code:acecode",
    "mbpp": "unidiff.tasks.published.code:mbpp",
    "humaneval": "unidiff.tasks.published.code:humaneval",
    "prompts": "unidiff.tasks.published.pictures:prompts",
    "edits": "unidiff.tasks.published.pictures:edits",
}
_ANY = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def resolve(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task with this name. options: its settings by name, as texts or values; for several tasks the name is
    prefixed ("shapes.skill"). Raises ValueError for an unknown name or setting (with the nearest known one),
    FileNotFoundError for a missing file, TypeError if the name does not lead to a task."""
    given = dict(options or {})
    if "," in name and not Path(name).exists():
        return _several([part.strip() for part in name.split(",")], given)
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


def _several(names: list[str], options: dict[str, Any]) -> Mix:
    """Several tasks as one; the option `weights` sets how often each comes."""
    short = [name.rpartition(":")[2] if ":" in name else Path(name).stem for name in names]
    if len(set(short)) < len(names) or not all(short):
        raise ValueError(f"task {','.join(names)!r}: name each task once")
    weights = options.pop("weights", None)
    if isinstance(weights, str):
        weights = convert(weights, tuple[float, ...], "task.weights")
    own: dict[str, dict[str, Any]] = {one: {} for one in short}
    for key, value in options.items():
        one, dot, setting = key.partition(".")
        if not dot or one not in own:
            raise ValueError(f"task.{key}: of several tasks, name the one that it is of: task.{short[0]}.{key}")
        own[one][setting] = value
    return Mix({one: resolve(name, own[one]) for one, name in zip(short, names)}, weights)


def _file(path: str, test: str | None = None, **options: Any) -> Rows:
    """A data file. test: the file of the held-out split."""
    return Rows(path if test is None else {"train": path, "test": test}, **options)


def _module(path: Path) -> str:
    """Makes a file importable and returns its module name. Raises FileNotFoundError."""
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
    """The task; a class or function is called with the options."""
    if isinstance(found, Task):
        if options:
            raise ValueError(f"task {name!r} is made already and takes no options; name what makes it")
        return found
    if not callable(found):
        raise TypeError(f"{name!r} is a {type(found).__name__}; it must be a Task, or make one")
    known = _parameters(found) if found is not _file else {**_parameters(found), **_parameters(Rows)}
    takes_any = found is not _file and any(one.kind is one.VAR_KEYWORD for one in known.values())
    for key, value in options.items():
        if key not in known and not takes_any:
            raise ValueError(f"task {name!r} has no setting {key!r}{nearest(key, known)}")
        if isinstance(value, str) and key in known:
            options[key] = _read(value, known[key].annotation, key)
    for key, one in _parameters(found).items():
        if one.default is one.empty and one.kind not in _ANY and key not in options:
            raise ValueError(f"task {name!r} needs a setting: --task.{key} VALUE")
    return check_task(found(**options))


def _parameters(found: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(found, eval_str=True).parameters)
    except NameError:  # an annotation exists only for type checkers
        return dict(inspect.signature(found).parameters)


def _read(value: str, hint: Any, key: str) -> Any:
    """Converts a command-line word to a task's setting. Words stay texts, unless the type is a number, a bool, a
    Literal or a tuple."""
    kinds = set(typing.get_args(hint) or (hint,)) - {type(None)}
    plain = kinds <= {bool, int, float} or typing.get_origin(hint) in (typing.Literal, tuple)
    return convert(value, hint, f"task.{key}") if plain or value.lower() in ("none", "null") else value
