"""The page shows the data, escapes what others wrote, stays small, and is never half-written."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unidiff import files
from unidiff.report import page
from unidiff.report.page import environment, write_page
from unidiff.report.record import RewardRecord, RolloutRecord, SegmentRecord, png, record
from unidiff.sampling.rollout import Stop

EVIL = '<script>alert("x")</script>'


class Parsed(HTMLParser):
    """Tags with their attributes, and text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._skip = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        self._skip = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._skip = False

    def handle_data(self, data: str) -> None:
        if not self._skip:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and all(a.get(k) == v for k, v in attributes.items())]


@pytest.fixture(scope="module")
def gallery(demonstrated, model) -> list[RolloutRecord]:
    made = []
    for i, (rollout, views) in enumerate(zip(demonstrated.rollouts, demonstrated.rows)):
        options = {"table": demonstrated.table, "routed": demonstrated.routed, "row": i}
        made.append(record(rollout, views, title=f"board {i}", decode_token=model.tokenizer.decode, **options))
    return made


def test_rollouts_appear_in_order_with_what_they_earned(tmp_path, gallery) -> None:
    shown = Parsed(
        write_page(tmp_path / "page.html", title="A run", galleries={"before": gallery[:1], "after": gallery})
    )
    for made in gallery:
        places = [shown.text.index(part) for part in (made.title, *(s.text for s in made.response if s.text))]
        assert places[0] < max(places)
    assert f"16 rollouts, {sum(bool(g.success) for g in gallery)} of 16 with success" in shown.text
    assert shown.text.count("✓ success") == sum(bool(g.success) for g in gallery + gallery[:1])
    values = [s.advantage for g in gallery for s in g.response if s.advantage]
    for value in values:
        assert f"{'▲' if value > 0 else '▼'} {value:+.2f}".replace("-", "−") in shown.text
    assert "of picture tokens kept" in shown.text and "GFLOPs" not in shown.text and "MFLOPs" in shown.text


@pytest.mark.parametrize("stop", Stop)
def test_what_is_cut_off_is_said_and_a_drawn_picture_is_an_end(tmp_path, gallery, stop) -> None:
    ended = replace(gallery[0], stop=stop.name.lower(), stop_reason=stop.value)
    shown = Parsed(write_page(tmp_path / "page.html", title="A run", galleries={"a": [ended]}))
    assert (f"cut off: {stop.value}" in shown.text) == (stop in (Stop.NO_END, Stop.MAX_ROUNDS))


def test_missing_values_are_shown_only_where_they_were_lost(tmp_path, gallery) -> None:
    said = [
        RewardRecord("judge", None, 1.0, "timeout: no answer in 30 s"),
        RewardRecord("idle", None, 1.0, "not applicable"),
    ]
    first = replace(gallery[0], segments=(replace(gallery[0].response[0], rewards=said),))
    shown = Parsed(write_page(tmp_path / "page.html", title="A run", galleries={"a": [first]}))
    assert "lost: timeout" in shown.text and "idle" not in shown.text
    assert [a["title"] for a in shown.all("li") if a.get("title")] == ["timeout: no answer in 30 s"]


def test_each_picture_is_embedded_once_and_decodes_to_itself(tmp_path, gallery) -> None:
    shown = Parsed(write_page(tmp_path / "page.html", title="A run", galleries={"a": gallery, "b": gallery}))
    distinct = {s.picture for g in gallery for s in g.segments if s.picture}
    images = shown.all("image")
    embedded = {base64.b64decode(a["href"].removeprefix("data:image/png;base64,")) for a in images}
    assert len(images) == len(distinct) and embedded == distinct
    uses = shown.all("use")
    pictures = sum(s.picture is not None for g in gallery for s in g.segments)
    edits = sum(s.picture is not None for g in gallery for s in g.response)  # at large: before, after, and both to move
    assert len(uses) == 2 * (pictures + 4 * edits)
    assert {a["href"] for a in uses} == {f"#{a['id']}" for a in images}


def test_outline_runs_around_the_edited_tokens() -> None:
    outline = environment().filters["outline"]
    edited = np.zeros((3, 4), bool)
    edited[1, 1:3] = True
    segment = SegmentRecord(modality="image", tokens=[0] * 12, grid=(3, 4), edited=edited.flatten().tolist())
    edges = re.findall(r"M(\d) (\d)([hv])1", outline(segment))
    assert sorted(edges) == sorted(
        [("1", "1", "h"), ("2", "1", "h"), ("1", "2", "h"), ("2", "2", "h"), ("1", "1", "v"), ("3", "1", "v")]
    )
    nothing = SegmentRecord(modality="image", tokens=[0] * 12, grid=(3, 4), edited=[False] * 12)
    assert outline(nothing) == ""


