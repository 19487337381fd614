"""Settings as text: the output of `--help`, and a YAML file of all settings with their defaults."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from unidiff.config import GROUPS, nearest

_WIDTH, _COLUMN = 118, 36


def help_text(config: type, description: str = "", topic: str = "") -> str:
    """All settings by group. topic: one group, or "yaml" for a settings file. Raises SystemExit for another topic."""
    groups = _grouped(config)
    if topic == "yaml":
        return yaml_text(config)
    if topic and topic in groups:
        return _group_text(config, topic, groups[topic])
    if topic and not topic.startswith("--"):
        raise SystemExit(f"error: --help knows no {topic!r}{nearest(topic, [*groups, 'yaml'])}")
    text = [description.strip(), *(_group_text(config, name, group) for name, group in groups.items())]
    return "\n\n".join(part for part in text if part)


def yaml_text(config: type) -> str:
    """A settings file with all defaults. An absolute path is commented out, as it is valid on one machine only."""
    lines = []
    for group, some in _grouped(config).items():
        lines.append(f"\n{group}:" if group else "")
        for f in some:
            value = _value(f)
            start = f"{'  ' * bool(group)}{'# ' * value.startswith('/')}{f.name}: "
            start += os.path.relpath(value) if value.startswith("/") else value
            lines.append(f"{start:<{_COLUMN}}# {_line(config, f)}")
    return "\n".join(lines).strip() + "\n"


def _grouped(config: type) -> dict[str, list[Field[Any]]]:
    """The fields by group, in the order of GROUPS."""
    found: dict[str, list[Field[Any]]] = {group: [] for group in ("", *GROUPS)}
    for f in fields(config):
        found[f.metadata.get("group", "")].append(f)
    return {group: some for group, some in found.items() if some}


def _group_text(config: type, group: str, some: list[Field[Any]]) -> str:
    lines = [f"{group or 'settings'}:"]
    for f in some:
        start = f"  --{f.name} {_value(f)}"
        lines += _in_columns(start, _line(config, f))
    return "\n".join(lines)


def _in_columns(start: str, text: str) -> Iterator[str]:
    rows = textwrap.wrap(text, _WIDTH - _COLUMN) or [""]
    if len(start) >= _COLUMN:
        yield start
        start = ""
    for row in rows:
        yield f"{start:<{_COLUMN}}{row}".rstrip()
        start = ""


def _line(config: type, f: Field[Any]) -> str:
    """A setting's help text, with its choices."""
    kind = get_type_hints(config)[f.name]
    kinds = [kind, *get_args(kind)]
    choices = next((get_args(each) for each in kinds if get_origin(each) is Literal), ())
    text = f.metadata.get("help", "")
    return f"{text} [{', '.join(map(str, choices))}]" if choices else text


def _value(f: Field[Any]) -> str:
    """The default as YAML."""
    if f.default is MISSING and f.default_factory is MISSING:
        return "(required)"
    value = f.default if f.default_factory is MISSING else f.default_factory()
    if isinstance(value, tuple):
        value = list(value)
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
