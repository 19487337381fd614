"""Judges, against a small chat server on loopback that says what it is told to."""

import asyncio
import base64
import http.server
import io
import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from unidiff import backoff
from unidiff.rewards.reward import Cause, Missing
from unidiff.rewards.segment_view import SegmentView, SequenceView, link_row
from unidiff.scorers.judge import judge, read_score
from unidiff.sequence import Modality


def test_scores_are_read_or_missing():
    said = {
        "Good.\nScore: 7": 7,
        "**Score:** 3.5 of 10": 3.5,
        "score = 2, no: final score is 4": 4,
        '{"score": 9}': 9,
        "Score: 11": None,
        "Score: -1": None,
        "I would give it a seven": None,
        "underscore: 5": None,
        "": None,
        "Score: high": None,
        "Score：７": 7,
        "Score: 8/10": 8,
        "Score: 8 out of 10.": 8,
        "Score: 4/5": None,
        "Score: −1": None,
        "Score: 3-5": None,
        "Score: 3–5": None,
        "Score: 5 %": None,
        "Score: 7,5": None,
        "Score: 3. No, score: 7,5": None,
    }
    assert {text: read_score(text, 0, 10) for text in said} == said


class Chat(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        said = self.server.says(body)
        if not isinstance(said, dict):
            said = {"choices": [{"message": {"role": "assistant", "content": said}}]}
        data = json.dumps(said).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def chat():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Chat)
    server.seen, server.url = [], f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def row(*words):
    pixels = np.zeros((4, 6, 3), np.uint8)
    views = [SegmentView(modality=Modality.TEXT, tokens=torch.arange(2), text=w) for w in words]
    views.append(SegmentView(modality=Modality.IMAGE, tokens=torch.arange(6), pixels=pixels))
    return link_row(views, prompt=["draw a cat", Image.new("RGB", (3, 2), "red")])


def test_a_view_that_cannot_be_sent_loses_its_own_score(chat):
    chat.says = lambda body: "Score: 5"
    made, odd = judge(chat.url, "m", "r"), link_row([row("a")[0]], prompt=[Unsendable()])
    lost, sound = ask(made, [odd[0], row("a")[0]])
    assert sound == 0.5 and isinstance(lost, Missing) and lost.cause is Cause.RAISED
    assert "a picture is a file's path, its bytes or a PIL image, not Unsendable" in lost.message


class Unsendable:
    pass


def ask(reward, views):
    return asyncio.run(reward(list(views)))


def test_a_judge_sees_texts_and_pictures_in_order(chat, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "k-1")
    chat.says = lambda body: "It is a cat.\nScore: 4"
    reward = judge(
        chat.url, "vlm", "Is it a cat?", scale=(1, 5), api_key_env="JUDGE_KEY", extra={"seed": 3}, on="sequence",
        credit="image", weight=0.5,
    )  # fmt: skip
    assert (reward.name, reward.credit, reward.asynchronous) == ("judge", ("image",), True)
    assert ask(reward, [SequenceView(row("I think")), SequenceView(row("so"))]) == [0.75, 0.75]
    path, headers, body = chat.seen[0]
    assert path == "/v1/chat/completions" and headers["authorization"] == "Bearer k-1"
    assert (body["model"], body["temperature"], body["seed"]) == ("vlm", 0, 3)
    system, user = body["messages"]
    assert system["content"].startswith("Is it a cat?") and "from 1 to 5" in system["content"]
    kinds = [part["type"] for part in user["content"]]
    assert kinds == ["text", "text", "image_url", "text", "text", "image_url", "text"]
    url = user["content"][2]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert picture.size == (3, 2) and picture.getpixel((0, 0)) == (255, 0, 0)


def test_nonsense_is_missing_and_the_others_stay(chat):
    answers = {
        "a": "Score: 5",
        "b": "no idea",
        "c": {"error": "too long"},
        "d": None,
        "e": "Score: 99",
        "f": "Score: 10",
    }
    chat.says = lambda body: answers[body["messages"][1]["content"][-2]["text"]]
    views = [row(word)[0] for word in answers]
    said = ask(judge(chat.url, "vlm", "rubric"), views)
    assert [value for value in said if not isinstance(value, Missing)] == [0.5, 1.0]
    assert {value.cause for value in said if isinstance(value, Missing)} == {Cause.WRONG_TYPE}
    assert "'no idea'" in said[1].message and "no chat completion" in said[2].message


def test_a_judge_that_is_down_is_missing(chat, monkeypatch):
    monkeypatch.setattr(backoff, "FIRST_SECONDS", 0.01)
    (lost,) = ask(judge("http://127.0.0.1:9/v1", "vlm", "rubric", retries=1), [row("a")[0]])
    assert lost.cause is Cause.RAISED and "(2 attempts)" in lost.message


@pytest.mark.parametrize(
    ("options", "message"),
    [({"scale": (5, 5)}, r"scale=\(5, 5\)"), ({"api_key_env": "NO_SUCH_KEY"}, "no such environment variable")],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        judge("http://host/v1", "vlm", "rubric", **options)
