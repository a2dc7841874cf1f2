"""What is recorded comes back, and only once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sys
from datetime import UTC, datetime

import pytest
from sqlalchemy.exc import IntegrityError

from laserlm.errors import RunBusyError, StoreError
from laserlm.store import Store
from laserlm.tasks.example import Example


def test_an_evaluation_comes_back_equal(store, store_url, sample):
    hard = (0.1 + 0.2, math.pi, sys.float_info.min, sys.float_info.max, 5e-324, 1e22, math.inf, 1 / 3, 0.0, 2.0**-1074)
    plain = sample.evaluation("20-27.mlp@0.1", classes=("yes", "no"), seconds=math.e)
    scores = tuple(
        dataclasses.replace(s, logprob=-x, predicted=f"Zürich \u2028 '{x}' \"%\"", answer=f"{s.answer} ")
        for s, x in zip(plain.scores, hard, strict=True)
    )
    odd = dataclasses.replace(plain, scores=scores)
    with store.run(**sample.work()) as run:
        run.record(odd, sample.EXAMPLES)
        run.record(sample.evaluation(), sample.EXAMPLES)
        assert run.evaluation("validation", "20-27.mlp@0.1") == odd
        assert run.evaluation("test", "20-27.mlp@0.1") is None
    with Store.open(store_url) as again:
        assert again.evaluation(run.id, "validation", "20-27.mlp@0.1") == odd
        assert again.evaluation(run.id, "validation", "") == sample.evaluation()
        assert again.evaluation(run.id, "validation", "none") is None


def test_scores_keep_the_order_of_the_split(store, sample):
    backwards = sample.EXAMPLES[::-1]
    forwards = sample.evaluation("a")
    turned = sample.evaluation("b", examples=backwards)
    with store.run(**sample.work()) as run:
        run.record(forwards, sample.EXAMPLES)
        run.record(turned, backwards)
        assert run.evaluation("validation", "b") == turned
        assert [s.id for s in turned.scores] == [e.id for e in backwards]


def test_an_example_is_stored_once_for_all_trials_and_runs(store, sql, sample):
    for key in ("one", "two"):
        with store.run(**sample.work(key)) as run:
            for intervention in "abc":
                run.record(sample.evaluation(intervention), sample.EXAMPLES)
    assert sql("select count(*), count(distinct prompt) from examples") == [(10, 10)]
    assert sql("select count(*) from scores") == [(2 * 3 * 10,)]


def test_an_example_that_changed_under_its_id_is_another(store, sample):
    new = (dataclasses.replace(sample.EXAMPLES[0], answer="City X"), *sample.EXAMPLES[1:])
    with store.run(**sample.work()) as run:
        run.record(sample.evaluation("old"), sample.EXAMPLES)
        run.record(sample.evaluation("new", examples=new), new)
        assert run.evaluation("validation", "old").scores[0].answer == "City 0"
        assert run.evaluation("validation", "new").scores[0].answer == "City X"


def test_an_example_may_be_in_a_split_twice(store, sample):
    twice = sample.EXAMPLES[:2] * 2
    with store.run(**sample.work()) as run:
        run.record(sample.evaluation("a", examples=twice), twice)
        assert run.evaluation("validation", "a") == sample.evaluation("a", examples=twice)


def test_more_examples_than_one_query_takes(store, sample):
    many = tuple(Example(str(i), f"Prompt {i}", "yes") for i in range(1234))
    with store.run(**sample.work()) as run:
        run.record(sample.evaluation("a", examples=many[:700]), many[:700])
        run.record(sample.evaluation("b", examples=many), many)
        assert run.evaluation("validation", "b") == sample.evaluation("b", examples=many)


def test_trials_are_listed_in_order_with_their_figures(store, sample):
    with store.run(**sample.work()) as run:
        run.record(sample.evaluation("b"), sample.EXAMPLES)
        run.fail("validation", "a", "matrix has NaN")
        assert run.trials("validation")[1] == {"a": "matrix has NaN"}
        assert run.evaluation("validation", "a") is None
    done, failed = store.trials(run.id)
    scored = sample.evaluation("b")
    assert (done.split, done.intervention, done.status, done.reason) == ("validation", "b", "done", None)
    assert (done.n, done.accuracy, done.loss) == (scored.n, scored.accuracy, scored.loss)
    assert (done.seconds, done.scorer) == (scored.seconds, "answer")
    assert dataclasses.astuple(failed) == ("validation", "a", "failed", "matrix has NaN", *[None] * 5)


@pytest.mark.parametrize("first", ["record", "fail"])
@pytest.mark.parametrize("second", ["record", "fail"])
def test_a_trial_is_recorded_once(store, sql, sample, first, second):
    def add(how, run):
        if how == "fail":
            run.fail("validation", "a", "no")
        else:
            run.record(sample.evaluation("a"), sample.EXAMPLES)

    with store.run(**sample.work()) as run:
        add(first, run)
        with pytest.raises(StoreError, match="already has a trial of 'a' on validation"):
            add(second, run)
        run.record(sample.evaluation("a", split="test"), sample.EXAMPLES)
    assert [t.split for t in store.trials(run.id)] == ["validation", "test"]
    assert sql("select count(*) from scores") == [(20 if first == "record" else 10,)]


def test_a_trial_goes_on_where_its_scores_end(store, sql, sample):
    full = sample.evaluation("a")
    first, rest = (dataclasses.replace(full, scores=part, seconds=2.0) for part in (full.scores[:4], full.scores[4:]))
    with store.run(**sample.work()) as run:
        with pytest.raises(StoreError, match="has no trial of 'a' on validation, but 4 scores were expected"):
            run.record(rest, sample.EXAMPLES[4:], start=4)
        run.record(first, sample.EXAMPLES[:4])
        for start in (0, 3, 5):
            with pytest.raises(StoreError, match=f"done, 4 scores.*but {start} scores were expected"):
                run.record(rest, sample.EXAMPLES[4:], start=start)
        run.record(rest, sample.EXAMPLES[4:], start=4)
        assert run.evaluation("validation", "a") == dataclasses.replace(full, seconds=4.0)
        run.record(sample.evaluation("b"), sample.EXAMPLES)
        run.fail("validation", "b", "no room", start=10)
        run.record(sample.evaluation(""), sample.EXAMPLES)
        scores, failed = run.trials("validation")
        assert scores == {"a": run.evaluation("validation", "a"), "b": sample.evaluation("b"), "": sample.evaluation("")}
        assert failed == {"b": "no room"}
        assert run.evaluation("validation", "b") is None
        assert run.trials("test") == ({}, {})
    listed = {t.intervention: t for t in store.trials(run.id)}
    assert (listed["a"].n, listed["a"].seconds) == (10, 4.0)
    assert listed["a"].accuracy == pytest.approx(full.accuracy)
    assert listed["a"].loss == pytest.approx(full.loss)
    assert (listed["b"].status, listed["b"].reason, listed["b"].n) == ("failed", "no room", 10)
    assert sql("select count(*) from scores") == [(30,)]


def test_notes_last_until_the_run_goes_on(store, sample):
    with store.run(**sample.work()) as run:
        run.note("screen", {"1.fc_in@0.5": [0.25, None]})
        run.note("rung", 3)
    with store.run(**sample.work()) as again:
        assert again.resumed
        assert again.notes == {"screen": {"1.fc_in@0.5": [0.25, None]}, "rung": 3}
    assert store.export(again.id)["notes"] == again.notes


def test_scores_must_belong_to_the_examples(store, sample):
    scored = sample.evaluation("a")
    nan = (dataclasses.replace(scored.scores[0], logprob=math.nan), *scored.scores[1:])
    with store.run(**sample.work()) as run:
        with pytest.raises(StoreError, match="10 scores for 9 examples"):
            run.record(scored, sample.EXAMPLES[:9])
        with pytest.raises(StoreError, match=r"at position 0 the score of 'capital-0'.*'capital-9'"):
            run.record(scored, sample.EXAMPLES[::-1])
        with pytest.raises(StoreError, match="log-probability nan over 1 tokens"):
            run.record(dataclasses.replace(scored, scores=nan), sample.EXAMPLES)
    assert store.trials(run.id) == []


def test_what_cannot_be_stored_is_reported(store, sample):
    with pytest.raises(StoreError, match="not JSON serializable"), store.run(**sample.work(provenance={"a": object()})):
        pass
    with pytest.raises(StoreError, match="lack task"), store.run(**sample.work(settings={"model": "tiny"})):
        pass
    assert store.runs() == []
    half = sample.evaluation("a")
    half = dataclasses.replace(half, scores=tuple(dataclasses.replace(s, predicted="\ud800") for s in half.scores))
    with store.run(**sample.work()) as run:
        with pytest.raises(StoreError, match="surrogates"):
            run.record(half, sample.EXAMPLES)
        assert store.trials(run.id) == []


def test_text_and_figures_that_databases_refuse_come_back(store, sample):
    odd = "a\0b\x1a0\x1a1\x1a\0\\u0000 \u2028"
    figures = {"inf": math.inf, "low": -math.inf, odd: 1.5}
    example = Example(odd, odd, odd, (odd, "\ud800"), odd, odd, math.inf, aliases=(odd,))
    scored = sample.evaluation(odd, examples=[example], classes=(odd, "\ud800"))
    scored = dataclasses.replace(scored, scores=(dataclasses.replace(scored.scores[0], predicted=odd, figures=figures),))
    base = dataclasses.replace(scored, intervention="")
    with store.run(**sample.work(odd)) as run:
        run.record(scored, [example])
        run.record(base, [example])
        run.fail("test", odd, odd)
        run.note(odd, [odd, math.inf])
    with store.run(**sample.work(odd)) as run:
        assert run.resumed
        assert run.notes == {odd: [odd, math.inf]}
        assert run.trials("validation") == ({odd: scored, "": base}, {})
        assert run.trials("test")[1] == {odd: odd}
        run.note("nan", math.nan)
    assert math.isnan(store.notes(run.id)["nan"])
    assert store.examples(run.id, "validation") == (example,)


def test_an_intervention_may_be_long(store, sql, sample):
    # As text it hardly gets shorter, so that it fits into no page of an index.
    long = "+".join(f"{i}.fc_in@0.{hashlib.sha256(bytes([i])).hexdigest()}" for i in range(256))
    with store.run(**sample.work()) as run:
        run.record(sample.evaluation(long), sample.EXAMPLES)
        assert run.evaluation("validation", long) == sample.evaluation(long)
    columns = "run_id, split, intervention, status, created"
    with pytest.raises(IntegrityError):
        sql(f"insert into trials ({columns}) select {columns} from trials")


def test_runs_are_listed_newest_first(store, sample):
    before = datetime.now(UTC)
    for key in ("one", "two", "three"):
        with store.run(**sample.work(key)) as run:
            run.record(sample.evaluation("a"), sample.EXAMPLES)
            run.fail("test", "a", "why not")
            if key == "two":
                run.finish({"best": key})
    listed = store.runs()
    assert [(r.key, r.status, r.trials) for r in listed] == [
        ("three", "interrupted", 2),
        ("two", "done", 2),
        ("one", "interrupted", 2),
    ]
    newest = listed[0]
    assert (newest.id, newest.kind, newest.model, newest.task) == (run.id, "search", "tiny", "capitals")
    assert newest.settings == sample.work()["settings"]
    assert newest.provenance == {"seed": 3}
    assert [r.outcome for r in listed] == [None, {"best": "two"}, None]
    assert before <= newest.created <= newest.updated <= datetime.now(UTC)
    assert newest.created.tzinfo is UTC


def test_a_run_is_named_by_a_prefix(store, sql, sample):
    with pytest.raises(StoreError, match=r"no run 'last' among 0 .*laser runs list"):
        store.find("last")
    for key, id in (("one", "abc000000000"), ("two", "abd000000000"), ("three", "123456789abc")):
        with store.run(**sample.work(key)) as run:
            pass
        sql("update runs set id = :new where id = :old", new=id, old=run.id)
    with store.run(**sample.work("four") | {"kind": "scores"}):
        pass
    assert store.find("last").key == "three"  # scores that a study keeps are no search
    assert store.find("last", "scores").key == "four"
    assert store.find("abc").key == "one"
    assert store.find("ABD0").key == "two"
    assert store.find("123456789abc").key == "three"
    with pytest.raises(StoreError, match="2 runs: abd000000000, abc000000000"):
        store.find("ab")
    with pytest.raises(StoreError, match=r"no run '123456789abd' .*similar ids are 123456789abc; see 'laser runs list'"):
        store.find("123456789abd")
    for odd in ("", "%", "_bc"):
        with pytest.raises(StoreError, match="no run"):
            store.find(odd)
    for ask in (store.trials, store.export, store.delete, lambda id: store.evaluation(id, "test", "")):
        with pytest.raises(StoreError, match="no run 'abc'"):
            ask("abc")


def test_an_export_holds_everything_as_json(store, sample):
    with store.run(**sample.work()) as run:
        for intervention in ("", "3.fc_in@0.1"):
            run.record(sample.evaluation(intervention), sample.EXAMPLES)
        run.fail("test", "a", "why not")
        run.finish({"best": "3.fc_in@0.1"})
    exported = store.export(run.id)
    assert json.loads(json.dumps(exported, allow_nan=False)) == exported
    assert (exported["id"], exported["status"], exported["outcome"]) == (run.id, "done", {"best": "3.fc_in@0.1"})
    assert datetime.fromisoformat(exported["created"]) == store.find("last").created
    assert [Example(**e | {"choices": tuple(e["choices"])}) for e in exported["examples"]] == list(sample.EXAMPLES)
    base, edited, failed = exported["trials"]
    assert (failed["status"], failed["reason"], failed["scores"]) == ("failed", "why not", [])
    assert base["intervention"] == ""
    scored = sample.evaluation("3.fc_in@0.1")
    assert edited["loss"] == scored.loss
    assert [
        (exported["examples"][s["example"]]["id"], s["correct"], s["logprob"], s["tokens"], s["predicted"], s["answer"])
        for s in edited["scores"]
    ] == [(s.id, s.correct, s.logprob, s.tokens, s.predicted, s.answer) for s in scored.scores]


def test_deleting_a_run_leaves_nothing_of_it_and_all_of_the_others(store, sql, sample):
    with store.run(**sample.work("keep")) as kept:
        kept.record(sample.evaluation("a", examples=sample.EXAMPLES[:4]), sample.EXAMPLES[:4])
    with store.run(**sample.work("drop")) as dropped:
        dropped.record(sample.evaluation("a"), sample.EXAMPLES)
        with pytest.raises(RunBusyError, match=dropped.id):
            store.delete(dropped.id)
    store.delete(dropped.id)
    assert [r.id for r in store.runs()] == [kept.id]
    counts = {table: sql(f"select count(*) from {table}")[0][0] for table in ("trials", "scores", "examples")}
    assert counts == {"trials": 1, "scores": 4, "examples": 4}
    assert store.evaluation(kept.id, "validation", "a") == sample.evaluation("a", examples=sample.EXAMPLES[:4])


def test_missing_scores_are_noticed(store, sql, sample):
    with store.run(**sample.work()) as run:
        run.record(sample.evaluation("a"), sample.EXAMPLES)
    sql("delete from scores where position = 3")
    with pytest.raises(StoreError, match="9 of 10 scores for 'a' on validation"):
        store.evaluation(run.id, "validation", "a")
