"""Every program as a user starts it: --help says what it is and does nothing, whatever becomes of its output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("recipes", "tools", "tokenizers/native")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
)


def started(*words: str, gone: bool = False) -> subprocess.CompletedProcess[str]:
    """Python with these words. gone: nobody reads its output any more, as behind `| head` that has seen enough."""
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    reader, writer = os.pipe()
    if gone:
        os.close(reader)
    out = writer if gone else subprocess.PIPE
    try:
        return subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True, env=settings
        )
    finally:
        os.close(writer)
        if not gone:
            os.close(reader)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_does_nothing_but_print_even_where_nobody_reads_it(program) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "docs" / "images").iterdir()}
    done = started(program, "--help", gone=True)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "docs" / "images").iterdir()} == before


RUN = "from unidiff.program import run_program\ndef main():\n    {}\nrun_program(main)"


@pytest.mark.parametrize("body", ["print('x' * 100_000)", "raise SystemExit(0)", "print('x'); raise SystemExit(3)"])
def test_a_reader_who_has_gone_is_not_an_error(body) -> None:
    assert started("-c", RUN.format(body), gone=True).stderr == ""


def test_another_broken_pipe_is_an_error_and_an_int_is_the_status() -> None:
    done = started("-c", RUN.format("raise BrokenPipeError('a worker died')"))
    assert done.returncode == 1 and "a worker died" in done.stderr
    assert [started("-c", RUN.format(body)).returncode for body in ("return 3", "return None")] == [3, 0]


@pytest.mark.parametrize("program", ["tools/bench.py", "tools/bench_loops.py", "tools/bench_rewards.py"])
@pytest.mark.slow
def test_an_unknown_measurement_is_named(program) -> None:
    done = started(program, "edit")
    assert done.returncode == 1 and "error: 'edit' is not a command; give one of" in done.stderr
