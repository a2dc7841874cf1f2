"""A report in a real browser: the map is there, its hover works, nothing leaves the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from laserlm.models import LanguageModel
from laserlm.searching import search
from laserlm.store import Store
from laserlm.tasks import Example, Task
from laserlm.web.report import write_report

pytestmark = pytest.mark.browser
HOSTILE = "<img src=x onerror='window.hit=1'>"


@pytest.fixture
def report(llama: LanguageModel, tmp_path: Path) -> Path:
    answers = ["Paris", "Rome", "true", "false"] * 10
    examples = [Example(str(i), f"{HOSTILE} number {i} is", a, group=a) for i, a in enumerate(answers)]
    questions = Task.of(f"capitals {HOSTILE}", examples)
    result = search(llama, questions, grid="all.all@0.2,0.5", metric="loss", strategy="race", store=tmp_path / "runs.db")
    with Store.open(tmp_path / "runs.db") as store:
        return write_report(store, result.run, tmp_path / "report.html")


@pytest.mark.parametrize("width", [1280, 390])
def test_the_map_is_there_its_hover_works_and_nothing_leaves_the_machine(browser_page: Any, report: Path, width: int) -> None:
    page = browser_page.page
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(report.as_uri())
    page.wait_for_selector("#map .heatmaplayer image", state="attached")
    assert page.locator("#map .subplot").count() >= 2
    page.locator("#map .nsewdrag").first.scroll_into_view_if_needed()
    box = page.locator("#map .nsewdrag").first.bounding_box()
    hover = page.locator("#map .hoverlayer .hovertext")
    for step in range(1, 40):  # a race leaves cells empty; some cell of the panel has a value
        page.mouse.move(box["x"] + box["width"] * step / 40, box["y"] + box["height"] * (0.25 if step % 2 else 0.75))
        if hover.count():
            break
    assert "change of loss" in hover.first.text_content()
    assert "gain" in hover.first.text_content()
    assert "harm" in hover.first.text_content()
    assert page.locator("#screen .scatterlayer .point").count() >= 3
    assert page.evaluate("window.hit") is None
    assert HOSTILE in page.locator("h1").text_content()
    # Neither the page nor a table scrolls sideways.
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length") == 0
    colour = "e => getComputedStyle(e)"
    light = page.eval_on_selector("body", f"{colour}.backgroundColor"), page.eval_on_selector("#map text", f"{colour}.fill")
    page.emulate_media(color_scheme="dark")
    dark = page.eval_on_selector("body", f"{colour}.backgroundColor"), page.eval_on_selector("#map text", f"{colour}.fill")
    assert [int(c.split("(")[1].split(",")[0]) > 128 for c in (*light, *dark)] == [True, False, False, True]
    assert browser_page.requests == [report.as_uri()]
    assert browser_page.errors == browser_page.dialogs == []


def test_without_scripts_the_tables_are_there(browser_page: Any, report: Path) -> None:
    context = browser_page.page.context.browser.new_context(java_script_enabled=False)
    try:
        bare = context.new_page()
        bare.goto(report.as_uri())
        assert bare.locator("table").count() >= 6
        assert "The lowest change of loss of each block and matrix" in bare.locator("body").text_content()
    finally:
        context.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_map_is_coloured_by_harm_where_it_was_measured(browser_page: Any, report: Path, width: int) -> None:
    page = browser_page.page
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(report.as_uri())
    page.wait_for_selector("#map .heatmaplayer image", state="attached")
    panels = "[...document.querySelectorAll('#map .js-plotly-plot')]"
    state = f"() => {panels}.map(f => [f.data[0].z, f.data[0].zmax])"
    wanted = f"by => {panels}.map(f => [f.layout.meta[by].z, f.layout.meta[by].limit])"
    by_loss = page.evaluate(state)
    keys = page.locator(".key[data-by]")
    assert [keys.nth(i).is_visible() for i in range(2)] == [True, False]
    page.get_by_label("harm", exact=True).check()
    by_harm = page.evaluate(state)
    assert by_harm == page.evaluate(wanted, "harm") != by_loss
    measured = [z for panel, _ in by_harm for row in panel for z in row if z is not None]
    text = " ".join(page.locator("section", has=page.locator("#map")).inner_text().split())
    assert f"Harm is measured for {len(measured)} of" in text
    assert len(measured) > 1
    assert [keys.nth(i).is_visible() for i in range(2)] == [False, True]
    page.get_by_label("change of loss", exact=True).check()
    assert page.evaluate(state) == page.evaluate(wanted, "loss") == by_loss
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert browser_page.requests == [report.as_uri()]
    assert browser_page.errors == []
