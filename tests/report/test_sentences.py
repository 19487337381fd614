"""Sentences about figures are computed from them: nothing, all, equal and missing are said as such."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from PIL import Image

from tests.tables import each
from unidiff.report.filters import FILTERS, Credit
from unidiff.report.page import write_page
from unidiff.report.progress import plain_line
from unidiff.report.record import RolloutRecord, SegmentRecord, png
from unidiff.report.results import Figure, columns, held_out, percent
from unidiff.rewards.idle import silent_rewards


def edit(edited: list[int] | None, changed: list[int] | None) -> list[tuple[str, str]]:
    """What is said of an edit of four tokens."""
    masks = [None if m is None else [bool(x) for x in m] for m in (edited, changed)]
    step = [0 if x else -1 for x in edited or [1] * 4]
    segment = SegmentRecord(modality="image", tokens=[0] * 4, grid=(2, 2), edited=masks[0], changed=masks[1], step=step)
    return FILTERS["findings"](segment)


@each(
    ("edited", "changed", "said"),
    [
        (
            [0, 0, 0, 0],
            [0, 0, 0, 0],
            [
                ("none", "no token was masked: the picture is the one before"),
                ("good", "all 4 tokens are bit-identical"),
            ],
        ),
        (
            [0, 0, 0, 0],
            [0, 1, 0, 0],
            [
                ("none", "no token was masked: the picture is the one before"),
                ("bad", "1 of 4 tokens outside the mask changed: a bug"),
            ],
        ),
        (
            [1, 1, 0, 0],
            [0, 0, 0, 0],
            [
                ("none", "2 of 4 tokens denoised again in 1 step"),
                ("none", "none of them changed"),
                ("good", "the other 2 tokens are bit-identical"),
            ],
        ),
        (
            [1, 1, 0, 0],
            [1, 0, 0, 0],
            [
                ("none", "2 of 4 tokens denoised again in 1 step"),
                ("none", "1 of them changed, 1 came out as before"),
                ("good", "the other 2 tokens are bit-identical"),
            ],
        ),
        (
            [1, 1, 0, 0],
            [1, 0, 1, 1],
            [
                ("none", "2 of 4 tokens denoised again in 1 step"),
                ("none", "1 of them changed, 1 came out as before"),
                ("bad", "2 of 2 tokens outside the mask changed: a bug"),
            ],
        ),
        (
            [1, 1, 1, 1],
            [1, 1, 1, 1],
            [
                ("none", "4 of 4 tokens denoised again in 1 step"),
                ("none", "all of them changed"),
                ("none", "no token was kept"),
            ],
        ),
        ([1, 0, 0, 0], None, [("none", "1 of 4 tokens denoised again in 1 step")]),
        (None, [1, 1, 0, 0], [("none", "all 4 tokens sampled in 1 step, none kept")]),
    ],
)
def test_what_an_edit_did(edited, changed, said) -> None:
    assert edit(edited, changed) == said


@each(
    ("pairs", "said"),
    [
        ([(0.4, 0.3), (-0.2, -0.1)], "2 the same way."),
        ([(-0.4, 0.3), (0.4, 0.3)], "1 the same way, 1 opposite ways (round 1)."),
        ([(0.4, 0.0), (0.4, None)], "2 joint alone (round 1, round 2)."),
        ([(0.0, 0.3), (None, 0.3)], "2 factorized alone (round 1, round 2)."),
        ([(0.4, 0.3), (0.0, None)], "1 the same way, 1 by neither."),
    ],
)
def test_joint_beside_factorized(pairs, said) -> None:
    rows = [Credit(f"round {i}", {"joint": j, "factorized": f}, set()) for i, (j, f) in enumerate(pairs, 1)]
    assert FILTERS["interference"](rows) == f"Segments pushed by joint and factorized: {said}"


@each("value", [0.0, 1e-9, -0.004, None])
def test_nothing_is_pushed(value) -> None:
    rows = [Credit("answer", {"joint": value, "factorized": value}, set())]
    assert FILTERS["interference"](rows) == "No assignment pushes anything here: every advantage is 0 or missing."
    other = [Credit("answer", {"segment": 1.0}, set())]
    assert FILTERS["interference"](other) == ""


@each(
    ("share", "digits", "said"),
    [
        (0.0, 0, "0 %"),
        (1e-6, 0, "under 1 %"),
        (0.5, 0, "50 %"),
        (0.9999, 0, "over 99 %"),
        (1.0, 0, "100 %"),
        (0.0, 1, "0.0 %"),
        (0.0002, 1, "under 0.1 %"),
        (0.9996, 1, "over 99.9 %"),
        (1.0, 1, "100.0 %"),
    ],
)
def test_almost_all_is_not_all_and_almost_nothing_not_nothing(share, digits, said) -> None:
    assert percent(share, digits) == said


def cost(spent: float, regenerated: float | None, kept: int = 62) -> tuple[str, str]:
    """What a rollout with one picture of 64 tokens says of its cost, and of the difference in FLOPs."""
    sides = [{"image": {"token_forwards": x, "flops": x}} if x is not None else {} for x in (spent, regenerated)]
    masks = [i >= kept for i in range(64)]
    picture = SegmentRecord(modality="image", tokens=[0] * 64, grid=(8, 8), edited=masks)
    record = RolloutRecord(
        title="", segments=(picture,), stop="answered", stop_reason="", compute=sides[0], full=sides[1]
    )
    return FILTERS["saving"](record), FILTERS["less"](record)


def test_what_edits_saved() -> None:
    assert cost(68, 578) == (
        "97 % of picture tokens kept · 88 % fewer picture token-forwards than regenerated · "
        "68 token-forwards · 68 FLOPs",
        "88 % less",
    )
    assert "over 99 % fewer" in cost(2, 5000)[0] and cost(2, 5000)[1] == "over 99 % less"
    assert "100 % fewer" in cost(0, 512, 64)[0] and "100 % of picture tokens kept" in cost(0, 512, 64)[0]
    assert "no fewer picture token-forwards" in cost(578, 578)[0] and cost(578, 578)[1] == "the same"
    assert "10 % more picture token-forwards" in cost(110, 100)[0] and cost(110, 100)[1] == "10 % more"
    assert "regenerated" not in cost(68, None)[0]


def test_columns_say_the_temperatures_that_were_used() -> None:
    def named(**config: float) -> list[str]:
        side = {"sampled": {"success": 0.5}, "greedy": {"success": 0.6}, "other": 1.0}
        return columns(held_out({"base": side, "config": config}))

    assert named(text_temperature=0.7, image_temperature=0.7) == ["greedy", "sampled, T = 0.7", "result"]
    assert named(text_temperature=1.0, image_temperature=0.5)[1] == "sampled, T = 1 (texts), 0.5 (pictures)"
    assert named() == named(text_temperature=1.0) == ["greedy", "sampled", "result"]


def test_no_change_has_no_sign() -> None:
    figure = Figure("success", {"a": (0.5, 0.5), "b": (0.5, 0.50001), "c": (0.5, 0.4), "d": (None, 0.4)})
    assert [figure.change(c) for c in "abcd"] == ["0.0", "0.0", "−10.0", None]


@each(
    ("before", "after", "prompts", "tone"),
    [
        (0.0, 1.0, 1, "none"),
        (0.0, 1.0, 4, "good"),
        (1.0, 0.0, 4, "bad"),
        (0.5, 0.5, 4, "none"),
        (1.0, 1.0, 1, "none"),
        (0.0, 0.02, 256, "good"),
        (0.0, 0.01, 256, "none"),
    ],
)
def test_a_change_is_coloured_beyond_two_standard_errors_also_from_none_to_all(before, after, prompts, tone) -> None:
    assert Figure("success", {"": (before, after)}).tone("", prompts) == tone


@each(
    ("kind", "row", "said"),
    [
        ("image", {}, "gave no value in the run's 1 step: no response contains a picture. Check max_rounds"),
        ("sequence", {}, "gave no value in the run's 1 step: it always said that it does not apply (None)."),
        ("text", {"lost/r": 0.0}, "it always said that it does not apply (None)."),
        ("text", {"lost/r": 0.004}, "0.4 % of its values were lost to faults."),
        ("text", {"lost/r": 1.0}, "100 % of its values were lost to faults."),
    ],
)
def test_a_silent_reward(kind, row, said) -> None:
    (sentence,) = silent_rewards([{"step": 0, **row}], {"r": kind})
    assert said in sentence and "response contains a response" not in sentence


def page(tmp_path: Path, **given: Any) -> str:
    """The words of a page."""
    html = write_page(tmp_path / "page.html", title="t", **given).read_text()
    return " ".join(re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", html, flags=re.DOTALL).split())


def test_a_page_without_pictures_does_not_explain_pictures(tmp_path: Path) -> None:
    text = SegmentRecord(modality="text", tokens=[1], text="go", words=["go"], step=[0], probability=[1.0])
    picture = SegmentRecord(modality="image", tokens=[0], grid=(1, 1), picture=png(Image.new("RGB", (8, 8))))
    said = []
    for segments in ((text,), (text, picture)):
        record = RolloutRecord(title="", segments=segments, stop="answered", stop_reason="")
        said.append(page(tmp_path, galleries={"all": [record]}))
    for words in ("picture", "outline", "denoised again", "still masked"):
        assert words not in said[0] and words in said[1]
    assert "FLOPs" not in said[0]  # the cost is not known: it is not 0
    assert "How to read" not in page(tmp_path, galleries={"all": []})


def test_what_is_not_finite_is_not_a_figure(tmp_path: Path) -> None:
    rows = [{"step": 0, "seconds": math.nan, "seconds/rollout": math.inf, "success": None}, {"step": 1, "seconds": 2.0}]
    said = page(tmp_path, metrics=rows, summary={"seconds": math.nan, "final": {"success": math.nan}})
    assert "nan" not in said and "2 steps · 2.0 s, 2.0 s a step" in said
    line = plain_line({"success": None, "reward/a": math.nan, "seconds": math.nan, "zero_std/text": 0.999}, 1, 2, None)
    assert line == "step 1/2 | success – | rewards a – | zero-std text over 99% | –"
