"""tools/check_task.py: what ships is in order, and what is wrong with a task is said."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def check(program, tmp_path, monkeypatch, capsys):
    """Runs the tool: its status and what it prints."""
    tool = program("tools/check_task.py")

    def run(*words: str) -> tuple[int, str]:
        page = tmp_path / "out"
        monkeypatch.setattr("sys.argv", ["check_task.py", "--count", "2", "--output", str(page), *words])
        status = tool.main()
        assert (page / "page.html").stat().st_size > 10_000
        return status, capsys.readouterr().out

    return run


@pytest.mark.parametrize("task", ["frozen_lake", "countdown", "functions", "shapes", "edit_shapes"])
def test_what_ships_is_in_order(check, task):
    model = "recipes/base" if task == "frozen_lake" else "recipes/base_tasks"
    status, said = check("--task", task, "--model", model)
    assert status == 0 and "wrong" not in said
    assert said.count(": right, ") == said.count(": empty, ") == 2


def test_faults_are_named(check, tmp_path):
    rows = tmp_path / "rows.jsonl"
    golds = ("1 + 1", " + ".join(["1"] * 40), "7")
    lines = [{"q": f"make {n} from 1", "gold": gold, "answer": 7} for n, gold in enumerate(golds, 1)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--task", str(rows), "--task.prompt", "{q}", "--task.response", "gold", "--rewards", "numeric_answer")
    status, said = check("--model", "recipes/base_tasks", *words)
    assert status == 1
    assert "wrong: example 0: the right response earns 0, the empty one 0" in said
    assert "train example 1: the right response: it has a text of 80 tokens, and there is room for 48" in said
    with pytest.raises(SystemExit, match="no column 'p'; there are: q, gold, answer"):
        check("--task", str(rows), "--task.prompt", "{p}")
