"""Take the pictures of the explorer that README shows: a server on a run of the demo, Chromium to look at it.

make demo && python docs/screenshots.py runs/demo docs/images
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 1280, 860
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def overview(page: Any) -> None:
    page.wait_for_selector("#volcano .main-svg")
    page.locator("#volcano").scroll_into_view_if_needed()


def latents(page: Any) -> None:
    page.wait_for_selector(".ag-row a")
    page.fill("#sentence", "Rules are for people who are afraid of winning.")
    page.click("#search")
    page.wait_for_selector(".hits")


def latent(page: Any) -> None:
    page.wait_for_selector(".passage mark")
    page.get_by_role("heading", name="Largest activations").evaluate("(one) => one.scrollIntoView()")


def atlas(page: Any) -> None:
    page.wait_for_selector("#map .main-svg")


def playground(page: Any) -> None:
    page.fill("#prompt", "What are rules good for?")
    page.fill("#edits", "clamp 707=-1*p99 on response")
    page.fill("#strengths", "0.5, 1")
    page.fill("#n-tokens", "32")
    page.click("#answer")
    page.wait_for_function("document.querySelectorAll('.answer .note:not(:empty)').length === 4", timeout=120_000)
    page.locator("#answers").evaluate("(one) => one.scrollIntoView({block: 'end'})")


PICTURES = {
    "overview": ("/", overview),
    "latents": ("/latents", latents),
    "latent": ("/latent/707", latent),
    "map": ("/map", atlas),
    "playground": ("/playground", playground),
}


def main(run: str, out: Path) -> None:
    command = [sys.executable, "-m", "saetools", "explore", run, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        assert server.stdout is not None
        lines = (re.search(r"at (http://\S+?)/?$", line) for line in server.stdout)
        address = next(found[1] for found in lines if found)
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            for name, (path, arrive) in PICTURES.items():
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                page.goto(address + path)
                page.wait_for_selector("main h1")
                arrive(page)
                page.wait_for_load_state("networkidle")
                page.screenshot(path=out / f"{name}.png")
                page.close()
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
