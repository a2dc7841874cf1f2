from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from laserlm.errors import ReportError, StoreError
from laserlm.models import LanguageModel
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import Interval
from laserlm.searching import search
from laserlm.store import RunInfo, Store
from laserlm.studies.estimates import Estimate
from laserlm.studies.loss_map import LossMap
from laserlm.tasks import Example, Task
from laserlm.web import explorer

HOSTILE = "</td></table><script>alert(1)</script><img src=x onerror=alert(2)>\"'`${alert(3)}{{value}}"
EXAMPLES = tuple(Example(f"e{i}", f"Prompt {i} {HOSTILE} is", f"answer {i}") for i in range(6))


def evaluation(text: str, losses: Sequence[float], right: str = "", split: str = "validation") -> Evaluation:
    """Return scores with these losses; ``right`` holds the places of the correct ones."""
    scores = tuple(
        ExampleScore(e.id, str(i) in right, -2 * loss, 2, f"said {i} {text or 'base'}", e.answer)
        for i, (e, loss) in enumerate(zip(EXAMPLES, losses, strict=False))
    )
    return Evaluation("some/model", "facts", split, "answer", text, scores, 1.0)


@pytest.fixture
def results(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "runs.db") as results:
        yield results


@pytest.fixture
def record(results: Store) -> Callable[..., RunInfo]:
    """Record a search that made some evaluations."""

    def record(*arguments: Evaluation, best: str | None = None, kind: str = "search", fail: Sequence[str] = ()) -> RunInfo:
        settings = {"model": "some/model", "task": "facts"}
        with results.run(kind=kind, key=f"{len(results.runs())}", settings=settings, provenance={}) as run:
            for e in arguments:
                run.record(e, EXAMPLES[: e.n])
            for text in fail:
                run.fail("validation", text, "a log-probability of nan", start=len(run.trials("validation")[0][text].scores))
            if best is not None:
                run.finish({"best": best, "test": {"gain": 0.0}})
        return results.find(run.id)

    return record


BASE = evaluation("", [1, 2, 3, 4, 5, 6], right="01")
TRIALS = (
    evaluation("0.fc_in@0.5", [0, 1, 2, 3, 4, 5], right="013"),  # loss less by 1
    evaluation("0.fc_in@0.1", [3, 4, 5, 6, 7, 8], right=""),  # more by 2
    evaluation("2.fc_in@r3", [1.5, 2], right="1"),  # more by 0.25, on two examples
    evaluation("2.v_proj@0.5:bottom", [5, 6, 7, 8, 9, 10], right="0"),  # more by 4
    evaluation("0.fc_in@0.5+2.v_proj@0.5", [1, 2, 3, 4, 5, 6]),  # no place on a map
)


def test_a_map_has_of_every_matrix_the_size_of_the_lowest_loss(results: Store, record: Callable[..., RunInfo]) -> None:
    run = record(BASE, *TRIALS)
    loss_map = explorer.loss_map(results, run.id)
    assert sorted(m.intervention for m in loss_map) == sorted(t.intervention for t in TRIALS[:4])
    assert loss_map.sizes == ["0.1", "0.5", "0.5:bottom", "r3"]
    shown = explorer.table(loss_map)
    assert shown.columns == ("v_proj", "fc_in")
    cells = {block: [m and (m.intervention, m.loss_change.value, m.loss_change.n) for m in row] for block, row in shown.rows}
    assert cells == {
        "0": [None, ("0.fc_in@0.5", -1.0, 6)],
        "2": [("2.v_proj@0.5:bottom", 4.0, 6), ("2.fc_in@r3", 0.25, 2)],
    }
    assert loss_map.lowest().colour_limit == 4  # the larger of the fall, 1, and the median rise
    assert explorer.colour(4, 4) == explorer.colour(40, 4) == "hsl(28 80% 60%)"
    assert explorer.colour(-2, 4) == "hsl(205 80% 81%)"
    assert explorer.colour(0, 4) == "hsl(28 80% 100%)"


def test_one_size_is_shown_by_itself(results: Store, record: Callable[..., RunInfo]) -> None:
    loss_map = explorer.loss_map(results, record(BASE, *TRIALS).id)
    shown = explorer.table(loss_map, "0.1")
    assert [m.loss_change.value for _, row in shown.rows for m in row if m is not None] == [2]
    assert [block for block, _ in shown.rows] == ["0", "2"]
    with pytest.raises(ReportError, match=r"nothing at size '0.9'; it has 0.1, 0.5, 0.5:bottom, r3"):
        explorer.table(loss_map, "0.9")


