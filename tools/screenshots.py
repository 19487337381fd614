"""Makes the pictures of docs/inspect.md anew, with the shipped model and the Chromium of this machine.

python tools/screenshots.py
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from unidiff.command_line import parse
from unidiff.config import setting
from unidiff.program import run_program

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

WIDTH = 1180


@dataclass(frozen=True)
class Config:
    """The output folder."""

    output: str = setting(
        "",
        str(Path(__file__).resolve().parent.parent / "docs" / "images"),
        "folder of rollout.png and compare.png, which are replaced",
    )


def main() -> None:
    out = Path(parse(Config, description=__doc__ or "").output)
    from edit_rollout import main as edit_rollout
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        sys.exit("error: no Chromium is installed; on Debian: apt-get install chromium")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 900})
        words = ["--no_open", "--output", folder]
        page.goto(edit_rollout([*words, "--index", "0,1,2,3,4,5"]).resolve().as_uri())
        rollout(page, out / "rollout.png")
        page.goto(
            edit_rollout([*words, "--index", "0", "--compare", "region,confidence,random,full"]).resolve().as_uri()
        )
        comparison(page, out / "compare.png")
        browser.close()


def rollout(page: Page, path: Path) -> None:
    """A screenshot of the first rollout that shows most features, with its second edit masked."""
    wanted = (":has(.badge.good):has(td.opposed)", ":has(td.opposed)", ":has(.badge.good)", "")
    chosen = next(found for w in wanted if (found := page.locator(f".rollout:has(.pick){w}")).count()).first
    chosen.locator(".pick").nth(min(1, chosen.locator(".pick").count() - 1)).click()
    chosen.locator(".edit-panel:visible input[type=range]").fill("1")
    shoot(page, chosen, path)


def comparison(page: Page, path: Path) -> None:
    """A screenshot of a comparison's first two rounds, half denoised."""
    chosen = page.locator(".comparison").first
    for slider in chosen.locator("input[type=range]").all():
        slider.fill("3")
    page.add_style_tag(content=".comparison .round:nth-of-type(n + 3) { display: none; }")
    shoot(page, chosen, path)


def shoot(page: Page, what: Locator, path: Path) -> None:
    page.add_style_tag(content=".bar { position: static !important; }")
    what.screenshot(path=path)
    print(f"wrote {path}")


if __name__ == "__main__":
    run_program(main)
