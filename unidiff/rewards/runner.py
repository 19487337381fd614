"""Runs the reward functions of one batch, in parallel where possible, each with its timeout and retries.

Where rewards run:
- An async reward has its own event loop in a daemon thread that lives as long as the reward. So its open clients stay
  usable from batch to batch, a blocking reward does not delay others, and it works inside Jupyter's running loop.
- A sync reward with a timeout or retries has its own daemon thread, started together with the async ones.
- All other sync rewards run one after another in the caller's thread, while the others run.

Python cannot stop a thread. A sync reward that exceeds its timeout is abandoned: its thread goes on until the function
returns, and until then the reward is not called again. Code that may hang for ever belongs in a process that can be
killed, or behind an async client. A fault affects only its own reward.
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

GRACE_SECONDS = 1.0  # after its timeout an async reward is cancelled; if it blocks its loop, it is abandoned this later
SIDE_BY_SIDE = 32  # segments that an async reward with batched=False handles concurrently
PATIENCE_SECONDS = 60.0  # first warning about a slow reward without a timeout; later ones come at doubled intervals

_LOOPS: weakref.WeakKeyDictionary[Reward, tuple[threading.Thread, asyncio.AbstractEventLoop]] = (
    weakref.WeakKeyDictionary()
)
_GIVEN_UP: weakref.WeakKeyDictionary[Reward, Future] = weakref.WeakKeyDictionary()


class RewardTimeoutError(Exception):
    """The reward's timeout expired. (A TimeoutError that the reward itself raises counts as raised.)"""


class Job:
    """One reward on its segments of a batch. `start` begins background work, `finish` waits for the values."""

    def __init__(self, reward: Reward, views: Views, trainer_state: Any = None) -> None:
        self.reward, self.views = reward, views
        self.log = Log(trainer_state, len(views))
        over = f"took longer than {reward.timeout:g} s" if reward.timeout else "ended without a result"
        self._values: list[float | Missing] = [Missing(Cause.TIMEOUT, over)] * len(views)  # replaced by results
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
        values = list(self._values)  # copied, because an abandoned reward may still write to its list
        self._judge(values)
        return values

    # ---------------------------------------------------------------- whether

    def _skipped(self) -> bool:
        """Whether the reward rests, or an earlier call has not returned yet. If so, all values are missing."""
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
        """Records the outcome in the breaker, and warns of failures."""
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
        """Fills the values. Exceptions of the reward become missing values."""
        try:
            if self.reward.batched:
                returned = self._attempt(lambda: call(self.reward, self.views, self.log))
                self._values[:] = checked(returned, len(self.views))
            else:
                for i, one in enumerate(calls(self.reward, self.views)):
                    self._values[i] = self._one(one)
        except RewardTimeoutError:
            pass  # unfinished values stay missing
        except BaseException as error:  # also SystemExit: a reward must not end the run
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
        """Awaits, in the reward's loop, an awaitable that a sync function returned."""

        async def outcome() -> Any:
            try:
                return await awaitable
            except BaseException as error:  # SystemExit would end the loop; CancelledError would lose the place
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
        """Seconds before the next attempt. Raises the error again if no attempt is left."""
        pause = backoff.pause_before(attempt)
        if attempt >= self.reward.retries or (self._end is not None and time.monotonic() + pause > self._end):
            raise error
        return pause

    # ---------------------------------------------------------------- async

    async def _work_async(self) -> None:
        torch.set_grad_enabled(False)  # grad mode is thread-local, and an earlier call may have changed it
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
        """Waits for the values or the timeout."""
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
    """Whether the current task is really being cancelled, by its timeout or its closing loop. (A reward may also raise
    CancelledError itself.)"""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return task is None or task.cancelling() > 0


def _in_thread(work: Callable[[], None]) -> Future:
    """Runs work in a daemon thread. A ThreadPoolExecutor would wait for a hung thread at exit."""
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
    """The reward's event loop in its daemon thread (a new one after a fork or a blocked loop)."""
    thread, loop = _LOOPS.get(reward, (None, None))
    if thread is not None and loop is not None and thread.is_alive():
        return loop
    loop, retired = asyncio.new_event_loop(), threading.Event()

    def target() -> None:
        while not retired.is_set():  # the reward may stop the loop
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
