"""The page in a headless Chromium: it loads clean, its pictures move, keys work, columns align, nothing overflows."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unidiff.report.filters import edits_of
from unidiff.report.gallery import records
from unidiff.report.page import Comparison, write_page
from unidiff.report.record import RewardRecord, RolloutRecord

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed: the page is not tried in a browser", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

pytestmark = pytest.mark.slow  # the browser itself takes 8 seconds of a processor

EVIL = '"><script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">'


@pytest.fixture(scope="module")
def made(traced: Any, model: Any) -> list[RolloutRecord]:
    """Rollouts whose edits take 3 steps; the first one has a picture and hostile texts."""
    all_records = sorted(records(model, traced), key=lambda r: len(edits_of(r)), reverse=True)
    first = all_records[0]
    segments = [
        replace(s, text=EVIL, words=[EVIL] * len(s.tokens)) if s.modality == "text" else s for s in first.segments
    ]
    lost = RewardRecord("judge", None, 1.0, f"error: {EVIL}")
    segments[2] = replace(segments[2], rewards=[*segments[2].rewards, lost])
    return [replace(first, title=EVIL, segments=tuple(segments)), *all_records[1:]]


@pytest.fixture(scope="module")
def page_path(made: list[RolloutRecord], tmp_path_factory: pytest.TempPathFactory) -> Path:
    compared = Comparison(EVIL, {"region": made[0], "random": made[1], "full": made[2]})
    path = tmp_path_factory.mktemp("page") / "page.html"
    metrics = [{"step": i, "success": 0.1 * i} for i in range(3)]
    galleries = {"rollouts": made, EVIL: made[:1]}
    return write_page(path, title=EVIL, metrics=metrics, galleries=galleries, comparisons=[compared], open=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Any, page_path: Path) -> Iterator[Callable[..., Any]]:
    """visit(width) -> the page in a window of that width; errors, dialogs and requests fail the test at its end."""
    troubles: list[str] = []
    pages = []

    def go(width: int = 1280, scheme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: troubles.append(request.url) if request.url.startswith("http") else None)
        page.goto(page_path.as_uri())
        pages.append(page)
        return page

    yield go
    for page in pages:
        page.close()
    assert not troubles


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 820, 1280])
def test_it_loads_clean_and_does_not_scroll_sideways(visit, width, scheme) -> None:
    page = visit(width, scheme)
    for kind in ("step", "probability", "edit"):
        page.check(f"input[value={kind}]")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) > 380) == (scheme == "light")
    assert page.evaluate("window.hacked") is None and page.title() == EVIL


def test_no_script_but_the_page_s_own_runs(browser, page_path, tmp_path) -> None:
    """Were something not escaped, the policy would still stop it."""
    broken = tmp_path / "page.html"
    injected = "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
    broken.write_text(page_path.read_text().replace("<main>", "<main>" + injected, 1))
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(broken.as_uri())
    assert page.evaluate("window.hacked") is None and sum("inline" in text for text in refused) >= 2
    page.locator(".edit-panel").first.locator("input[type=range]").fill("1")
    assert page.locator(".stage .masked").count()  # its own script does
    page.close()


def test_failures_are_one_click_apart(visit, made) -> None:
    page = visit()
    failed = page.locator(".rollout[data-failure]").all()
    assert len(failed) == sum(r.success is False for r in [*made, made[0]]) > 1
    link = page.locator("#next-failure")
    assert link.inner_text() == f"✗ next failure of {len(failed)}"
    for one in [*failed, failed[0]]:
        link.click()
        assert 0 <= one.bounding_box()["y"] < 200


def test_the_slider_changes_the_picture(visit, made) -> None:
    page, edit = visit(), edits_of(made[0])[0]
    panel = page.locator(".edit-panel").first
    slider, stage = panel.locator("input[type=range]"), panel.locator(".stage")
    assert slider.get_attribute("max") == str(edit.segment.steps + 1) == "4"
    assert stage.locator(".masked").count() == 0
    shots = [stage.screenshot()]
    for done in (2, 1, 0):
        slider.fill(str(done + 1))
        assert stage.locator(".masked").count() == sum(s >= done for s in edit.segment.step)
        shots.append(stage.screenshot())
    slider.fill("0")
    assert panel.locator("output").inner_text() == "the picture before"
    assert stage.locator("use.before").is_visible() and not stage.locator("use.after").is_visible()
    assert len(set(shots)) == len(shots)


def test_confidence_of_masked_tokens_is_the_trace(visit, made) -> None:
    page, edit = visit(), edits_of(made[0])[0]
    page.check("input[value=probability]")
    panel = page.locator(".edit-panel").first
    for done in (0, 1):
        panel.locator("input[type=range]").fill(str(done + 1))
        shown = [int(t) for t in panel.locator(".stage .overlay text").all_text_contents()]
        known = zip(edit.segment.trace[done], edit.segment.step, edit.segment.probability, edit.segment.edited)
        values = [in_letters(p) if step >= done else round(100 * own) for p, step, own, edited in known if edited]
        assert shown == [v for v in values if v < 100]


def in_letters(probability: float) -> int:
    """Percent of a probability that went through one of 64 letters."""
    return int(round(63 * probability) / 0.63 + 0.5)


def test_keys_step_and_play(visit) -> None:
    page = visit()
    panel = page.locator(".edit-panel").first
    value = lambda: int(panel.locator("input[type=range]").input_value())  # noqa: E731
    panel.focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert value() == 2
    page.keyboard.press("ArrowRight")
    assert value() == 3
    panel.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    assert value() == 2  # the slider's own keys
    panel.focus()
    page.keyboard.press(" ")
    playwright.expect(panel.locator(".play")).to_have_text("❚❚ stop")
    playwright.expect(panel.locator(".play")).to_have_text("▶ play", timeout=5000)
    assert value() == 4


def test_choosing_a_picture_opens_its_edit(visit, made) -> None:
    page = visit()
    rollout = page.locator(".rollout:not(.comparison)").first
    picks = rollout.locator(".pick")
    assert picks.count() == len(edits_of(made[0])) >= 2
    picks.nth(1).focus()
    page.keyboard.press("Enter")
    assert not rollout.locator(".edit-panel").nth(0).is_visible() and rollout.locator(".edit-panel").nth(1).is_visible()
    assert [p.get_attribute("aria-pressed") for p in picks.all()[:2]] == ["false", "true"]


@pytest.mark.parametrize(("width", "columns"), [(1280, 3), (390, 2)])
def test_columns_of_a_comparison_align(visit, width, columns) -> None:
    page = visit(width)
    for row in page.locator(".comparison .round").all():
        boxes = [cell.bounding_box() for cell in row.locator(".columns > div").all()]
        lefts = sorted({round(b["x"]) for b in boxes})
        assert len(lefts) == columns and len({round(b["width"]) for b in boxes}) == 1
        assert len({round(b["y"]) for b in boxes[:columns]}) == 1
        pictures = [cell.locator(".stage").first for cell in row.locator(".columns > div").all()[:columns]]
        tops = {round(p.bounding_box()["y"]) for p in pictures if p.count()}
        assert len(tops) <= 1, "pictures side by side stand at different heights"
    row = page.locator(".comparison .round[data-scrub]").first
    row.locator("input[type=range]").fill("1")
    assert all(stage.locator(".masked").count() for stage in row.locator(".stage").all())


# ---------------------------------------------------------------- tips


def first_hint(made) -> str:
    segment = next(s for s in made[0].response if s.modality == "text")
    return f"set in step {segment.step[0] + 1} of {segment.steps}, probability {segment.probability[0]:.2f}"


def words_of(page: Any) -> Any:
    """The tokens of the first sampled text."""
    return page.locator(".rollout:not(.comparison) .words:has(.token[data-tip])").first.locator(".token")


def test_a_word_that_is_pointed_at_says_its_step_and_probability(visit, made) -> None:
    page, tip = visit(), None
    tip = page.locator("#tip")
    assert not tip.is_visible()
    words_of(page).first.hover()
    assert tip.is_visible() and tip.inner_text().split("\n")[0] == first_hint(made)
    page.locator("h1").hover()
    assert not tip.is_visible()


def test_keys_go_from_word_to_word(visit, made) -> None:
    page = visit()
    tip, words = page.locator("#tip"), words_of(page)
    before = page.locator(".edit-panel input[type=range]").first.input_value()
    page.locator(".tiles a").first.focus()
    while not page.evaluate("document.activeElement.matches('.token')"):
        page.keyboard.press("Tab")
    assert tip.is_visible() and tip.inner_text().split("\n")[0] == first_hint(made)
    assert words.first.get_attribute("aria-describedby") == "tip"
    page.keyboard.press("End")
    assert words.last.evaluate("e => e === document.activeElement")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    assert words.last.evaluate("e => e === document.activeElement") and tip.is_visible()
    page.keyboard.press("Escape")
    assert not tip.is_visible()
    assert page.locator(".edit-panel input[type=range]").first.input_value() == before  # arrows moved no picture
    stops = page.locator(".words").first.locator("xpath=ancestor::article").locator(".token[tabindex='0']").count()
    texts = (
        page.locator(".words").first.locator("xpath=ancestor::article").locator(".words:has(.token[data-tip])").count()
    )
    assert stops == texts  # one stop of the Tab key for a text


def test_a_tap_shows_the_tip_inside_a_narrow_screen(browser, page_path, made) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 800}, has_touch=True, is_mobile=True)
    page.goto(page_path.as_uri())
    tip = page.locator("#tip")
    for word in (words_of(page).first, words_of(page).last):
        word.tap()
        box = tip.bounding_box()
        assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 390 and tip.inner_text()
    page.locator("h1").tap()
    assert not tip.is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.close()


def test_a_cell_says_its_step_and_a_lost_reward_why(visit, made) -> None:
    page, segment = visit(), edits_of(made[0])[0].segment
    stage, tip = page.locator(".edit-panel .stage").first, page.locator("#tip")
    side = stage.bounding_box()["width"] / segment.grid[1]
    for at in (segment.edited.index(True), segment.edited.index(False)):
        row, column = divmod(at, segment.grid[1])
        stage.hover(position={"x": (column + 0.5) * side, "y": (row + 0.5) * side})
        known = f"set in step {segment.step[at] + 1}, probability {segment.probability[at]:.2f}"
        assert tip.inner_text() == f"row {row}, column {column}: {known if segment.edited[at] else 'kept'}"
    page.locator("li[data-tip]").first.focus()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Tab")
    assert tip.inner_text() == f"error: {EVIL}"


def test_every_control_has_a_name(visit) -> None:
    page = visit()
    nameless = """[...document.querySelectorAll("button, input, svg[role=img], nav, img")].filter(e => !(
        e.getAttribute("aria-label") || e.labels?.length || e.textContent.trim() || e.alt
        || e.querySelector("[aria-label]")
    )).map(e => e.outerHTML.slice(0, 80))"""
    assert page.evaluate(nameless) == []
