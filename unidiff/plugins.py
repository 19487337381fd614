"""Imports objects that settings name: `package.module:name` or `package.module.name`."""

from __future__ import annotations

import importlib
import pkgutil
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import Any

from unidiff.config import nearest


def is_path(name: str) -> bool:
    """Whether a name contains a module."""
    return ":" in name or "." in name


def split(name: str) -> tuple[str, str]:
    """(module, name in it) of "module:name" or "module.name". Raises ValueError if one of them is missing."""
    module, _, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not all(part.isidentifier() for part in [*module.split("."), *attribute.split(".")]):
        raise ValueError(f"{name!r} names nothing that can be imported; write package.module:name")
    return module, attribute


def imported(name: str, wanted: Callable[[Any], bool] = callable) -> Any:
    """The object that "package.module:name" names. wanted: selects the names for the hint if there is no such name.

    Raises ValueError in one line, with the nearest known name: there is no such module, it cannot be imported (with
    the error's file and line), or it does not have the name.
    """
    module_name, attribute = split(name)
    found: Any = import_module(module_name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [key for key, value in vars(found).items() if not key.startswith("_") and wanted(value)]
            hint = nearest(part, names) or f"; it has: {', '.join(sorted(names)) or 'none'}"
            raise ValueError(f"module {module_name!r} has no {attribute!r}{hint}")
        found = getattr(found, part)
    return found


def import_module(name: str) -> ModuleType:
    """A module by its name. Raises ValueError in one line, as `imported` does."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise ValueError(
                f"module {name!r} cannot be imported: it needs {error.name!r}, which is not there"
            ) from error
        raise ValueError(f"No module named {error.name!r}{_hint(error.name)}") from error
    except SyntaxError as error:
        place = f"{error.filename or name}, line {error.lineno or 1}"
        raise ValueError(
            f"module {name!r} cannot be imported: {type(error).__name__}: {error.msg} ({place})"
        ) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(str(error).split())
        said = f"{type(error).__name__}: {words} ({frame.filename}, line {frame.lineno})"
        raise ValueError(f"module {name!r} cannot be imported: {said}") from error


def _hint(name: str) -> str:
    package, _, last = name.rpartition(".")
    path = getattr(importlib.import_module(package), "__path__", ()) if package else None
    if path == ():
        return f"; {package!r} is a module, not a package: write {package}:name"
    found = nearest(last, [module.name for module in pkgutil.iter_modules(path)])
    return found or "; is its folder on the path? PYTHONPATH=. adds the working directory"
