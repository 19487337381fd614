"""UniGRPO's ladder (`random:start=uniform`): its ratios by the paper's formula, and who shares them."""

from __future__ import annotations

import pytest
import torch

from unidiff import noise
from unidiff.canvas import Canvas, render
from unidiff.estimators import draw_views, ladder, make, parse
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.spec import ModelSpec

N = 4000  # tokens of a row: enough to read a ratio off a mask
SPEC = ModelSpec(
    family="toy", mask=0, pad=1, bos=2, text_end=(3, 4), image_next=4, image_begin=(5,), image_end=(6,),
    text_range=(3, 20), image_offset=20, codebook_size=8, logit_rows=28, image_grid=(2, 3), text_length=N,
    max_positions=2 * N,
)  # fmt: skip


def canvas(rows: int) -> Canvas:
    words = torch.full((N,), 9)
    words[-1] = 3
    prompt, response = Segment(Modality.TEXT, words[:2], True), Segment(Modality.TEXT, words)  # type: ignore[arg-type]
    return render([Interleaved([prompt, response])] * rows, SPEC, torch.device("cpu"))


def ratios(step: int, iterations: int, rows: int = 2) -> torch.Tensor:
    """[iterations, rows]: shares of the tokens that are masked."""
    keys = torch.tensor([noise.key(1, i, step) for i in range(rows)])
    draws = draw_views(
        canvas(rows), make("random", start="uniform"), make("one_step"), iterations, keys, noise.key(0, step)
    )
    return torch.stack([draw.views[0].mask.sum(1) / N for draw in draws])


def test_the_papers_grid():
    """t_n = (n − 1)/(μ − 1)·(T − t_1) + t_1 with μ = 5, t_1 = 100, T = 1000: 100, 325, …, 1000."""
    grid = [1000 * ladder.from_start(0.1, i, 5) for i in range(5)]
    assert grid == pytest.approx([100, 325, 550, 775, 1000])
    assert ladder.from_start(0.37, 0, 1) == 0.37


@pytest.mark.parametrize("iterations", [2, 5])
def test_one_start_for_a_step_then_even_to_everything(iterations):
    starts = []
    for step in range(6):
        found = ratios(step, iterations)
        assert (found[-1] == 1).all()
        assert torch.allclose(found[:, 0], found[:, 1], atol=0.04)  # four standard deviations of a share are 0.032
        even = torch.linspace(float(found[0].mean()), 1, iterations)
        assert torch.allclose(found.mean(1), even, atol=0.04)
        starts.append(float(found[0].mean()))
    assert max(starts) - min(starts) > 0.3  # another start in another step


def test_the_start_depends_on_the_step_alone():
    assert torch.equal(ratios(3, 1, rows=4)[:, :2], ratios(3, 1, rows=2))


def test_the_other_ladder_is_as_it_was():
    keys = torch.tensor([noise.key(1, 0)])
    for key in (0, 5):
        (draw,) = draw_views(canvas(1), make("random", min_ratio=0.2), make("one_step"), 1, keys, key)
        assert float(draw.views[0].mask.sum()) / N == pytest.approx(0.999, abs=0.003)


def test_an_unknown_start_is_refused():
    with pytest.raises(ValueError, match="start is 'even'"):
        make("random", start="even")


def test_the_setting_names_it():
    assert make("random").ratio is True  # it has an importance ratio, as all of its kind
    assert parse("random:start=uniform") == make("random", start="uniform")
