"""The reference reward server under odd input, full memory and scorers that hang."""

import ast
import asyncio
import base64
import io
import json
import signal
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
from PIL import Image

from tests.tables import each

pytest.importorskip("fastapi")

TOOL = str(Path(__file__).resolve().parents[2] / "tools" / "reward_server.py")
SCORERS = """
import re, time

def words(segments, **columns):
    return [len(s.text.split()) for s in segments]

def corner(segments):
    return [{"red": s.image.getpixel((0, 0))[0], "width": s.image.width} for s in segments]

def hangs(segments):
    time.sleep(600)

def keeps_the_interpreter(segments):
    re.match("(a+)+$", "a" * 60 + "b")
"""


def start(folder, *options):
    """The server as a process: (process, url)."""
    (folder / "mine.py").write_text(SCORERS)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    names = ",".join(f"mine:{name}" for name in ("words", "corner", "hangs", "keeps_the_interpreter"))
    command = [sys.executable, TOOL, "--scorers", names, "--port", str(port), *options]
    process = subprocess.Popen(command, cwd=folder)  # the module is found in the folder where it is started
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
    process, url = start(tmp_path_factory.mktemp("scorers"), "--seconds", "1")
    yield url
    process.kill()
    process.wait()


def post(url, body):
    """(status, JSON) of a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url + "/score", body), timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def item(reward="words", **parts):
    return {"history": [{"text": "a b"}], "required_rewards": [reward], **parts}


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return base64.b64encode(buffer.getvalue()).decode()


BODIES = {
    "not a number": (b'{"requests": [], "x": NaN}', "NaN is not a number in JSON"),
    "infinity": (b'{"requests": [{"metadata": {"x": -Infinity}}]}', "-Infinity is not a number in JSON"),
    "a number out of range": (b'{"requests": [1e999]}', "1e999 is not a number in JSON"),
    "a number of ten thousand digits": (b'{"requests": [' + b"1" * 10_000 + b"]}", "10000 digits"),
    "deep": (b"[" * 90_000, "nested too deeply"),
    "deep objects": (b'{"a":' * 90_000, "nested too deeply"),
    "a key twice": (b'{"requests": [], "requests": [{}]}', "a key twice: requests, requests"),
    "a key twice inside": (b'{"requests": [{"metadata": {"x": 1, "x": 2}}]}', "a key twice: x, x"),
    "not UTF-8": (b'{"requests": ["\xff\xfe"]}', "codec can't decode"),
    "nothing": (b"", "Expecting value"),
    "no list": (b'{"requests": {"0": {}}}', "no list of requests"),
    "a number": (b"7", "no list of requests"),
    "two million lists": (b'{"requests": [' + b"[]," * 2_000_000 + b"1]}", "more than 2000000 commas and brackets"),
}


@each("name", BODIES)
def test_an_odd_body_is_refused_by_name(server, name):
    body, words = BODIES[name]
    status, answer = post(server, body)
    assert status == 400 and words in answer["detail"] and len(answer["detail"]) <= 300


def test_an_odd_item_costs_its_own_values(server):
    png = base64.b64decode(file_of(Image.effect_noise((64, 64), 50)))
    odd = [
        (item(required_rewards=[["words"]]), "which are names"),
        (item(required_rewards=[{}]), "which are names"),
        (item(required_rewards="words"), "which are names"),
        (item(required_rewards=[f"r{i}" for i in range(1000)]), "asks for 1000 rewards"),
        (item(history=["a b"]), "must be an object with the role"),
        (item(history=[{"role": ["prompt"], "text": "a"}]), "the role 'prompt' or 'response'"),
        (item(history=[{"text": "a", "image_b64": "AAAA"}]), "and only one"),
        (item(history=[{"text": 5}]), "needs a text or an image_b64"),
        (item(history={"text": "a"}), "at least one part"),
        (item(metadata=[]), "metadata must be an object"),
        (item(metadata="x"), "metadata must be an object"),
        ([item()], "which are names"),
        (item("\ud800"), {"\ud800": "not served here; there are: words, corner, hangs, keeps_the_interpreter"}),
    ]
    broken = ["not base 64", "AAAA", *(base64.b64encode(one).decode() for one in (png[:-900], png[:90] + png[130:]))]
    others = [file_of(Image.new("RGB", (4, 4)), kind) for kind in ("GIF", "BMP", "TIFF", "PPM", "ICO", "PDF")]
    for picture in broken + others:
        odd.append((item("corner", history=[{"image_b64": picture}]), "a picture cannot be read (PNG, JPEG, WEBP)"))
    good = [item(), item(required_rewards=["words"] * 100_000), item(metadata={"segments": 1, "": None, "a b": 2})]
    status, answer = post(server, json.dumps({"requests": [good[0], *(one for one, _ in odd), *good[1:]]}).encode())
    assert status == 200 and answer["results"][0] == answer["results"][-2] == {"words": 2.0}
    assert answer["errors"][0] is answer["errors"][-2] is None
    assert "multiple values for argument 'segments'" in answer["errors"][-1]["words"]
    for (_, words), error, result in zip(odd, answer["errors"][1:], answer["results"][1:]):
        assert (error == words if isinstance(words, dict) else words in error) and result == {}


def test_pictures_are_read_as_a_viewer_shows_them(server):
    wide = Image.fromarray(np.full((4, 6), 0x8080, np.uint16))
    clear = Image.new("RGBA", (6, 4), (10, 0, 0, 0))
    turned = Image.Exif()
    turned[0x0112] = 6
    red = Image.new("RGB", (6, 4), (200, 0, 0))
    files = [
        file_of(wide),
        file_of(clear),
        file_of(red, "JPEG", exif=turned, quality=100),
        file_of(red, "WEBP", lossless=True),
    ]
    requests = [item("corner", history=[{"image_b64": file}]) for file in files]
    status, answer = post(server, json.dumps({"requests": requests}).encode())
    got = [(result["corner"]["red"], result["corner"]["width"]) for result in answer["results"]]
    assert status == 200 and got == [(128, 6), (255, 6), (pytest.approx(200, abs=2), 4), (200, 6)]


@pytest.mark.parametrize("scorer", ["hangs", "keeps_the_interpreter"])
def test_a_scorer_that_hangs_costs_its_own_values_and_does_not_keep_the_process(tmp_path, scorer):
    process, url = start(tmp_path, "--seconds", "0.5")
    try:
        body, answers = json.dumps({"requests": [item(scorer), item()]}).encode(), []

        def ask():
            with suppress(OSError):  # when the process ends
                answers.append(post(url, body))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        if scorer == "hangs":
            asking.join(20)
            assert answers[0][1]["errors"] == [{"hangs": "took longer than 0.5 s"}, None]
            assert answers[0][1]["results"] == [{"hangs": None}, {"words": 2.0}]
        else:
            time.sleep(1.0)
        process.terminate()
        assert process.wait(5) == -signal.SIGTERM
    finally:
        process.kill()


def ask(module, limits, messages, seconds=0.0):
    """What an application behind the body's limits answers to these messages: status, and the body that it got."""
    got, sent = [], []

    async def app(scope, receive, send):
        got.append((await receive())["body"])
        await module.Reply({})(scope, receive, send)

    async def receive():
        if not messages:
            await asyncio.sleep(60)
        await asyncio.sleep(seconds)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    limited = module.BodyLimit(app, **limits)
    asyncio.run(limited({"type": "http", "method": "POST", "headers": []}, receive, send))
    return sent[0]["status"], *got


