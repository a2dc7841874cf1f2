from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from laserlm.models import LanguageModel

Run = Callable[..., tuple[int, str, str]]
REDUCTION = "all.mlp@0.1"


@pytest.fixture
def options(folder: Path, tmp_path: Path) -> tuple[object, ...]:
    questions = tmp_path / "questions.jsonl"
    facts = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Norway", "Oslo"), ("Portugal", "Lisbon")] * 4
    rows = [{"prompt": f"The capital {i} of {of} is", "answer": city, "fact": of} for i, (of, city) in enumerate(facts)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (folder, "--task", f"jsonl:{questions}", "--store", tmp_path / "runs.db", "--reduce", REDUCTION, "--split", "all")


def test_calibration_as_json_csv_and_figure(
    run: Run, options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from laserlm.studies import calibration

    scored = []
    confidences = calibration.confidences

    def counted(lm: LanguageModel, *arguments: object) -> object:
        scored.append(lm.intervention)
        return confidences(lm, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(calibration, "confidences", counted)
    code, out, err = run("analyze", "calibration", *options, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert (values["n"], values["confidence_in"], values["intervention"]) == (20, "first token", REDUCTION)
    assert values["before"]["ece"]["n"] == 20
    assert [b["accuracy"]["n"] for b in values["curve_after"]] == [5] * 4  # ten bins would hold two each
    assert values["change"]["confidence"]["value"] == pytest.approx(
        values["after"]["confidence"]["value"] - values["before"]["confidence"]["value"]
    )
    code, out, _ = run("analyze", "calibration", *options, "--csv", "--bins", 2, "--figure", tmp_path / "f.html")
    assert code == 0
    table = list(csv.DictReader(io.StringIO(out)))
    assert [r["measure"] for r in table] == ["expected calibration error", "Brier score", "mean confidence", "accuracy"]
    assert list(table[0])[:4] == ["measure", "before", "before low", "before high"]
    assert float(table[1]["before"]) == values["before"]["brier"]["value"]
    assert (tmp_path / "f.html").stat().st_size > 1_000_000
    code, out, _ = run("analyze", "calibration", *options, "--bins", 2)
    assert code == 0
    assert "before and after, n 20" in out
    assert "reliability" in out
    assert scored == ["", REDUCTION]  # they were kept


def test_calibration_of_a_run_and_of_what_has_no_answer(run: Run, options: tuple[object, ...], tmp_path: Path) -> None:
    folder, _, task, _, store, *_ = options
    search = (folder, "--task", task, "--store", store, "--grid", "all.all@0.2,0.5", "--metric", "loss")
    code, out, _ = run("search", *search, "--strategy", "exhaustive", "--json")
    assert json.loads(out)["best"]
    code, out, err = run("analyze", "calibration", "last", "--store", store, "--json")
    assert code == 0, err
    assert json.loads(out)["intervention"]
    text = tmp_path / "text.txt"
    text.write_text("The capital of France is Paris.\n" * 5)
    code, _, err = run(
        "analyze", "calibration", folder, "--task", f"perplexity:{text}", "--store", store, "--reduce", REDUCTION
    )
    assert code == 1
    assert "perplexity reads neither. Give a model, --reduce SPEC and --scorer choice" in err


def test_paraphrases_as_json_csv_and_figure(run: Run, options: tuple[object, ...], tmp_path: Path) -> None:
    code, out, err = run("analyze", "paraphrases", *options, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert (values["facts"], values["single"], values["n"]) == (5, 0, 20)
    assert sum(n for row in values["tables"][0]["counts"] for n in row) == 5
    code, out, _ = run("analyze", "paraphrases", *options, "--csv", "--figure", tmp_path / "f.html")
    assert code == 0
    table = list(csv.DictReader(io.StringIO(out)))
    assert [r["of facts"] for r in table] == ["all phrasings right", "any right", "phrasings agree"]
    assert (tmp_path / "f.html").stat().st_size > 1_000_000
    code, out, _ = run("analyze", "paraphrases", *options)
    assert code == 0
    assert "5 facts with two phrasings or more (0 with one left out)" in out
    assert "facts of 4 phrasings" in out
    code, _, err = run("analyze", "paraphrases", *options, "--limit", 5)
    assert code == 1
    assert "has two phrasings; study a task with several" in err
