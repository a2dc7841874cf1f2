"""The configuration of a search: written, kept with the run, and read again."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import yaml

from laserlm.cli.config_file import as_configuration, configuration_yaml, option_types, read_configuration
from laserlm.cli.search import NOT_CONFIGURED, search
from laserlm.errors import LaserError

Run = Callable[..., tuple[int, str, str]]
OPTIONS = option_types(search, NOT_CONFIGURED)


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> list[Any]:
    """A quick search."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"The capital number {i} is", "answer": "Rome" if i % 2 else "Paris"} for i in range(10)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["search", folder, "--task", f"jsonl:{questions}", "--strategy", "exhaustive", "--no-chat"]


def read(text: str, file: Path) -> dict[str, Any]:
    file.write_text(text, encoding="utf-8")
    return read_configuration(file, OPTIONS)


def test_a_search_is_repeated_by_the_file_that_it_saved_and_by_what_its_run_keeps(
    run: Run, command: list[Any], tmp_path: Path
) -> None:
    saved, shown, store = tmp_path / "run.yaml", tmp_path / "shown.yaml", tmp_path / "runs.db"
    code, out, err = run(*command, "--grid", "1.mlp@0.5", "--guard", "self", "--store", store, "--save-config", saved, "--json")
    assert code == 0, err
    done = json.loads(out)
    code, out, _ = run("runs", "show", "last", "--config", "--store", store)
    shown.write_text(out, encoding="utf-8")
    kept = yaml.safe_load(out)
    assert yaml.safe_load(saved.read_text()) == kept | {"store": str(store)}
    assert (kept["grid"], kept["guard"], kept["chat"], kept["memory"]) == ("1.mlp@0.5", ["self"], False, 1.0)
    for arguments in (["--config", saved], ["--config", shown, "--store", store]):
        code, out, err = run("search", *arguments, "--json")
        assert (code, json.loads(out)["run"]) == (0, done["run"])
    assert read(saved.read_text(), tmp_path / "again.yaml") == yaml.safe_load(saved.read_text())


def test_an_option_of_the_command_line_wins_over_the_file(run: Run, command: list[Any], tmp_path: Path) -> None:
    file, saved = tmp_path / "run.yaml", tmp_path / "saved.yaml"
    file.write_text("grid: 1.mlp@0.5\ndelta: 1e-3\nlimit: 2\nchat: true\nfirst_rung: 4\nmodel: elsewhere\n")
    store = ("--store", tmp_path / "runs.db")
    code, _, err = run(*command, "--config", file, "--limit", 3, *store, "--save-config", saved, "--json")
    assert code == 0, err
    values = yaml.safe_load(saved.read_text())
    assert (values["grid"], values["delta"], values["limit"], values["chat"]) == ("1.mlp@0.5", 1e-3, 3, False)
    assert (values["model"], values["first_rung"]) == (str(command[1]), 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_ham: 0.1", "no option 'max_ham'; did you mean 'max_harm'?"),
        ("max-harm: 0.1", "did you mean 'max_harm'?"),
        ("restart: true", "no option 'restart'"),
        ("zzzz: 1", "'laser search --help' lists the options"),
        ("limit: many", "limit is 'many', but must be a whole number from 1"),
        ("limit: 2.5", "limit is 2.5, but must be a whole number from 1"),
        ("limit: true", "limit is True, but must be a whole number"),
        ("limit: 0", "limit is 0, but must be a whole number from 1"),
        ("keep: 2", "keep is 2, but must be a number from 0 to 1"),
        ("keep: .nan", "keep is nan, but must be a number from 0 to 1"),
        ("keep: much", "keep is 'much', but must be a number from 0 to 1"),
        ("chat: maybe", "chat is 'maybe', but must be true or false"),
        ("revision: 1234567", "revision is 1234567, but must be a text; write it in quotes"),
        ("guard: [self, 3]", "guard is ['self', 3], but must be a list of texts"),
        ("guard: []", "guard is [], but must be a list of texts"),
        ("grid: [1, 2]", "grid is [1, 2], but must be a text"),
        ("seed: 1\nseed: 2", "seed occurs 2 times"),
        ("- a\n- b", "holds no options"),
        ("", "holds no options"),
        ("seed: 1\ngrid: 'a", "line 2 is no YAML"),
        ("a: 2001-99-99", "is no YAML"),
        ("[" * 3000, "is no YAML"),
        ("!!python/object/apply:os.system [ls]", "is no YAML"),
    ],
)
def test_a_wrong_file_names_the_key_the_value_and_what_is_allowed(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(LaserError) as error:
        read(text, tmp_path / "run.yaml")
    assert message in str(error.value)
    assert str(tmp_path / "run.yaml") in str(error.value)


def test_a_wrong_key_ends_the_command_and_a_missing_file_is_named(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    code, _, err = run("search", "bundled", "--config", file)
    assert (code, f"cannot read the configuration {file}" in err) == (1, True)
    file.write_text("strategy: rase")
    code, _, err = run("search", "bundled", "--config", file)
    assert (code, "no strategy 'rase'; there are strengths, components, race" in err) == (1, True)
    file.write_text("task: worldfacts")
    assert run("search", "--config", file)[0] == 2  # a model is missing


def test_values_are_read_as_the_types_of_the_options(tmp_path: Path) -> None:
    read_back = read("guard: self\nlimit: null\ndelta: 1\ndata_folder: ~/data\n", tmp_path / "run.yaml")
    assert read_back == {"guard": ["self"], "delta": 1.0, "data_folder": str(Path.home() / "data")}
    with pytest.raises(LaserError, match="did you mean 'candidates'"):
        read("width: 6", tmp_path / "run.yaml")


def test_a_password_is_left_out_and_a_foreign_file_stays(
    run: Run, command: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert as_configuration(store="postgresql://me:secret@host/db", data=Path("a"), seed=None) == {"data": "a"}
    assert "--store" in capsys.readouterr().err
    file = tmp_path / "run.yaml"
    file.write_text("mine: 1")
    code, _, err = run(*command, "--save-config", file)
    assert (code, file.read_text()) == (1, "mine: 1")
    assert "is not this configuration of laserlm; move it away, or give another file" in err
    for seed, expected in ((1, 0), (1, 0), (2, 1)):  # the same options may be written again
        assert run(*command, "--seed", seed, "--dry-run", "--save-config", tmp_path / "own.yaml")[0] == expected


def test_any_name_and_value_is_written_so_that_it_is_read_again(tmp_path: Path) -> None:
    def command(text: Annotated[str, typer.Option()], number: Annotated[float, typer.Option()]) -> None: ...

    options = dict(inspect.signature(command, eval_str=True).parameters)
    for text in ("no", "1e3", "é\n#: 'x' \"y\"", "27-29.mlp@0.05,0.5", "x " * 200, "0123", "null"):
        file = tmp_path / "run.yaml"
        file.write_text(configuration_yaml({"text": text, "number": 1e-07}), encoding="utf-8")
        assert read_configuration(file, options) == {"text": text, "number": 1e-07}


def test_a_run_without_a_configuration_says_why(run: Run, finished_search: tuple[str, Path]) -> None:
    from laserlm.store import Store

    run_id, store = finished_search
    with (
        Store.open(store) as results,
        results.run(kind="scores", key="k", settings={"model": "m", "task": "t"}, provenance={}) as r,
    ):
        other = r.id
    code, _, err = run("runs", "show", other, "--config", "--store", store)
    assert (code, "keeps no configuration: it is a run of kind scores" in err) == (1, True)
    assert run("runs", "show", run_id, "--config", "--store", store)[0] == 0