def test_the_map_by_harm_has_the_cells_whose_harm_was_measured(results: Store, record: Callable[..., RunInfo]) -> None:
    run = record(BASE, *TRIALS)
    measured = Estimate(0.125, Interval(0.0625, 0.25), 64)
    harms = {"0.fc_in@0.1": measured, "2.v_proj@0.5:bottom": replace(measured, value=-0.5)}
    loss_map = LossMap(
        tuple(
            replace(m, harm=harms.get(m.intervention), guard=HOSTILE if m.intervention in harms else "")
            for m in explorer.loss_map(results, run.id)
        )
    )
    assert explorer.measured(loss_map) == "2 of 4"
    shown = explorer.table(loss_map, by_harm=True)
    # The lowest of a matrix is that of those that were measured; rows and columns are those of the whole map.
    assert [[m and m.intervention for m in row] for _, row in shown.rows] == [
        [None, "0.fc_in@0.1"],
        ["2.v_proj@0.5:bottom", None],
    ]
    seen = Tags()
    html = explorer.table_html(shown, by_harm=True, measured=explorer.measured(loss_map))
    seen.feed(html)
    assert seen.picks == ["0.fc_in@0.1", "2.v_proj@0.5:bottom"]
    assert "measured for 2 of 4 reductions" in " ".join(seen.text.split())
    assert "+0.125" in seen.text
    assert "-0.500" in seen.text
    assert html.count(f"background: {explorer.colour(-0.5, 0.5)}") == 1
    assert "img" not in seen.tags
    nothing = explorer.table(loss_map, "r3", by_harm=True)
    assert nothing.cells == []
    assert "<button" not in explorer.table_html(nothing, by_harm=True, measured="2 of 4")
    assert "harm not measured" in explorer.table_html(explorer.table(loss_map))


def test_harm_that_is_measured_later_is_a_change_of_the_map(results: Store, record: Callable[..., RunInfo]) -> None:
    run = record(BASE, *TRIALS)
    assert explorer.last_change(results, run.id) == run.updated
    settings = {"model": "some/model", "task": "facts", "harm_of": run.id}
    with results.run(kind="scores", key="harm", settings=settings, provenance={}):
        pass
    (later,) = [r for r in results.runs() if r.kind == "scores"]
    assert explorer.last_change(results, run.id) == later.updated > run.updated


def test_a_candidate_is_paired_with_the_same_examples_of_the_unchanged_model(
    results: Store, record: Callable[..., RunInfo]
) -> None:
    run = record(BASE, *TRIALS)
    full = explorer.changes(results, run.id, "0.fc_in@0.5")
    assert [f.id for f in full.of("corrected")] == ["e3"]
    assert [(f.prompt, f.answer, f.base, f.edited) for f in full.of("corrected")] == [
        (EXAMPLES[3].prompt, "answer 3", "said 3 base", "said 3 0.fc_in@0.5")
    ]
    assert full.of("broken") == []
    dropped = explorer.changes(results, run.id, "2.fc_in@r3")
    assert (dropped.comparison.n, dropped.comparison.base, dropped.comparison.edited) == (2, 1.0, 0.5)
    assert [f.id for f in dropped.of("broken")] == ["e0"]
    summary = explorer.summary(dropped)
    assert summary["examples"] == "2 of validation, which the search chose by"
    assert summary["gain"].startswith("-50.0 points [-")
    assert summary["change of loss"].startswith("+0.2500 nats per token")
    single = explorer.changes(results, record(BASE, evaluation("1.v_proj@0.5", [3])).id, "1.v_proj@0.5")
    assert explorer.summary(single)["change of loss"] == "+2.0000 nats per token (a single example)"
    for text, missing in (("1.fc_in@0.5", "'1.fc_in@0.5'"), ("", "''")):
        with pytest.raises(ReportError, match=f"no scores of {missing} on validation"):
            explorer.changes(results, run.id, text)


def test_a_search_that_grades_written_text_shows_that_accuracy_and_no_other(
    results: Store, record: Callable[..., RunInfo]
) -> None:
    text = "0.fc_in@0.5"
    written = [evaluation(t, [1] * 6, right, "finalists") for t, right in (("", "0"), (text, "0123"))]
    run = record(BASE, *TRIALS, *written)
    finalist = explorer.summary(explorer.changes(results, run.id, text), "contains")
    assert finalist["accuracy by contains"] == "16.7% before, 66.7% after"
    assert finalist["examples"] == "6 of validation, which the search chose by"
    other = explorer.summary(explorer.changes(results, run.id, "0.fc_in@0.1"), "contains")
    assert other.keys() == {"examples", "change of loss", "accuracy by contains"}
    assert other["accuracy by contains"].startswith("not measured")


