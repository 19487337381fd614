"""Every program as a user starts it: --help says what it is and does nothing, whatever becomes of its output."""

from __future__ import annotations

import json
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


# Imports once what all of them import, and then is each program in turn, in a process of its own that ends as any does.
# Frozen, what was imported is not looked through again when one ends, which takes a second.
EACH_IN_TURN = """
import gc, json, os, runpy, sys
import accelerate, torch, transformers
import unidiff.run
gc.freeze()
ended = {}
for number, program in enumerate(sys.argv[2:]):
    reader, writer = os.pipe()
    os.close(reader)
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        os.dup2(os.open(f"{sys.argv[1]}/{number}", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = [program, "--help"]
        sys.path[0] = os.path.dirname(program)
        runpy.run_path(program, run_name="__main__")
        sys.exit()
    os.close(writer)
    ended[program] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(json.dumps(ended))
"""


@pytest.mark.slow
def test_help_does_nothing_but_print_even_where_nobody_reads_it(tmp_path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "docs" / "images").iterdir()}
    done = started("-c", EACH_IN_TURN, str(tmp_path), *PROGRAMS)
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout.splitlines()[-1])
    said = {program: (tmp_path / str(number)).read_text() for number, program in enumerate(PROGRAMS)}
    assert {p: said[p] for p in PROGRAMS if ended[p] not in (0, 1)} == {}
    assert {p: text for p, text in said.items() if "Traceback" in text or "BrokenPipe" in text} == {}
    assert {path: path.stat().st_mtime_ns for path in (ROOT / "docs" / "images").iterdir()} == before


@pytest.mark.slow
def test_help_of_a_program_that_is_started_by_itself() -> None:
    done = started("tools/bench.py", "--help")
    assert done.returncode == 0 and done.stderr == "" and "python tools/bench.py edits" in done.stdout


RUN = "from unidiff.program import run_program\ndef main():\n    {}\nrun_program(main)"


@pytest.mark.parametrize("body", ["print('x' * 100_000)", "raise SystemExit(0)", "print('x'); raise SystemExit(3)"])
def test_a_reader_who_has_gone_is_not_an_error(body) -> None:
    assert started("-c", RUN.format(body), gone=True).stderr == ""


def test_another_broken_pipe_is_an_error_and_an_int_is_the_status() -> None:
    done = started("-c", RUN.format("raise BrokenPipeError('a worker died')"))
    assert done.returncode == 1 and "a worker died" in done.stderr
    assert [started("-c", RUN.format(body)).returncode for body in ("return 3", "return None")] == [3, 0]


@pytest.mark.slow
def test_an_unknown_measurement_is_named() -> None:
    done = started("tools/bench_rewards.py", "edit")
    assert done.returncode == 1 and "error: 'edit' is not a command; give one of" in done.stderr
