"""Make the pictures of the documentation: report, leaderboard and playground with the bundled model's results.

    .venv/bin/python scripts/make_screenshots.py [RESULTS_DATABASE]

Without a database it runs the demo first. The pictures are of the last search. Needs Chromium, and the extras ``app`` and
``test``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
LASER = [sys.executable, "-c", "from laserlm.cli import main; main()"]
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
PROMPT = "The capital of Portugal is"


def laser(*arguments: object) -> None:
    """Run a command of laserlm."""
    subprocess.run([*LASER, *map(str, arguments)], check=True)


def main() -> None:
    """Write the pictures to ``docs/images``."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("no Chromium is installed: apt-get install chromium")
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(folder) / "runs.db"
        if len(sys.argv) == 1:
            laser("demo", "--store", store)
        laser("analyze", "components", "last", "--store", store)
        laser("report", "last", "--store", store, "--out", Path(folder) / "report.html")
        laser("leaderboard", "build", "--store", store, "--out", Path(folder) / "site")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            page = browser.new_page(viewport={"width": 1200, "height": 850})
            page.goto((Path(folder) / "report.html").as_uri())
            page.screenshot(path=IMAGES / "report.png")
            page.goto((Path(folder) / "site" / "index.html").as_uri())
            page.screenshot(path=IMAGES / "leaderboard.png")
            playground(page, store)
            browser.close()


def playground(page: Page, store: Path) -> None:
    """Serve the app and take a picture of an answer."""
    with subprocess.Popen(
        [*LASER, "app", "bundled", "--port", "0", "--store", str(store)], stdout=subprocess.PIPE, text=True
    ) as served:
        try:
            assert served.stdout is not None
            page.goto(served.stdout.readline().strip())
            page.get_by_role("tab", name="Playground").click()
            page.get_by_label("Prompt").fill(PROMPT)
            page.get_by_role("button", name="Answer").click()
            page.wait_for_timeout(8000)
            page.screenshot(path=IMAGES / "playground.png")
        finally:
            served.terminate()


if __name__ == "__main__":
    main()
