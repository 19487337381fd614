"""Remote scorers against the reference server and against servers that fail, all on loopback."""

import asyncio
import base64
import gzip
import http.server
import json
import pickle
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tables import each

pytest.importorskip("fastapi")

from unidiff import backoff
from unidiff.rewards.reward import Cause, Missing
from unidiff.rewards.segment_view import SegmentView, SequenceView, link_row
from unidiff.scorers.remote import encoded, pickled, remote
from unidiff.sequence import Modality

ROOT = Path(__file__).resolve().parents[2]

SCORERS = """
import time

def brightness(segments, **columns):
    return [{"score": s.image.getpixel((0, 0))[0] / 255, "width": s.image.width} for s in segments]

def words(segments, bonus):
    if any("boom" in (s.text or "") for s in segments):
        raise RuntimeError("boom is not scored")
    return [None if "skip" in s.text else len(s.text.split()) + b for s, b in zip(segments, bonus)]

def story(segments):
    return [float(s.texts == ["a b", "c"] and s.prompt[0] == "q" and len(s.images) == 1) for s in segments]

def sizes(segments):
    return [len(segments)] * len(segments)

def slow(segments):
    time.sleep(0.5)
    return [1] * len(segments)

def odd(segments):
    return [{"x": float("nan"), "y": "one", "z": 1.5}[s.text] for s in segments]

def short(segments):
    return [1.0]
"""


def text(content):
    return SegmentView(modality=Modality.TEXT, tokens=torch.arange(2), text=content)


def picture(shade):
    pixels = np.full((4, 6, 3), shade, np.uint8)
    return SegmentView(modality=Modality.IMAGE, tokens=torch.arange(6), pixels=pixels)


def row(*views, **columns):
    return link_row(views, prompt=["q"], columns=columns)


def ask(reward, views):
    return asyncio.run(reward(list(views)))


def quick(url, scorer="words", **options):
    return remote(url, scorer, **{"seconds": 5, "retries": 0, **options})


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(folder):
    """The reference server as a process: (process, url)."""
    (folder / "scorers.py").write_text(SCORERS)
    names = ("brightness", "words", "story", "sizes", "slow", "odd", "short")
    port = free_port()
    words = ["--scorers", ",".join(f"{n}={folder}/scorers.py:{n}" for n in names), "--port", str(port)]
    words += ["--items", "8", "--body", "100000", "--batch", "4", "--wait", "0.05"]
    process = subprocess.Popen([sys.executable, str(ROOT / "tools/reward_server.py"), *words])
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url + "/health", timeout=5)
            return process, url
        except OSError:
            assert process.poll() is None
            time.sleep(0.1)
    raise AssertionError("the server did not start")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    process, url = start(tmp_path_factory.mktemp("scorers"))
    yield url
    process.kill()
    process.wait()


def post(url, body):
    """(status, JSON) of a raw request."""
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


# --- the reference server ---------------------------------------------------------------------------------------------


def test_text_images_and_whole_responses(server):
    first, second = row(text("a b"), picture(51), text("c"), bonus=1), row(text("skip"), picture(255), bonus=2)
    texts = [view for view in (*first, *second) if view.text is not None]
    assert ask(quick(server, columns=("bonus",)), texts) == [3.0, 2.0, None]
    images = quick(server, "brightness", on="image", weight=2.0)
    assert (images.name, images.on, images.weight) == ("brightness", "image", 2.0)
    assert ask(images, [first[1], second[1]]) == [0.2, 1.0]
    assert ask(quick(server, "brightness", on="image", metric="width"), [first[1]]) == [6.0]
    whole = quick(server, "story", on="sequence")
    assert ask(whole, [SequenceView(first), SequenceView(second)]) == [1.0, 0.0]


def test_an_error_is_its_items_own(server):
    views = [view for words in ("a", "boom", "b c") for view in row(text(words), bonus=0)]
    one, lost, two = ask(quick(server, columns=("bonus",)), views)
    assert (one, two) == (1.0, 2.0) and lost.cause is Cause.RAISED and "boom is not scored" in lost.message
    nan, word, right = ask(quick(server, "odd"), [row(text(t))[0] for t in "xyz"])
    assert "gave nan" in nan.message and "'one', which is not a number" in word.message and right == 1.5
    assert ask(quick(server, "short"), row(text("a"))) == [1.0]
    unknown = ask(quick(server, "beauty"), row(text("a")))[0]
    assert "not served here; there are: brightness, words" in unknown.message


