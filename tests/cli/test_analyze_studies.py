from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from plotly.graph_objects import Figure

Run = Callable[..., tuple[int, str, str]]
REDUCTION = "1.fc_in@0.25"
STUDIES = ("flips", "generations", "terms", "controls", "components", "low-rank", "side-effects", "frequency")
CORRECTS = "2.fc_out@0.1"
"""Makes the model answer Paris."""
FAST = {"terms": ("--tokens", 2), "generations": ("--tokens", 2), "controls": ("--draws", 1), "components": ("--chunk", 20)}


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    facts = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Norway", "Oslo"), ("Portugal", "Lisbon")] * 5
    file.write_text(
        "".join(
            json.dumps({"prompt": f"The capital {i} of {of} is", "answer": city, "group": of[0], "popularity": i}) + "\n"
            for i, (of, city) in enumerate(facts)
        )
    )
    return file


@pytest.fixture
def study_options(folder: Path, questions: Path, tmp_path: Path) -> tuple[object, ...]:
    return (folder, "--task", f"jsonl:{questions}", "--store", tmp_path / "runs.db", "--reduce", REDUCTION)


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_is_a_command_with_table_json_csv_and_figure(
    study: str, run: Run, study_options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This reduction corrects nothing that the model writes; what is done with corrected examples is done with all.
    monkeypatch.setattr("laserlm.studies.entities.sets_of", lambda base, *_: {s.id: ("A", "B") for s in base.scores})
    study_options = (*study_options[:-1], CORRECTS) if study == "components" else study_options
    arguments = ("analyze", study, *study_options, *FAST.get(study, ()))
    code, out, err = run(*arguments, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert values["model"] == str(study_options[0])
    assert "NaN" not in out
    assert "Infinity" not in out
    if study == "components":
        assert values["corrected"] > 0
        assert {b["fraction"] for b in values["bottom"]} >= {"0", "1"}
    code, out, err = run(*arguments, "--csv", "--figure", tmp_path / "f.html")
    assert code == 0, err
    assert list(csv.DictReader(io.StringIO(out)))
    assert (tmp_path / "f.html").stat().st_size > 1_000_000
    code, out, err = run(*arguments)
    assert code == 0, err
    assert out.strip()


def test_generations_of_a_reduction_that_corrects_nothing_say_so(run: Run, study_options: tuple[object, ...]) -> None:
    code, _, err = run("analyze", "generations", *study_options, "--tokens", 2)
    assert code == 1
    assert "corrects nothing" in err


def test_what_a_study_scored_is_not_scored_again(
    run: Run, study_options: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, first, err = run("analyze", "low-rank", *study_options, "--json", "--ranks", "10,1")
    assert code == 0, err
    monkeypatch.setattr("laserlm.studies.scores.evaluate_rows", None)  # would fail if it was called
    monkeypatch.setattr("laserlm.studies.scores.evaluate", None)
    code, again, err = run("analyze", "low-rank", *study_options, "--json", "--ranks", "10,1")
    assert code == 0, err
    assert again == first


def test_a_run_stands_for_model_task_and_reduction(
    run: Run, folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ("--store", tmp_path / "runs.db")
    search = ("search", folder, "--task", f"jsonl:{questions}", *store, "--grid", "all.mlp@0.2,0.5", "--metric", "loss")
    code, out, err = run(*search, "--strategy", "exhaustive", "--json")
    assert code == 0, err
    of_run = json.loads(out)
    assert of_run["best"]
    questions.unlink()
    code, out, err = run("analyze", "low-rank", "last", *store, "--json", "--ranks", "5")
    assert code == 0, err
    values = json.loads(out)
    assert (values["intervention"], values["n"]) == (of_run["best"], of_run["test"]["n"])
    assert values["points"][0]["chosen"]
    assert values["points"][0]["loss"] == pytest.approx(of_run["test"]["best_loss"])
    code, out, err = run("analyze", "low-rank", "last", *store, "--json", "--limit", 5, "--ranks", "5", "--rhos", "")
    assert code == 0, err
    assert json.loads(out)["n"] == 5
    # The map needs neither the model nor its data.
    monkeypatch.setattr("laserlm.models.load", None)
    code, out, err = run("analyze", "low-rank", "last", "--map", *store, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert len(values["measured"]) == 18  # three matrices of three blocks at two sizes
    assert {m["loss_change"]["n"] for m in values["measured"]} == {of_run["validation"]["n"]}
    measured = {m["matrix"] + "@" + m["size"] for m in values["measured"] if m["harm"]}
    assert measured == {p["intervention"] for p in of_run["points"]}
    assert {m["guard"] for m in values["measured"]} == {"self", ""}
    code, out, _ = run("analyze", "low-rank", "last", "--map", *store, "--figure", tmp_path / "map.html")
    assert code == 0
    assert "fc_out" in out
    assert f"Harm is measured for {len(measured)} of them" in out
    assert "harm on self" in out
    code, out, _ = run("analyze", "low-rank", "last", "--map", *store, "--csv")
    assert code == 0
    assert sum(bool(row["harm"]) for row in csv.DictReader(io.StringIO(out))) == len(measured)
    code, _, err = run("analyze", "flips", "last", *store, "--split", "validation")
    assert code == 1
    assert "leave out --split" in err
    code, _, err = run("analyze", "flips", "last", *store, "--scorer", "first_token", "--phrasings", "rewrite")
    assert code == 1
    assert "leave out --phrasings, --scorer" in err
    code, _, err = run("analyze", "low-rank", "last", "--map", *store, "--limit", 3)
    assert code == 1
    assert "Leave out --reduce, --limit" in err
    code, out, _ = run("runs", "list", *store, "--json")
    assert {r["status"] for r in json.loads(out) if r["kind"] == "scores"} == {"open"}


def test_the_harm_of_more_cells_of_the_map_is_measured(
    run: Run, folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laserlm.searching.session.MAX_HARMS", 1)
    store = ("--store", tmp_path / "runs.db")
    search = ("search", folder, "--task", f"jsonl:{questions}", *store, "--grid", "1-2.mlp@0.2,0.5", "--metric", "loss")
    code, _, err = run(*search, "--strategy", "exhaustive")
    assert code == 0, err
    code, out, _ = run("analyze", "low-rank", "last", "--map", *store)
    assert "Harm is measured for 1 of them; --harm measures more." in out
    code, out, err = run("analyze", "low-rank", "last", "--map", "--harm", *store)
    assert code == 0, err
    # The unchanged model and five of the six matrices, each on four passages.
    assert "measuring the harm of 5 reductions: 24 passes at most, each of one passage or question of self" in err
    assert "Harm is measured for 6 of them.\n" in out
    code, out, err = run("analyze", "low-rank", "last", "--map", "--harm", "--json", *store)
    assert code == 0, err
    assert "is measured already" in err
    assert sum(m["harm"] is not None for m in json.loads(out)["measured"]) == 6
    code, _, err = run("analyze", "low-rank", "last", "--harm", *store)
    assert code == 1
    assert "Write --map --harm" in err


def test_side_effects_are_a_matrix_of_runs_and_tasks(run: Run, folder: Path, questions: Path, tmp_path: Path) -> None:
    store = ("--store", tmp_path / "runs.db")
    other = tmp_path / "other.jsonl"
    other.write_text(questions.read_text().replace("capital", "seat"))
    runs = []
    for file, grid in ((questions, "all.mlp@0.2,0.5"), (other, "all.attn@0.5,0.2")):
        search = ("search", folder, "--task", f"jsonl:{file}", *store, "--grid", grid, "--metric", "loss", "--json")
        code, out, err = run(*search, "--strategy", "exhaustive")
        assert code == 0, err
        runs.append(json.loads(out))
    assert all(r["best"] for r in runs)
    text = tmp_path / "text.txt"
    text.write_text("It rained all night, so the grass was wet in the morning.\n" * 200)
    more = ("--on", "worldfacts", "--examples", 6, "--text", text, "--passages", 3)
    code, out, err = run("analyze", "side-effects", runs[0]["run"], "--with", runs[1]["run"], *more, *store, "--json")
    assert code == 0, err
    values = json.loads(out)
    assert [e["intervention"] for e in values["effects"]] == [r["best"] for r in runs]
    assert all(e["divergence"]["n"] == 40 and e["divergence"]["value"] > 0 for e in values["effects"])
    assert all(e["text"]["ratio"]["n"] == 3 for e in values["effects"])
    tasks = [r["settings"]["task"] for r in runs]
    cells = {(c["chosen_on"], c["scored_on"]): c for c in values["transfer"]}
    assert set(cells) == {(i, j) for i in tasks for j in [*tasks, "worldfacts"]}
    for r, name in zip(runs, tasks, strict=True):
        assert cells[name, name]["gain"]["value"] == pytest.approx(r["test"]["gain"])
    assert cells[tasks[0], "worldfacts"]["gain"]["n"] == 6


@pytest.mark.browser
def test_still_images_where_a_browser_is(run: Run, study_options: tuple[object, ...], tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")):
        pytest.skip("there is no Chromium")
    for name in ("f.png", "f.svg"):
        code, _, err = run("analyze", "flips", *study_options, "--top", 0, "--figure", tmp_path / name)
        assert code == 0, err
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "f.svg").read_text()


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_a_still_image_is_what_the_browser_draws(
    suffix: str, run: Run, study_options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    monkeypatch.setattr("plotly.graph_objects.Figure.write_image", lambda figure, file, **_: drawn.extend((figure, file)))
    code, _, err = run("analyze", "flips", *study_options, "--top", 0, "--figure", tmp_path / f"f.{suffix}")
    assert code == 0, err
    figure, file = drawn
    assert isinstance(figure, Figure)
    assert Path(str(file)).suffix == f".{suffix}"


def test_without_a_browser_a_still_image_is_an_error(
    run: Run, study_options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("analyze", "flips", *study_options, "--top", 0)
    monkeypatch.setattr("plotly.graph_objects.Figure.write_image", _no_browser)
    code, _, err = run(*arguments, "--figure", tmp_path / "g.png")
    assert code == 1
    assert "write an .html file instead" in err
    code, _, err = run(*arguments, "--figure", tmp_path / "f.gif")
    assert code == 1
    assert ".html" in err


def _no_browser(*_: object, **__: object) -> None:
    raise RuntimeError("no browser\nmore about it")


@pytest.mark.parametrize(
    ("study", "options", "named"),
    [
        ("low-rank", ("--ranks", "ten"), "ten"),
        ("low-rank", ("--rhos", "2"), "2"),
        ("components", ("--fractions", "r3"), "r3"),
        ("generations", ("--pipeline", "no_such_pipeline"), "no_such_pipeline"),
        ("side-effects", ("--on", "no-such-task"), "no-such-task"),
        ("side-effects", ("--with", "no-such-run"), "no-such-run"),
        ("flips", ("--json", "--csv"), "exclude each other"),
        ("flips", ("--figure", "no/such/folder/f.html"), "no/such/folder"),
    ],
)
def test_what_cannot_be_done_names_what_was_given(
    study: str, options: tuple[str, str], named: str, run: Run, study_options: tuple[object, ...]
) -> None:
    code, _, err = run("analyze", study, *study_options, *options)
    assert code in (1, 2)
    assert named in err


def test_a_model_without_a_reduction_learns_what_is_missing(run: Run, folder: Path, tmp_path: Path) -> None:
    code, _, err = run("analyze", "flips", folder, "--task", "worldfacts", "--store", tmp_path / "runs.db")
    assert code == 1
    assert "--reduce SPEC" in err


def test_a_search_whose_scorer_judges_what_is_written_can_be_studied(
    run: Run, folder: Path, questions: Path, tmp_path: Path
) -> None:
    store = ("--store", tmp_path / "runs.db")
    task = ("--task", f"jsonl:{questions}", "--scorer", "contains", "--new-tokens", 3)
    search = ("search", folder, *task, *store, "--grid", "all.mlp@0.2,0.5", "--metric", "loss", "--json")
    code, out, err = run(*search, "--strategy", "exhaustive")
    assert code == 0, err
    best = json.loads(out)["best"]
    assert best
    for study in ("components", "calibration", "low-rank", "terms", "side-effects"):
        code, out, err = run("analyze", study, "last", *store, "--json")
        assert code == 0, err
        assert "NaN" not in out


def test_text_next_to_a_task_is_scored_as_text_whatever_the_task_s_scorer(
    run: Run, study_options: tuple[object, ...], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It rained all night, so the grass was wet in the morning.\n" * 200)
    results = []
    for scorer in ("answer", "first_token"):
        arguments = ("analyze", "side-effects", *study_options, "--text", text, "--passages", 2, "--json", "--scorer", scorer)
        code, out, err = run(*arguments)
        assert code == 0, err
        results.append(json.loads(out)["effects"][0]["text"])
    assert results[0] == results[1]
