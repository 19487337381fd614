"""Measures built-in rewards: the reference server on loopback, math answers, code in the sandbox.

    python tools/bench_rewards.py server     # items a second with 1, 8 and 64 items in a request
    python tools/bench_rewards.py math       # 512 answers
    python tools/bench_rewards.py code       # programs and tests in the sandbox
    python tools/bench_rewards.py overlap    # rollouts and a slow scorer, in one or in several parts

--items, --workers, --repeats, --generations, --seconds. The fastest repeat counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unidiff import GRPOConfig, InterleavedSampler, UnifiedModel, noise, reward
from unidiff.config import setting
from unidiff.grpo.experience import sample_and_judge
from unidiff.grpo.process import Clock
from unidiff.program import run_command, run_program
from unidiff.rewards.segment_view import SegmentView, SequenceView, link_row
from unidiff.sandbox import lifeline
from unidiff.scorers.code import code_tests
from unidiff.scorers.math import MathVerifier
from unidiff.scorers.remote import remote
from unidiff.sequence import Modality
from unidiff.tasks import FrozenLake
from unidiff.timing import seconds_of

SERVER = Path(__file__).with_name("reward_server.py")
BASE = Path(__file__).resolve().parent.parent / "recipes" / "base"
SCORER = "def mean(segments):\n    return [float(s.image.resize((1, 1)).getpixel((0, 0))[0]) for s in segments]\n"
ANSWERS = (  # right answer, text
    (r"\frac{3}{4}", r"Half of it and a quarter, so \boxed{0.75}."),
    ("42", r"Thus the answer is \boxed{42}."),
    ("x^2 + 2x + 1", r"Expanding gives $(x+1)^2$."),
    (r"\sqrt{8}", r"so \boxed{2\sqrt{2}}"),
    (r"\{1, 2\}", r"The roots are \boxed{\{2, 1\}}"),
    (r"\frac{\pi}{6}", r"the angle is \boxed{\frac{\pi}{3}}"),
    ("12", "I do not know."),
    ("(1, 3)", r"the interval is \boxed{(1,3)}"),
)


@dataclass
class Config:
    """Settings of all measurements."""

    items: int = setting("", 512, "scored in each measurement")
    workers: int = setting("", 2, "processes of math, threads of code")
    repeats: int = setting("", 3, "of each measurement")
    generations: int = setting("", 8, "rollouts of each of the 8 prompts of a step")
    seconds: float = setting("", 0.0, "the slow scorer's time for a step; 0 = as long as the step's rollouts take")


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """Runs the reference server in a separate process, with a very cheap scorer. Yields its URL."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        scorer = Path(folder) / "scorer.py"
        scorer.write_text(SCORER)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = [sys.executable, str(SERVER), "--scorers", f"{scorer}:mean", "--port", str(port)]
        process = subprocess.Popen(lifeline.command(*words))
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(url + "/health")
                    break
                time.sleep(0.1)
            yield url
        finally:
            process.kill()
            process.wait()


def server(config: Config) -> None:
    """Items per second: PNG pictures of 64 × 64 pixels, encoded and decoded each time, four concurrent requests."""
    rng = np.random.default_rng(0)
    views = []
    for _ in range(config.items):
        pixels = np.kron(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), np.ones((16, 16, 1), np.uint8))
        one = SegmentView(modality=Modality.IMAGE, tokens=torch.zeros(64, dtype=torch.int64), pixels=pixels)
        views += link_row([one], prompt=["find a safe way to the goal"])
    print("| items in a request | items a second | ms a request |\n|---|---|---|")
    with serving() as url, asyncio.Runner() as runner:
        for batch in (1, 8, 64):
            scorer = remote(url, "mean", batch=batch, parallel=4)
            part = views[: max(config.items // 8, 64)] if batch == 1 else views
            seconds = seconds_of(lambda scorer=scorer, part=part: runner.run(scorer(part)), config.repeats)
            print(f"| {batch} | {len(part) / seconds:.0f} | {4 * seconds / (len(part) / batch) * 1000:.1f} |")


def math(config: Config) -> None:
    """Seconds to verify answers, with workers already running."""
    verifier = MathVerifier(config.workers, seconds=30)
    pairs = [ANSWERS[i % len(ANSWERS)] for i in range(config.items)]
    seconds = seconds_of(lambda: verifier.verify(pairs), config.repeats)
    right = sum(value == 1.0 for value in verifier.verify(pairs))
    verifier.close()
    print(f"{config.items} answers ({right} right) in {seconds:.2f} s: {config.items / seconds:.0f} a second")


FUNCTIONS = (  # code, a test of it with X for numbers
    ("def f(x):\n    return x * x", "assert f(X) == X ** 2"),
    ("def f(a, b):\n    return tuple(set(a) & set(b))", "assert set(f((1, X), (X, 9))) == set((X,))"),
    ("import heapq\ndef f(xs):\n    return heapq.nlargest(2, xs)", "assert f([X, 9, 1]) == [9, X]"),
    ("import math\ndef f(r):\n    return math.pi * r", "import math\nassert math.isclose(f(X), 3.141592653589793 * X)"),
)
CODE = {  # what is judged: texts, each with what it is judged by
    "functions": [(text, [test.replace("X", x) for x in "234"]) for text, test in FUNCTIONS],
    "classes, beside the code": [
        ("class P:\n    def __init__(s, x): s.x = x", [f"assert P({x}).x == {x}" for x in "234"])
    ],
    "programs": [("print(int(input()) ** 2)", {"inputs": ["2", "3", "4"], "outputs": ["4", "9", "16"]})],
}


def cpu_seconds() -> float:
    """Of this process, its children, and all that these have reaped: the server of sandboxes is one."""
    children = {word for path in Path("/proc/self/task").glob("*/children") for word in path.read_text().split()}
    ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15] for pid in ("self", *children)]
    return sum(int(tick) for four in ticks for tick in four) / os.sysconf("SC_CLK_TCK")


