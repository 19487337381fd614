"""What a reward may do wrong to the whole process: the run goes on as if it had not."""

import asyncio
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tables import each
from unidiff.rewards.call import checked_value
from unidiff.rewards.guard import in_words
from unidiff.rewards.reward import Cause, reward
from unidiff.rewards.table import RewardTable, reward_table


def ones(segments):
    return [1.0] * len(segments)


# ---------------------------------------------------------------------------------------------- what it raises


class SilentError(Exception):
    def __str__(self):
        raise ValueError("no words")

    __repr__ = __str__


class BaseError(BaseException):
    pass


ERRORS = [KeyboardInterrupt, GeneratorExit, SystemExit, asyncio.CancelledError, StopIteration, SilentError, BaseError]
ERRORS += [MemoryError, RecursionError, StopAsyncIteration]


def raises(error, way):
    def plain(segments, **columns):
        raise error("x")

    async def within(segments, **columns):
        raise error("x")

    async def later(segments, **columns):
        await asyncio.sleep(0.001)
        raise error("x")

    async def in_a_task(segments, **columns):
        await asyncio.create_task(later(segments))

    async def in_a_callback(segments, **columns):
        asyncio.get_running_loop().call_soon(plain, segments)
        await asyncio.sleep(0.05)
        raise error("x")

    return {
        "plain": plain,
        "coroutine": lambda segments, **columns: within(segments),
        "within": within,
        "later": later,
        "in_a_task": in_a_task,
        "in_a_callback": in_a_callback,
    }[way]


@pytest.mark.parametrize("error", ERRORS)
@each("way", ["plain", "coroutine", "within", "later", "in_a_task", "in_a_callback"])
def test_whatever_a_reward_raises_costs_its_own_values(error, way, responses):
    handler = signal.signal(signal.SIGINT, lambda number, frame: None)  # as in a run: Ctrl-C raises nothing
    try:
        for options in ({}, {"batched": False}, {"timeout": 20}):
            given = reward(raises(error, way), name="f", **options)
            for _ in range(2):  # and it can be called again
                table = reward_table([given, reward(ones)], responses(1))
                assert table.lost == {("f", Cause.RAISED): 2} and table.values_BSF[..., 1].nansum() == 2
                assert table.explain(0, 0)
    finally:
        signal.signal(signal.SIGINT, handler)


def test_the_users_own_interrupt_is_the_users(responses):
    """Without a trainer that collects the signals, a KeyboardInterrupt in the main thread is that of Ctrl-C."""
    with pytest.raises(KeyboardInterrupt):
        reward_table([reward(raises(KeyboardInterrupt, "plain"), name="f")], responses(1))


@pytest.mark.parametrize("times", [1, 3])
def test_a_reward_that_stops_its_loop_goes_on(times, responses):
    async def stops(segments):
        for _ in range(times):
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0.001)
        return ones(segments)

    given = reward(stops)
    for _ in range(2):
        assert reward_table([given], responses(1)).values_BSF.nansum() == 2


# ---------------------------------------------------------------------------------------------- what it gives back


class Odd:
    """Raises whatever is asked of it."""

    def __getattr__(self, name):
        raise RuntimeError("no")

    def __str__(self):
        raise KeyboardInterrupt

    __repr__ = __float__ = __len__ = __iter__ = __str__


class OddNumber(float):
    def __float__(self):
        raise SystemExit

    __str__ = __repr__ = __float__


@pytest.mark.parametrize("kind", [Odd, OddNumber])
def test_a_value_that_cannot_be_read_is_missing_alone(kind, responses):
    odd = kind()
    handler = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        table = reward_table([reward(lambda segments: [1.0, odd], name="f")], responses(1))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert table.values_BSF.nansum() == 1 and len(table.missing) == 1 and table.explain(0, 2)
    assert isinstance(in_words(odd), str)


def test_what_a_reward_logs_is_kept_as_words(responses):
    lock = threading.Lock()

    def logs(segments, log_extra):
        log_extra("odd", [OddNumber(2.0), lock])
        log_extra("plain", [np.float64(1.5), "a"])
        return ones(segments)

    table = reward_table([reward(logs)], responses(1))
    assert not table.lost, table.messages
    kept = RewardTable.from_tensors(*table.to_tensors())
    assert kept.extra["plain"] == table.extra["plain"] == {(0, 0): 1.5, (0, 2): "a"}
    assert kept.extra["odd"][0, 2] == str(lock) and "a OddNumber" in kept.extra["odd"][0, 0]
    assert "odd: " in kept.explain(0, 0)


def test_values_are_numbers_of_any_library():
    for value in (True, np.float16(1), np.bool_(True), torch.tensor(1), np.array(1.0)):
        assert checked_value(value) == 1.0


# ---------------------------------------------------------------------------------------------- what it changes

