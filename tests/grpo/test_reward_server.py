"""A run whose scorer is a server of its own, and what becomes of it when the server is killed in the middle."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from unidiff.rewards import endpoint
from unidiff.rewards.remote import remote
from unidiff.rewards.reward import Breaker, Cause, RewardError

SERVER = Path(__file__).resolve().parents[2] / "tools" / "reward_server.py"

SCORER = """
import os, signal
from pathlib import Path

ORDER = Path(__file__).with_name("die")

def brightness(segments):
    if ORDER.exists() and ORDER.read_text() == "now":  # what an out-of-memory killer would do
        os.kill(os.getpid(), signal.SIGKILL)
    if ORDER.exists():
        ORDER.write_text("now")  # at the next batch
    return [sum(s.image.resize((1, 1)).getpixel((0, 0))) / 765 for s in segments]
"""


class Server:
    """tools/reward_server.py as a process, with a scorer that kills it in its second batch after `doom`."""

    def __init__(self, folder: Path) -> None:
        self.scorer, self.order = folder / "scorer.py", folder / "die"
        self.scorer.write_text(SCORER)
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        """Waits until it answers."""
        words = ["--scorers", f"{self.scorer}:brightness", "--port", str(self.port), "--wait", "0"]
        self.process = subprocess.Popen([sys.executable, str(SERVER), *words])
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server did not start"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(self.url + "/health", timeout=5).close()
                return
            time.sleep(0.05)
        raise AssertionError("the server does not answer")

    def doom(self) -> None:
        self.order.write_text("soon")

    def restart(self) -> None:
        self.process.wait(timeout=30)
        self.order.unlink()
        self.start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "PAUSE_SECONDS", 0.01)
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.wait()


def brightness(server, **options):
    return remote(server.url, "brightness", on="image", batch=1, parallel=1, seconds=20, retries=1, **options)


def test_a_run_goes_on_while_its_server_is_dead_and_when_it_is_back(
    make_trainer, server, rewards, monkeypatch, tmp_path
):
    monkeypatch.setattr(Breaker, "REST", 1)
    tables = []

    def watch(step, metrics, experience):
        tables.append(experience.table)
        if step == 0:
            server.doom()
        if step == 4:
            server.restart()

    trainer = make_trainer([*rewards, brightness(server, breaker=2)], max_steps=6, options={"on_step": watch})
    history = trainer.train()

    alive, killed, down, tripped, skipped, back = (m["lost/brightness"] for m in history)
    assert alive == back == 0 and 0 < killed < 1 and down == tripped == skipped == 1
    causes = [[k.split("/")[2] for k in m if k.startswith("lost/brightness/")] for m in history]
    assert causes == [[], ["raised"], ["raised"], ["raised"], ["skipped"], []]
    assert all(("reward/brightness" in m) == (m["lost/brightness"] < 1) for m in history)
    assert all(m["lost/bright"] == 0 and m["grad_norm"] > 0 for m in history)  # the others go on as ever

    images = int(tables[1].asked_F[2])
    assert tables[1].lost == {("brightness", Cause.RAISED): images - 1} and len(tables[1].present(2)) == 1
    row, segment = next((row, s) for f, row, s in tables[1].losses if f == 2)
    assert "brightness has no value (raised: http://127.0.0.1" in tables[1].explain(row, segment)
    assert f"raised {images - 1}" in str(tables[1])
    assert "failed 2 times in a row" in tables[4].messages["brightness", Cause.SKIPPED]
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == history


def test_a_required_server_that_dies_ends_the_run_and_a_resumed_one_is_the_same(
    make_trainer, server, rewards, weights, difference, timeless, tmp_path
):
    def dooms(step, metrics, experience):
        if step == 0:
            server.doom()

    needed = [*rewards, brightness(server, required=True)]
    with pytest.raises(
        RewardError, match=r"'brightness' is required and has no value for sample \d, segment \d: raised"
    ):
        make_trainer(needed, max_steps=3, options={"on_step": dooms}).train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000001"]

    server.restart()
    resumed = make_trainer(needed, max_steps=3, resume=True)
    history = resumed.train()
    unbroken = make_trainer(needed, max_steps=3, output_dir=str(tmp_path / "unbroken"))
    assert [timeless(m) for m in history] == [timeless(m) for m in unbroken.train()]
    assert difference(weights(resumed), weights(unbroken)) == 0