def test_whatever_others_wrote_is_escaped(tmp_path, gallery) -> None:
    first = gallery[0]
    text = replace(first.response[0], text=EVIL, words=None)
    words = replace(first.response[0], words=[EVIL, '" onload="x'], rewards=[RewardRecord(EVIL, None, 1.0, EVIL)])
    prompt = replace(first.prompt[0], text=EVIL, words=[EVIL, '" onload="x'])  # its words are shown, being others
    evil = replace(first, title=EVIL, segments=(prompt, text, words), stop="no_end", stop_reason=EVIL)
    evil = replace(evil, rewards=[RewardRecord(EVIL, 1.0)], compute={EVIL: {**first.total}})
    summary = {EVIL: EVIL, "config": {EVIL: EVIL}, "base": {EVIL: 0.5}, "final": {EVIL: 0.6}}
    written = write_page(tmp_path / "page.html", title=EVIL, summary=summary, galleries={EVIL: [evil]})
    html = written.read_text()
    assert (
        html.count("<script") == 1
        and html.count("</script>") == 1
        and "onload=" not in html.replace("&#34; onload=", "")
    )
    assert "&lt;script&gt;" in html


def test_the_page_asks_nothing_of_the_network(tmp_path, gallery) -> None:
    path = write_page(
        tmp_path / "page.html", title="A run", metrics=[{"step": 0, "success": 0.5}], galleries={"a": gallery}
    )
    shown = Parsed(path)
    addresses = [a.get(k) for _, a in shown.tags for k in ("src", "href", "action", "data") if a.get(k)]
    assert addresses and all(a.startswith(("data:image/", "#")) for a in addresses)
    assert "default-src 'none'" in path.read_text()
    script = path.read_text().partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'\"" in path.read_text() and path.read_text().count("<script") == 1
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", path.read_text())


@pytest.mark.slow
def test_sixteen_rollouts_stay_below_five_megabytes(tmp_path) -> None:
    rng = np.random.default_rng(0)
    coarse = [rng.integers(0, 256, (16, 16, 3), dtype=np.uint8) for _ in range(64)]
    pictures = [png(Image.fromarray(c).resize((264, 264), Image.Resampling.BICUBIC)) for c in coarse]
    made = []
    for i in range(16):
        segments = [SegmentRecord(modality="text", prompt=True, text="draw")]
        for j in range(4):
            tokens = list(range(1024))
            said = {"step": [t % 30 for t in tokens[:99]], "probability": rng.random(99).tolist()}
            segments.append(
                SegmentRecord(
                    modality="text", tokens=tokens[:99], text="a thought " * 40, words=["thought "] * 99, **said
                )
            )
            segments.append(
                SegmentRecord(
                    modality="image", tokens=tokens, picture=pictures[4 * i + j], grid=(32, 32),
                    step=[t % 50 for t in tokens], probability=rng.random(1024).tolist(),
                    trace=[[float(t % 7) / 7 if t % 50 >= s else None for t in tokens] for s in range(50)],
                )
            )  # fmt: skip
        made.append(RolloutRecord(title=str(i), segments=tuple(segments), stop="answered", stop_reason=""))
    path = write_page(tmp_path / "page.html", title="large", galleries={"a": made}, open=True)
    assert path.stat().st_size < 5e6 and path.read_text().count("data-trace") == 64


def test_large_pictures_are_embedded_small(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)  # 200 pixels, but 120 kB as PNG
    segment = SegmentRecord(modality="image", tokens=[0] * 16, grid=(4, 4), picture=png(Image.fromarray(noise)))
    made = RolloutRecord(title="a", segments=(segment,), stop="answered", stop_reason="")
    images = Parsed(write_page(tmp_path / "page.html", title="a", galleries={"a": [made]})).all("image")
    assert [a["href"].split(";")[0] for a in images] == ["data:image/jpeg"]
    kept = Image.open(io.BytesIO(base64.b64decode(images[0]["href"].split(",")[1])))
    assert kept.size == (200, 200)