CHANGES = {
    "the working directory": (os.getcwd, lambda: os.chdir("/")),
    "the environment": (lambda: os.environ["PATH"], lambda: os.environ.update(PATH="/nowhere", UNIDIFF_NEW="1")),
    "sys.path": (lambda: list(sys.path), lambda: sys.path.pop(0)),
    "torch's default dtype": (torch.get_default_dtype, lambda: torch.set_default_dtype(torch.float64)),
    "torch's default device": (torch.get_default_device, lambda: torch.set_default_device("meta")),
    "torch's number of threads": (torch.get_num_threads, lambda: torch.set_num_threads(torch.get_num_threads() + 1)),
    "torch's determinism": (
        torch.get_deterministic_debug_mode,
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
    ),
    "torch's precision of matmuls": (
        torch.get_float32_matmul_precision,
        lambda: torch.set_float32_matmul_precision("medium"),
    ),
    "torch's autocast": (
        lambda: torch.is_autocast_enabled("cpu"),
        lambda: torch.autocast("cpu", dtype=torch.bfloat16).__enter__(),
    ),
    "torch's anomaly detection": (torch.is_anomaly_enabled, lambda: torch.autograd.set_detect_anomaly(True)),
    "cuDNN's benchmark mode": (
        lambda: torch.backends.cudnn.benchmark,
        lambda: setattr(torch.backends.cudnn, "benchmark", True),
    ),
    "which warnings are errors": (
        lambda: [one for one in warnings.filters if one[0] == "error"],
        lambda: warnings.filterwarnings("error", category=ResourceWarning, message="x"),
    ),
    "the garbage collector": (gc.isenabled, gc.disable),
    "sys.excepthook": (lambda: sys.excepthook, lambda: setattr(sys, "excepthook", None)),
    "numpy's handling of errors": (np.geterr, lambda: np.seterr(all="raise")),
    "the handler of SIGTERM": (
        lambda: signal.getsignal(signal.SIGTERM),
        lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    ),
    "the handler of SIGINT": (
        lambda: signal.getsignal(signal.SIGINT),
        lambda: signal.signal(signal.SIGINT, lambda number, frame: None),
    ),
    "the timer of SIGALRM": (lambda: signal.getitimer(signal.ITIMER_REAL), lambda: signal.alarm(30)),
    "sys.stdout and sys.stderr": (lambda: sys.stdout, lambda: setattr(sys, "stdout", None)),
    "": (torch.is_grad_enabled, lambda: torch.set_grad_enabled(True)),
    " ": (random.random, lambda: random.seed(5)),
    "  ": (lambda: np.random.random(), lambda: np.random.seed(5)),  # noqa: NPY002
    "   ": (lambda: torch.rand(1).item(), lambda: torch.manual_seed(5)),
}


THREADS = ("torch's default device", "torch's number of threads", "torch's autocast", "numpy's handling of errors")


@pytest.mark.parametrize("change", [lambda: os.environ.pop("HOME"), lambda: sys.path.reverse()])
def test_what_a_reward_removes_or_reorders_is_set_back(change, responses, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    before = dict(os.environ), list(sys.path)

    def removes(segments):
        change()
        return ones(segments)

    reward_table([reward(removes, name="removes")], responses(1))
    assert (dict(os.environ), list(sys.path)) == before


def test_what_a_reward_adds_stays(responses, monkeypatch):
    """A library that it loads sets variables, and looks for its modules later."""
    monkeypatch.setenv("UNIDIFF_ADDED", "0")
    monkeypatch.delenv("UNIDIFF_ADDED")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def adds(segments):
        os.environ["UNIDIFF_ADDED"] = "1"
        sys.path.insert(0, "/added")
        return ones(segments)

    reward_table([reward(adds, name="adds")], responses(1))
    assert os.environ["UNIDIFF_ADDED"] == "1" and "/added" in sys.path


def states():
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


# Handlers are set in the main thread alone; the others are a thread's own, so there is nothing to see.
SYNC_ONLY = ("the handler of SIGTERM", "the handler of SIGINT", *THREADS)
WAYS = [(what, asynchronous) for what in CHANGES for asynchronous in (False, True)]


@pytest.mark.parametrize(("what", "asynchronous"), [way for way in WAYS if way[0] not in SYNC_ONLY or not way[1]])
def test_what_a_reward_changes_in_the_process_is_set_back(what, asynchronous, responses, caplog):
    read, change = CHANGES[what]

    def changes(segments):
        change()
        return ones(segments)

    async def changes_async(segments):
        return changes(segments)

    state = states()
    before = read()
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])
    seen = []
    given = reward(changes_async if asynchronous else changes, name=f"changes{len(what)}{asynchronous}")
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            table = reward_table([given, reward(lambda s: seen.append(read()) or ones(s), name="after")], responses(1))
            assert not table.lost, table.messages
    assert read() == before
    if what.strip():
        assert seen == [before, before]  # the next reward does not see it either
        assert caplog.text.count(f"'{given.name}', or one beside it, changed {what}: set back") == 1


def test_a_working_directory_that_is_gone_ends_nothing(responses, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rmdir = reward(lambda segments: (tmp_path / "here").rmdir() or os.chdir("/") or ones(segments), name="rmdir")
    assert not reward_table([rmdir, reward(ones)], responses(1)).lost
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "there")
    (tmp_path / "there").rmdir()
    assert not reward_table([reward(ones)], responses(1)).lost


def test_a_second_ctrl_c_acts_as_usual_and_the_first_ends_the_run_in_order():
    code = (
        "import signal, sys\n"
        "from unidiff.grpo.process import stop_signals\n"
        "with stop_signals() as asked:\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
        "    print(asked == [signal.SIGINT, signal.SIGTERM], flush=True)\n"
        "    try:\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM)\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert done.stdout.split() == ["True", "interrupted"] and done.returncode == -signal.SIGTERM
