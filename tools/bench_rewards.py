"""Measures built-in rewards: the reference server on loopback, math answers, code in the sandbox.

    python tools/bench_rewards.py server     # items a second with 1, 8 and 64 items in a request
    python tools/bench_rewards.py math       # 512 answers
    python tools/bench_rewards.py code       # programs and tests in the sandbox
    python tools/bench_rewards.py overlap    # a step with a slow scorer, its rollouts in one or in several parts

--items, --workers, --repeats, --generations, --seconds. The fastest repeat counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from unidiff import GRPOConfig, GRPOTrainer, UnifiedModel, reward
from unidiff.config import parse
from unidiff.rewards.code_tests import code_tests
from unidiff.rewards.math_answers import MathVerifier
from unidiff.rewards.remote import remote
from unidiff.rewards.segment_view import SegmentView, SequenceView, link_row
from unidiff.sequence import Modality
from unidiff.tasks import FrozenLake

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
    """items: scored in each measurement. workers: processes of math, threads of code. repeats: of each measurement.
    generations: rollouts of each of the 8 prompts of a step. seconds: that the slow scorer takes for a step; 0 = as
    long as the step's rollouts are sampled."""

    items: int = 512
    workers: int = 2
    repeats: int = 3
    generations: int = 8
    seconds: float = 0.0


def fastest(run: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest repeat, after one that warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])


@contextlib.contextmanager
def serving() -> Iterator[str]:
    """The reference server in a process of its own, with a scorer that costs next to nothing. Gives its url."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        scorer = Path(folder) / "scorer.py"
        scorer.write_text(SCORER)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        words = [sys.executable, str(SERVER), "--scorers", f"{scorer}:mean", "--port", str(port)]
        process = subprocess.Popen(words)
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
    """Items a second, PNG pictures of 64 × 64 pixels, encoded and decoded each time, four requests at a time."""
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
            seconds = fastest(lambda scorer=scorer, part=part: runner.run(scorer(part)), config.repeats)
            print(f"| {batch} | {len(part) / seconds:.0f} | {4 * seconds / (len(part) / batch) * 1000:.1f} |")


def math(config: Config) -> None:
    """Seconds to verify answers, with workers that run already."""
    verifier = MathVerifier(config.workers, seconds=30)
    pairs = [ANSWERS[i % len(ANSWERS)] for i in range(config.items)]
    seconds = fastest(lambda: verifier.verify(pairs), config.repeats)
    right = sum(value == 1.0 for value in verifier.verify(pairs))
    verifier.close()
    print(f"{config.items} answers ({right} right) in {seconds:.2f} s: {config.items / seconds:.0f} a second")


def code(config: Config) -> None:
    """Seconds to judge functions by two tests each, every one in two sandboxes of its own."""
    columns = {"tests": ["assert f(2) == 4", "assert f(3) == 9"]}
    text = "def f(x):\n    return x * x"
    views = []
    for _ in range(config.items // 8):
        one = SegmentView(modality=Modality.TEXT, tokens=torch.zeros(8, dtype=torch.int64), text=text)
        views += link_row([one], columns=columns)
    tested = code_tests(workers=config.workers)
    seconds = fastest(lambda: asyncio.run(tested(views)), config.repeats)
    right = sum(value == 1.0 for value in asyncio.run(tested(views)))
    print(f"{len(views)} functions ({right} right) in {seconds:.2f} s: {len(views) / seconds:.0f} a second")


def overlap(config: Config) -> None:
    """Seconds of a default step with a scorer elsewhere that takes a time for each response, as `rollout_parts` grow.
    Settings take turns."""
    model, task = UnifiedModel.from_pretrained(BASE), FrozenLake()
    pause = 0.0

    async def slow(segments: list[SequenceView]) -> list[float]:
        await asyncio.sleep(pause * len(segments))
        return [1.0] * len(segments)

    rewards = [*task.rewards(), reward(slow, on="sequence", weight=0.0)]
    found: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            num_generations=config.generations, output_dir=folder, save_steps=0, quiet=True, check_ratio_every=0
        )
        trainers = {
            n: GRPOTrainer(copy.deepcopy(model), task, replace(settings, rollout_parts=n), rewards)
            for n in (1, 2, 4, 8)
        }
        first, _ = trainers[1].step(0)
        rows = settings.num_prompts * settings.num_generations
        pause = (config.seconds or first["seconds/rollout"]) / rows
        for step in range(config.repeats):
            for n, trainer in trainers.items():
                metrics, _ = trainer.step(0)  # the same step again: the same prompts and noise
                if step == 0 or metrics["seconds"] < found[n]["seconds"]:
                    found[n] = metrics
    print(f"{rows} rollouts, a scorer of {pause * rows:.2f} s, {torch.get_num_threads()} threads")
    print("| rollout_parts | step, s | sampling, s | waiting for rewards, s |\n|---|---|---|---|")
    for n, metrics in found.items():
        step, sampling, waiting = (metrics[name] for name in ("seconds", "seconds/rollout", "seconds/reward"))
        print(f"| {n} | {step:.2f} | {sampling:.2f} | {waiting:.2f} |")


COMMANDS = {"server": server, "math": math, "code": code, "overlap": overlap}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit(f"usage: python tools/bench_rewards.py {'|'.join(COMMANDS)} [--setting value …]\n\n{__doc__}")
    COMMANDS[sys.argv[1]](parse(Config, sys.argv[2:], __doc__ or ""))
