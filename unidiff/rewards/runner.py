"""Runs the reward functions of one batch: all at once where they can be, each with its deadline and its retries.

What runs where:
- an async reward in an event loop of its own, in a daemon thread that lives as long as the reward: clients that it
  keeps open stay usable from batch to batch, one that blocks holds up no other, and Jupyter's running loop is no
  hindrance;
- a sync reward with a timeout or retries in a daemon thread of its own, started with the async ones;
- any other sync reward in the caller's thread, one after the other, while the others run.

Python cannot stop a thread. A sync reward that is over its time is given up: its thread lives on until the function
returns, and until then the reward is not called again. What may hang for ever belongs into a process that can be
killed, or behind an async client. A fault stays inside its reward.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

import torch

from unidiff import backoff
from unidiff.rewards.call import Log, Views, call, calls, checked, checked_value
from unidiff.rewards.guard import in_words, raised
from unidiff.rewards.reward import Cause, Missing, Reward

logger = logging.getLogger(__name__)

GRACE_SECONDS = 1.0  # an async reward is cancelled at its timeout; one that blocks its loop is given up later
SIDE_BY_SIDE = 32  # segments that an async reward with batched=False works on at once
PATIENCE_SECONDS = 60.0  # after which one without a timeout is said to be waited for

_LOOPS: weakref.WeakKeyDictionary[Reward, tuple[threading.Thread, asyncio.AbstractEventLoop]] = (
    weakref.WeakKeyDictionary()
)
_GIVEN_UP: weakref.WeakKeyDictionary[Reward, Future] = weakref.WeakKeyDictionary()


class RewardTimeoutError(Exception):
    """The reward's own time is over (a TimeoutError that it raises itself counts as raised)."""