def code(config: Config) -> None:
    """Texts per second; each is judged by three tests in its own sandbox. And their CPU time."""
    print("| judged | texts a second | CPU ms of one |\n|---|---|---|")
    tested = code_tests(workers=config.workers)
    number, count = itertools.count(), config.items // 8

    def judge(rows: list[tuple[str, Any]]) -> None:
        views = []
        for text, tests in itertools.islice(itertools.cycle(rows), count):
            own = f"{text}  # {next(number)}"  # all different, so that no verdict comes from the cache
            one = SegmentView(modality=Modality.TEXT, tokens=torch.zeros(8, dtype=torch.int64), text=own)
            views += link_row([one], columns={"tests": tests})
        values = asyncio.run(tested(views))
        if values != [1.0] * count:
            raise RuntimeError(f"right code was judged wrong: {values}")

    for name, rows in CODE.items():
        before = cpu_seconds()
        seconds = seconds_of(lambda rows=rows: judge(rows), config.repeats)
        spent = 1000 * (cpu_seconds() - before) / (config.repeats + 1) / count
        print(f"| {name} | {count / seconds:.0f} | {spent:.1f} |")


def overlap(config: Config) -> None:
    """Seconds until a default step's rollouts are sampled and judged, for several `rollout_parts`, with a remote scorer
    that takes a fixed time per response. Settings take turns; the rest of a step is the same for all."""
    settings, task = GRPOConfig(num_generations=config.generations), FrozenLake()
    model = UnifiedModel.from_pretrained(BASE)
    sampler = InterleavedSampler(model, settings.sampler(), task.region)
    examples = [task.example("train", i) for i in range(settings.num_prompts)]
    prompts = [model.encode(list(example.prompt)) for example in examples]
    keys = [noise.key(0, p, g) for p in range(settings.num_prompts) for g in range(settings.num_generations)]
    pause = 0.0

    async def slow(segments: list[SequenceView]) -> list[float]:
        await asyncio.sleep(pause * len(segments))
        return [1.0] * len(segments)

    rewards = [*task.rewards(), reward(slow, on="sequence")]

    def seconds(parts: int) -> dict[str, float]:
        clock = Clock()
        sample_and_judge(sampler, prompts, examples, keys, rewards, parts, clock)
        return clock.seconds

    pause = (config.seconds or seconds(1)["rollout"]) / len(keys)
    found: dict[int, dict[str, float]] = {}
    for _ in range(config.repeats):
        for parts in (1, 2, 4, 8):
            new = seconds(parts)
            if parts not in found or sum(new.values()) < sum(found[parts].values()):
                found[parts] = new
    print(f"{len(keys)} rollouts, a scorer of {pause * len(keys):.2f} s, {torch.get_num_threads()} threads")
    print("| rollout_parts | seconds | of them sampling | waiting for rewards |\n|---|---|---|---|")
    for parts, spent in found.items():
        print(f"| {parts} | {sum(spent.values()):.2f} | {spent['rollout']:.2f} | {spent['reward']:.2f} |")


COMMANDS = {"server": server, "math": math, "code": code, "overlap": overlap}


def main() -> None:
    run_command(COMMANDS, Config, __doc__ or "")


if __name__ == "__main__":
    run_program(main)
