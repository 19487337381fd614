"""Two runs at once in one folder: the second one is refused, however the first one ends."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys

import pytest

from unidiff.grpo.config import GRPOConfig
from unidiff.run_folder import RunFolder


def config(folder, **settings) -> GRPOConfig:
    return GRPOConfig(output_dir=str(folder), **settings)


HOLD = """
import os, sys, time
from unidiff.grpo.config import GRPOConfig
from unidiff.run_folder import RunFolder
folder = RunFolder(sys.argv[1])
folder.open(GRPOConfig(output_dir=sys.argv[1]))
if os.fork():  # a child that outlives the run
    print("held", flush=True)
time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has claimed tmp_path/run, and has a child."""
    code = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("going_on", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_folder_in_use_is_not_taken_until_its_process_ends(tmp_path, holder, going_on):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(ValueError, match=rf"run is in use by process {holder.pid} on .*; wait until it ends"):
        folder.open(config(folder.path, resume=going_on))
    holder.kill()
    holder.wait()
    folder.open(config(folder.path, resume=going_on))


def test_a_process_may_take_its_own_folder_again(tmp_path):
    """As in a notebook, where the trainer that failed is still there. The lock stays while one of them lives."""
    take = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"

    def free() -> bool:
        gc.collect()
        code = [sys.executable, "-c", take, str(tmp_path / "run.lock")]
        return subprocess.run(code, stderr=subprocess.DEVNULL).returncode == 0

    first, second = RunFolder(tmp_path), RunFolder(tmp_path)
    first.open(config(tmp_path))
    second.open(config(tmp_path, resume=True))
    del first
    assert not free()
    del second
    assert free()
