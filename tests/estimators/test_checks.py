"""Estimators that do what they must not, or leave out what they must do, are told so by name before they train."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from unidiff import UnifiedModel, noise
from unidiff.canvas import Canvas
from unidiff.estimators import Ask, Estimator, View, draw_views, make, parse, register, values_of


@dataclass(frozen=True)
class Mine(Estimator):
    """Gives what `change` makes of a sound view, which masks all that was sampled."""

    change: Callable[[Canvas, View], Any]

    def views(self, ask: Ask) -> list[View]:
        return self.change(ask.canvas, View(ask.among))


@pytest.fixture
def canvas(model: UnifiedModel, prompts: list) -> Canvas:
    return model.render([p + model.encode(["go", "find"], prompt=False) for p in prompts[:2]])


def drawn(canvas: Canvas, change: Callable[[Canvas, View], Any]) -> Any:
    keys = torch.tensor([noise.key(1, i) for i in range(len(canvas.ids))])
    return draw_views(canvas, Mine(change), make("one_step"), 1, keys)[0]


MISTAKES: dict[str, tuple[Callable[[Canvas, View], Any], str]] = {
    "nothing": (lambda c, v: [], "views must return a list of View, at least one, not an empty list"),
    "none": (lambda c, v: None, "views must return a list of View, at least one, not a NoneType"),
    "tensors": (lambda c, v: [v.mask], "views must return a list of View, at least one, not a list of Tensor"),
    "float mask": (
        lambda c, v: [View(v.mask.float())],
        r"a mask must be a bool tensor \[2, \d+\], not a float32 tensor",
    ),
    "no mask": (lambda c, v: [View(None)], r"a mask must be a bool tensor \[2, \d+\], not a NoneType"),  # type: ignore[arg-type]
    "one row": (lambda c, v: [View(v.mask[:1])], r"a mask must be .* not a bool tensor \[1, \d+\]"),
    "prompt": (lambda c, v: [View(c.clean.valid)], "a mask holds tokens that are not sampled text tokens"),
    "pictures": (lambda c, v: [View(c.sampled)], "a mask holds tokens that are not sampled text tokens"),
    "nothing masked": (lambda c, v: [View(v.mask & False)], "a segment with sampled tokens is not scored"),
    "factor 0": (lambda c, v: [replace(v, factor=v.mask * 0.0)], "a segment with sampled tokens is not scored"),
    "factor NaN": (lambda c, v: [replace(v, factor=v.mask / v.mask.float() * math.nan)], "a factor is not finite"),
    "factor of one": (lambda c, v: [replace(v, factor=0.5)], "a factor must be a number tensor .* not a float"),
    "factor of rows": (lambda c, v: [replace(v, factor=torch.ones(2, 1))], "a factor must be a number tensor"),
    "hides its own": (lambda c, v: [replace(v, hide=c.sampled)], "hide holds tokens that are not prompt tokens"),
    "hides pads": (lambda c, v: [replace(v, hide=~c.clean.valid)], "hide holds tokens that are not prompt"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named(canvas: Canvas, mistake: str) -> None:
    change, message = MISTAKES[mistake]
    drawn(canvas, lambda c, v: [v])
    if "sampled text" in message:  # pictures are there to be masked by mistake
        canvas.modality[0, canvas.sampled[0].nonzero()[0]] = 1
    with pytest.raises((TypeError, ValueError), match=f"estimator Mine: {message}"):
        drawn(canvas, change)


def test_one_segment_that_is_left_out_is_found(canvas: Canvas) -> None:
    """Among others that are scored."""
    last = canvas.segment.masked_fill(~canvas.sampled, -1).amax(1, keepdim=True)
    with pytest.raises(ValueError, match="a segment with sampled tokens is not scored"):
        drawn(canvas, lambda c, v: [View(v.mask & (c.segment < last))])


def test_a_factor_counts_where_its_mask_is(canvas: Canvas) -> None:
    """So it may be written for all tokens at once."""
    everywhere = drawn(canvas, lambda c, v: [replace(v, factor=torch.full(c.shape, 0.5))])
    masked = drawn(canvas, lambda c, v: [replace(v, factor=v.mask * 0.5)])
    assert torch.equal(everywhere.views[0].factors, masked.views[0].factors)
    assert torch.equal(everywhere.weight, masked.weight)


@pytest.mark.parametrize(
    "gives", [lambda logp, place: logp, lambda logp, place: logp.sum((0, 2)), lambda logp, place: 1.0]
)
def test_combine_gives_a_value_for_each_token(canvas: Canvas, gives: Callable[..., Any]) -> None:
    class Combining(Mine):
        def combine(self, logp_KBL: Tensor, factor_KBL: Tensor, place: Any, advantage_BL: Tensor) -> Any:
            return gives(logp_KBL, place)

    method, other = Combining(lambda c, v: [v, v]), make("random")
    (draw,) = draw_views(canvas, method, other, 1, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"estimator Combining: combine must return a tensor \[2, \d+\], not a"):
        values_of(canvas, draw, torch.zeros(2, *canvas.shape), method, other, torch.ones(canvas.shape))


@pytest.mark.usefixtures("registry")
def test_what_cannot_be_registered() -> None:
    class Plain(Estimator):
        pass

    @dataclass(frozen=True)
    class Rollout(Estimator):
        unit: ClassVar[Any] = "rollout"

    with pytest.raises(TypeError, match="'plain' must be a dataclass: write @dataclass"):
        register("plain")(Plain)
    with pytest.raises(ValueError, match="unit is 'token' or 'segment'"):
        register("rollout")(Rollout)
    for name in ("", "a.b", "a:b", "a=b"):
        with pytest.raises(ValueError, match="a name has no"):
            register(name)(Mine)


@pytest.mark.usefixtures("registry")
def test_options_that_cannot_be_written() -> None:
    @register("optional")
    @dataclass(frozen=True)
    class Optional(Estimator):
        needed: float
        cap: int | None = None

    assert make("optional", needed=0.5, cap=3) == Optional(0.5, 3)
    with pytest.raises(ValueError, match="estimator 'optional' needs its option 'needed'"):
        parse("optional")
    for text in ("optional:cap=3", "optional:needed=0.5"):
        with pytest.raises(ValueError, match="cannot be written so, for it has no plain default; use make"):
            parse(text)
