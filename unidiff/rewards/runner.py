"""Runs the reward functions of one batch: async ones side by side, sync ones in order, timeouts enforced.

A fault stays inside its reward. A sync reward without a timeout runs in the caller's thread; with one it runs
in a daemon thread, which is abandoned when the time is over (Python cannot stop it) and does not hold up the
exit of the process. Each async reward has an event loop of its own that lives as long as the reward: clients
that it keeps open stay usable from batch to batch, one that blocks holds up no other, and it works under
Jupyter's running loop.
"""

from __future__ import annotations

import asyncio
import threading
import traceback
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch

from unidiff.rewards.reward import Cause, Loss, Reward, call, checked
from unidiff.rewards.segment_view import SegmentView, SequenceView

Views = Sequence[SegmentView | SequenceView]

# An async reward is cancelled by its loop at its timeout; one that blocks its loop is given up later.
GRACE_SECONDS = 1.0

_LOOPS: weakref.WeakKeyDictionary[Reward, tuple[threading.Thread, asyncio.AbstractEventLoop]] = (
    weakref.WeakKeyDictionary()
)


class RewardTimeoutError(Exception):
    """The reward's own time is over (a TimeoutError that it raises itself counts as raised)."""


def run_rewards(rewards: Sequence[Reward], batches: Sequence[Views]) -> list[list[float | Loss]]:
    """Calls reward i on batches[i]; gives one finite float or `Loss` for each of its segments."""
    started: dict[int, Future] = {}
    for i, (reward, views) in enumerate(zip(rewards, batches)):
        if views and reward.asynchronous:
            started[i] = _start_async(reward, lambda r=reward, v=views: call(r, v))
    results: dict[int, list[float | Loss]] = {}
    for i, (reward, views) in enumerate(zip(rewards, batches)):
        if i not in started:
            results[i] = _guarded(lambda r=reward, v=views: _run_sync(r, v), reward, len(views)) if views else []
    for i, future in started.items():
        reward, count = rewards[i], len(batches[i])
        results[i] = _guarded(lambda r=reward, f=future: _finish_async(r, f), reward, count)
    return [results[i] for i in range(len(rewards))]


def _guarded(produce: Callable[[], Any], reward: Reward, count: int) -> list[float | Loss]:
    """The checked values, or the one reason why all of them are lost."""
    try:
        return checked(produce(), count)
    except RewardTimeoutError:
        return [Loss(Cause.TIMEOUT, f"took longer than {reward.timeout:g} s")] * count
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{frame.filename}:{frame.lineno}"
        return [Loss(Cause.RAISED, f"raised {type(error).__name__}: {error} ({place})")] * count


def _run_sync(reward: Reward, views: Views) -> Any:
    if reward.timeout is None:
        with torch.no_grad():
            returned = call(reward, views)
    else:
        returned = _in_thread(lambda: call(reward, views), reward.timeout)
    if asyncio.iscoroutine(returned):  # a plain function that hands on a coroutine
        return _finish_async(reward, _start_async(reward, lambda: returned))
    return returned


def _in_thread(work: Callable[[], Any], seconds: float) -> Any:
    """Runs work in a daemon thread. A ThreadPoolExecutor would wait for a hung one at the process's exit."""
    future: Future = Future()

    def target() -> None:
        torch.set_grad_enabled(False)  # grad mode is thread-local
        try:
            future.set_result(work())
        except BaseException as error:  # also SystemExit, which would end the thread without a word
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))

    threading.Thread(target=target, daemon=True, name="unidiff-reward").start()
    if not wait([future], timeout=seconds).done:
        raise RewardTimeoutError
    return future.result()


def _start_async(reward: Reward, make: Callable[[], Any]) -> Future:
    async def timed() -> Any:
        scope = asyncio.timeout(reward.timeout)
        try:
            async with scope:
                return await make()
        except TimeoutError as error:
            if scope.expired():
                raise RewardTimeoutError from error
            raise

    return asyncio.run_coroutine_threadsafe(timed(), _loop(reward))


def _finish_async(reward: Reward, future: Future) -> Any:
    patience = None if reward.timeout is None else reward.timeout + GRACE_SECONDS
    if not wait([future], timeout=patience).done:
        future.cancel()
        _LOOPS.pop(reward, None)  # its loop is blocked: the next batch gets a new one
        raise RewardTimeoutError
    return future.result()


def _loop(reward: Reward) -> asyncio.AbstractEventLoop:
    """The reward's own event loop in its daemon thread (a new one after a fork or a blocked loop)."""
    thread, loop = _LOOPS.get(reward, (None, None))
    if thread is not None and loop is not None and thread.is_alive():
        return loop
    loop = asyncio.new_event_loop()

    def target() -> None:
        torch.set_grad_enabled(False)
        loop.run_forever()
        loop.close()

    thread = threading.Thread(target=target, daemon=True, name=f"unidiff-reward-{reward.name}")
    thread.start()
    _LOOPS[reward] = (thread, loop)
    weakref.finalize(reward, loop.call_soon_threadsafe, loop.stop).atexit = False
    return loop
