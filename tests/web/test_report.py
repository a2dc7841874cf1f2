from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from laserlm.errors import ReportError, StoreError
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.searching import SearchResult, search
from laserlm.searching.result import Point
from laserlm.store import Store
from laserlm.studies.side_effects import divergence
from laserlm.tasks import Example, Task
from laserlm.web.report import write_report

Make = Callable[..., LanguageModel]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def task(name: str = "capitals", extra: str = "") -> Task:
    cities = ["Paris", "Rome", "true", "false"] * 10
    return Task.of(name, [Example(str(i), f"The capital {extra}{i} is", a, group=f"{extra}{a}") for i, a in enumerate(cities)])


def searched(lm: LanguageModel, store: Path, built: Task, **settings: object) -> SearchResult:
    options = {"grid": "all.mlp@0.2,0.5", "metric": "loss", "strategy": "exhaustive", "store": store} | settings
    return search(lm, built, **options)  # type: ignore[arg-type]


class Tags(HTMLParser):
    """Counts elements, and collects the text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data + " "


def parse_page(file: Path) -> Tags:
    tags = Tags()
    tags.feed(file.read_text(encoding="utf-8"))
    return tags


def test_the_report_holds_what_the_search_found(llama: LanguageModel, tmp_path: Path) -> None:
    result = searched(llama, tmp_path / "runs.db", task())
    assert result.best
    with Store.open(tmp_path / "runs.db") as store:
        assert write_report(store, result.run, tmp_path / "r.html") == tmp_path / "r.html"
    page = parse_page(tmp_path / "r.html")
    text = re.sub(r"\s+", " ", page.text)
    for message in (
        result.run,
        str(result.best),
        f"{result.test.base_loss:.3f}",
        f"{result.test.edited_loss:.3f}",
        f"{result.validation.edited_loss - result.validation.base_loss:+.3f}",
        "18 candidates",
        result.settings["model_hash"],
        result.settings["test"],
        f"laser save {llama.name} --run {result.run}",
        "Loss map",
        "Not measured yet",
        *result.verdict(),
    ):
        assert message in text, message
    assert f"Harm is measured for {len(result.points)} of 18 reductions" in text
    assert len(result.points) > 1
    assert f"laser analyze low-rank {result.run} --map --harm" in text
    assert "src=" not in (tmp_path / "r.html").read_text(encoding="utf-8").replace(HOSTILE, "")[:3000]
    assert not re.findall(
        r"<(?:link|script|img)[^>]+(?:href|src)=[\"'](?!data:)", (tmp_path / "r.html").read_text(encoding="utf-8")
    )


def test_a_race_with_its_screen_a_composition_and_no_gain(llama: LanguageModel, tmp_path: Path) -> None:
    for strategy, message in (("race", "The screen against what was measured"), ("compose", "What was asked")):
        result = searched(llama, tmp_path / "runs.db", task(), strategy=strategy)
        with Store.open(tmp_path / "runs.db") as store:
            write_report(store, result.run, tmp_path / "r.html", overwrite=True)
        assert message in parse_page(tmp_path / "r.html").text
    none = searched(llama, tmp_path / "runs.db", task("other"), grid="0.fc_in@0", metric="accuracy")
    if not none.best:
        with Store.open(tmp_path / "runs.db") as store:
            write_report(store, none.run, tmp_path / "r.html", overwrite=True)
        assert "No candidate beat the unchanged model" in parse_page(tmp_path / "r.html").text


def test_one_point_is_a_table_without_a_picture(llama: LanguageModel, tmp_path: Path) -> None:
    result = searched(llama, tmp_path / "runs.db", task(), max_harm=0.5)
    point = Point(str(result.best), result.validation, result.harms)
    with Store.open(tmp_path / "runs.db") as store:
        with store.run(kind="search", key="point", settings=store.find(result.run).settings, provenance={}) as run:
            run.finish(replace(result, points=(point,)).as_dict())
        write_report(store, run.id, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Gain against harm" in page
    assert "the validation figures of 1 point, so" in re.sub(r"\s+", " ", page)
    assert '"harm",' not in page


def test_harm_is_next_to_the_gain_as_figures_and_as_a_picture(llama: LanguageModel, tmp_path: Path) -> None:
    result = searched(llama, tmp_path / "runs.db", task(), max_harm=0.5)
    (harm,) = result.harms
    other = Point("0.fc_in@drop" + ",".join(map(str, range(0, 80, 2))), result.validation, (replace(harm, guard=HOSTILE),))
    chosen = Point(str(result.best), replace(result.validation, gain=0.5, edited_loss=0.0), (harm,))
    with Store.open(tmp_path / "runs.db") as store:
        info = store.find(result.run)
        with store.run(kind="search", key="points", settings=info.settings, provenance={}) as run:
            run.finish(replace(result, points=(other, chosen, chosen)).as_dict())
        write_report(store, run.id, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", parse_page(tmp_path / "r.html").text)
    low, high = harm.interval
    for message in (
        f"Harm: {harm}.",
        f"perplexity on its own text ×{harm.ratio:.3f} [{low:.3f} to {high:.3f}], n {harm.comparison.size}",
        "Gain against harm",
        f"{result.best} (chosen)",
        "winner's curse",
        f"--run {run.id} --point N",
    ):
        assert message in text, message
    assert page.index("Gain against harm") < page.index("What was asked")
    figure = re.search(r'Plotly\.newPlot\(\s*"harm",\s*(\[.*?\])\s*,\s*\{"', page, re.DOTALL)
    assert figure is not None
    by_name = {trace["name"]: trace for trace in json.loads(figure[1])}
    assert by_name["chosen"]["x"] == [pytest.approx(harm.ratio)]
    assert by_name["chosen"]["y"] == [50.0]
    assert by_name["dominated"]["text"][0].startswith("<b>40 components of 1 matrices</b>")
    assert HOSTILE not in page


def test_removed_components_are_counted_and_explained_once_a_study_has_looked_at_them(
    llama: LanguageModel, tmp_path: Path
) -> None:
    from laserlm.studies import cached_scorer
    from laserlm.studies.removed_components import removed_components

    result = searched(llama, tmp_path / "runs.db", task())
    removed = "0.fc_in@drop0,2-4+2.v_proj@drop1"
    outcome = result.as_dict() | {"best": removed, "strategy": "components"}
    with Store.open(tmp_path / "runs.db") as store:
        with store.run(kind="search", key="components", settings=store.find(result.run).settings, provenance={}) as run:
            run.finish(outcome)
        write_report(store, run.id, tmp_path / "counts.html")
        with cached_scorer(llama, task().test, store) as scorer:
            rows = removed_components(scorer, removed, task().test.examples[:4])
        write_report(store, run.id, tmp_path / "tokens.html")
    counts, tokens = (re.sub(r"\s+", " ", parse_page(tmp_path / f"{n}.html").text) for n in ("counts", "tokens"))
    assert "5 of 18 singular components are removed, from 2 matrices" in counts
    assert "block v_ proj fc_ in all 0 4 4 2 1 1 all 1 4 5 share 20% 80%" in counts
    assert f"which questions want them gone: laser analyze components {run.id} computes it" in counts
    assert f"laser analyze components {run.id} # what the removed components read and write" in counts
    assert f"{rows[0].matrix} {rows[0].component} {rows[0].value:.2f} {rows[0].reads[0]!r}" in tokens
    assert any(prompt in tokens for row in rows for prompt, _ in row.questions)


def test_the_long_text_of_strengths_is_nowhere_in_a_report(llama: LanguageModel, tmp_path: Path) -> None:
    result = searched(llama, tmp_path / "runs.db", task())
    weakened = "+".join(f"{layer}.fc_in@scale" + ",".join(f"{i}=0.9{i % 10}" for i in range(30)) for layer in range(3))
    point = Point(weakened, replace(result.validation, gain=0.5), ())
    with Store.open(tmp_path / "runs.db") as store:
        settings = store.find(result.run).settings
        with store.run(kind="search", key="strengths", settings=settings, provenance={}) as run:
            run.finish(replace(result, best=Intervention.parse(weakened), points=(point, point)).as_dict())
        write_report(store, run.id, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "29=0.99" not in page
    text = re.sub(r"\s+", " ", parse_page(tmp_path / "r.html").text)
    assert re.search(r"90 of \d+ singular components are weakened, in 3 matrices", text)
    assert "which questions want them weaker" in text
    assert f"laser analyze components {run.id} # what the changed components read and write" in text


def test_everything_from_data_stays_text(llama: LanguageModel, tmp_path: Path) -> None:
    llama.name = f"model {HOSTILE}"
    result = searched(llama, tmp_path / "runs.db", task(f"task {HOSTILE}", HOSTILE))
    with Store.open(tmp_path / "runs.db") as store:
        write_report(store, result.run, tmp_path / "hostile.html")
    llama.name = "model"
    plain = searched(llama, tmp_path / "plain.db", task("task", "x "))
    with Store.open(tmp_path / "plain.db") as store:
        write_report(store, plain.run, tmp_path / "plain.html")
    hostile, other = parse_page(tmp_path / "hostile.html"), parse_page(tmp_path / "plain.html")
    assert "img" not in hostile.tags
    assert hostile.tags.count("script") == other.tags.count("script")
    assert HOSTILE in hostile.text


def test_side_effects_that_were_measured_are_in_the_report(llama: LanguageModel, tmp_path: Path) -> None:
    from laserlm.studies import cached_scorer

    result = searched(llama, tmp_path / "runs.db", task())
    best = str(result.best)
    other = task("seats", "seat ").test
    with Store.open(tmp_path / "runs.db") as store:
        with cached_scorer(llama, other, store) as scorer:
            base, reduced = scorer(""), scorer(best)
            kept = scorer.cached(f"divergence under {best} on x", lambda: divergence(llama, ["Rome is old."] * 5, best))
        write_report(store, result.run, tmp_path / "r.html")
    text = re.sub(r"\s+", " ", parse_page(tmp_path / "r.html").text)
    assert "Not measured yet" not in text
    assert f"on 5 neutral prompts: {kept[0]:.3f}" in text
    assert f"{reduced.loss - base.loss:+.3f}" in text
    assert "seats" in text


def test_what_cannot_be_reported_is_an_error(llama: LanguageModel, tmp_path: Path) -> None:
    result = searched(llama, tmp_path / "runs.db", task())
    with Store.open(tmp_path / "runs.db") as store:
        with pytest.raises(ReportError, match="no/such/folder"):
            write_report(store, result.run, Path("no/such/folder/r.html"))
        with pytest.raises(StoreError, match="nothing"):
            write_report(store, "nothing", tmp_path / "r.html")
        settings = {"model": "m", "task": "t"}
        with store.run(kind="search", key="k", settings=settings, provenance={}) as run:
            pass
        with pytest.raises(ReportError, match="interrupted"):
            write_report(store, run.id, tmp_path / "r.html")
        with store.run(kind="search", key="old", settings=settings, provenance={}) as run:
            run.finish({"best": "", "test": {}})
        with pytest.raises(ReportError, match="older laserlm"):
            write_report(store, run.id, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
