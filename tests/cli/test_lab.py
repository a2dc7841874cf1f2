"""The commands of the lab that train nothing for long: Sokoban from training to playing, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from laserlm.lab.sokoban import training

Run = Callable[..., tuple[int, str, str]]

BOXOBAN = """; 0
##########
#        #
# @$.    #
#        #
#        #
#        #
#        #
#        #
#        #
##########

; 1
##########
#   .    #
#        #
#   $    #
#   @    #
#        #
#        #
#        #
#        #
##########
"""


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few held-out levels, which every command makes."""
    monkeypatch.setattr(training, "N_HELD_OUT", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that was trained for two steps."""
    folder = tmp_path_factory.mktemp("sokoban") / "player"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "N_HELD_OUT", 20)
        training.train(training.TrainingConfig(levels=8, steps=2), folder)
    return folder


@pytest.fixture
def player(trained: Path, few: None, capsys: pytest.CaptureFixture[str]) -> Path:
    capsys.readouterr()  # what training showed
    return trained


def test_a_model_is_trained_once(run: Run, few: None, tmp_path: Path) -> None:
    arguments = ("lab", "sokoban", "train", "--out", tmp_path / "player", "--levels", 8, "--steps", 2)
    code, out, _ = run(*arguments)
    assert code == 0
    assert "parameters" in out
    written = (tmp_path / "player" / "model.safetensors").stat().st_mtime_ns
    assert run(*arguments)[0] == 0
    assert (tmp_path / "player" / "model.safetensors").stat().st_mtime_ns == written


def test_a_trained_model_plays_is_searched_and_saved(run: Run, player: Path, tmp_path: Path) -> None:
    code, out, _ = run("lab", "sokoban", "evaluate", player, "--max-steps", 5, "--reduce", "2.fc_in@0", "--json")
    assert code == 0
    report = json.loads(out)
    before, after = report["evaluations"]
    assert before["n"] == report["comparison"]["n"] == 16
    assert before["steps"] <= 5
    assert after["intervention"] == "2.fc_in@0"
    # Playing on without solving anything costs 0.1 for each of five steps, but for boxes pushed on or off goals.
    assert -2.5 <= report["return"][0]["value"] <= 12

    arguments = ("--max-steps", 5, "--grid", "2.fc_in@0,0.5", "--store", tmp_path / "runs.db")
    code, out, _ = run("lab", "sokoban", "search", player, *arguments, "--json")
    assert code == 0
    values = json.loads(out)
    assert values["candidates"] == 2
    assert values["test"]["n"] == 16
    assert "" in values["finalists"]
    assert run("report", values["run"], "--store", tmp_path / "runs.db", "--out", tmp_path / "report.html")[0] == 0

    assert run("save", player, "--reduce", "2.fc_in@0.5", "--out", tmp_path / "reduced")[0] == 0
    code, out, _ = run("lab", "sokoban", "evaluate", tmp_path / "reduced", "--max-steps", 5, "--json")
    assert code == 0
    assert json.loads(out)["evaluations"][0]["n"] == 16


def test_an_episode_is_drawn_and_written_as_an_animated_picture(run: Run, player: Path, tmp_path: Path) -> None:
    file = tmp_path / "episode.gif"
    code, out, _ = run("lab", "sokoban", "play", player, "--max-steps", 4, "--picture", file)
    assert code == 0
    assert "solved in" in out
    assert out.count("@@") + out.count("++") == 2  # the first board and the last
    code, out, _ = run("lab", "sokoban", "play", player, "--max-steps", 4, "--json")
    moves = json.loads(out)["moves"]
    with Image.open(file) as picture:
        assert picture.format == "GIF"
        assert 1 <= getattr(picture, "n_frames", 1) <= len(moves) + 1  # equal frames in a row are one


def test_boxoban_levels_are_solved_for_their_lengths_and_played(run: Run, player: Path, tmp_path: Path) -> None:
    file = tmp_path / "levels.txt"
    file.write_text(BOXOBAN, encoding="utf-8")
    code, out, _ = run("lab", "sokoban", "evaluate", player, "--levels", file, "--split", "all", "--max-steps", 5, "--json")
    assert code == 0
    assert json.loads(out)["evaluations"][0]["n"] == 2


def test_other_models_and_levels_that_are_not_there_are_refused(run: Run, player: Path, folder: Path) -> None:
    code, _, err = run("lab", "sokoban", "evaluate", folder)
    assert code == 1
    assert "not a Sokoban model" in err
    code, _, err = run("lab", "sokoban", "play", player, "--level", 16)
    assert code == 1
    assert "no level 16" in err


def test_unknown_choices_are_refused(run: Run, tmp_path: Path) -> None:
    code, _, err = run("lab", "noisy-recall", "--learnt", "some", "--out", tmp_path)
    assert code == 2
    assert "outputs or all" in err
    code, _, err = run("lab", "rank-constraint", "chess")
    assert code == 2
    assert "recall or worldfacts" in err
