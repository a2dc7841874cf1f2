from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from searching.support import harm_on

from laserlm.edit import applied
from laserlm.errors import AnalysisError
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.searching import search
from laserlm.searching.guard import guards_of
from laserlm.store import Store
from laserlm.studies.estimates import Estimate
from laserlm.studies.loss_map import LossMap
from laserlm.studies.map_harms import measure_map_harms, stored_harms
from laserlm.tasks import Example, Scorer, Task


def test_the_map_is_of_single_matrices_each_on_its_own_examples(llama: LanguageModel) -> None:
    pairs = zip("abcdefgh", ["Paris", "Rome"] * 4, strict=True)
    split = Task.of("t", [Example(c, f"The capital of {c} is", a) for c, a in pairs]).every
    base = evaluate(llama, split)
    trials = {}
    for text in ("1.fc_in@0.5", "1.fc_in@0.1", "2.k_proj@0.5", "1-2.fc_up@0.5", "1.fc_in@0.5+2.k_proj@0.5"):
        with applied(llama, text):
            trials[text] = evaluate(llama, split)
    trials["2.k_proj@0.5"] = replace(trials["2.k_proj@0.5"], scores=trials["2.k_proj@0.5"].scores[:3])
    result = LossMap.of(base, trials).cells
    assert [(m.matrix, m.layer, m.name, m.size) for m in result] == [
        ("1.fc_in", 1, "fc_in", "0.1"),
        ("1.fc_in", 1, "fc_in", "0.5"),
        ("2.k_proj", 2, "k_proj", "0.5"),
    ]
    assert [m.loss_change.n for m in result] == [8, 8, 3]
    assert result[1].loss_change.value == pytest.approx(trials["1.fc_in@0.5"].loss - base.loss)
    three = [a.loss - b.loss for b, a in zip(base.scores, trials["2.k_proj@0.5"].scores, strict=False)]
    assert result[2].loss_change.value == pytest.approx(sum(three) / 3)
    assert result[2].loss_change.is_small
    with pytest.raises(AnalysisError, match=r"single matrix.*--strategy race or exhaustive"):
        LossMap.of(base, {"1-2.fc_up@0.5": trials["1-2.fc_up@0.5"]})


def scored(text: str, split: str, losses: Sequence[float], scorer: Scorer = "answer") -> Evaluation:
    scores = tuple(ExampleScore(str(i), False, -loss, 1, "", "") for i, loss in enumerate(losses))
    return Evaluation("m", "t", split, scorer, text, scores, 1.0)


EXAMPLES = [Example(str(i), f"{i}", "answer") for i in range(3)]
GUARDS = [{"name": "self", "hash": "1"}, {"name": "facts", "hash": "2"}]


def keep(store: Store, evaluations: Sequence[Evaluation], **settings: object) -> str:
    """Record scores in a run of a search with two guards, and return its id."""
    settings = {"model": "m", "task": "t", "guards": GUARDS} | settings
    with store.run(kind="search", key=str(settings), settings=settings, provenance={}) as run:
        for e in evaluations:
            run.record(e, EXAMPLES[: e.n])
    return run.id


