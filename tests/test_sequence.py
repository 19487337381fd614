"""Segments, sequences and their layout as a canvas, against a layout by plain lists."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, fields

import pytest
import torch

from tests.tables import each
from unidiff.canvas import Canvas, Tokens, Window, render, wrap
from unidiff.sequence import Interleaved, Modality, Segment
from unidiff.spec import ModelSpec

RandomRows = Callable[..., list[Interleaved]]
Spec = Callable[..., ModelSpec]
NAMES = [f.name for f in fields(Tokens)]
VARIANTS = [{}, {"row_separator": 8}, {"bos": None}, {"image_begin": (5, 9), "image_end": ()}]
GRIDS = [(2, 3), (3, 2), (1, 4)]


def text(*ids: int, prompt: bool = False) -> Segment:
    return Segment(Modality.TEXT, torch.tensor(ids), prompt)


def image(*ids: int, grid: tuple[int, int], prompt: bool = False, edited: list[bool] | None = None) -> Segment:
    return Segment(Modality.IMAGE, torch.tensor(ids), prompt, grid, None if edited is None else torch.tensor(edited))


# ---------------------------------------------------------------- segments and sequences


@each("grid", [None, (2, 2), (0, 3), (3, 2)])
def test_an_image_needs_its_grid(grid: tuple[int, int] | None) -> None:
    with pytest.raises(ValueError, match=r"Segment\.grid is .* an image of 5 tokens"):
        Segment(Modality.IMAGE, torch.arange(5), grid=grid)


@each("name", ["edited", "step", "probability"])
def test_fields_of_a_segment_have_its_length(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Segment\.{name} has 3 values for 4 tokens"):
        Segment(Modality.TEXT, torch.arange(4), **{name: torch.zeros(3)})


def test_sampled_tokens_of_a_segment() -> None:
    edited = [True, False, False, True]
    assert not image(1, 2, 3, 4, grid=(2, 2), prompt=True, edited=edited).sampled.any()
    assert image(1, 2, 3, 4, grid=(2, 2), edited=edited).sampled.tolist() == edited
    assert image(1, 2, 3, 4, grid=(2, 2)).sampled.all() and text(5, 6).sampled.all()


def test_sequences_read_well() -> None:
    row = Interleaved([text(7, 8, prompt=True), image(20, 21, grid=(1, 2), prompt=True), text(7)])
    row += [image(20, 21, grid=(1, 2), edited=[True, False])]
    assert repr(row) == "Interleaved(prompt text[2] · prompt image[1×2] · text[1] · image[1×2, 1 edited])"
    assert isinstance(row, Interleaved) and len(row.prompt) == 2 and len(row.response) == 2
    assert row.last_image() is row[3] and row.prompt.last_image() is row[1]
    assert Interleaved([text(7)]).last_image() is None and Interleaved().prompt == ()


# ---------------------------------------------------------------- the layout


@dataclass
class Column:
    """What one column of a canvas has to hold."""

    ids: int
    segment: int
    modality: int
    position: int
    offset: int
    previous: int
    valid: bool = True
    sampled: bool = False
    source: int = -1


def laid_out(row: Interleaved, spec: ModelSpec) -> tuple[list[Column], list[Column]]:
    """The clean and the noisy columns of a row, one token at a time, from the definitions."""
    clean: list[Column] = []
    noisy: list[Column] = []
    last: Segment | None = None
    for ordinal, segment in enumerate(row):
        modality = int(segment.modality)

        def add(token: int, offset: int = -1, previous: int = -1, sampled: bool = False) -> None:
            column = Column(token, ordinal, modality, len(clean), offset, previous, True, sampled)  # noqa: B023
            if sampled:
                noisy.append(Column(**{**vars(column), "source": len(clean)}))
            clean.append(column)

        if segment.modality is Modality.TEXT:
            if segment.prompt and spec.bos is not None:
                add(spec.bos)
            start, ended = len(clean), False
            for j, token in enumerate(segment.tokens.tolist()):
                add(token, j, sampled=not segment.prompt and not ended)
                ended = ended or token in spec.text_end
            written = sum(c.sampled for c in clean[start:])
            for j in range(written, spec.text_length if not segment.prompt else 0):
                noisy.append(Column(spec.mask, ordinal, modality, start + j, j, -1))
        else:
            rows, columns = segment.grid
            for token in spec.image_begin:
                add(token)
            for r in range(rows):
                for c in range(columns):
                    j = r * columns + c
                    same = last is not None and last.grid == segment.grid
                    add(int(segment.tokens[j]), j, int(last.tokens[j]) if same else -1, bool(segment.sampled[j]))
                if spec.row_separator is not None:
                    add(spec.row_separator)
            for token in spec.image_end:
                add(token)
            last = segment
    return clean, noisy


@each(("variant", "seed"), itertools.product(range(len(VARIANTS)), range(8)))
def test_render_is_the_definition(variant: int, seed: int, toy_spec: Spec, random_rows: RandomRows) -> None:
    spec = toy_spec(**VARIANTS[variant])
    rows = random_rows(spec, 5, seed, GRIDS)
    canvas = render(rows, spec)
    pad = Column(0, -1, -1, 0, -1, -1, valid=False)
    for i, (clean, noisy) in enumerate(laid_out(row, spec) for row in rows):
        clean += [pad] * (canvas.shape[1] - len(clean))
        noisy += [pad] * (canvas.noisy.shape[1] - len(noisy))
        for name in NAMES:
            assert getattr(canvas.clean, name)[i].tolist() == [getattr(c, name) for c in clean], name
            assert getattr(canvas.noisy, name)[i].tolist() == [getattr(c, name) for c in noisy], name
        assert canvas.sampled[i].tolist() == [c.sampled for c in clean]
        assert canvas.source[i].tolist() == [c.source for c in noisy]


@each("seed", range(20))
def test_only_chosen_content_is_sampled(seed: int, toy_spec: Spec, random_rows: RandomRows) -> None:
    """Invariant 2: no delimiter, no kept image token, no prompt, no pad, nothing after an end token."""
    spec = toy_spec(row_separator=8)
    rows = random_rows(spec, 6, seed, GRIDS)
    canvas = render(rows, spec)
    sampled, segment, offset = canvas.sampled, canvas.segment, canvas.clean.offset
    assert not (sampled & ~canvas.clean.valid).any() and not (sampled & (offset < 0)).any()
    delimiters = torch.tensor([2, 5, 6, 7, 8])
    assert not (sampled & torch.isin(canvas.ids, delimiters) & (canvas.modality == Modality.IMAGE)).any()
    for i, row in enumerate(rows):
        for s, part in enumerate(row):
            inside = (segment[i] == s) & (offset[i] >= 0)
            chosen = sampled[i, inside]
            if part.prompt:
                assert not chosen.any()
            elif part.modality is Modality.IMAGE:
                assert torch.equal(chosen, part.sampled)
            else:
                ends = [j for j, token in enumerate(part.tokens.tolist()) if token in spec.text_end]
                assert chosen.sum() == (ends[0] + 1 if ends else len(part)) and not chosen[int(chosen.sum()) :].any()


@each("seed", range(10))
def test_a_window_is_a_part_of_the_layout(seed: int, toy_spec: Spec, random_rows: RandomRows) -> None:
    """Of the columns of the whole those of segments that are seen, close together, of which some are scored."""
    spec = toy_spec(**VARIANTS[seed % len(VARIANTS)])
    rows = random_rows(spec, 4, seed, GRIDS)
    windows = []
    for i, row in enumerate(rows):
        seen = frozenset(s for s in range(len(row)) if (seed + i * s + s) % 3)
        windows.append(Window(seen, frozenset(s for s in seen if (seed + s) % 2)))
    canvas = render(rows, spec, windows=windows)
    for i, (row, window) in enumerate(zip(rows, windows)):
        clean, noisy = laid_out(row, spec)
        places = {at: new for new, at in enumerate(n for n, c in enumerate(clean) if c.segment in window.seen)}
        start = {s: min(n for n, c in enumerate(clean) if c.segment == s) for s in window.seen}
        kept = [clean[at] for at in places]
        width, count = len(kept), int(canvas.noisy.valid[i].sum())
        for name in ("ids", "segment", "modality", "offset", "previous"):
            assert getattr(canvas.clean, name)[i, :width].tolist() == [getattr(c, name) for c in kept], name
        assert (
            canvas.clean.position[i, :width].tolist() == list(range(width)) and not canvas.clean.valid[i, width:].any()
        )
        assert canvas.sampled[i, :width].tolist() == [c.sampled and c.segment in window.scored for c in kept]
        scored = [c for c in noisy if c.segment in window.scored]
        assert canvas.source[i, :count].tolist() == [places.get(c.source, -1) for c in scored]
        moved = [c.position - start[c.segment] + places[start[c.segment]] for c in scored]
        assert canvas.noisy.position[i, :count].tolist() == moved


def test_nothing_behind_an_end_token_is_sampled(toy_spec: Spec) -> None:
    canvas = render([Interleaved([text(9, 3, 10, 4, 11)])], toy_spec())
    assert canvas.sampled.tolist() == [[True, True, False, False, False]]
    assert canvas.source.tolist() == [[0, 1, -1, -1, -1, -1]]
    assert canvas.noisy.ids.tolist() == [[9, 3, 0, 0, 0, 0]]
    assert canvas.noisy.position.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_an_end_token_in_a_prompt_ends_nothing(toy_spec: Spec) -> None:
    canvas = render([Interleaved([text(9, 3, prompt=True), text(9, 10)])], toy_spec())
    assert canvas.sampled[0].tolist() == [False, False, False, True, True]


def test_images_of_another_grid_are_no_image_before(toy_spec: Spec) -> None:
    row = Interleaved(
        [image(*range(20, 26), grid=(2, 3)), image(*[21] * 6, grid=(3, 2)), image(*[22] * 6, grid=(3, 2))]
    )
    canvas = render([row], toy_spec(image_begin=(), image_end=()))
    assert canvas.clean.previous[0].tolist() == [-1] * 12 + [21] * 6


@each("seed", range(5))
def test_padding_and_company_change_no_row(seed: int, toy_spec: Spec, random_rows: RandomRows) -> None:
    spec = toy_spec(row_separator=8)
    rows = random_rows(spec, 6, seed, GRIDS)
    canvas = render(rows, spec)
    for i in range(len(rows)):
        alone = render([rows[i]], spec)
        trimmed, width = canvas.rows(torch.tensor([i])).trimmed()
        assert width == alone.shape[1] and same(trimmed, alone)


def same(a: Canvas, b: Canvas) -> bool:
    parts = zip([a.clean, a.noisy], [b.clean, b.noisy])
    return (
        all(torch.equal(getattr(x, n), getattr(y, n)) for x, y in parts for n in NAMES)
        and torch.equal(a.sampled, b.sampled)
        and torch.equal(a.source, b.source)
    )


def test_rows_keep_columns_and_trimming_keeps_content(toy_spec: Spec, random_rows: RandomRows) -> None:
    rows = random_rows(toy_spec(), 6, 0)
    canvas = render(rows, toy_spec())
    some = canvas.rows(torch.tensor([3, 0]))
    assert some.shape == (2, canvas.shape[1]) and torch.equal(some.ids[1], canvas.ids[0])
    assert same(canvas.trimmed()[0], canvas) and canvas.trimmed()[1] == canvas.shape[1]
    assert same(canvas.to("cpu"), canvas)


def test_an_empty_sequence_is_a_row_of_pads(toy_spec: Spec) -> None:
    canvas = render([Interleaved(), Interleaved([text(9)])], toy_spec())
    assert canvas.clean.valid.tolist() == [[False], [True]] and not canvas.noisy.valid[0].any()
    assert render([Interleaved()], toy_spec()).trimmed()[1] == 1
    assert render([], toy_spec()).shape == (0, 1)


def test_tokens_join_and_split(toy_spec: Spec, random_rows: RandomRows) -> None:
    tokens = render(random_rows(toy_spec(), 3, 1), toy_spec()).clean
    parts = [tokens.columns(slice(0, 2)), tokens.columns(slice(2, None))]
    joined = Tokens.cat(parts)
    assert all(torch.equal(getattr(joined, n), getattr(tokens, n)) for n in NAMES)
    other = tokens.with_ids(tokens.ids + 1)
    assert torch.equal(other.ids, tokens.ids + 1) and other.valid is tokens.valid
    assert torch.equal(tokens.rows(torch.tensor([2])).ids, tokens.ids[2:])


def test_wrap_puts_delimiters_around(toy_spec: Spec) -> None:
    ids, offset = wrap(image(*range(20, 26), grid=(2, 3)), toy_spec(row_separator=8))
    assert ids.tolist() == [5, 20, 21, 22, 8, 23, 24, 25, 8, 6, 7]
    assert offset.tolist() == [-1, 0, 1, 2, -1, 3, 4, 5, -1, -1, -1]
    assert wrap(text(9, prompt=True), toy_spec())[0].tolist() == [2, 9]
    assert wrap(text(9), toy_spec())[0].tolist() == [9]


def test_render_checks_every_segment(toy_spec: Spec) -> None:
    with pytest.raises(ValueError, match=r"image\[1×2\]: ids \[9\] are not in \[20, 28\)"):
        render([Interleaved([text(9), image(20, 9, grid=(1, 2))])], toy_spec())
    with pytest.raises(ValueError, match=r"7 tokens is longer than text_length 6"):
        render([Interleaved([text(*[9] * 7)])], toy_spec())
