"""Rewards may be named as their authors like: curves, pages, tables and files show the name as it is."""

import io
import json

import pytest
from PIL import Image
from rich.console import Console

from unidiff.report.curves import draw_curves, draw_panels
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:Glyph")
def test_an_odd_name_is_shown_everywhere(name, tmp_path):
    assert reward(lambda segments: [], name=name).name == name
    rows = [
        {
            "step": i,
            f"reward/{name}": 0.1 * i,
            f"lost/{name}": 0.1 * i,
            f"lost/{name}/raised": 0.1 * i,
            f"clip{name}": 0.1,
        }
        for i in range(3)
    ]
    buffer = io.BytesIO()
    draw_curves(rows, buffer, kinds={name: "text"}, keys=["reward/.*", "clip.*", "lost.*"])
    assert Image.open(buffer).format == "PNG" and draw_panels(rows, {name: "text"})
    said = RewardRecord(name, None, "raised: x")
    segment = SegmentRecord(modality="text", text="go", tokens=[1, 2], words=["g", "o"], rewards=[said])
    rollout = RolloutRecord(title=name, segments=(segment,), stop="answered", stop_reason="x", rewards=[said])
    write_page(tmp_path / "p.html", title=name, metrics=rows, kinds={name: "text", name + "2": "image"},
               galleries={name: [rollout]})  # fmt: skip
    page = (tmp_path / "p.html").read_text()
    escaped = name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;")
    assert escaped.replace("'", "&#39;") in page
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=200)
        with Progress(3, console=console) as progress:
            for row in rows:
                progress.update(row)
            progress.message(name)
        assert name in console.file.getvalue()
    assert name in results_table({"base": {name: 0.1}, "final": {name: 0.2}})
    assert json.loads(json.dumps(rows)) == rows


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\ud800", "a\x00", "\u2028", 3])
def test_a_name_that_cannot_be_shown_on_a_line_is_refused(name):
    with pytest.raises((ValueError, TypeError), match=r"a reward cannot be named .*printable text, on one line"):
        reward(lambda segments: [], name=name or "\t")
