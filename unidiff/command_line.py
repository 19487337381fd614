"""The command line: `parse(Config)` reads `--config file.yaml` and `--field value`; the latter has priority.

A setting is given by its name (`--beta 0.1`) or with its group (`--loss.beta 0.1`; in a file `loss: {beta: 0.1}`).
Options of a task are prefixed: `--task.size 6` is `task_options: {size: 6}`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from unidiff.config import GROUPS, build, expanded

T = TypeVar("T")


def parse(
    config: type[T],
    argv: Sequence[str] | None = None,
    description: str = "",
    start: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    others: Collection[str] = (),
) -> T:
    """Builds the dataclass from the command line (default: sys.argv). `--help` prints all settings, `--help loss` one
    group, `--help yaml` a settings file.

    start: maps the given settings to values that replace the defaults. others: keys in a file that belong to another
    program and are ignored. Raises SystemExit with a message for an unknown key, a value of a wrong type or a missing
    file.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if asked := {"--help", "-h"} & set(words):
        from unidiff.settings_text import help_text

        topic = words[words.index(asked.pop()) + 1 :][:1]
        print(help_text(config, description, *topic))
        raise SystemExit(0)
    try:
        given = ungrouped(config, flags(words))
        if "config" in given:
            from unidiff.settings_file import from_yaml  # a plain rollout needs no YAML

            file = ungrouped(config, from_yaml(expanded(given.pop("config"), "config")))
            given = {**{k: v for k, v in file.items() if k not in others}, **given}
        return build(config, {**(start(given) if start else {}), **given})
    except (ValueError, TypeError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def ungrouped(config: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Removes groups from the names of settings. Raises ValueError for a setting that is given twice, or under a wrong
    group."""
    pairs: list[tuple[str, str, Any]] = []  # group, name, value
    for key, value in values.items():
        group, dot, name = key.partition(".")
        if dot and group in GROUPS:
            pairs.append((group, name, value))
        elif key in GROUPS and isinstance(value, dict):
            pairs += [(key, name, each) for name, each in value.items()]
        else:
            pairs.append(("", key, value))
    own = {f.name: f.metadata.get("group", "") for f in fields(config)}
    found: dict[str, Any] = {}
    for group, name, value in pairs:
        head, dot, option = name.partition(".")
        if dot and f"{head}_options" in own:  # --task.size 6: an entry of task_options
            found.setdefault(f"{head}_options", {})[option] = value
            continue
        if group and own.get(name, "") not in ("", group):
            raise ValueError(f"unknown setting '{group}.{name}'; {name} is in the group {own[name]!r}")
        if name in found:
            raise ValueError(f"setting {name!r} is given twice, with its group and without")
        found[name] = value
    return found


def flags(words: Sequence[str]) -> dict[str, str]:
    """Reads --name value, --name=value, and a bare --name for true. The last one wins."""
    given: dict[str, str] = {}
    at = 0
    while at < len(words):
        word = words[at]
        if not word.startswith("--"):
            raise ValueError(f"expected --setting value, got {word!r}")
        name, has_value, value = word[2:].partition("=")
        if not has_value and at + 1 < len(words) and not words[at + 1].startswith("--"):
            at, value, has_value = at + 1, words[at + 1], "="
        given[name.replace("-", "_")] = value if has_value else "true"
        at += 1
    return given
