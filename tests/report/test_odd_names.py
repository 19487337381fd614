"""Rewards may be named as their authors like: curves, pages, tables and files show the name as it is."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from tests.tables import each
from unidiff.report.curves import draw_curves
from unidiff.report.page import write_page
from unidiff.report.progress import Progress, results_table
from unidiff.report.record import RewardRecord, RolloutRecord, SegmentRecord
from unidiff.rewards.reward import reward

NAMES = [
    r"a$\frac{$",
    "$x$",
    "costs $5",
    r"\$",
    "[red]x[/]",
    "[/]",
    "<b>&\"'",
    "%s {} {{ 1/0 }}",
    "_hidden",
    "日本 🙂",
    "a/b",
]
NAMES += ["\\", "a/b", "<lambda>", "none", "reward/x", "é\u0301"]


def rows_of(names):
    """Metrics of three steps, in every panel that shows names of rewards."""
    starts = {"reward/{}": 0.1, "lost/{}": 0.1, "lost/{}/raised": 0.1, "clip{}": 0.0}
    return [
        {"step": i, **{start.format(name): 0.1 + by * i for name in names for start, by in starts.items()}}
        for i in range(3)
    ]


@pytest.mark.filterwarnings("ignore:Glyph")
def test_odd_names_are_drawn():
    """Some in one figure."""
    for names in (NAMES[i::5] for i in range(5)):
        rows, kinds, buffer = rows_of(names), dict.fromkeys(names, "text"), io.BytesIO()
        draw_curves(rows, buffer, kinds=kinds, keys=["reward/.*", "clip.*", "lost.*"])
        assert Image.open(buffer).format == "PNG"
        assert json.loads(json.dumps(rows)) == rows


@pytest.mark.filterwarnings("ignore:Glyph")
def test_odd_names_are_shown_on_a_page(tmp_path):
    rollouts = {}
    for name in NAMES:
        said = RewardRecord(name, None, "raised: x")
        segment = SegmentRecord(modality="text", text="go", tokens=[1, 2], words=["g", "o"], rewards=[said])
        rollouts[name] = [
            RolloutRecord(title=name, segments=(segment,), stop="answered", stop_reason="x", rewards=[said])
        ]
    kinds = {**dict.fromkeys(NAMES, "text"), **{name + "2": "image" for name in NAMES}}
    title = "".join(NAMES)
    shown = {"kinds": kinds, "galleries": rollouts, "metrics": rows_of(NAMES[::3])}
    page = write_page(tmp_path / "p.html", title=title, **shown)
    for name in (title, *NAMES):
        escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")
        assert escaped.replace("'", "&#39;") in page.read_text(), name


@pytest.mark.parametrize("name", NAMES)
def test_an_odd_name_is_shown_in_a_terminal(name):
    assert reward(lambda segments: [], name=name).name == name
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        with Progress(3, console=console) as progress:
            for row in rows_of([name]):
                progress.update(row)
            progress.message(name)
        assert name in console.file.getvalue()
    assert name in results_table({"base": {name: 0.1}, "final": {name: 0.2}})


@each("name", ["", " ", "a\nb", "\ud800", "a\x00", "\u2028", 3])
def test_a_name_that_cannot_be_shown_on_a_line_is_refused(name):
    with pytest.raises((ValueError, TypeError), match=r"a reward cannot be named .*printable text, on one line"):
        reward(lambda segments: [], name=name or "\t")
