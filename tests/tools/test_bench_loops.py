"""tools/bench_loops.py on the smallest body: what is exact gives what the plain loops give."""

from __future__ import annotations

import pytest


@pytest.fixture
def table(program, monkeypatch, capsys):
    """Runs a measurement: its rows, by what was measured."""
    tool = program("tools/bench_loops.py")

    def run(command: str) -> dict[str, list[str]]:
        words = ["bench_loops.py", command, "--shapes", "tiny", "--rows", "2", "--repeats", "1"]
        monkeypatch.setattr("sys.argv", words)
        tool.main()
        lines = capsys.readouterr().out.splitlines()[2:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        return {row[1]: row[2:] for row in cells}

    return run


def test_exact_rollouts_are_those_of_the_plain_loops(table):
    rows = table("rollout")
    assert len(rows) == 8
    for kind in ("text", "picture"):
        assert rows[f"{kind}, none"][-1] == "100.0%"


def test_gradients_are_those_of_the_plain_loop(table):
    rows = table("update")
    assert set(rows) == {"texts", "rounds"}
    assert all(float(row[-1]) < 1e-5 for row in rows.values())


def test_growth_is_measured(table):
    rows = table("growth")
    assert [row[1] for name, row in rows.items() if name.startswith("picture")] == ["32", "128", "288"]
