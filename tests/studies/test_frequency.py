from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

from laserlm.cli.analyze.frequency import frequency as command
from laserlm.errors import AnalysisError, ScoringError
from laserlm.jsonable import to_json
from laserlm.models import LanguageModel
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.statistics import paired_difference, wilson
from laserlm.studies.estimates import Estimate
from laserlm.studies.frequency import Frequency, frequency, popularity
from laserlm.tasks import Example

Make = Callable[..., LanguageModel]


def study(
    how_often: Sequence[float | None],
    before: Sequence[bool],
    after: Sequence[bool],
    *,
    fall: Sequence[float] = (),
    facts: Sequence[str] = (),
    bins: int = 5,
) -> Frequency:
    """Study examples 0, 1, ... with these figures."""
    n = len(how_often)
    examples = [Example(str(i), "p", "a", fact=facts[i] if facts else "") for i in range(n)]
    fall = fall or [0.0] * n
    sides = [
        Evaluation(
            "m", "t", "test", "answer", name, tuple(ExampleScore(str(i), right[i], -loss[i], 1, "", "a") for i in range(n)), 0.0
        )
        for name, right, loss in (("", before, [3.0] * n), ("1.fc_in@0.1", after, [3.0 - f for f in fall]))
    ]
    return frequency(*sides, examples, {str(i): x for i, x in enumerate(how_often) if x is not None}, bins=bins)


def test_bins_worked_out_by_hand() -> None:
    how_often = [0, 0, 0, None, 1, 2, 3, 4]
    before = [False, False, True, True, False, True, True, True]
    after = [True, True, False, True, True, True, False, True]
    result = study(how_often, before, after, bins=2, fall=[1, 2, 3, 9, -1, -1, 0, 0.5])
    assert [(p.low, p.high, p.n, p.is_small) for p in result.bins] == [(0, 0, 3, True), (1, 2, 2, True), (3, 4, 2, True)]
    zero, _, last = result.bins
    assert (zero.base.value, zero.base.interval, zero.edited.value) == (1 / 3, wilson(1, 3), 2 / 3)
    assert (zero.gain.value, zero.gain.interval) == (1 / 3, paired_difference(2, 1, 3))
    assert zero.loss.value == -2
    assert (last.gain.value, last.loss.value) == (-1 / 2, -0.25)
    assert [(p.low, p.high, p.n, p.gain.value) for p in result.cumulative] == [
        (0, 0, 3, 1 / 3),
        (0, 2, 5, 2 / 5),
        (0, 4, 7, 1 / 7),
    ]
    assert (result.without, result.facts, len(result.examples)) == (1, 7, 7)
    assert not result.cumulative[1].is_small
    # The middle of the zeros is 1.5 of 7, that of the 1 is 3.5, which is no less than the half.
    assert (result.rare.n, result.frequent.n) == (3, 4)
    assert (result.rare.gain.value, result.frequent.gain.value, result.difference.value) == (1 / 3, 0, 1 / 3)
    assert math.isinf(result.difference.interval.low)  # three facts of a half tell nothing
    values = json.loads(json.dumps(to_json(result), allow_nan=False))
    assert values["bins"][0] | {"before": 0, "after": 0, "gain": 0, "loss": 0} == {
        "low": 0, "high": 0, "n": 3, "few": True, "before": 0, "after": 0, "gain": 0, "loss": 0
    }  # fmt: skip
    assert values["difference"] == {"value": 1 / 3, "interval": None, "n": 7}
    assert [e["id"] for e in values["examples"]] == ["0", "1", "2", "4", "5", "6", "7"]


@pytest.mark.parametrize(
    ("how_often", "bins", "sizes"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 5, [2, 2, 2, 2, 2]),
        ([1, 1, 1, 1, 1, 1, 2, 3, 4, 5], 5, [6, 2, 2]),  # equal ones stay together, and there are fewer bins
        ([7, 7, 7], 5, [3]),
        ([0, 0], 5, [2]),
        ([0, 1, 2], 1, [1, 2]),  # what never occurs is by itself
        ([-1, 0, 1], 1, [3]),  # on a scale where 0 is not the least it is not
        ([5, 4, 3, 2, 1], 9, [1, 1, 1, 1, 1]),
    ],
)
def test_bins_hold_as_many_each_and_part_no_equal_ones(how_often: list[float], bins: int, sizes: list[int]) -> None:
    result = study(how_often, [False] * len(how_often), [True] * len(how_often), bins=bins)
    assert [p.n for p in result.bins] == sizes
    ends = [x for p in result.bins for x in (p.low, p.high)]
    assert ends == sorted(ends)
    assert len({p.low for p in result.bins} | {p.high for p in result.bins}) == sum(1 + (p.low != p.high) for p in result.bins)
    assert result.cumulative[-1].n == len(how_often)