def test_a_cell_has_the_largest_harm_of_all_guards_where_each_was_measured(tmp_path: Path) -> None:
    on_validation = [scored(t, "validation", [2.0, 2.0, 2.0]) for t in ("", "1.fc_in@0.5", "1.fc_in@0.1", "2.k_proj@0.5")]
    first, second = "guard 0 choosing", "guard 1 choosing"
    on_guards = [
        scored("", first, [1.0, 2.0, 3.0], "perplexity"),
        scored("1.fc_in@0.5", first, [1.1, 2.2, 3.3], "perplexity"),  # more by 0.1, 0.2 and 0.3
        scored("1.fc_in@0.1", first, [1.0, 2.0, 3.0], "perplexity"),
        scored("2.k_proj@0.5", first, [1.5], "perplexity"),  # an interrupted search has one of three
        scored("", second, [1.0, 1.0, 1.0]),
        scored("1.fc_in@0.5", second, [1.1, 1.1, 1.1]),
        scored("2.k_proj@0.5", second, [1.0, 1.0, 1.0]),
        scored("1.fc_in@0.5", "guard 1 measuring", [9.0, 9.0, 9.0]),
    ]
    with Store.open(tmp_path / "runs.db") as store:
        run = keep(store, [*on_validation, *on_guards])
        cells = {m.intervention: m for m in LossMap.read(store, run)}
        assert {text for text, m in cells.items() if m.harm} == {"1.fc_in@0.5"}
        harm = cells["1.fc_in@0.5"].harm
        assert harm is not None
        assert (harm.value, harm.n, cells["1.fc_in@0.5"].guard) == (pytest.approx(0.2), 3, "self")
        # Student's interval of three differences: their deviation is 0.1, and 4.303 is the quantile of two degrees.
        assert list(harm.interval) == pytest.approx([0.2 - 4.303 * 0.1 / 3**0.5, 0.2 + 4.303 * 0.1 / 3**0.5], abs=1e-4)
        # What is measured after the search counts too.
        later = [scored("", second, [1.0, 1.0, 1.0]), scored("1.fc_in@0.1", second, [1.0, 1.0, 4.0])]
        later += [scored(t, first, [1.0, 1.0, 1.0], "perplexity") for t in ("", "1.fc_in@0.1")]
        keep(store, later, harm_of=run)
        keep(store, [scored("", first, [1.0]), scored("2.k_proj@0.5", first, [1.0])], harm_of="another")
        loss_map = LossMap.read(store, run)
        measured = {m.intervention: (m.guard, m.harm.value) for m in loss_map if m.harm}
        assert measured == {"1.fc_in@0.5": ("self", pytest.approx(0.2)), "1.fc_in@0.1": ("facts", pytest.approx(1.0))}
        assert [m.intervention for m in loss_map.with_harm()] == ["1.fc_in@0.1", "1.fc_in@0.5"]
        assert loss_map.harm_limit == pytest.approx(1.0)  # the median rise, the higher of two


def test_harm_is_measured_after_a_search_and_goes_on_after_an_interruption(llama: LanguageModel, tmp_path: Path) -> None:
    cities = ["Paris", "Rome", "Oslo", "Lisbon"] * 5
    task = Task.of("example", [Example(f"{i}", f"The capital {i} is", a) for i, a in enumerate(cities)], scorer="first_token")
    result = search(
        llama, task, strategy="race", grid="1-2.mlp@0.5,0.1", metric="loss", candidates=9, first_rung=2, store=tmp_path / "r.db"
    )
    guards = guards_of(llama, None)
    with Store.open(tmp_path / "r.db") as store:
        run = store.find(result.run)
        before = LossMap.read(store, run.id)
        assert {m.intervention for m in before.with_harm()} == {p.intervention for p in result.points}
        wanted = [m.intervention for m in before.lowest() if m.harm is None]
        assert len(wanted) > 1
        passes: list[tuple[int, int]] = []

        def stop(done: int, total: int) -> None:
            passes.append((done, total))
            if len(passes) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            measure_map_harms(llama, store, run, guards, wanted, on_scored=stop)
        assert measure_map_harms(llama, store, run, guards, wanted, on_scored=lambda *now: passes.append(now)) == {}
        n = len(guards[0].choosing.split)
        assert passes == [(n * k, n * (1 + len(wanted))) for k in range(1, 2 + len(wanted))]
        after = {m.intervention: m for m in LossMap.read(store, run.id)}
        assert all(after[text].harm for text in wanted)
        for text in wanted:
            expected, found = harm_on(llama, guards[0], guards[0].choosing, text), after[text].harm
            assert found is not None
            assert found.value == pytest.approx(expected.change, abs=1e-4)
            assert list(found.interval) == pytest.approx(list(expected.comparison.loss_interval), abs=1e-4)
        for point in result.points:
            assert after[point.intervention].harm == Estimate(
                point.change, point.harms[0].comparison.loss_interval, point.harms[0].comparison.n
            )
        with pytest.raises(AnalysisError, match=r"no guard to measure harm on; search again with --guard"):
            measure_map_harms(llama, store, run, [], wanted)


def test_harm_on_a_part_of_a_guard_is_not_shown(tmp_path: Path) -> None:
    """As an interruption between two chunks of passages leaves it."""
    scores = [scored(t, "guard 0 choosing", [1.0, 2.0, 3.0], "perplexity") for t in ("", "1.fc_in@0.5")]
    with Store.open(tmp_path / "runs.db") as store:
        for n, shown in ((3, {"1.fc_in@0.5"}), (4, set())):
            run = store.find(keep(store, scores, guards=[{"name": "self", "n": n, "hash": "1"}]))
            assert stored_harms(store, run).keys() == shown
