"""Edit selectors: which tokens of a copied image are chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.tables import each
from unidiff import noise
from unidiff.images import grid
from unidiff.sampling import edit

CPU = torch.device("cpu")


def keys(n: int, seed: int = 0) -> torch.Tensor:
    return torch.tensor([noise.key(seed, i) for i in range(n)])


def test_region_asks_for_each_text() -> None:
    asked = []

    def locate(text: str, grid: tuple[int, int]) -> np.ndarray | torch.Tensor | None:
        asked.append((text, grid))
        found = {"all": np.ones(grid, int), "top": torch.tensor([[1, 1, 1], [0, 0, 0]])}
        return found.get(text)

    mask = edit.region(["all", "top", "nothing"], (2, 3), [locate] * 3, CPU)
    assert mask.dtype == torch.bool and mask.tolist() == [[True] * 6, [True] * 3 + [False] * 3, [False] * 6]
    assert asked == [("all", (2, 3)), ("top", (2, 3)), ("nothing", (2, 3))]


def test_a_region_of_another_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the region of 'x' is \(3, 2\), the image's grid \(2, 3\)"):
        edit.region(["x"], (2, 3), [lambda *_: np.ones((3, 2))], CPU)


def test_box_is_half_open() -> None:
    locate = edit.box(1, 0, 3, 2)
    expected = [[False] * 3, [True, True, False], [True, True, False], [False] * 3]
    assert np.asarray(locate("whatever", (4, 3))).tolist() == expected
    with pytest.raises(ValueError, match=r"box \(1, 0, 3, 2\) does not fit a grid of \(2, 2\)"):
        locate("", (2, 2))


def test_given_tokens_whatever_the_text_says() -> None:
    mask = grid.from_box((4, 0, 8, 5), (8, 12), 4)  # pixels
    found = edit.region(["a", ""], (2, 3), [edit.given(mask)] * 2, CPU)
    assert found.tolist() == [[False] * 3 + [True, True, False]] * 2
    with pytest.raises(ValueError, match=r"is \(2, 3\), the image's grid \(3, 3\)"):
        edit.region(["a"], (3, 3), [edit.given(mask)], CPU)


@each("sides", [(1, 0, 1, 2), (0, 2, 3, 2), (-1, 0, 1, 1), (0, -1, 1, 1), (3, 0, 1, 1)])
def test_empty_boxes_are_refused(sides: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"needs 0 <= top < bottom and 0 <= left < right"):
        edit.box(*sides)


@each(("share", "n", "count"), [(0.125, 64, 8), (0.5, 5, 2), (0.01, 64, 1), (1.0, 7, 7), (0.3, 10, 3)])
def test_lowest_takes_its_share(share: float, n: int, count: int) -> None:
    score = noise.uniform(keys(20), (0,), n)
    mask = edit.lowest(score, share)
    assert (mask.sum(1) == count).all()
    for row in range(20):
        chosen, left = score[row, mask[row]], score[row, ~mask[row]]
        assert not len(left) or chosen.max() < left.min()
        assert torch.equal(mask[row : row + 1], edit.lowest(score[row : row + 1], share))


def test_equal_scores_are_taken_from_the_left() -> None:
    assert edit.lowest(torch.tensor([[0.5, 0.1, 0.5, 0.5]]), 0.75).tolist() == [[True, True, True, False]]
    assert edit.lowest(torch.zeros(1, 500), 0.2)[0].nonzero()[:, 0].tolist() == list(range(100))


@each("threshold", [0.0, 0.3, 1.0])
def test_lowest_by_threshold(threshold: float) -> None:
    score = noise.uniform(keys(5), (0,), 30).float()
    assert torch.equal(edit.lowest(score, 0.5, threshold), score < threshold)


def test_random_is_even_and_depends_on_key_and_stream() -> None:
    masks = edit.random(keys(4000), 16, 0.25, (1, 2))
    assert (masks.sum(1) == 4).all()
    assert (masks.double().mean(0) - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(masks[7:8], edit.random(keys(8)[7:], 16, 0.25, (1, 2)))
    assert not torch.equal(masks, edit.random(keys(4000), 16, 0.25, (1, 3)))