def test_correlations_are_those_of_scipy() -> None:
    source = np.random.default_rng(3)
    how_often = source.integers(0, 6, 80).tolist()
    before, after = (source.random(80) < 0.5 for _ in range(2))
    fall = (source.normal(size=80) - 0.1 * np.array(how_often)).round(1)
    facts = [f"f{i // 2}" for i in range(80)]
    result = study(how_often, before.tolist(), after.tolist(), fall=fall.tolist(), facts=facts)
    change = after.astype(int) - before.astype(int)
    assert result.correctness.value == pytest.approx(stats.spearmanr(how_often, change).statistic, abs=1e-12)
    # The losses are rounded alike, so that equal falls stay equal.
    fall = [e.base_loss - e.edited_loss for e in result.examples]
    assert result.loss.value == pytest.approx(stats.spearmanr(how_often, fall).statistic, abs=1e-12)
    assert (result.facts, result.correctness.n) == (40, 80)
    # The bootstrap over facts, done in the plain way.
    members = [np.array([2 * i, 2 * i + 1]) for i in range(40)]
    drawn = [np.concatenate([members[i] for i in source.integers(40, size=40)]) for _ in range(2000)]
    rho = [stats.spearmanr(np.array(how_often)[d], change[d]).statistic for d in drawn]
    assert result.correctness.interval == pytest.approx(np.quantile(rho, [0.025, 0.975]), abs=0.03)


def planted(effect: bool, seed: int = 0) -> Frequency:
    """Study 150 facts in 2 phrasings: of those that were wrong three quarters of the rare ones, or a third, are corrected."""
    source = np.random.default_rng(seed)
    how_often = np.repeat(source.integers(0, 1000, 150), 2)
    before = np.repeat(source.random(150) < 0.5, 2)
    lifted = np.repeat(source.random(150) < (3 / 4 if effect else 1 / 3), 2) & (how_often < (400 if effect else 1000))
    after = (before | lifted) & ~np.repeat(source.random(150) < 0.05, 2)
    fall = lifted + source.normal(size=300)
    facts = [f"f{i // 2}" for i in range(300)]
    return study(how_often.tolist(), before.tolist(), after.tolist(), fall=fall.tolist(), facts=facts)


def test_an_effect_on_what_is_rare_is_found() -> None:
    result = planted(effect=True)
    assert result.difference.interval.low > 0
    assert result.correctness.interval.high < 0
    assert result.loss.interval.high < 0
    assert result.bins[0].gain.value > result.bins[-1].gain.value
    assert [p.high for p in result.bins] == [p.high for p in result.cumulative]


def test_no_effect_is_not_found() -> None:
    included = [
        (f.difference.interval, f.correctness.interval, f.loss.interval) for f in (planted(False, seed) for seed in range(10))
    ]
    for intervals in zip(*included, strict=True):
        assert sum(low <= 0 <= high for low, high in intervals) >= 8


def test_phrasings_of_one_fact_are_no_independent_examples() -> None:
    source = np.random.default_rng(5)
    how_often, change = np.arange(30.0), source.random(30) < 0.4
    once = study(how_often.tolist(), [False] * 30, change.tolist())
    many = [np.repeat(values, 4).tolist() for values in (how_often, np.zeros(30, dtype=bool), change)]
    facts = [f"f{i // 4}" for i in range(120)]
    grouped, loose = study(*many, facts=facts), study(*many)

    def width(results: Frequency) -> float:
        return results.difference.interval.high - results.difference.interval.low

    assert (once.facts, grouped.facts, loose.facts) == (30, 30, 120)
    assert grouped.difference.value == pytest.approx(once.difference.value)
    assert width(grouped) == pytest.approx(width(once), rel=0.1)
    assert width(loose) < 0.6 * width(grouped)


def test_what_tells_nothing_has_no_interval() -> None:
    result = study([1] * 6, [False] * 6, [True, False] * 3)  # all occur as often
    assert (result.rare.n, result.frequent.n, result.difference.n) == (0, 6, 6)
    values = to_json(result)
    nothing = {"value": None, "interval": None, "n": 6}
    assert values["correctness"] == values["difference"] == values["loss"] == nothing
    assert values["rare"]["low"] is None
    few = study([1, 2, 3, 4], [False] * 4, [True, False, False, True])  # four facts
    assert to_json(few.correctness)["interval"] is None
    lone = study([0] * 40 + [7] * 4, [False] * 44, [True, False] * 22)  # four facts that occur at all
    assert to_json(lone.correctness)["interval"] is None is to_json(lone.difference)["interval"]
    assert to_json(study([0] * 39 + [7] * 5, [False] * 44, [True, False, False, False] * 11).correctness)["interval"]
    unmoved = study(list(range(40)), [False] * 40, [True] * 4 + [False] * 36, fall=list(range(40)))  # four that change
    assert to_json(unmoved.correctness)["interval"] is None is to_json(unmoved.difference)["interval"]
    same = study(list(range(20)), [True] * 20, [True] * 20)  # nothing changes
    assert (same.difference.value, to_json(same.difference)["interval"]) == (0, None)