def part(size, more=True):
    return {"type": "http.request", "body": b"x" * size, "more_body": more}


def test_bodies_have_a_deadline_and_a_common_limit(program):
    module = program("tools/reward_server.py")
    memory = module.Memory(100)
    limits = {"most": 80, "seconds": 0.2, "memory": memory}
    assert ask(module, limits, [part(30), part(30, False)]) == (200, b"x" * 60)
    assert ask(module, limits, [part(1)]) == (408,)
    assert ask(module, limits, [part(1) for _ in range(50)], seconds=0.02) == (408,)  # it drips
    assert ask(module, limits, [part(70), part(20)]) == (413,)
    memory.take(50)  # another request's
    assert ask(module, limits, [part(30), part(30, False)]) == (503,)
    assert memory.left == 50


def test_pictures_count_for_the_memory_of_all_requests(program):
    module = program("tools/reward_server.py")
    served = {"corner": module.Scorer("corner", lambda segments: [1] * len(segments), 4, 0.0, 64)}
    allowance = module.Allowance(module.Memory(100))
    requests = [item("corner", history=[{"image_b64": file_of(Image.new("RGB", (5, 5)))}])]
    module.enlist(served, requests, allowance)
    assert allowance.held == 75
    with pytest.raises(module.queue.Full):
        module.enlist(served, requests, allowance)


@each(
    ("name", "message"),
    [
        ("nowhere.py:f", "error: 'nowhere.py:f': FileNotFoundError: [Errno 2] No such file or directory"),
        ("nowhere.rewards:f", "error: 'nowhere.rewards:f': ModuleNotFoundError: No module named 'nowhere'"),
        ("broken.py:f", "broken.py, line 1: "),
        ("broken:f", "broken.py, line 1: "),
        ("json:f", "error: 'json:f': AttributeError: module 'json' has no attribute 'f'"),
        ("json", "error: 'json' names no function; write package.module:function or file.py:function"),
        ("json:__name__", "error: 'json:__name__' is 'json'; a scorer is a function"),
        ("raises.py:f", "error: 'raises.py:f': RuntimeError: in two lines"),
        ("raises:f", "error: 'raises:f': RuntimeError: in two lines"),
        ("lacks.py:f", "error: 'lacks.py:f': ImportError: cannot import name 'nothing' from 'os'"),
        ("leaves.py:f", "error: 'leaves.py:f': SystemExit: bye"),
        ("folder.py:f", "error: 'folder.py:f': IsADirectoryError: [Errno 21] Is a directory"),
        ("json:dumps, x=json:loads,y.json:dumps", "No module named 'y'"),
        ("json:dumps,json:dumps", "error: two scorers are named 'dumps'; write another_name=json:dumps"),
        ("json:dumps,", "error: '' names no function"),
    ],
)
def test_a_scorer_that_is_not_there_is_one_line(program, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('in\\ntwo lines')\n")
    (tmp_path / "lacks.py").write_text("from os import nothing\n")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit('bye')\n")
    (tmp_path / "folder.py").mkdir(exist_ok=True)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as told:
        program("tools/reward_server.py").found(name)
    assert message in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "words", ["--batch 0", "--items -1", "--seconds nan", "--memory 0", "--wait -1", "--port 70000"]
)
def test_limits_are_checked(program, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "argv", ["reward_server.py", "--scorers", "json:dumps", *words.split()])
    with pytest.raises(SystemExit):
        program("tools/reward_server.py").main()
    assert capsys.readouterr().err.splitlines()[-1].count(words.split()[0])


def test_it_stands_alone():
    """It is copied into environments that have no unidiff."""
    nodes = ast.walk(ast.parse(Path(TOOL).read_text()))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.split(".")[0] for one in imports for name in [getattr(one, "module", None) or one.names[0].name]}
    assert names - sys.stdlib_module_names == {"fastapi", "PIL", "uvicorn"}
