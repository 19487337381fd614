"""From pictures to what a tokenizer takes; masks and boxes go the same way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw
from torchvision import transforms

from tests.tables import each
from unidiff.images.preprocess import Preprocess

CROP, SQUASH = Preprocess("crop", 64), Preprocess("squash", 64)
MULTIPLE, BUCKETS = Preprocess("multiple", resample="lanczos"), Preprocess("buckets", 128, 32)
SIZES = [(100, 70), (70, 101), (64, 64), (33, 90), (515, 700)]


@pytest.fixture
def board(task) -> Image.Image:
    return task.example("train", 0).prompt[1]


@pytest.mark.parametrize("size", SIZES)
def test_crop_and_squash_are_torchvision_s(board, size):
    image, bicubic = board.resize(size), transforms.InterpolationMode.BICUBIC
    crop = transforms.Compose([transforms.Resize(64, bicubic), transforms.CenterCrop((64, 64))])
    assert CROP.image(image).tobytes() == crop(image).tobytes()
    assert SQUASH.image(image).tobytes() == transforms.Resize((64, 64), bicubic)(image).tobytes()


def test_multiple_is_diffusers_rule(board):
    from diffusers.image_processor import VaeImageProcessor

    image = board.resize((101, 70))
    theirs = VaeImageProcessor(vae_scale_factor=16, do_normalize=False).preprocess(image)[0]
    ours = np.asarray(MULTIPLE.image(image))
    assert ours.shape == (64, 96, 3)
    np.testing.assert_allclose(ours / 255, theirs.permute(1, 2, 0).numpy(), atol=1e-6)


@pytest.mark.parametrize(("size", "count", "tokens"), [(512, 49, (896, 1024)), (1024, 97, (3808, 4096))])
def test_buckets_are_the_published_list(size, count, tokens):
    buckets = Preprocess("buckets", size, 32).buckets()
    cells = [w * h // 256 for w, h in buckets]
    assert (len(set(buckets)), min(cells), max(cells)) == (count, *tokens)
    assert {(h, w) for w, h in buckets} == set(buckets) and (size, size) in buckets
    assert all(w % 32 == h % 32 == 0 and max(w, h) <= 4 * min(w, h) for w, h in buckets)


def test_buckets_keep_the_shape(board):
    for size in SIZES:
        image = BUCKETS.image(board.resize(size))
        assert image.size in BUCKETS.buckets()
        ratio = size[0] / size[1] / (image.size[0] / image.size[1])
        assert 0.8 < ratio < 1.25
    assert BUCKETS.image(board.resize((1000, 1000))).size == (128, 128)
    assert BUCKETS.image(board.resize((900, 100))).size == (256, 64)


def test_very_large_pictures_are_averaged_first(board):
    """Twice halved by averaging, and then nothing is left to resize."""
    image = board.resize((512, 512))
    halved = image.resize((256, 256), Image.Resampling.BOX).resize((128, 128), Image.Resampling.BOX)
    assert BUCKETS.image(image).tobytes() == halved.tobytes()


@each(("rule", "size"), itertools.product([CROP, SQUASH, MULTIPLE, BUCKETS], SIZES))
def test_masks_and_boxes_go_the_way_of_the_picture(rule, size):
    width, height = size
    top, left, bottom, right = height // 3, width // 3, height // 3 + height // 4, width // 3 + width // 5
    image, mask = Image.new("RGB", size), Image.new("L", size)
    for canvas in (image, mask):
        ImageDraw.Draw(canvas).rectangle((left, top, right - 1, bottom - 1), fill="white")
    bright = np.asarray(rule.image(image).convert("L")) > 127
    marked = np.asarray(rule.mask(mask))
    box = rule.box((top, left, bottom, right), width, height)
    boxed = np.zeros_like(marked)
    boxed[box[0] : box[2], box[1] : box[3]] = True
    assert marked.shape == bright.shape == rule.image(image).size[::-1]
    assert bright.any() and (bright != marked).sum() <= 2 * sum(bright.shape)  # they part at the edges only
    ys, xs = np.nonzero(marked)
    assert abs(box[0] - ys.min()) <= 1 and abs(box[2] - 1 - ys.max()) <= 1
    assert abs(box[1] - xs.min()) <= 1 and abs(box[3] - 1 - xs.max()) <= 1
    assert not (marked & ~boxed).any()


def test_a_box_that_is_cropped_away():
    assert CROP.box((0, 0, 10, 60), 200, 100) == (0, 0, 7, 7)
    with pytest.raises(ValueError, match="the prepared picture shows nothing of it"):
        CROP.box((0, 0, 10, 40), 200, 100)
    with pytest.raises(ValueError, match="needs 0 <= top < bottom <= 100 and 0 <= left < right <= 200"):
        CROP.box((0, 0, 10, 201), 200, 100)


def test_bad_pictures():
    with pytest.raises(ValueError, match="mask: expected mode 1 or L, got RGB"):
        CROP.mask(Image.new("RGB", (64, 64)))
    with pytest.raises(ValueError, match="an image of 64 x 15 pixels is smaller than 16; enlarge it"):
        MULTIPLE.image(Image.new("RGB", (64, 15)))


def test_bad_rules():
    with pytest.raises(ValueError, match=r"Preprocess\.rule is 'pad'; choose one of crop, squash"):
        Preprocess("pad", 64)
    with pytest.raises(ValueError, match=r"Preprocess\.resample is 'nearest'; choose one of bicubic, lanczos"):
        Preprocess("crop", 64, resample="nearest")
    for size in (0, 100):
        with pytest.raises(ValueError, match=f"size {size} must be a positive multiple of 32"):
            Preprocess("buckets", size, 32)
