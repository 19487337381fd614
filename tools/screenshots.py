"""Makes the pictures of docs/inspect.md anew, with the shipped model and the Chromium of this machine.

python tools/screenshots.py
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from edit_rollout import main as edit_rollout
from playwright.sync_api import Locator, Page, sync_playwright

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "images"
WIDTH = 1180


def main() -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("error: no Chromium is installed; on Debian: apt-get install chromium")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        words = ["--no_open", "--output", folder]
        page.goto(edit_rollout([*words, "--index", "0,1,2,3,4,5"]).resolve().as_uri())
        rollout(page)
        page.goto(
            edit_rollout([*words, "--index", "0", "--compare", "region,confidence,random,full"]).resolve().as_uri()
        )
        comparison(page)
        browser.close()


def rollout(page: Page) -> None:
    """The first rollout that has most to show; its second edit is masked."""
    wanted = (":has(.badge.good):has(td.opposed)", ":has(td.opposed)", ":has(.badge.good)", "")
    chosen = next(found for w in wanted if (found := page.locator(f".rollout:has(.pick){w}")).count()).first
    chosen.locator(".pick").nth(min(1, chosen.locator(".pick").count() - 1)).click()
    chosen.locator(".edit-panel:visible input[type=range]").fill("1")
    shoot(page, chosen, "rollout.png")


def comparison(page: Page) -> None:
    """The first two rounds, half denoised."""
    chosen = page.locator(".comparison").first
    for slider in chosen.locator("input[type=range]").all():
        slider.fill("3")
    page.add_style_tag(content=".comparison .round:nth-of-type(n + 3) { display: none; }")
    shoot(page, chosen, "compare.png")


def shoot(page: Page, what: Locator, name: str) -> None:
    page.add_style_tag(content=".bar { position: static !important; }")
    what.screenshot(path=FOLDER / name)
    print(f"wrote {FOLDER / name}")


if __name__ == "__main__":
    main()
