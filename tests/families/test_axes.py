"""Rotary positions by rows and columns: what they say, what attention makes of them, and that they are saved."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from unidiff import UnifiedModel
from unidiff.families import native
from unidiff.sequence import Interleaved, Modality


@pytest.fixture(scope="module")
def rows(model: UnifiedModel, random_rows: Callable[..., list[Interleaved]]) -> list[Interleaved]:
    return random_rows(model.spec, 6, 3)


def test_axes_are_rows_and_columns(build_model: Callable[..., UnifiedModel], rows: list[Interleaved]) -> None:
    model = build_model(axes=True)
    for tokens in (model.render(rows).clean, model.render(rows).noisy):
        found = model.positions(tokens)
        inside = tokens.valid & (tokens.offset >= 0)
        image = inside & (tokens.modality == Modality.IMAGE)
        assert torch.equal(found[..., 0][tokens.valid], tokens.segment[tokens.valid]) and found.min() >= 0
        assert torch.equal((found[..., 1] * 8 + found[..., 2])[image], tokens.offset[image])
        assert torch.equal(found[inside & ~image][:, 1:].T[1], tokens.offset[inside & ~image])
        assert not found[inside & ~image][:, 1].any()


def test_axial_rotation_tells_differences_alone() -> None:
    """A query and a key see only how far apart they are, along each axis."""
    rotary, x = (
        native.AxialRotary(32),
        torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
    )

    def score(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
        cos, sin = rotary(x[None], torch.tensor([[a, b]]))
        query, key = (v * cos[0, i] + torch.cat([-v[16:], v[:16]]) * sin[0, i] for i, v in enumerate(x))
        return float(query @ key)

    start = score((0, 0, 0), (2, 1, 3))
    assert score((5, 6, 4), (7, 7, 7)) == pytest.approx(start, abs=1e-5)
    others = [score((0, 0, 0), other) for other in ((3, 1, 3), (2, 2, 3), (2, 1, 4), (2, 3, 1))]
    assert all(abs(other - start) > 0.1 for other in others)


def test_axes_are_saved(build_model: Callable[..., UnifiedModel], rows: list[Interleaved], tmp_path: Path) -> None:
    model = build_model(axes=True)
    model.save_pretrained(tmp_path)
    again, canvas = UnifiedModel.from_pretrained(tmp_path), model.render(rows)
    with torch.no_grad():
        assert torch.equal(again.score(canvas, canvas.sampled), model.score(canvas, canvas.sampled))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["embedding"]["axes"] is True
    config["embedding"]["axes"] = "yes"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="axes is 'yes'; it must be true or false"):
        UnifiedModel.from_pretrained(tmp_path)
