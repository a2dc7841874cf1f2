"""The page in a browser: sorting, filters, and strings that would do harm if they were not text."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from laserlm.store import Store
from laserlm.web.leaderboard import build, rows
from laserlm.web.submissions import submission

pytestmark = pytest.mark.browser
Record = Callable[..., str]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>"
VISIBLE = "rows => rows.filter(r => r.checkVisibility()).length"


@pytest.fixture
def site(store: Store, record: Record, tmp_path: Path) -> Path:
    record("1.fc_in@0.5", numbers=(1000, 185, 10, 40), model="model b")
    record("2.fc_in@0.5", numbers=(1000, 185, 40, 10), model="model a")
    record("10.fc_in@0.5", numbers=(1000, 200, 10, 10), model="model c")
    entry = submission(store.find(record("3.fc_in@0.5", model_hash="e" * 64)), credit=HOSTILE, report="https://example.org/x")
    entry["model"]["name"] = entry["task"]["name"] = entry["method"] = HOSTILE
    entry["result"]["base"].pop("loss")
    entry["result"].pop("loss_interval")
    (tmp_path / "subs").mkdir()
    (tmp_path / "subs" / "a.json").write_text(json.dumps(entry))
    return build(tmp_path / "site", store, submissions=tmp_path / "subs", report=lambda *given: given[2].write_text("x")).folder


@pytest.fixture
def opened(browser_page: Any, site: Path) -> Any:
    browser_page.page.goto((site / "index.html").as_uri())
    yield browser_page
    assert browser_page.errors == []
    assert browser_page.dialogs == []
    assert all(url.startswith((site.as_uri() + "/", "data:")) for url in browser_page.requests)


def n_visible(page: Any) -> int:
    return int(page.eval_on_selector_all("tbody tr", VISIBLE))


def column(page: Any, heading: str, number: int) -> list[str]:
    table = page.get_by_role("table", name=heading, exact=True)
    return [text.split("\n")[0].strip() for text in table.locator(f"tbody td:nth-child({number})").all_inner_texts()]


def test_clicks_and_keys_sort_a_table_and_say_how(opened: Any) -> None:
    page = opened.page
    table = page.get_by_role("table", name="worldfacts", exact=True)
    models = ["model a", "model b", "model c", "some/model"]
    assert column(page, "worldfacts", 6) == ["+3.0", "+3.0", "+0.0", "-3.0"]
    assert table.locator("th[aria-sort]").all_inner_texts() == ["Gain, points"]

    table.get_by_role("button", name="Model").click()
    assert column(page, "worldfacts", 1) == models
    assert table.locator("th[aria-sort=ascending]").all_inner_texts() == ["Model"]
    table.get_by_role("button", name="Model").press("Enter")
    assert column(page, "worldfacts", 1) == models[::-1]
    assert table.locator("th[aria-sort]").count() == 1
    assert table.locator("th[aria-sort=descending]").all_inner_texts() == ["Model"]

    gain = table.get_by_role("button", name="Gain")
    gain.click()
    assert column(page, "worldfacts", 6) == ["+3.0", "+3.0", "+0.0", "-3.0"]
    gain.press("Space")
    assert column(page, "worldfacts", 6) == ["-3.0", "+0.0", "+3.0", "+3.0"]

    table.get_by_role("button", name="Intervention").click()
    assert column(page, "worldfacts", 8) == ["[fc_in, 1, 0.5]", "[fc_in, 2, 0.5]", "[fc_in, 3, 0.5]", "[fc_in, 10, 0.5]"]


def test_what_is_not_known_stays_last_both_ways(opened: Any) -> None:
    page = opened.page
    button = page.get_by_role("table", name="fever", exact=True).get_by_role("button", name="Base loss")
    known = ["2.50", "1.24", "1.02"]
    button.click()
    assert column(page, "fever", 3) == [*known, *"–––––"]
    button.click()
    assert column(page, "fever", 3) == [*known[::-1], *"–––––"]


def test_each_filter_leaves_the_rows_that_fit_it(opened: Any, store: Store, site: Path) -> None:
    page = opened.page
    entries = rows(store, site.parent / "subs")
    assert n_visible(page) == len(entries)
    for name in ("model", "task", "method"):
        field = page.get_by_label(name.capitalize(), exact=True)
        values = sorted({getattr(r, name) for r in entries})
        assert sorted(field.locator("option").evaluate_all("all => all.map(o => o.value)")) == ["", *values]
        for value in values:
            field.select_option(value)
            fitting = sum(getattr(r, name) == value for r in entries)
            assert n_visible(page) == fitting > 0
            assert page.get_by_role("status").inner_text() == f"{fitting} of {len(entries)} rows"
        field.select_option("")
        assert n_visible(page) == len(entries)
    text = page.get_by_label("Containing")
    text.fill("GPT-J  fever")
    assert n_visible(page) == sum(r.task == "fever" and "gpt-j" in r.model for r in entries)
    assert page.locator("section:visible").count() == 1
    page.get_by_label("Method", exact=True).select_option("LASER")
    assert n_visible(page) == 1
    text.fill("nothing such")
    assert n_visible(page) == 0
    assert page.get_by_text("No row matches").is_visible()
    text.fill("")
    page.get_by_label("Method", exact=True).select_option("")
    assert n_visible(page) == len(entries)
    assert not page.get_by_text("No row matches").is_visible()


def test_hostile_strings_are_text(opened: Any) -> None:
    page = opened.page
    page.get_by_label("Task", exact=True).select_option(HOSTILE)
    page.get_by_label("Model", exact=True).select_option(HOSTILE)
    page.get_by_label("Containing").fill("onerror=alert(2)")
    assert n_visible(page) == 1
    row = page.locator("tbody tr:visible")
    assert row.locator("td").first.inner_text() == HOSTILE
    assert HOSTILE in row.locator("td").nth(8).inner_text()
    assert page.locator("h2:visible").inner_text() == HOSTILE
    assert page.locator("img, svg, iframe, object").count() == 0
    assert page.locator("script").count() == 1
    for head in page.locator("table:visible th button").all():
        head.click()


def test_a_mark_opens_and_says_what_is_missing(opened: Any) -> None:
    page = opened.page
    row = page.locator("tr[data-task=fever]").first
    row.locator("summary").press("Enter")
    assert row.get_by_text("lacks a sha256 of the model's weights", exact=False).is_visible()
    assert "lacks a sha256" in str(row.locator("details").get_attribute("title"))
    own = page.locator("tr[data-model='model a']")
    own.locator("summary").click()
    assert own.get_by_text("a" * 64).is_visible()


def test_a_report_opens_from_the_page(opened: Any) -> None:
    opened.page.locator("tr[data-model='model a']").get_by_role("link", name="report").click()
    assert opened.page.url.startswith("file://")
    assert opened.page.url.rpartition("/")[0].endswith("/site/reports")
    assert opened.page.inner_text("body") == "x"


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_the_page_is_as_wide_as_the_window(opened: Any, width: int) -> None:
    opened.page.set_viewport_size({"width": width, "height": 800})
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    if width < 800:  # on a phone a row needs no scrolling either
        assert (
            opened.page.evaluate("Math.max(...[...document.querySelectorAll('td')].map(c => c.getBoundingClientRect().right))")
            <= width
        )


@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_do_not_widen_the_page(browser_page: Any, store: Store, record: Record, tmp_path: Path, width: int) -> None:
    entry = submission(store.find(record()), credit="c" * 120)
    for part in (entry["model"], entry["task"]):
        part["name"] = "n" * 120
    entry["method"] = "m" * 120
    entry["harm"] = [{"guard": "g" * 120, "ratio": 1.006, "interval": [1.003, 1.01], "n": 64}]
    (tmp_path / "a.json").write_text(json.dumps(entry))
    folder = build(tmp_path / "site", submissions=tmp_path).folder
    browser_page.page.set_viewport_size({"width": width, "height": 800})
    browser_page.page.goto((folder / "index.html").as_uri())
    assert browser_page.page.evaluate("document.documentElement.scrollWidth") == width
    wide = "Math.max(...[...document.querySelectorAll('table')].map(t => t.scrollWidth))"
    assert browser_page.page.evaluate(wide) <= width


def test_a_stranger_s_word_stays_below_when_sorted(opened: Any, site: Path) -> None:
    page = opened.page
    for _ in range(2):
        page.locator("table").first.locator("th button").first.click()
        claims = page.evaluate("[...document.querySelectorAll('tbody')].map(b => [...b.rows].map(r => 'claim' in r.dataset))")
        assert all(c == sorted(c) for c in claims)


def test_without_scripts_all_rows_are_there(browser: Any, site: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    try:
        page = context.new_page()
        page.goto((site / "index.html").as_uri())
        assert page.locator("tbody tr:visible").count() == len(rows()) + 5
        assert page.locator("button:visible, select:visible, input:visible").count() == 0
    finally:
        context.close()


def test_print_leaves_out_what_is_pressed(opened: Any) -> None:
    opened.page.emulate_media(media="print")
    assert not opened.page.locator("#filters").is_visible()
    assert n_visible(opened.page) == len(rows()) + 5
