"""A trainer killed at any moment leaves nothing running: not a sandbox, not a worker that compares answers."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from unidiff.sandbox import lifeline

FOLDER = Path(lifeline.__file__).parent

DRIVER = """
import os, signal, sys, time
{setup}
for milliseconds in range(0, 122, {step}):
    ready, go = os.pipe()
    pid = os.fork()
    if pid == 0:
        {first}
        os.write(go, b"x")
        {start}
        os._exit(0)
    os.read(ready, 1)
    os.close(ready), os.close(go)
    time.sleep(milliseconds / 1000)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""
# It leaves its group and session, has a child that does, and is deaf to all signals but one.
STAYS = """
import ctypes, os, signal, time
os.fork()
for number in set(range(1, 32)) - {9, 19}: signal.signal(number, signal.SIG_IGN)
ctypes.CDLL(None).prctl(1, 0)
os.fork() or os.setsid()
time.sleep(60)
"""


def marked(mark: str, where: Sequence[str] = ("cmdline", "environ")) -> list[str]:
    """Processes whose command line or environment holds the mark."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = b"".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in where)
        except OSError:
            continue
        if mark.encode() in text:
            found.append(text.decode(errors="replace"))
    return found


def left_soon(mark: str) -> list[str]:
    """What is still there a little later."""
    deadline = time.monotonic() + 2
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    return marked(mark)


def drive(script: str, mark: str, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parents[1]), "MARK": mark}
    words = [sys.executable, "-W", "ignore", "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, env=environment)
    return done


@pytest.mark.parametrize("first", ["pass", pytest.param("box.run('')", marks=pytest.mark.slow)])
def test_a_trainer_killed_at_any_moment_leaves_no_sandbox(walls, tmp_path, first):
    """first: what a trainer does before the moments begin. Its first sandbox starts a server, later ones are forked."""
    mark = str(tmp_path)  # in the command line of whatever is started from here
    shutil.copytree(FOLDER, tmp_path / "sandbox")
    off = "S.process.namespaces_refused = lambda: 'off'" if "network" in walls else "S.namespaces_refused()"
    setup = f"sys.path.insert(0, {mark!r})\nimport sandbox as S\n{off}\nbox = S.Sandbox(seconds=50, **{walls!r})"
    done = drive(DRIVER.format(step=2, setup=setup, first=first, start=f"box.run({STAYS!r})"), mark)
    assert done.returncode == 0, done.stderr
    assert left_soon(mark) == []


@pytest.mark.slow
def test_a_trainer_killed_at_any_moment_leaves_no_math_worker():
    pytest.importorskip("math_verify")
    mark = f"mark-{os.getpid()}-{time.time_ns()}"
    setup = "from unidiff.scorers.math import MathVerifier\nverifier = MathVerifier(workers=1, seconds=50)"
    done = drive(DRIVER.format(step=6, setup=setup, first="pass", start="verifier.verify([('1', '$1$')])"), mark)
    assert done.returncode == 0, done.stderr
    assert left_soon(mark) == []
    busy = f"import os, threading\n{setup}\nverifier.verify([('1', '$1$')])\nthreading.Timer(0.5, os.kill, "
    done = drive(busy + "(os.getpid(), 9)).start()\nverifier.verify([('1', '$10000000!$')])", mark)
    assert done.returncode == -9, done.stderr
    assert left_soon(mark) == []


@pytest.mark.slow
def test_a_sandbox_that_nobody_stops_has_a_clock_of_its_own(walls, tmp_path):
    """The trainer is stopped, not dead: nothing tells the sandbox, and no CPU limit counts a program that sleeps."""
    mark = str(tmp_path)
    shutil.copytree(FOLDER, tmp_path / "sandbox")
    name = f"stays-{os.getpid()}"
    code = STAYS.replace("time.sleep", f"ctypes.CDLL(None).prctl(15, {name.encode()!r})\ntime.sleep")
    off = "S.process.namespaces_refused = lambda: 'off'" if "network" in walls else ""
    script = f"import sys\nsys.path.insert(0, {mark!r})\nimport sandbox as S\n{off}\n"
    script += f"S.Sandbox(seconds=1, **{walls!r}).run({code!r})"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", script]) as trainer:
        deadline = time.monotonic() + 20
        while not marked(name, ["comm"]) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(trainer.pid, signal.SIGSTOP)
        assert marked(name, ["comm"])
        while marked(name, ["comm"]) and time.monotonic() < deadline:
            time.sleep(0.1)
        left = marked(name, ["comm"])
        trainer.kill()
    assert left == []
    assert left_soon(mark) == []


def test_a_server_that_is_killed_costs_the_sandboxes_that_it_runs(tmp_path):
    """Another one is started for those that come after it."""
    mark = str(tmp_path)
    shutil.copytree(FOLDER, tmp_path / "sandbox")
    script = f"import os, sys\nsys.path.insert(0, {mark!r})\nimport sandbox as S\nbox = S.Sandbox(network='allow')\n"
    script += "def killed():\n    for task in os.listdir('/proc/self/task'):\n"
    script += "        for pid in open(f'/proc/self/task/{task}/children').read().split(): os.kill(int(pid), 9)\n"
    script += "print(box.run('print(1)').stdout)\nkilled()\nimport threading, time\ntime.sleep(0.5)\n"
    script += "print(box.run('print(2)').stdout)\nthreading.Timer(0.3, killed).start()\n"
    script += "try: box.run('import time; time.sleep(4)')\nexcept S.SandboxError as error: print(error)\n"
    script += "time.sleep(0.5)\nprint(box.run('print(3)').stdout)"
    done = drive(script, mark)
    assert done.stdout.split("\n\n") == ["1", "2", "the sandbox could not be built: it ended without a word\n3", ""], (
        done
    )