class Job:
    """One reward on its segments of a batch. `start` begins what runs elsewhere, `finish` waits for the values."""

    def __init__(self, reward: Reward, views: Views, trainer_state: Any = None) -> None:
        self.reward, self.views = reward, views
        self.log = Log(trainer_state, len(views))
        over = f"took longer than {reward.timeout:g} s" if reward.timeout else "ended without a result"
        self._values: list[float | Missing] = [Missing(Cause.TIMEOUT, over)] * len(views)  # until there are others
        self._future: Future | None = None
        self._end: float | None = None
        self._idle = not views

    def start(self) -> Job:
        """Begins an async reward, or a sync one with a timeout or retries."""
        reward = self.reward
        if self._idle or self._skipped():
            return self
        self._end = None if reward.timeout is None else time.monotonic() + reward.timeout
        if reward.asynchronous:
            self._future = asyncio.run_coroutine_threadsafe(self._work_async(), _loop(reward))
        elif reward.timeout is not None or reward.retries:
            self._future = _in_thread(self._work)
        return self

    def finish(self) -> list[float | Missing]:
        """One finite float or `Missing` for each segment."""
        if self._idle:
            return list(self._values)
        if self._future is None:
            with torch.no_grad():
                self._work()
        else:
            self._wait(self._future)
        values = list(self._values)  # one that was given up may go on and fill its own list
        self._judge(values)
        return values

    # ---------------------------------------------------------------- whether

    def _skipped(self) -> bool:
        """The reward rests, or an earlier call of it has not come back."""
        given_up = _GIVEN_UP.get(self.reward)
        if self.reward.state.skips():
            lost = Missing(Cause.SKIPPED, f"was not called: it failed {self.reward.state.failed} times in a row")
        elif given_up is not None and not given_up.done():
            lost = Missing(Cause.TIMEOUT, "was not called: its call in an earlier batch has not come back yet")
        else:
            return False
        self._values[:] = [lost] * len(self.views)
        self._idle = True
        return True

    def _judge(self, values: list[float | Missing]) -> None:
        """Tells the breaker how it went, and says so where it matters."""
        reward, lost = self.reward, [v for v in values if isinstance(v, Missing) and v.cause is not Cause.NONE]
        faulty = len(lost) == len(values)
        rests = reward.state.record(faulty, reward.breaker)
        if rests:
            logger.warning(
                "reward %r failed %d times in a row, is left out for %d batches: %s",
                *(reward.name, reward.state.failed, reward.state.resting, lost[0].message),
            )
        elif faulty and reward.state.failed == 1:
            logger.warning("reward %r lost all values of a batch: %s", reward.name, lost[0].message)

    # ---------------------------------------------------------------- sync

    def _work(self) -> None:
        """Fills the values; raises nothing that a reward may raise."""
        try:
            if self.reward.batched:
                returned = self._attempt(lambda: call(self.reward, self.views, self.log))
                self._values[:] = checked(returned, len(self.views))
            else:
                for i, one in enumerate(calls(self.reward, self.views)):
                    self._values[i] = self._one(one)
        except RewardTimeoutError:
            pass  # what is not there by now stays lost
        except BaseException as error:  # a SystemExit, say: what a reward raises is its own affair
            self._values[:] = [raised(error)] * len(self.views)

    def _one(self, function: Callable[[], Any]) -> float | Missing:
        try:
            return checked_value(self._attempt(function))
        except RewardTimeoutError:
            raise
        except BaseException as error:
            return raised(error)

    def _attempt(self, function: Callable[[], Any]) -> Any:
        for attempt in itertools.count():
            try:
                returned = function()
                return self._awaited(returned) if inspect.isawaitable(returned) else returned
            except RewardTimeoutError:
                raise
            except Exception as error:
                time.sleep(self._pause(attempt, error))
        raise AssertionError("unreachable")

    def _awaited(self, awaitable: Any) -> Any:
        """What a plain function hands on that has to be awaited, awaited in the reward's loop."""

        async def outcome() -> Any:
            try:
                return await awaitable
            except BaseException as error:  # a SystemExit would end the loop, a CancelledError lose its place
                if isinstance(error, Exception) or _cancelled():
                    raise
                raise RuntimeError(f"{type(error).__name__}: {in_words(error, form=str)}") from error

        future = asyncio.run_coroutine_threadsafe(outcome(), _loop(self.reward))
        left = None if self._end is None else max(self._end - time.monotonic(), 0)
        if not wait([future], timeout=left).done:
            future.cancel()
            raise RewardTimeoutError
        return future.result()

    def _pause(self, attempt: int, error: BaseException) -> float:
        """Seconds before the next attempt; raises the error again if there is none."""
        pause = backoff.pause_before(attempt)
        if attempt >= self.reward.retries or (self._end is not None and time.monotonic() + pause > self._end):
            raise error
        return pause

    # ---------------------------------------------------------------- async

    async def _work_async(self) -> None:
        torch.set_grad_enabled(False)  # an earlier call may have changed it, in this thread
        scope = asyncio.timeout(self.reward.timeout)
        try:
            async with scope:
                if self.reward.batched:
                    returned = await self._attempt_async(lambda: call(self.reward, self.views, self.log))
                    self._values[:] = checked(returned, len(self.views))
                else:
                    await self._each_async()
        except BaseException as error:
            if not scope.expired():
                self._values[:] = [raised(error)] * len(self.views)

    async def _each_async(self) -> None:
        gate = asyncio.Semaphore(SIDE_BY_SIDE)

        async def one(i: int, function: Callable[[], Any]) -> None:
            async with gate:
                try:
                    self._values[i] = checked_value(await self._attempt_async(function))
                except BaseException as error:
                    if _cancelled():
                        raise
                    self._values[i] = raised(error)

        await asyncio.gather(*(one(i, function) for i, function in enumerate(calls(self.reward, self.views))))

    async def _attempt_async(self, function: Callable[[], Any]) -> Any:
        for attempt in itertools.count():
            try:
                returned = function()
                return await returned if inspect.isawaitable(returned) else returned
            except Exception as error:
                await asyncio.sleep(self._pause(attempt, error))
        raise AssertionError("unreachable")

    # ---------------------------------------------------------------- waiting

    def _wait(self, future: Future) -> None:
        """Until the values are there or the time is over."""
        if self._end is None:
            patience = PATIENCE_SECONDS
            while not wait([future], timeout=patience).done:
                logger.warning("still waiting for reward %r, which has no timeout", self.reward.name)
                patience *= 2
            return
        grace = GRACE_SECONDS if self.reward.asynchronous else 0.0
        if wait([future], timeout=max(self._end - time.monotonic(), 0) + grace).done:
            return
        self.log = Log()
        if self.reward.asynchronous:
            future.cancel()
            _LOOPS.pop(self.reward, None)  # its loop is blocked: the next batch gets a new one
        else:
            _GIVEN_UP[self.reward] = future


def _cancelled() -> bool:
    """The task in progress is being cancelled, by its deadline, or closed with its loop; a reward may also raise
    CancelledError itself."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return task is None or task.cancelling() > 0


def _in_thread(work: Callable[[], None]) -> Future:
    """Runs work in a daemon thread. A ThreadPoolExecutor would wait for a hung one at the process's exit."""
    future: Future = Future()

    def target() -> None:
        torch.set_grad_enabled(False)  # grad mode is thread-local
        try:
            work()
        finally:
            future.set_result(None)

    threading.Thread(target=target, daemon=True, name="unidiff-reward").start()
    return future


def _loop(reward: Reward) -> asyncio.AbstractEventLoop:
    """The reward's own event loop in its daemon thread (a new one after a fork or a blocked loop)."""
    thread, loop = _LOOPS.get(reward, (None, None))
    if thread is not None and loop is not None and thread.is_alive():
        return loop
    loop, retired = asyncio.new_event_loop(), threading.Event()

    def target() -> None:
        while not retired.is_set():  # the reward, or a task that it began, may stop the loop
            with contextlib.suppress(BaseException):
                loop.run_forever()
        loop.close()

    def retire() -> None:
        retired.set()
        loop.call_soon_threadsafe(loop.stop)

    thread = threading.Thread(target=target, daemon=True, name=f"unidiff-reward-{reward.name}")
    thread.start()
    _LOOPS[reward] = (thread, loop)
    weakref.finalize(reward, retire).atexit = False
    return loop
