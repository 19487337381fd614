"""What a row becomes in a request to a remote scorer: columns as plain data, pictures as a viewer shows them."""

import base64
import datetime
import io

import numpy as np
import torch
from PIL import Image

from tests.tables import each
from unidiff.rewards.reward import Cause
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.scorers.remote import request_of
from unidiff.sequence import Modality


def row(prompt="q", **columns):
    view = SegmentView(modality=Modality.TEXT, tokens=torch.arange(2), text="a")
    return link_row([view], prompt=[prompt], columns=columns)[0]


@each(
    ("value", "sent"),
    [
        (np.float32(0.5), 0.5),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        ({"deep": [np.bool_(True), torch.tensor([1.5])]}, {"deep": [True, [1.5]]}),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (np.datetime64("2024-02-29T12:30"), "2024-02-29T12:30"),
        (np.array(["2024-02-29"], "datetime64[ns]"), ["2024-02-29T00:00:00.000000000"]),
    ],
)
def test_a_column_is_sent_as_plain_data(value, sent):
    assert request_of(row(board=value), "words", ["board"], {})["metadata"] == {"board": sent}


@each(
    ("value", "why"),
    [
        (object(), "JSON cannot hold a object"),
        (float("nan"), "not JSON compliant"),
        (np.array([1.0, np.inf]), "not JSON compliant"),
        (np.datetime64("NaT"), "JSON cannot hold a datetime64"),
        (np.timedelta64(1, "ns"), "JSON cannot hold a timedelta64"),
        ({1, 2}, "JSON cannot hold a set"),
        (1j, "JSON cannot hold a complex"),
    ],
)
def test_a_column_that_json_cannot_hold_is_named(value, why):
    lost = request_of(row(board=value), "words", ["board"], {})
    assert lost.cause is Cause.WRONG_TYPE and why in lost.message
    assert lost.message.startswith("column 'board' cannot be sent as JSON: ")


def turned():
    image = Image.new("RGB", (6, 4), "white")
    image.getexif()[0x0112] = 6
    return image


@each(
    ("image", "size", "red"),
    [
        (Image.fromarray(np.full((4, 6), 0x8080, np.uint16)), (6, 4), 128),
        (Image.fromarray(np.full((4, 6), 0.5, np.float32)), (6, 4), 128),
        (turned(), (4, 6), 255),
        (Image.new("RGBA", (6, 4), (9, 9, 9, 0)), (6, 4), 255),
    ],
)
def test_a_picture_is_sent_as_a_viewer_shows_it(image, size, red):
    sent = request_of(row(image), "words", [], {})["history"][0]["image_b64"]
    picture = Image.open(io.BytesIO(base64.b64decode(sent)))
    assert (picture.mode, picture.size, picture.getpixel((0, 0))[0]) == ("RGB", size, red)


def test_a_picture_that_rgb_cannot_hold_is_said():
    lost = request_of(row(Image.fromarray(np.full((4, 6), -7.5, np.float32))), "words", [], {})
    assert lost.cause is Cause.WRONG_TYPE and "a picture of the prompt cannot be sent: " in lost.message
