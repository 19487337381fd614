"""Image rewards, on pictures of FrozenLake and on small ones made by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tables import each
from unidiff.rewards.names import resolve
from unidiff.rewards.reward import Cause, Missing
from unidiff.rewards.segment_view import SegmentView, link_row
from unidiff.scorers.pictures import (
    cell_agreement,
    edit_locality,
    enlarged,
    pixel_agreement,
    psnr_agreement,
    ssim,
    ssim_agreement,
    token_agreement,
)
from unidiff.sequence import Modality


@pytest.fixture(scope="module")
def board(task):
    return np.asarray(task.example("test", 0).prompt[1].convert("RGB"))


def picture(pixels, **fields):
    return SegmentView(modality=Modality.IMAGE, tokens=torch.arange(4), pixels=pixels, **fields)


def values(reward, *pictures, prompt=(), **columns):
    return reward(list(link_row([picture(p) for p in pictures], prompt=prompt, columns=columns)))


def with_square(pixels, colour=(255, 0, 0), size=16):
    changed = pixels.copy()
    changed[:size, :size] = colour
    return changed


def test_agreement_with_a_target(board):
    other, target = with_square(board), Image.fromarray(board)
    area = 16 * 16 / board[..., 0].size
    share, whole = values(pixel_agreement(), other, board, target=target)
    assert 1 - area <= share < 1 - area / 2 and whole == 1.0
    assert values(pixel_agreement(tolerance=255), other, target=board) == [1.0]
    cells = values(cell_agreement(4, 4), other, board, target=board)
    assert cells == [15 / 16, 1.0]
    for kind in (psnr_agreement(), ssim_agreement()):
        far, near, same = values(kind, 255 - board, other, board, target=board)
        assert far < near < same == 1.0


def test_psnr_is_that_of_its_formula():
    black, gray = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert values(psnr_agreement(), gray, target=black) == [pytest.approx(20 * np.log10(5) / 50)]


def test_ssim_is_that_of_scikit_image(board):
    """Constants from scikit-image's structural_similarity (gaussian_weights=True, sigma=1.5,
    use_sample_covariance=False, channel_axis=2, data_range=255) on these pictures."""
    rng = np.random.default_rng(0)
    first, second = (rng.integers(0, 256, (24, 20, 3), dtype=np.uint8) for _ in range(2))
    mixed = (first // 2 + second // 2).astype(np.uint8)
    assert ssim(first, second) == pytest.approx(0.015066483, abs=1e-6)
    assert ssim(first, mixed) == pytest.approx(0.663679951, abs=1e-6)
    assert -1 <= ssim(np.zeros((3, 5, 3), np.uint8), np.full((3, 5, 3), 255, np.uint8)) < 0.01


def test_a_target_for_each_round(board):
    other = with_square(board)
    said = values(pixel_agreement(), board, other, board, target=[Image.fromarray(board), other])
    assert said == [1.0, 1.0, None] and values(pixel_agreement(), board, target=None) == [None]


def test_tokens():
    assert values(token_agreement(), np.zeros((2, 2, 3), np.uint8), target_tokens=[0, 1, 9, 3]) == [0.75]
    two = [np.zeros((2, 2, 3), np.uint8)] * 2
    assert values(token_agreement(), *two, target_tokens=[torch.arange(4), None]) == [1.0, None]
    (lost,) = values(token_agreement(), two[0], target_tokens=[0, 1])
    assert "4 tokens has a target of shape [2]" in lost.message


def test_locality_by_a_column(board):
    wanted = np.zeros((4, 4), bool)
    wanted[0, 0] = True
    inside, outside, both = with_square(board), board.copy(), with_square(board)
    outside[-16:, -16:] = both[-16:, -16:] = (255, 0, 0)
    before = Image.fromarray(board)

    def locality(after):
        return values(edit_locality("wanted"), after, prompt=[before], wanted=wanted)[0]

    assert locality(inside) == 1.0 and locality(board) == 0.0 and locality(outside) == 0.0
    assert 0.9 < locality(both) < 1.0
    assert values(edit_locality("wanted"), inside, wanted=wanted) == [None]  # nothing before it
    assert values(edit_locality("wanted"), inside, prompt=[before], wanted=None) == [None]


def test_locality_by_the_edited_tokens(board):
    edited = np.zeros((8, 8), bool)
    edited[:2, :2] = True
    views = link_row([picture(board), picture(with_square(board), edited=edited), picture(board)])
    assert edit_locality()(list(views)) == [None, 1.0, None]


def test_enlarged():
    assert enlarged(np.array([[True, False]]), 2, 4).tolist() == [[True, True, False, False]] * 2


@each(
    ("reward", "target", "message"),
    [
        (pixel_agreement(), np.zeros((8, 16, 3), np.uint8), "picture and target differ in size: "),
        (psnr_agreement(), np.zeros((64, 64, 3)), "a picture is uint8 [H, W, 3], not float64 [64, 64, 3]"),
        (ssim_agreement(), "lake.png", "a picture is a PIL image or uint8 [H, W, 3], not a str"),
        (cell_agreement(5, 4), np.zeros((64, 64, 3), np.uint8), "5 × 4 cells do not divide"),
        (edit_locality("target"), np.ones((2, 2), bool), "follows one of shape (3, 3, 3)"),
        (edit_locality("target"), np.ones((64, 64, 3), bool), "a mask is bool [h, w], not bool [64, 64, 3]"),
        (token_agreement("target"), {"a": 1}, "could not infer dtype of dict"),
        (token_agreement("target"), [0, -1, 2, 3], "tokens must be ids: whole numbers from 0 up"),
        (token_agreement("target"), [True, False, True, True], "tokens must be ids: whole numbers from 0 up"),
        (token_agreement("target"), [0.0, 1.0, 2.0, 3.0], "tokens must be ids: whole numbers from 0 up"),
        (token_agreement("target"), [[0, 1, 2]], "a picture of 4 tokens has a target of shape [3]"),
    ],
)
def test_an_odd_target_loses_its_own_row_and_says_why(board, reward, target, message):
    small = "follows" in message
    sound = np.ones((1, 1), bool) if "locality" in reward.name else board
    sound = torch.arange(4) if "token" in reward.name else sound
    before = [Image.new("RGB", (3, 3))] if small else [Image.fromarray(board)]
    odd = link_row([picture(board)], prompt=before, columns={"target": target})
    other = link_row([picture(board)], prompt=[Image.fromarray(board)], columns={"target": sound})
    good = type(reward)(reward.function, reward.name, "image")
    lost, value = good([*odd, *other])
    assert isinstance(lost, Missing) and lost.cause is Cause.RAISED and message.lower() in lost.message.lower()
    assert f"; the column 'target' holds {repr(target)[:20]}" in lost.message
    assert isinstance(value, float) or reward.name == "cell_agreement"


def test_short_names():
    assert resolve("edit_locality").on == "image"
