"""Strips and animations show the mask and the steps that the record says."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from unidiff.report.filters import edits_of
from unidiff.report.gallery import records
from unidiff.report.strips import frames, strip, write_animation, write_strips


@pytest.fixture(scope="module")
def made(traced, model):
    return next(r for r in records(model, traced) if edits_of(r))


def cells(picture: Image.Image, rows: int = 8) -> np.ndarray:
    """[rows, rows, h, w, 3] the inner pixels of each token, without the outline."""
    side = picture.height // rows
    grid = np.asarray(picture).reshape(rows, side, rows, side, 3).transpose(0, 2, 1, 3, 4)
    return grid[:, :, 4:-4, 4:-4]


def test_frames_hide_what_is_still_masked(made) -> None:
    edit = edits_of(made)[0]
    shown = frames(edit)
    assert len(shown) == 2 + edit.segment.steps  # before, masked, each step
    last = cells(shown[-1])
    for done, frame in enumerate(shown[1:]):
        alike = (cells(frame) == last).all((2, 3, 4)).flatten()
        assert alike.tolist() == [step < done for step in edit.segment.step]


def test_a_strip_is_before_mask_after(made) -> None:
    edit = edits_of(made)[0]
    picture = strip(edit)
    side = picture.height
    before, mask, after = (picture.crop((i * (side + 8), 0, i * (side + 8) + side, side)) for i in range(3))
    kept = (cells(before) == cells(mask)).all((2, 3, 4)).flatten()
    assert kept.tolist() == [not e for e in edit.segment.edited]
    assert (cells(after) == cells(frames(edit)[-1])).all()


def test_files_are_written_and_read_back(made, tmp_path) -> None:
    strips = write_strips(tmp_path / "strips", "a", made)
    assert [p.name for p in strips] == [f"a-edit-{i + 1}.png" for i in range(len(edits_of(made)))]
    path = write_animation(tmp_path / "deep" / "a.gif", made)
    assert path is not None
    with Image.open(path) as animation:
        assert animation.n_frames == sum(len(frames(e)) for e in edits_of(made))
        assert animation.info["loop"] == 0
    assert not list(tmp_path.rglob("*.draft"))