def test_requests_share_batches_and_the_size_is_bounded(server):
    views = [row(text("a"))[0] for _ in range(10)]
    sizes = ask(quick(server, "sizes", batch=2, parallel=5), views)
    assert max(sizes) > 2 and max(sizes) <= 4
    refused = ask(quick(server, "sizes", batch=10), views)
    assert all('answered 413: {"detail":"10 items; at most 8 are taken' in one.message for one in refused)


def test_limits_and_bad_requests(server):
    assert post(server + "/score", b"x" * 200_000)[0] == 413
    assert post(server + "/score", b"{")[1]["detail"].startswith("the body is not JSON: Expecting property name")
    assert post(server + "/score", b"[]")[1]["detail"] == "the body has no list of requests"
    items = [
        7,
        {"history": [], "required_rewards": ["sizes"]},
        {"history": [{"image_b64": "AAAA"}], "required_rewards": ["sizes"]},
        {"history": [{"role": "prompt"}], "required_rewards": ["sizes"]},
        {"history": [{"text": "a"}], "required_rewards": ["sizes"]},
    ]
    status, answer = post(server + "/score", json.dumps({"requests": items}).encode())
    assert status == 200 and answer["results"][4] == {"sizes": 1.0} and answer["errors"][4] is None
    for error, words in zip(answer["errors"], ["required_rewards", "at least one part", "cannot be read", "a text or"]):
        assert words in error
    with urllib.request.urlopen(server + "/health") as response:
        health = json.load(response)
    assert health["status"] == "ok" and health["scorers"]["sizes"]["scored"] >= 1


def test_small_files_that_hold_large_pictures(program, monkeypatch):
    """Pixels are bounded, of a picture and of a request: what is bounded as a body may be a thousand times as large."""
    module = program("tools/reward_server.py")
    monkeypatch.setattr(module, "PIXELS", 30)
    monkeypatch.setattr(module, "PIXELS_OF_REQUEST", 60)
    served = {"sizes": module.Scorer("sizes", lambda segments: [1] * len(segments), 4, 0.0, 64)}

    def item(*sizes):
        pictures = [base64.b64encode(encoded(Image.new("RGB", size))).decode() for size in sizes]
        return {"history": [{"image_b64": one} for one in pictures], "required_rewards": ["sizes"]}

    allowance = module.Allowance(module.Memory(1 << 20))
    asked, errors = module.enlist(served, [item((5, 5)), item((8, 8)), item((5, 5), (5, 5)), item((2, 2))], allowance)
    assert [i for i, _, _ in asked] == [0, 3] and errors[0] is errors[3] is None
    assert errors[1] == "a picture has more than 30 pixels"
    assert errors[2] == "the request's pictures have more than 60 pixels: send fewer items"