def test_trials_that_failed_are_not_offered(results: Store, record: Callable[..., RunInfo]) -> None:
    run = record(BASE, *TRIALS, fail=["0.fc_in@0.5"])
    assert "0.fc_in@0.5" not in explorer.candidates(results, run.id)
    assert "0.fc_in@0.5" not in [m.intervention for m in explorer.loss_map(results, run.id)]
    assert explorer.candidates(results, run.id) == [t.intervention for t in TRIALS[1:]]


def test_what_the_best_corrects_on_test_is_given_where_it_has_a_prompt(
    results: Store, record: Callable[..., RunInfo], monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = [evaluation(text, [1] * 6, right, "test") for text, right in (("", "0"), ("0.fc_in@0.5", "024"))]
    run = record(BASE, *TRIALS, *sides, best="0.fc_in@0.5")
    assert [f.id for f in explorer.corrected(results, run)] == ["e2", "e4"]
    monkeypatch.setattr(results, "examples", lambda *_: tuple(replace(e, prompt=e.prompt * (e.id != "e2")) for e in EXAMPLES))
    assert [f.id for f in explorer.corrected(results, run)] == ["e4"]
    assert explorer.corrected(results, record(BASE, best="")) == []
    assert explorer.corrected(results, record(BASE)) == []


def test_searches_are_listed_newest_first_by_name(results: Store, record: Callable[..., RunInfo]) -> None:
    first, _, last = record(BASE, best="0.fc_in@0.5"), record(BASE, kind="scores"), record(BASE)
    assert [r.id for r in explorer.searches(results)] == [last.id, first.id]
    assert explorer.name_of(first) == f"{first.id}: some/model on facts, {first.created:%Y-%m-%d}, 0.fc_in@0.5"
    assert explorer.name_of(last).endswith("interrupted")
    assert explorer.name_of(record(BASE, best="")).endswith("the unchanged model")


def test_what_has_no_map_is_reported(results: Store, record: Callable[..., RunInfo]) -> None:
    with pytest.raises(ReportError, match="has not scored the unchanged model yet"):
        explorer.loss_map(results, record().id)
    with pytest.raises(ReportError, match="nothing to map"):
        explorer.loss_map(results, record(BASE, TRIALS[-1]).id)
    with pytest.raises(StoreError, match="no run 'abc'"):
        explorer.loss_map(results, "abc")


class Tags(HTMLParser):
    """Collects the elements and attributes of a page, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.picks: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}
        self.picks += [value or "" for name, value in attrs if name == "data-pick"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_map_is_buttons_that_hold_their_reduction_and_nothing_else(results: Store, record: Callable[..., RunInfo]) -> None:
    loss_map = explorer.loss_map(results, record(BASE, *TRIALS).id)
    hostile = LossMap(tuple(replace(m, name=HOSTILE, matrix=f"{m.layer}.{HOSTILE}") for m in loss_map))
    seen = Tags()
    seen.feed(explorer.table_html(explorer.table(hostile, "0.5")))
    assert seen.picks == [f"0.{HOSTILE}@0.5"]
    assert seen.tags == {"p", "div", "table", "thead", "tbody", "tr", "th", "td", "button"}
    assert {name for name in seen.names if name.startswith("on")} == set()
    assert HOSTILE in seen.text


def test_a_search_is_explored(llama: LanguageModel, tmp_path: Path) -> None:
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    rows = [Example(f"{i}", f"The capital of {a} is", cities[i % 5], fact=f"{i}") for i, a in enumerate("abcdefghijklmnopqrst")]
    result: Any = search(
        llama,
        Task.of("example", rows, scorer="first_token"),
        strategy="exhaustive",
        grid="1-2.mlp@0.5,0.1",
        metric="loss",
        store=tmp_path / "real.db",
    )
    with Store.open(tmp_path / "real.db") as results:
        shown = explorer.table(explorer.loss_map(results, result.run))
        cells = [m for _, row in shown.rows for m in row if m is not None]
        assert len(cells) == 6
        lowest = min(cells, key=lambda m: m.loss_change.value)
        assert lowest.intervention == str(result.best)
        assert lowest.loss_change.value == pytest.approx(result.validation.edited_loss - result.validation.base_loss)
        for cell in cells:
            summary = explorer.changes(results, result.run, cell.intervention)
            assert summary.comparison.gain == cell.gain.value
        test = explorer.corrected(results, results.find(result.run))
        assert len(test) == result.test.corrected