def test_a_given_text_is_shown_as_it_was_and_as_it_was_read(tmp_path) -> None:
    def shown(text: str, words: list[str]) -> str:
        segment = SegmentRecord(modality="text", prompt=True, tokens=[0] * len(words), text=text, words=words)
        made = RolloutRecord(title="a", segments=(segment,), stop="answered", stop_reason="")
        return Parsed(write_page(tmp_path / "page.html", title="a", galleries={"a": [made]})).text

    assert "find the goal" in shown("find the goal", ["find", " the", " goal"])
    assert "read as" not in shown("find the goal", ["find", "the", "goal"])
    assert "find the treasureread as: find the <unk>" in shown("find the treasure", ["find", "the", "<unk>"])


def test_a_token_stands_between_its_spaces_and_says_its_drafts() -> None:
    words = [" go", "right\n", "", " "]
    segment = SegmentRecord(
        modality="text", tokens=[0] * 4, text=" goright\n", words=words, step=[0, 2, 1, 1],
        probability=[0.9, 0.8, 1, 1], trace=[[0.9, 0.3, 1, 1], [None, 0.41, 1, 1], [None, 0.8, None, None]],
    )  # fmt: skip
    tokens = environment().filters["spoken"](segment)
    assert [(t.lead, t.word, t.gap) for t in tokens] == [
        (" ", "go", ""),
        ("", "right", "\n"),
        ("", "", ""),
        ("", " ", ""),
    ]
    assert tokens[0].hint == "set in step 1 of 3, probability 0.90"
    assert tokens[1].hint == "set in step 3 of 3, probability 0.80\ndrafts before: 0.30, 0.41"


def test_held_out_results_and_settings(tmp_path) -> None:
    summary = {
        "task": "FrozenLake",
        "seconds": 245.0,
        "seconds_training": 117.9,
        "eval_size": 256,
        "config": {"learning_rate": 5e-4, "sampler": {"edit": "region"}, "beta": None},
        "base": {"greedy": {"success": 0.473, "image_exact": 0.9}, "sampled": {"success": 0.4}},
        "final": {"greedy": {"success": 0.645, "image_exact": 0.895, "compute": {"total": {"seconds": 2.5}}}},
    }
    path = write_page(tmp_path / "page.html", title="A run", summary=summary)
    shown = Parsed(path)
    for words in (
        "47.3 → 64.5 %",
        "+17.2",
        "−0.5",
        "4 min 05 s",
        "1 min 58 s",
        "learning_rate0.0005",
        "sampler.editregion",
        "3.1 points",
    ):
        assert words in shown.text, words
    assert "compute/total/seconds" in shown.text
    changes = [a["class"] for a in shown.all("span") if (a.get("class") or "").startswith("change")]
    assert changes == ["change good", "change none"]


def test_curves_come_from_metrics_or_else_from_the_picture(tmp_path) -> None:
    rows = [{"step": i, "success": 0.1 * i, "seconds": 2.0, "seconds/rollout": 1.5} for i in range(4)]
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "PNG")
    given = write_page(tmp_path / "a.html", title="A run", curves_png=picture.getvalue())
    assert [a["alt"] for a in Parsed(given).all("img")] == ["Training curves"]
    drawn = Parsed(write_page(tmp_path / "b.html", title="A run", metrics=rows, curves_png=picture.getvalue()))
    assert [a["alt"] for a in drawn.all("img")] == ["Curve: answers, training prompts", "Curve: seconds by phase"]
    assert "4 steps · 8.0 s, 2.0 s a step · rollout 75 %" in drawn.text


def test_an_empty_page_is_still_a_page(tmp_path) -> None:
    shown = Parsed(write_page(tmp_path / "deep" / "page.html", title="nothing yet", galleries={"none": []}))
    assert "nothing yet" in shown.text and "0 rollouts" in shown.text


def test_a_failed_write_leaves_the_old_page(tmp_path, monkeypatch) -> None:
    path = write_page(tmp_path / "page.html", title="old")
    old = path.read_text()

    def fail(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_page(path, title="new")
    assert path.read_text() == old and [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_other_pages_can_build_on_the_parts(gallery) -> None:
    source = (
        '{% import "parts.html" as parts %}{{ parts.picture(segment, pictures, "x") }}{{ parts.library(pictures) }}'
    )
    html = environment().from_string(source).render(segment=gallery[0].response[1], pictures=page.PictureLibrary())
    assert 'href="#picture-0"' in html and 'id="picture-0"' in html and 'data-columns="8"' in html