# --- servers that fail ------------------------------------------------------------------------------------------------


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers in the way that its server's `mode` says; `fails` times, if that is a number, then well."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.bodies.append(body)
        mode = self.server.mode if self.server.fails > 0 else "good"
        self.server.fails -= 1
        getattr(self, mode)(body)

    def send(self, status, body, kind="application/json", length=None):
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def results(self, count):
        return json.dumps({"results": [{"words": 0.5}] * count, "errors": [None] * count}).encode()

    def good(self, body):
        self.send(200, self.results(len(json.loads(body)["requests"])))

    def error(self, body):
        self.send(500, b"out of memory")

    def busy(self, body):
        self.send(503, b"busy")

    def refusal(self, body):
        self.send(401, b"who are you?")

    def html(self, body):
        self.send(200, b"<html>Sign in</html>", "text/html")

    def half(self, body):
        self.send(200, self.results(2)[:20], length=500)

    def longer(self, body):
        self.send(200, self.results(7))

    def nothing(self, body):
        self.send(200, b"{}")

    def strings(self, body):
        self.send(200, self.results(2).replace(b"0.5", b'"high"'))

    def slow(self, body):
        time.sleep(1.5)
        self.good(body)

    def bomb(self, body, status=200, encoding="gzip"):
        self.send_response(status)
        self.send_header("content-encoding", encoding)
        self.end_headers()
        self.wfile.write(gzip.compress(bytes(1 << 24), 1))

    def refusing_bomb(self, body):
        self.bomb(body, 400, "br")

    def flood(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b"x" * (1 << 16))

    def error_flood(self, body):
        self.flood(body, 400)

    def drip(self, body):
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(0.05)

    def deep(self, body):
        self.send(200, b"[" * 100_000 + b"]" * 100_000)

    def digits(self, body):
        self.send(200, b"1" * 10_000)

    def hangs_up(self, body):
        self.connection.shutdown(socket.SHUT_RDWR)

    def evil(self, body):
        self.send(200, pickle.dumps(Evil()), "application/octet-stream")

    def old(self, body):
        given = pickle.loads(body)
        scores = [np.float32(0.25)] * len(given["images"])
        self.send(200, pickle.dumps({"scores": scores, "array": np.ones(len(scores))}), "application/octet-stream")

    def old_json(self, body):
        self.send(200, json.dumps({"scores": [0.25] * len(pickle.loads(body)["images"])}).encode())

    def log_message(self, *args):
        pass


RAN = []


class Evil:
    def __reduce__(self):
        return (RAN.append, (1,))


@pytest.fixture
def failing():
    """failing(mode, fails=…) -> its url."""
    made = []

    def make(mode, fails=10**6):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Failing)
        server.mode, server.fails, server.bodies = mode, fails, []
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        made.append(server)
        make.bodies = server.bodies
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield make
    for server in made:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("mode", "cause", "words"),
    [
        ("error", Cause.RAISED, "answered 500: out of memory"),
        ("busy", Cause.RAISED, "answered 503: busy"),
        ("refusal", Cause.RAISED, "answered 401: who are you?"),
        ("html", Cause.WRONG_TYPE, "answered no JSON but text/html: '<html>Sign in"),
        ("half", Cause.RAISED, "RemoteProtocolError"),
        ("longer", Cause.WRONG_LENGTH, "7 results for 2 items"),
        ("nothing", Cause.WRONG_TYPE, "no list of results"),
        ("strings", Cause.WRONG_TYPE, "'high' for 'words', which is not a number"),
        ("slow", Cause.TIMEOUT, "gave no answer in 0.3 s"),
        ("hangs_up", Cause.RAISED, "Error"),
        ("bomb", Cause.WRONG_TYPE, "answered 200 encoded as 'gzip', which was not asked for"),
        ("refusing_bomb", Cause.WRONG_TYPE, "answered 400 encoded as 'br', which was not asked for"),
        ("flood", Cause.WRONG_TYPE, "answered with more than 4194304 bytes"),
        ("error_flood", Cause.RAISED, "answered 400: xxxx"),
        ("drip", Cause.TIMEOUT, "gave no answer in 0.3 s"),
        ("deep", Cause.WRONG_TYPE, "answered no JSON but application/json: '[[[["),
        ("digits", Cause.WRONG_TYPE, "answered no JSON but application/json: '1111"),
    ],
)
def test_a_fault_is_named_and_loses_its_values(failing, mode, cause, words):
    lost = ask(quick(failing(mode), seconds=0.3 if mode in ("slow", "drip") else 5), row(text("a"), text("b")))
    assert len(lost) == 2 and all(
        isinstance(one, Missing) and one.cause is cause and words in one.message for one in lost
    )


def test_a_server_that_is_down():
    (lost,) = ask(quick(f"http://127.0.0.1:{free_port()}", retries=2), row(text("a")))
    assert lost.cause is Cause.RAISED and "ConnectError" in lost.message and "(3 attempts)" in lost.message


