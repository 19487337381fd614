"""Scoring of bidirectional models: each segment on the sequence cut after it, whatever it is batched with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unidiff.head
from unidiff import noise
from unidiff.canvas import Canvas
from unidiff.estimators import View, draw_views, make
from unidiff.model import UnifiedModel
from unidiff.sequence import Interleaved, Modality, Segment

ALL = ("llada", "mmada", "mmada_parallel_a", "dimoo")
RandomRows = Callable[..., list[Interleaved]]


@pytest.fixture(scope="module", params=ALL)
def model(request: pytest.FixtureRequest, published: Callable[[str], Path]) -> UnifiedModel:
    return UnifiedModel.from_pretrained(published(request.param))


@pytest.fixture(scope="module")
def rows(model: UnifiedModel, random_rows: RandomRows) -> list[Interleaved]:
    found = (
        [r for r in random_rows(model.spec, 40, 0, [(4, 4), (2, 3)]) if r.response] if model.images else texts(model)
    )
    return found[:8]


def texts(model: UnifiedModel) -> list[Interleaved]:
    generator = torch.Generator().manual_seed(0)
    low = max(model.spec.special.values()) + 1

    def text(n: int, prompt: bool) -> Segment:
        return Segment(Modality.TEXT, torch.randint(low, model.spec.logit_rows, (n,), generator=generator), prompt)

    return [Interleaved([text(2 + i, True), text(3 + i % 5, False)]) for i in range(8)]


def views(canvas: Canvas, name: str) -> list[View]:
    estimator = make(name)
    keys = torch.tensor([noise.key(5, i) for i in range(canvas.shape[0])])
    return [view for draw in draw_views(canvas, estimator, estimator, 2, keys) for view in draw.views]


def plain_score(model: UnifiedModel, row: Interleaved, mask: Tensor) -> Tensor:
    """One row, segment by segment, from ids that are put together by hand and the full logits of a plain forward."""
    spec = model.spec
    canvas = model.render([row])
    out = torch.zeros(canvas.shape[1])
    ids, segment = canvas.ids[0], canvas.segment[0]
    for s, part in enumerate(row):
        scored = (segment == s) & mask
        if not scored.any():
            continue
        hidden = ids.masked_fill(scored, spec.mask)
        if part.modality is Modality.IMAGE:
            whole, places = hidden[segment <= s], scored.nonzero()[:, 0]
        else:
            n = int((canvas.sampled[0] & (segment == s)).sum())  # up to its end token
            tail = torch.full((spec.text_length - n,), spec.mask)
            before = int((segment < s).sum())
            whole, places = torch.cat([hidden[: before + n], tail]), scored.nonzero()[:, 0]
        low, high = spec.range_of(part.modality)
        with torch.no_grad():
            logits = model.backbone.logits(whole[None])[0, :, low:high].double()
        if low <= spec.mask < high:
            logits[:, spec.mask - low] = -torch.inf
        for place in places.tolist():
            out[place] = logits[place].log_softmax(-1)[ids[place] - low]
    return out


def test_score_is_the_plain_reference(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows)
    view = views(canvas, "random")[0]
    found = model.score(canvas, view.mask).detach()
    assert (found[~view.mask] == 0).all() and (found[view.mask] < 0).all()
    for b, row in enumerate(rows):
        expected = plain_score(model, row, view.mask[b, : model.render([row]).shape[1]])
        assert (found[b, : len(expected)] - expected).abs().max() < 1e-4
        assert not found[b, len(expected) :].any()
    assert found[view.mask].std() > 0.3  # far from uniform


@pytest.mark.parametrize("name", ["one_step", "random", "coupled", "spg"])
def test_scores_do_not_depend_on_the_batch(name: str, model: UnifiedModel, rows: list[Interleaved]) -> None:
    """Invariants 1 and 4: the ratio of an unchanged policy is 1 for any micro-batch, order and padding. Of every
    estimator: tests/grpo/test_every_estimator.py."""
    canvas = model.render(rows)
    for view in views(canvas, name):
        whole = model.score(canvas, view.mask, view.hide).detach()
        assert torch.equal(model.score(canvas, view.mask, view.hide).detach(), whole)  # the ratio is 1 exactly
        for index in [[0], [6, 2], [5, 4, 3, 2, 1, 0, 6, 7]]:
            part = torch.tensor(index)
            some = view.rows(part)
            found = model.score(canvas.rows(part), some.mask, some.hide).detach()
            assert ((found - whole[part]).exp() - 1).abs().max() < 1e-4


def test_what_pads_hold_is_of_no_account(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows)
    view = views(canvas, "random")[0]
    expected = model.score(canvas, view.mask).detach()
    canvas.clean.ids[~canvas.clean.valid] = 7
    canvas.noisy.ids[~canvas.noisy.valid] = 8
    assert torch.equal(model.score(canvas, view.mask).detach(), expected)


def test_later_segments_change_no_score_but_earlier_ones_do(model: UnifiedModel, rows: list[Interleaved]) -> None:
    first = rows[0].prompt + rows[0].response[:1] if rows[0].prompt else Interleaved(rows[1].response[:1])
    short, long = model.render([first]), model.render([Interleaved([*first, *rows[2].response])])
    n = short.shape[1]
    mask = torch.zeros_like(long.sampled)
    mask[:, :n] = short.sampled
    a, b = model.score(short, short.sampled).detach(), model.score(long, mask).detach()[:, :n]
    assert (a - b).abs().max() < 1e-4 and a.any()
    hide = torch.zeros_like(short.sampled)
    hide[:, 0] = True
    if rows[0].prompt:
        assert ((model.score(short, short.sampled, hide) - a)[short.sampled].abs() > 1e-4).any()


def test_masks_of_one_segment_hide_nothing_in_another(model: UnifiedModel, rows: list[Interleaved]) -> None:
    """Scored together or one by one, segments give the same: each sees the others as they are."""
    row = max(rows, key=lambda r: len(r.response))
    canvas = model.render([row])
    together = model.score(canvas, canvas.sampled).detach()
    alone = torch.zeros_like(together)
    for s in range(len(row)):
        mask = canvas.sampled & (canvas.segment == s)
        if mask.any():
            alone += model.score(canvas, mask).detach()
    assert (together - alone).abs().max() < 1e-4


def test_only_masked_positions_meet_the_head(
    model: UnifiedModel, rows: list[Interleaved], monkeypatch: pytest.MonkeyPatch
) -> None:
    canvas = model.render(rows)
    mask = views(canvas, "random")[0].mask
    seen = []
    log_probs = UnifiedModel.log_probs

    def spy(self: UnifiedModel, hidden: Tensor, *rest: Any, **named: Any) -> Tensor:
        seen.append(len(hidden))
        return log_probs(self, hidden, *rest, **named)

    expected = model.score(canvas, mask).detach()
    monkeypatch.setattr(UnifiedModel, "log_probs", spy)
    monkeypatch.setattr(unidiff.head, "LOGITS_AT_ONCE", 2000)
    assert (model.score(canvas, mask) - expected).abs().max() < 1e-4
    widths = [high - low for low, high in map(model.spec.range_of, Modality) if high > low]
    assert sum(seen) == int(mask.sum()) and max(seen) <= 2000 // min(widths)


def test_nothing_masked_scores_nothing_and_has_a_gradient(model: UnifiedModel, rows: list[Interleaved]) -> None:
    canvas = model.render(rows)
    none = model.score(canvas, torch.zeros_like(canvas.sampled))
    assert not none.any()
    none.sum().backward()  # processes of a distributed run all do a backward pass
    model.score(canvas, canvas.sampled).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()


def test_the_mask_is_no_value_of_a_token(model: UnifiedModel) -> None:
    hidden = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    found = model.log_probs(hidden, Modality.TEXT)
    low = model.spec.text_range[0]
    assert (found[:, model.spec.mask - low] == -torch.inf).all()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3))


def test_an_image_that_a_text_announces_has_one_begin(published: Callable[[str], Path]) -> None:
    model = UnifiedModel.from_pretrained(published("dimoo"))
    spec = model.spec
    image = Segment(Modality.IMAGE, torch.arange(4) + spec.image_offset, grid=(2, 2))
    text = torch.tensor([20, 21])
    announced = Segment(Modality.TEXT, torch.cat([text, torch.tensor([spec.image_next])]))
    inside = [int(spec.image_offset), int(spec.image_offset) + 1, spec.row_separator]
    inside += [int(spec.image_offset) + 2, int(spec.image_offset) + 3, spec.row_separator, spec.image_end[0]]
    for first in (announced, Segment(Modality.TEXT, text)):
        canvas = model.render([Interleaved([first, image])])
        assert canvas.ids[0].tolist() == [20, 21, spec.image_begin[0], *inside]
        assert canvas.sampled[0].sum() == len(first) + 4
