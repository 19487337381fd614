"""How programs end under a launcher: the last line is theirs. And what started them, to be written again."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, sys, time, warnings
from unidiff import program
from unidiff.program import run_program

def main():
    command = program.command()
    try:  # from here on the test may interrupt
        os.write(1, f"{command}\\n".encode())  # in one piece: two processes share this output
        if sys.argv[1:] == ["wait"]:
            time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(1)  # the launcher has ended meanwhile
        print("go on with", command, file=sys.stderr)
        program.repeat("go on with " + command)
        sys.exit(130)
    warnings.warn("mind the step")
    sys.exit("error: seed is 'x'; it must be a whole number")

run_program(main)
"""

LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": ["accelerate", "launch", "--cpu"],
    "torchrun": ["torchrun", "--nproc_per_node", "2"],
}


@pytest.fixture
def start(tmp_path: Path):
    """start(launcher, *words) -> a process that runs the program above from a folder with a space in its name."""
    script = tmp_path / "a b" / "program.py"
    script.parent.mkdir()
    script.write_text(PROGRAM)
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), str(Path(sys.executable).parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(launcher: str, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*LAUNCHERS[launcher], str(script), *words],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_last_line_is_the_error(start, launcher: str) -> None:
    process = start(launcher)
    out, err = process.communicate(timeout=300)
    lines = err.splitlines()
    assert process.returncode == 1 and lines[-1] == "error: seed is 'x'; it must be a whole number"
    assert "warning: mind the step" in lines
    assert lines.count(lines[-1]) <= {"python": 1, "torchrun": 3}.get(launcher, 2)
    assert shlex.split(out.splitlines()[0]) == process.args  # what was written starts it again


@pytest.mark.slow
def test_the_last_line_after_an_interrupt(start) -> None:
    """Ctrl-C reaches the launcher, which ends at once, and the program, which takes its time."""
    process = start("accelerate", "wait")
    assert process.stdout is not None and process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    lines = process.communicate(timeout=300)[1].splitlines()
    assert lines[-1].startswith("go on with accelerate launch --cpu '")