def test_what_passes_is_tried_again(failing):
    for mode in ("error", "half", "hangs_up", "busy"):
        assert ask(quick(failing(mode, fails=2), retries=2), row(text("a"))) == [0.5]
    url = failing("refusal", fails=1)
    assert isinstance(ask(quick(url, retries=3), row(text("a")))[0], Missing)
    assert len(failing.bodies) == 1  # what will not pass is not tried again


def test_a_failed_batch_loses_its_own_items_only(failing):
    values = ask(quick(failing("error", fails=1), batch=2, parallel=1), row(*[text(t) for t in "abcde"]))
    assert [isinstance(v, Missing) for v in values] == [True, True, False, False, False] and values[2:] == [0.5] * 3


def test_a_server_killed_in_the_middle_of_a_run(tmp_path):
    process, url = start(tmp_path)
    reward, views = quick(url, "slow", batch=1, parallel=2), row(*[text(t) for t in "abcdef"])
    threading.Timer(0.8, process.kill).start()
    values = ask(reward, views)
    process.wait()
    assert len(values) == 6 and isinstance(values[-1], Missing) and "Error" in values[-1].message
    assert isinstance(ask(reward, views[:1])[0], Missing)  # the next step goes on without it


@each(
    ("options", "message"),
    [
        ({"url": "host:8000"}, "url='host:8000'; it must start with http"),
        ({"batch": 0}, "batch=0"),
        ({"seconds": 0}, "seconds=0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        remote(**{"url": "http://host", "scorer": "x", **options})


def test_a_row_that_cannot_be_sent_is_lost_alone(failing):
    reward = quick(failing("good"), columns=("board",))
    values = ask(reward, [row(text("a"), board=b)[0] for b in (1, object(), "x")] + [*row(text("a"))])
    (body,) = failing.bodies
    assert [item["metadata"]["board"] for item in json.loads(body)["requests"]] == [1, "x"]
    assert values[0] == values[2] == 0.5 and "column 'board' cannot be sent as JSON" in values[1].message
    assert "this row has no column 'board'; it has: " in values[3].message


# --- pickles ----------------------------------------------------------------------------------------------------------


def test_pickles_are_sent_and_not_loaded_unless_told(failing):
    views = row(picture(0), picture(9), meta={"tag": 1})
    url = failing("old")
    lost = ask(pickled(url, retries=0), [*views])
    assert all(one.cause is Cause.WRONG_TYPE and "trust_pickle=True allows it" in one.message for one in lost)
    sent = pickle.loads(failing.bodies[0])
    assert sent["prompts"] == ["q", "q"] and sent["images"][0][:2] == b"\xff\xd8"
    assert ask(pickled(url, trust_pickle=True), [*views]) == [0.25, 0.25]
    ask(pickled(url, column="meta", extra={"only_strict": True}), [*views])
    sent = pickle.loads(failing.bodies[-1])
    assert sent["meta_datas"] == [{"tag": 1}] * 2 and sent["only_strict"] and "prompts" not in sent
    assert ask(pickled(failing("old_json")), [*views]) == [0.25, 0.25]


def test_a_row_that_cannot_be_pickled_is_lost_alone(failing):
    views = [*row(picture(0), meta=1), *row(picture(0), meta=threading.Lock()), *row(picture(9), meta=2)]
    first, lost, last = ask(pickled(failing("old"), trust_pickle=True, column="meta"), views)
    assert first == last == 0.25 and "column 'meta' cannot be sent as a pickle: cannot pickle" in lost.message


def test_a_pickle_that_runs_code_is_not_run_even_when_told(failing):
    RAN.clear()
    url = failing("evil")
    for trust in (False, True):
        (lost,) = ask(pickled(url, trust_pickle=trust, retries=0), [row(picture(0))[0]])
        assert isinstance(lost, Missing) and lost.cause is Cause.WRONG_TYPE
    assert "it holds a" in lost.message and not RAN
    missing = ask(pickled(failing("old"), key="rewards", trust_pickle=True), [row(picture(0))[0]])
    assert "without a list 'rewards'" in missing[0].message
    one, lost = ask(pickled(failing("old_json"), column="meta"), [*row(picture(0), meta=1), *row(picture(0))])
    assert one == 0.25 and "this row has no column 'meta'" in lost.message
