"""Curves: a valid picture of the metrics that are there."""

from __future__ import annotations

import io
import math
import sys

import pytest
from PIL import Image

from unidiff.report.curves import PANELS, draw_curves, draw_panels, panels_of, running_mean, series

ROWS = [
    {"step": i, "success": 0.5, "reward/a": i / 10, "zero_std/text": 0.1, "odd": 3.0, "name": "x", "seconds": 1.0}
    | {"lost/a": 0.0, "lost/b": float(i == 3)}
    | ({"eval/greedy/success": 0.4, "ratio_first_iteration_max_dev": 0.0} if i % 5 == 0 else {})
    for i in range(12)
]


def picture(**options) -> Image.Image:
    buffer = io.BytesIO()
    draw_curves(ROWS, buffer, **options)
    image = Image.open(buffer)
    image.load()
    assert image.format == "PNG"
    return image


def test_the_file_is_a_png_that_grows_with_its_panels(tmp_path) -> None:
    draw_curves(ROWS, tmp_path / "curves.png", keys=["success"])
    one = Image.open(tmp_path / "curves.png")
    assert one.format == "PNG" and one.size < picture(keys=["success", "reward/.*"]).size


def test_only_panels_with_data_are_drawn() -> None:
    titles = [panel.title for panel, _ in draw_panels(ROWS)]
    assert titles == [
        "answers, training prompts",
        "held out",
        "rewards",
        "lost rewards",
        "groups without spread",
        "first-iteration ratio: max |ρ − 1|",
    ]
    assert len({p.title for p in PANELS}) == len(PANELS)
    assert draw_panels([]) == []


def test_rewards_have_a_panel_for_each_kind() -> None:
    rows = [{"step": i, **dict.fromkeys(("reward/a", "reward/b", "reward/b.c", "reward/new"), 0.5)} for i in range(3)]
    kinds = {"a": "text", "b": "image", "b.c": "sequence"}
    shown = {panel.title: names for panel, names in panels_of(rows, kinds)}
    assert shown == {
        "rewards of texts": ["reward/a"],
        "rewards of pictures": ["reward/b"],
        "rewards of whole responses": ["reward/b.c"],
        "rewards": ["reward/new"],
    }
    assert {p.title: names for p, names in panels_of(rows)} == {"rewards": list(rows[0])[1:]}


def test_only_rewards_that_were_lost_are_drawn_as_lost() -> None:
    assert [names for panel, names in panels_of(ROWS) if panel.title == "lost rewards"] == [["lost/b"]]
    calm = [{**row, "lost/b": 0.0} for row in ROWS]
    assert not any(panel.title == "lost rewards" for panel, _ in panels_of(calm))


def test_named_metrics_that_no_panel_knows_get_their_own() -> None:
    assert picture(keys=["odd"]).format == "PNG"
    with pytest.raises(ValueError, match="no row holds a number"):
        draw_curves(ROWS, io.BytesIO(), keys=["nothing"])


def test_series_skips_what_is_no_finite_number() -> None:
    rows = [{"step": 3, "a": 1}, {"step": 4}, {"step": 5, "a": math.nan}, {"step": 6, "a": "x"}, {"a": 2.0}]
    assert series(rows, "a") == ([3.0, 4.0], [1.0, 2.0])


def test_running_mean() -> None:
    assert running_mean([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert running_mean([1, 2, 3], 10) == [1, 1.5, 2]


def test_no_global_state_of_pyplot_is_touched(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    picture(keys=["success"])
