"""Look at a checkpoint folder: its family, its spec, whether its parts fit together, and what is wrong if they do not.

python tools/inspect_checkpoint.py recipes/base
python tools/inspect_checkpoint.py recipes/base --family native

Only headers of weight files are read, so a checkpoint of any size takes seconds. Ends with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unidiff import UnifiedModel, families
from unidiff.program import run_program
from unidiff.spec import ModelSpec


def checks_of(family: Any, folder: Path, config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], str]]]:
    """A family's own checks; without them, a check that the checkpoint loads."""
    if hasattr(family, "checks"):
        yield from family.checks(folder, config)
        return

    def loads() -> str:
        model = UnifiedModel.from_pretrained(folder, family.name)
        return f"{sum(p.numel() for p in model.parameters()):,} parameters; spec, tokenizers and weights fit"

    yield "loading", loads


def spec_of(family: Any, folder: Path, config: dict[str, Any]) -> ModelSpec:
    if hasattr(family, "spec_of"):
        return family.spec_of(folder, config)
    return UnifiedModel.from_pretrained(folder, family.name).spec


def inspect(folder: Path, name: str | None = None) -> int:
    """Prints the report; returns the number of failed checks."""
    try:
        config = families.read_config(folder)
        family = families.find(config, name)
    except (OSError, ValueError) as error:
        print(f"WRONG  {error}")
        return 1
    print(f"family {family.name}")
    failed = 0
    for title, check in checks_of(family, folder, config):
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            try:
                print(f"ok     {title}: {check()}")
            except (OSError, ValueError, ImportError) as error:  # ImportError: diffusers is not installed
                failed += 1
                print(f"WRONG  {title}: {error}")
        for text in dict.fromkeys(str(note.message) for note in notes):
            print(f"note   {title}: {text}")
    if not failed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            spec = spec_of(family, folder, config)
        print("spec")
        for field, value in spec.to_dict().items():
            print(f"  {field} = {value}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint folder")
    parser.add_argument("--family", help=f"if the config does not tell it: {', '.join(sorted(families.FAMILIES))}")
    arguments = parser.parse_args(argv)
    return 1 if inspect(arguments.folder, arguments.family) else 0


if __name__ == "__main__":
    run_program(main)
