"""Settings in a YAML file, read as on the command line: a value's type is decided by its field, not by its notation.

YAML itself would read `1.10` as the number 1.1, `010` as 8 and `no` as false. Here every value stays a text (`null`,
`~` and an empty value are None) until `config.build` converts it to its field's type. Duplicate keys are errors. So are
aliases of lists and mappings, because they can expand to any size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml


def from_yaml(path: str | Path) -> dict[str, Any]:
    """The settings of a file; {} if it is empty. Raises FileNotFoundError, or ValueError with the file's name."""
    if Path(path).is_dir() or not Path(path).exists():  # a pipe is allowed
        raise FileNotFoundError(f"config file {path} " + ("is a folder" if Path(path).is_dir() else "does not exist"))
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError:
        raise ValueError(f"config file {path} is not UTF-8 text; save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ValueError(f"config file {path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"config file {path} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"config file {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"config file {path} must hold keys and values, it holds {type(values).__name__}")
    return values


class _Loader(yaml.SafeLoader):
    # A plain value is a text or None.
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"))] for first in ("~", "n", "N", "")
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            if isinstance(self.anchors.get(alias.anchor), yaml.CollectionNode):
                line = alias.start_mark.line + 1
                raise ValueError(f"line {line}: *{alias.anchor} repeats a list or mapping; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                line = key.start_mark.line + 1
                if key.value in lines:
                    raise ValueError(f"line {line}: {key.value!r} is given again, first in line {lines[key.value]}")
                lines[key.value] = line
        return super().construct_mapping(node, deep)
