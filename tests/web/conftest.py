"""A browser to look at pages with, and finished searches to make them of."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from laserlm.scoring.statistics import mcnemar, paired_difference
from laserlm.store import Store

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@dataclass
class BrowserPage:
    """A page, and what happened on it: addresses asked for, errors on the console, dialogs that opened."""

    page: Page
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


# Not for the whole session: as long as it is open, no other test of this process could run an event loop.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def browser_page(browser: Browser) -> Iterator[BrowserPage]:
    """A new page; errors are those of scripts, of the console and of blocked content."""
    context = browser.new_context()
    seen = BrowserPage(context.new_page())
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("console", lambda message: seen.errors.append(message.text) if message.type == "error" else None)
    seen.page.on("pageerror", lambda error: seen.errors.append(str(error)))

    def dismiss(dialog: Any) -> None:
        seen.dialogs.append(dialog.message)
        dialog.dismiss()

    seen.page.on("dialog", dismiss)
    yield seen
    context.close()


def outcome(best: str, n: int, base: int, corrected: int, broken: int) -> dict[str, Any]:
    """Return the outcome of a search whose numbers follow from these counts."""
    edited = base + corrected - broken
    test = {
        "split": "test",
        "intervention": best,
        "n": n,
        "base": base / n,
        "best": edited / n,
        "gain": (corrected - broken) / n,
        "interval": list(paired_difference(corrected, broken, n)),
        "mcnemar_p": mcnemar(corrected, broken),
        "corrected": corrected,
        "broken": broken,
        "base_loss": 3.5,
        "best_loss": 3.25,
        "loss_interval": [-0.3, -0.2],
    }
    return {"best": best, "strategy": "race", "candidates": 3090, "scored": 54, "complete": True, "test": test}


@pytest.fixture
def record(store: Store) -> Callable[..., str]:
    """Record a search in the store, and return its id; what is given differs from a plain finished one."""

    def record(
        best: str = "1.fc_in@0.5",
        *,
        finish: bool = True,
        kind: str = "search",
        numbers: tuple[int, int, int, int] = (1000, 185, 40, 10),
        key: str = "",
        result: dict[str, Any] | None = None,
        **settings: Any,
    ) -> str:
        full: dict[str, Any] = {
            "model": "some/model",
            "model_hash": "a" * 64,
            "config": "b" * 64,
            "dtype": "torch.float32",
            "task": "worldfacts",
            "validation": "c" * 64,
            "test": "d" * 64,
            "scorer": "answer",
            "grid": "all.all@0.5",
            "metric": "accuracy",
            "strategy": "race",
            "seed": 0,
        } | settings
        made_by = {"versions": {"python": "3.11.7", "laserlm": "0.1"}, "command": ["/home/ann/laser"], "machine": "Linux"}
        name = key or f"{best} {numbers} {kind} {sorted(settings.items())}"
        with store.run(kind=kind, key=name, settings=full, provenance=made_by, restart=True) as run:
            if finish:
                run.finish(outcome(best, *numbers) | (result or {}))
        return run.id

    return record


@pytest.fixture
def store(tmp_path: Path, empty_database: Path) -> Iterator[Store]:
    with Store.open(shutil.copy(empty_database, tmp_path / "runs.db")) as store:
        yield store