def test_popularity_is_that_of_the_examples() -> None:
    examples = [Example("1", "p", "a", popularity=3.0), Example("2", "p", "a"), Example("3", "p", "a", popularity=0.0)]
    assert popularity(examples) == {"1": 3.0, "3": 0.0}
    with pytest.raises(AnalysisError, match="--corpus"):
        popularity(examples[1:2])


def test_what_cannot_be_studied_is_reported() -> None:
    examples = [Example("1", "p", "a"), Example("2", "p", "a")]
    scores = tuple(ExampleScore(e.id, True, -1.0, 1, "a", "a") for e in examples)
    base = Evaluation("m", "t", "test", "answer", "", scores, 0.0)
    assert frequency(base, base, examples, {"1": 2.0, "2": math.nan}).without == 1
    with pytest.raises(AnalysisError, match="0 bins"):
        frequency(base, base, examples, {"1": 2.0}, bins=0)
    with pytest.raises(AnalysisError, match="no example '2'"):
        frequency(base, base, examples[:1], {"1": 2.0})
    with pytest.raises(AnalysisError, match="none of the 2 examples"):
        frequency(base, base, examples, {"3": 2.0})
    with pytest.raises(ScoringError, match="cannot compare"):
        frequency(base, replace(base, scores=scores[:1]), examples, {"1": 2.0})


def test_the_command_goes_by_popularity_or_by_a_corpus(make: Make, tmp_path: Path) -> None:
    lm = make("llama")
    lm.model.save_pretrained(tmp_path / "model")
    lm.require_tokenizer().save_pretrained(tmp_path / "model")
    rows = [
        {
            "prompt": f"The capital number {i} is",
            "answer": a,
            "subject": f"land {i}",
            "fact": f"f{i % 16}",
            "popularity": i // 4,
        }
        for i, a in enumerate(["Paris", "Rome", "true", "false"] * 8)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "texts.txt").write_text("\n\n".join(f"Land {i}: {rows[i]['answer']}." for i in range(32) for _ in range(i % 3)))
    app = typer.Typer()
    app.command()(command)
    task = ["--task", f"jsonl:{tmp_path / 'q.jsonl'}", "--store", str(tmp_path / "runs.db"), "--split", "all"]
    arguments = [str(tmp_path / "model"), *task, "--reduce", "all.all@0.2"]

    def run(*options: object) -> str:
        result = CliRunner().invoke(app, [*arguments, *map(str, options)], catch_exceptions=False, env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.stdout

    known = json.loads(run("--json", "--bins", 3, "--figure", tmp_path / "f.html"))
    assert (known["n"], known["facts"], known["without"], known["frequency"]) == (32, 16, 0, "popularity")
    assert [(b["low"], b["high"], b["n"]) for b in known["bins"]] == [(0, 0, 4), (1, 2, 8), (3, 5, 12), (6, 7, 8)]
    assert (tmp_path / "f.html").stat().st_size > 1_000_000
    counted = json.loads(run("--json", "--corpus", tmp_path / "texts.txt"))
    assert counted["mentions"]["documents"] == sum(i % 3 for i in range(32))
    assert [e["frequency"] for e in counted["examples"]] == [i % 3 for i in range(32)]
    assert [(b["low"], b["high"], b["n"]) for b in counted["bins"]] == [(0, 0, 11), (1, 1, 11), (2, 2, 10)]
    text = run("--corpus", tmp_path / "texts.txt")
    assert "none mentions both subject and answer of 11 examples" in text
    assert "cumulative" in text
    assert run("--csv").splitlines()[0].startswith("from,to,n,before,before low,before high,after,after low,after high,gain,")
    with pytest.raises(AnalysisError, match="no corpus"):
        run("--corpus", tmp_path / "nowhere")


def test_bins_take_the_variance_between_facts() -> None:
    examples = [Example(str(i), f"prompt {i}", "a", fact=f"f{i // 3}") for i in range(30)]
    changed = [i // 3 in (1, 4) for i in range(30)]
    before, after = (
        tuple(ExampleScore(str(i), right, -1.0, 1, "", "a") for i, right in enumerate(of)) for of in ([False] * 30, changed)
    )
    base = Evaluation("m", "t", "test", "answer", "", before, 0.0)
    edited = replace(base, intervention="x", scores=after)
    (by_fact,) = frequency(base, edited, examples, {e.id: 1.0 for e in examples}, bins=1).bins
    facts = [e.fact for e in examples]
    assert by_fact.gain == Estimate.gain([False] * 30, changed, facts)
    assert by_fact.edited == Estimate.share_by_fact(changed, facts)
    assert by_fact.gain.interval.low < paired_difference(6, 0, 30).low
    assert by_fact.gain.interval.high > paired_difference(6, 0, 30).high
    assert by_fact.edited.interval.low < wilson(6, 30).low
