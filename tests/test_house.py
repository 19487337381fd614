"""The house: which module imports which, read from the sources."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(ROOT.glob("unidiff/**/*.py"))}


def imported(name: str, path: Path) -> set[str]:
    """Modules of the library that a module imports when it runs, wherever it does so. What only type checkers import
    is left out."""
    tree = ast.parse(path.read_text())
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] + "." * bool(node.module) if node.level else ""
            base += node.module or ""
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in MODULES else base for a in node.names}
    return (found & MODULES.keys()) - {name}


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert "unidiff.sequence" in imported("unidiff.spec", MODULES["unidiff.spec"])  # arrows are found
    assert "unidiff.sandbox.process" in imported("unidiff.sandbox.sandbox", MODULES["unidiff.sandbox.sandbox"])
    order = graphlib.TopologicalSorter({name: imported(name, path) for name, path in MODULES.items()})
    order.prepare()  # raises CycleError, which names a circle
