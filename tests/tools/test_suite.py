"""The suite's table: oracles earn everything, chance does not, and the model's rows are an evaluation's figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import AutoTokenizer

from tests.covering import slow_after
from unidiff.families import native
from unidiff.images.patch_vq import PatchVQ
from unidiff.model import UnifiedModel
from unidiff.tasks import resolve

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("frozen_lake", "maze", "sokoban", "sliding_puzzle", "jigsaw")


@pytest.fixture(scope="module")
def blank() -> UnifiedModel:
    """A model with the puzzles' tokenizers and random weights."""
    folder = ROOT / "tokenizers" / "puzzles"
    tokenizer = AutoTokenizer.from_pretrained(folder / "text")
    images = PatchVQ.from_pretrained(folder / "image").eval()
    return native.build(tokenizer, images, text_length=16, d_model=16, layers=1, axes=True)


@pytest.fixture
def suite(program: Callable[[str], ModuleType]) -> ModuleType:
    return program("tools/suite.py")


@pytest.mark.parametrize("name", slow_after(2, TASKS))
def test_the_oracle_earns_everything_and_chance_does_not(suite: ModuleType, blank: UnifiedModel, name: str) -> None:
    task: Any = resolve(name).fitted(blank)
    found = suite.figures(blank, task, suite.Config(rows=("oracle", "demonstrator", "random"), count=24))
    assert all(found["oracle"][figure] == 1.0 for figure in task.headline), found["oracle"]
    for row in ("demonstrator", "random"):
        assert found[row]["legal"] == 1.0 and found[row]["format"] == 1.0 and found[row]["image_exact"] == 1.0
    assert found["random"]["success"] < 0.6 and found["random"]["success"] < found["oracle"]["success"]
    walks = [task.random_walk(task.example("test", 0), attempt) for attempt in range(8)]
    assert len({str([p for p in walk if isinstance(p, str)]) for walk in walks}) > 1


def test_the_command(suite: ModuleType, monkeypatch: Any, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["suite.py", "--count", "6", "--rows", "oracle,greedy", "--output", str(tmp_path)])
    suite.main()
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "suite.json").read_text())
    assert list(found["frozen_lake"]) == ["oracle", "greedy"]
    assert "| frozen_lake | oracle | 100.0 % |" in out
    monkeypatch.setattr(sys, "argv", ["suite.py", "--rows", "oracles"])
    with pytest.raises(SystemExit, match="rows: 'oracles' is not known; choose from oracle"):
        suite.main()


def test_columns_are_what_most_tasks_have(suite: ModuleType) -> None:
    found = {"a": {"x": {"success": 0.5, "own": 1.0}}, "b": {"x": {"success": 0.25}}, "c": {"x": {"success": 1.0}}}
    lines = suite.table(found).splitlines()
    assert lines[0] == "| task | row | success |" and lines[2] == "| a | x | 50.0 % |"
    assert len(lines) == 5
