"""Harm is printed beside every gain, and every point of the Pareto list can be saved."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from laserlm.models import load
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import compare
from laserlm.searching import SearchResult
from laserlm.searching.guard import guards_of, measure_harm
from laserlm.searching.result import Point
from laserlm.store import Store

Run = Callable[..., tuple[int, str, str]]
CITIES = ["Paris", "Rome", "true", "false"]


@pytest.fixture(autouse=True)
def few_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.searching.guard.PASSAGES", 4)
    monkeypatch.setattr("laserlm.searching.guard.PASSAGE_TOKENS", 8)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"The capital number {i} is", "answer": CITIES[i % 4]} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def search(run: Run, folder: Path, questions: Path, tmp_path: Path) -> Run:
    """Search by the loss."""
    command = ("search", folder, "--task", questions, "--metric", "loss", "--store", tmp_path / "runs.db")
    return lambda *more: run(*command, *more)


@pytest.fixture
def points(search: Run, folder: Path, tmp_path: Path) -> SearchResult:
    """A finished search in the store with four points: the second is its choice, and the third dominates the fourth."""
    grid = "0.fc_in@0.5,0.1+1.fc_in@0.5,0.1"
    run = json.loads(search("--strategy", "exhaustive", "--grid", grid, "--json")[1])["run"]
    lm = load(folder, cache=tmp_path / "cache")
    (guard,) = guards_of(lm, None)
    with Store.open(tmp_path / "runs.db") as store:
        info = store.find(run)
        assert info.outcome is not None
        result = SearchResult.from_dict(info.outcome)
        base = store.evaluation(run, "validation", "")
        results = []
        for i, text in enumerate(["0.fc_in@0.5", "1.fc_in@0.5", "0.fc_in@0.1", "1.fc_in@0.1"]):
            edited = store.evaluation(run, "validation", text)
            assert base is not None
            assert edited is not None
            gain, loss = min(i, 2) / 10, base.loss - min(i, 2)
            harm = measure_harm(lm, guard, text)
            harm = replace(harm, comparison=replace(harm.comparison, edited_loss=harm.comparison.base_loss + i / 100))
            results.append(Point(text, replace(compare(base, edited), gain=gain, edited_loss=loss), (harm,)))
        best = Intervention.parse("1.fc_in@0.5")
        with store.run(kind="search", key="points", settings=info.settings, provenance=info.provenance) as again:
            result = replace(result, run=again.id, best=best, points=tuple(results))
            again.finish(result.as_dict())
    return result


def ratios(text: str) -> list[float]:
    return [float(ratio) for ratio in re.findall(r"perplexity x([\d.]+) \[", text)]


def test_a_search_prints_its_harm_on_every_guard_as_a_plain_pass_measures_it(
    search: Run, run: Run, folder: Path, questions: Path, tmp_path: Path
) -> None:
    command = ("--strategy", "exhaustive", "--grid", "0-1.mlp@0.5,0.1", "--guard", "self", "--guard", questions)
    values = json.loads(search(*command, "--json")[1])
    assert values["best"]
    lm = load(folder, cache=tmp_path / "other cache")
    expected = [measure_harm(lm, guard, values["best"]) for guard in guards_of(lm, ["self", str(questions)])]
    assert [h["guard"] for h in values["harms"]] == ["self", "questions:questions"]
    assert [h["ratio"] for h in values["harms"]] == pytest.approx([h.ratio for h in expected], rel=1e-4)
    assert [h["comparison"]["n"] for h in values["harms"]] == [4, 32]
    out = search(*command)[1]
    assert ratios(out) == pytest.approx([h.ratio for h in expected], abs=1e-3)
    assert re.search(r"Harm: perplexity .* on text that the model wrote \(4 passages\), divergence [\d.]+ nats per token", out)
    assert re.search(r"Harm: perplexity .* on questions:questions, accuracy .* \(32 questions\)", out)
    (listed,) = json.loads(run("runs", "list", "--store", tmp_path / "runs.db", "--json")[1])
    largest = max(values["harms"], key=lambda h: h["ratio"])
    assert (listed["harm"], listed["harm_interval"]) == (largest["ratio"], largest["interval"])
    assert (listed["test_gain"], listed["test_interval"]) == (values["test"]["gain"], values["test"]["interval"])
    low, high = largest["interval"]
    table = run("runs", "list", "--store", tmp_path / "runs.db")[1]  # which may break a line within a cell
    assert all(text in table for text in (f"x{largest['ratio']:.3f}", f"[{low:.3f},", f"{high:.3f}]"))
    assert ratios(run("runs", "show", "last", "--store", tmp_path / "runs.db")[1]) == ratios(out)


def test_a_search_for_components_keeps_its_bound_and_prints_a_short_form(search: Run, tmp_path: Path, run: Run) -> None:
    command = ("--strategy", "components", "--max-harm", "3", "--delta", "1")
    values = json.loads(search(*command, "--json")[1])
    assert (values["strategy"], values["settings"]["max_harm"]) == ("components", 3)
    assert values["best"]
    chosen = next(p for p in values["points"] if p["intervention"] == values["best"])
    assert chosen["harms"][0]["ratio"] <= 4
    out = search(*command)[1]
    assert "components: " in out
    assert values["best"] not in out
    assert f"laser runs show {values['run']} --json" in out
    assert f"laser save {json.loads(run('runs', 'show', 'last', '--store', tmp_path / 'runs.db', '--json')[1])['model']}" in out
    code, _, err = search("--max-harm", "0")
    assert code == 1
    assert "max_harm 0.0 allows no change" in err


def test_the_pareto_list_is_numbered_by_harm_and_marks_the_choice(points: SearchResult, run: Run, tmp_path: Path) -> None:
    assert [p.intervention for p in points.pareto] == ["0.fc_in@0.5", "1.fc_in@0.5", "0.fc_in@0.1"]
    out = run("runs", "show", points.run, "--store", tmp_path / "runs.db")[1]
    lines = [line for line in out.splitlines() if re.search(r"^│ \d", line)]
    assert [line.split()[1:3] for line in lines] == [["1", "│"], ["2", "│"], ["3", "│"]]
    assert ["(chosen)" in line for line in lines] == [False, True, False]
    assert [re.findall(r"x\d\.\d+", line)[-1] for line in lines] == ["x1.000", "x1.010", "x1.020"]
    assert "1.fc_in@0.1" not in "".join(lines)
    assert "winner's curse" in out
    assert "is not in the list" not in out


def test_every_point_is_saved_and_its_card_says_whether_it_was_tested(
    points: SearchResult, run: Run, folder: Path, tmp_path: Path
) -> None:
    command = ("save", folder, "--run", points.run, "--store", tmp_path / "runs.db")
    cards = {}
    for number, text in ((None, "1.fc_in@0.5"), (2, "1.fc_in@0.5"), (3, "0.fc_in@0.1")):
        out = tmp_path / f"point-{number}"
        code, _, err = run(*command, *([] if number is None else ["--point", number]), "--out", out)
        assert code == 0, err
        assert json.loads((out / "laser.json").read_text())["intervention"] == text
        cards[number] = (out / "README.md").read_text()
    for number in (None, 2):
        assert "Not tested" not in cards[number]
        assert "| test (held out) |" in cards[number]
        assert f"| harm | {points.harms[0]} |" in cards[number]
    assert "**Not tested on held-out questions.**" in cards[3]
    assert "test (held out)" not in cards[3]
    assert f"Harm: {points.pareto[2].harms[0]}." in cards[3]
    code, _, err = run("reproduce", tmp_path / "point-3", "--score")
    assert (code, "test scores" in err) == (0, False)
    code, _, err = run(*command, "--point", "4", "--out", tmp_path / "none")
    assert code == 1
    assert f"run {points.run} has no point 4; it has 1 to 3" in " ".join(err.split())
    assert run("save", folder, "--reduce", "0.fc_in@0.5", "--point", "1", "--out", tmp_path / "none")[0] == 2


def test_evaluate_measures_the_harm_next_to_the_comparison(run: Run, folder: Path, questions: Path, tmp_path: Path) -> None:
    command = ("evaluate", folder, "--task", questions, "--reduce", "1.fc_in@0.1", "--compare")
    lm = load(folder, cache=tmp_path / "cache")
    expected = [measure_harm(lm, guard, "1.fc_in@0.1") for guard in guards_of(lm, ["self", str(questions)])]
    out = run(*command, "--guard", "self", "--guard", questions)[1]
    assert ratios(out) == pytest.approx([h.ratio for h in expected], abs=1e-3)
    values = json.loads(run(*command, "--guard", "self", "--json")[1])
    assert [h["ratio"] for h in values["harms"]] == pytest.approx([expected[0].ratio], rel=1e-4)
    assert "harm: not measured; measure it with --guard self" in run(*command)[1]
    code, _, err = run("evaluate", folder, "--task", questions, "--guard", "self")
    assert code == 2
    assert "add --reduce" in err
    code, _, err = run("search", folder, "--task", questions, "--strategy", "components", "--candidates", "5")
    assert code == 2
    assert "--candidates is a setting of the strategy race" in err


def test_harm_that_was_not_measured_is_reported_as_such(points: SearchResult) -> None:
    assert replace(points, harms=()).harm_sentences() == [
        "Harm: not measured. Name a text or a task that must not get worse with --guard."
    ]
    assert replace(points, best=Intervention()).harm_sentences() == []
    dominated = replace(points, best=Intervention.parse("1.fc_in@0.1"))
    assert "It is not in the list" in dominated.pareto_note()


def test_the_list_says_what_its_accuracies_are_of(points: SearchResult) -> None:
    sentence = "accuracies are of the answer's own tokens"
    assert sentence not in points.pareto_note()
    assert sentence in replace(points, settings=points.settings | {"scorer": "contains"}).pareto_note()


def test_components_that_a_file_names_are_explained_by_their_tokens(
    run: Run, folder: Path, questions: Path, tmp_path: Path
) -> None:
    Intervention.parse("1.fc_up@drop0-2+0.fc_out@drop4").write(tmp_path / "edit.json")
    command = ("analyze", "components", folder, "--task", questions, "--reduce", f"@{tmp_path / 'edit.json'}")
    code, out, err = run(*command, "--store", tmp_path / "runs.db", "--json")
    assert code == 0, err
    values = json.loads(out)
    assert (values["bottom"], values["chunks"]) == ([], [])
    names = {(r["matrix"], r["component"]) for r in values["removed"]}
    assert names == {("1.fc_up", 0), ("1.fc_up", 1), ("1.fc_up", 2), ("0.fc_out", 4)}
    rows = list(csv.DictReader(io.StringIO(run(*command, "--store", tmp_path / "runs.db", "--csv")[1])))
    assert [row["reads"] for row in rows] == [" ".join(map(repr, r["reads"])) for r in values["removed"]]
    assert {len(r["writes"]) for r in values["removed"]} == {5}


def test_points_are_tested_on_the_test_split(search: Run, run: Run, questions: Path, tmp_path: Path) -> None:
    found = json.loads(search("--strategy", "exhaustive", "--grid", "0-1.mlp@0.5,0.1", "--guard", questions, "--json")[1])
    command = ("analyze", "points", "last", "--store", tmp_path / "runs.db")
    code, _, err = run(*command)
    assert (code, "name their files again with --guard" in " ".join(err.split())) == (1, True)
    values = json.loads(run(*command, "--guard", questions, "--json")[1])
    chosen = next(p for p in values["points"] if p["is_chosen"])
    assert chosen["intervention"] == found["best"]
    assert chosen["comparison"]["gain"] == found["test"]["gain"]
    assert chosen["harms"][0]["guard"] == "questions:questions"
    assert chosen["harms"][0]["comparison"]["edited_loss"] == pytest.approx(found["harms"][0]["comparison"]["edited_loss"])
    assert "hold for all" in run(*command, "--guard", questions)[1]
    code, _, err = run(*command, "--guard", questions, "--point", "9")
    assert code == 1
    assert "there is no point 9" in err
    code, _, err = run("analyze", "points", "last", "--reduce", "0.fc_in@0.5", "--store", tmp_path / "runs.db")
    assert code == 1
    assert "leave out --reduce" in err


def test_points_of_a_search_that_kept_the_model_are_tested(search: Run, run: Run, tmp_path: Path) -> None:
    found = json.loads(search("--strategy", "exhaustive", "--grid", "0-1.mlp@0.5,0.1", "--max-harm", "1e-9", "--json")[1])
    assert (found["best"], len(found["pareto"]) > 0) == ("", True)
    code, out, err = run("analyze", "points", "last", "--store", tmp_path / "runs.db", "--json")
    assert code == 0, err
    values = json.loads(out)["points"]
    assert len(values) == len(found["pareto"])
    assert {p["confidence"] for p in values} == {1 - 0.05 / len(values)}
    assert not any(p["is_chosen"] for p in values)
