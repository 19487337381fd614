"""Mathematical answers, compared by math-verify in worker processes that can be killed.

A worker verifies one answer at a time, with a hard timeout. If it is late or dies, it is replaced, and only its current
answer is lost. Workers end with this process, even if this process is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from unidiff.config import typed
from unidiff.rewards.guard import Value, column_of, each
from unidiff.rewards.names import register
from unidiff.rewards.reward import Cause, Missing, Reward, reward
from unidiff.rewards.segment_view import SegmentView
from unidiff.sandbox import lifeline
from unidiff.scorers import math_worker
from unidiff.scorers.answers import bases, final_answer, right_answer, same_text
from unidiff.scorers.text import check_which, looked_at, right_text


class _Worker:
    """One process of math_worker.py."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            lifeline.command(sys.executable, "-I", math_worker.__file__),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # the trainer handles Ctrl-C
        )
        self.buffer = b""
        ready = self._read(math_worker.START_SECONDS)
        if "missing" in ready:
            self.kill()
            raise ImportError(
                f'mathematical answers need math-verify ({ready["missing"]}): pip install "unidiff[math]"'
            )

    def ask(self, request: Sequence[Any], seconds: float) -> dict[str, Any]:
        """Sends a request and returns the reply. Raises TimeoutError, or EOFError if the process has died; after either
        the worker is unusable."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([seconds, *request]).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise EOFError from error
        return self._read(seconds)

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        deadline, out = time.monotonic() + seconds, self.process.stdout.fileno()
        while b"\n" not in self.buffer:
            if not select.select([out], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise TimeoutError
            chunk = os.read(out, 1 << 16)
            if not chunk:
                raise EOFError
            self.buffer += chunk
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


class MathVerifier:
    """A pool of workers. They start with the first answer and live as long as this process.

    workers: number of processes. seconds: timeout of one answer.
    """

    def __init__(self, workers: int = 2, seconds: float = 5.0) -> None:
        if workers < 1 or not seconds > 0:
            raise ValueError(f"workers={workers!r}, seconds={seconds!r}; both must be above 0")
        self.workers, self.seconds = workers, seconds
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(workers, "unidiff-math")

    def verify(self, pairs: Sequence[tuple[str, str]]) -> list[float | Missing]:
        """1 or 0 for each (right answer, text that contains an answer), or `Missing` with the cause.

        Raises ImportError without math-verify.
        """
        return list(self._pool.map(self._one, pairs))

    async def verify_async(self, pairs: Sequence[tuple[str, str]]) -> list[float | Missing]:
        """As `verify`, for an event loop. Cancellation drops the answers that have not started."""
        loop = asyncio.get_running_loop()
        return await asyncio.gather(*(loop.run_in_executor(self._pool, self._one, pair) for pair in pairs))

    def _one(self, pair: tuple[str, str]) -> float | Missing:
        right, given = right_answer(pair[0]), final_answer(pair[1])
        if bases(right.text) and bases(given.text) not in ([], bases(right.text)):  # math-verify ignores bases
            return 0.0
        same = same_text(right.text, given.text)
        request = [right.readings, given.readings, given.last_resort, same]
        with self._lock:
            worker = self._idle.pop() if self._idle else None
        try:
            worker = worker or _Worker()
        except (OSError, EOFError) as error:
            return Missing(Cause.RAISED, f"no worker for it could be started: {type(error).__name__}: {error}")
        try:
            reply = worker.ask(request, self.seconds)
        except TimeoutError:
            worker.kill()
            return Missing(Cause.TIMEOUT, f"took longer than {self.seconds:g} s to verify")
        except EOFError:
            worker.kill()
            return Missing(Cause.RAISED, "the worker that verified it has died")
        with self._lock:
            self._idle.append(worker)
        return reply["value"] if "value" in reply else Missing(Cause.RAISED, f"math-verify: {reply['error']}")

    def close(self) -> None:
        """Ends the workers; another call starts new ones."""
        with self._lock:
            while self._idle:
                self._idle.pop().kill()


@typed
def math_answer(
    column: str = "answer", *, which: str = "last", workers: int = 2, seconds: float = 5.0, **options: Any
) -> Reward:
    r"""1 for a text whose final answer is mathematically equal to the column's. The final answer is in <answer>, in the
    last \boxed{}, after "Answer:", or the last expression (see `final_answer`).

    column: the right answer, a number, LaTeX or plain text; None = not applicable. For any other type the value is
    missing. which: as in unidiff.scorers.text.
    workers, seconds: see `MathVerifier`. After a timeout the value is missing, not 0.
    """
    check_which(which)
    verifier = MathVerifier(workers, seconds)

    def pair(view: SegmentView) -> tuple[str, str] | None:
        right = column_of(view, column) if looked_at(view, which) else None
        return None if right is None else (right_text(right), view.text or "")

    async def math_answer(segments: Sequence[SegmentView]) -> list[Value]:
        pairs = each(segments, pair, column)
        verdicts = iter(await verifier.verify_async([one for one in pairs if isinstance(one, tuple)]))
        return [next(verdicts) if isinstance(one, tuple) else one for one in pairs]

    return reward(math_answer, on="text", **options)


register("math_answer")(math_answer())
