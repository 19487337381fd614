"""A run whose scorer is a server of its own, and what becomes of it when the server is killed in the middle."""

from __future__ import annotations

import contextlib
import http.server
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from unidiff import backoff
from unidiff.rewards.reward import Breaker, Cause, RewardError
from unidiff.scorers.remote import remote

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
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)
    server = Server(tmp_path)
    yield server
    server.process.kill()
    server.process.wait()


def brightness(server, **options):
    return remote(server.url, "brightness", on="image", batch=1, parallel=1, seconds=20, retries=1, **options)


@pytest.mark.slow
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
    row, segment = next((row, s) for f, row, s in tables[1].missing if f == 2)
    assert "brightness has no value (raised: http://127.0.0.1" in tables[1].explain(row, segment)
    assert f"raised {images - 1}" in str(tables[1])
    assert "failed 2 times in a row" in tables[4].messages["brightness", Cause.SKIPPED]
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert written == history


@pytest.mark.slow
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


# --- servers that answer, but badly -----------------------------------------------------------------------------------


class Bad(http.server.BaseHTTPRequestHandler):
    """Answers in the way that the first part of the path names."""

    def do_POST(self) -> None:
        count = len(json.loads(self.rfile.read(int(self.headers["content-length"])))["requests"])
        way = self.path.split("/")[1]
        if way == "slow":
            time.sleep(2.0)
        body = json.dumps({"results": [{way: 0.5}] * (count + (way == "longer"))}).encode()
        status, body = {"error": (500, b"out of memory"), "page": (200, b"<html>Sign in</html>")}.get(way, (200, body))
        self.send_response(status)
        self.send_header("content-length", str(len(body) + 9 * (way == "half")))
        self.end_headers()
        with contextlib.suppress(OSError):  # the client no longer waits
            self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass


BAD = {"down": "raised", "error": "raised", "page": "wrong_type", "half": "raised", "longer": "wrong_length"}
BAD |= {"slow": "timeout"}


@pytest.fixture
def bad(monkeypatch):
    """bad(way, **options) -> a reward of a server that answers in that way."""
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Bad)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def make(way, **options):
        port = 1 if way == "down" else server.server_address[1]
        seconds = 0.2 if way == "slow" else 20
        return remote(f"http://127.0.0.1:{port}/{way}", way, on="image", seconds=seconds, retries=1, **options)

    yield make
    server.shutdown()
    server.server_close()


def test_a_run_goes_on_with_servers_that_answer_badly(make_trainer, rewards, bad, weights, difference, tmp_path):
    tables = []
    remotes = [bad(way) for way in ("fine", *BAD)]
    trainer = make_trainer([*rewards, *remotes], options={"on_step": lambda s, m, e: tables.append(e.table)})
    fine = make_trainer([*rewards, remotes[0]], output_dir=str(tmp_path / "fine"))
    assert [m["grad_norm"] for m in trainer.train()] == [m["grad_norm"] for m in fine.train()]
    assert difference(weights(trainer), weights(fine)) == 0
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    for metrics, table in zip(map(json.loads, written), tables, strict=True):
        assert metrics["reward/fine"] == 0.5 and metrics["lost/fine"] == 0
        for way, cause in BAD.items():
            assert metrics[f"lost/{way}/{cause}"] == metrics[f"lost/{way}"] == 1 and f"reward/{way}" not in metrics
            assert {c for name, c in table.lost if name == way} == {cause}
            place = next((row, segment) for f, row, segment in table.missing if table.names[f] == way)
            assert f"{way} has no value ({cause}: " in table.explain(*place)


@pytest.mark.parametrize("way", BAD)
def test_a_required_server_that_answers_badly_ends_the_run(make_trainer, rewards, bad, tmp_path, way):
    with pytest.raises(RewardError, match=rf"'{way}' is required .* for sample \d, segment \d: {BAD[way]}: "):
        make_trainer([*rewards, bad(way, required=True)]).train()
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000000"]
