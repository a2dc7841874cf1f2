"""Training on solved levels: what is learnt from, what is written, how it goes on, and a search over what came of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import laserlm
from laserlm.edit import applied
from laserlm.errors import TaskError
from laserlm.lab.sokoban.episodes import canonical_board, replay, task
from laserlm.lab.sokoban.levels import generate
from laserlm.lab.sokoban.training import SHIPPED_MODEL, TrainingConfig, held_out_task, train, training_levels
from laserlm.models import load
from laserlm.scoring.evaluate import evaluate
from laserlm.store import Store
from laserlm.web.report import write_report

N_HELD_OUT = "laserlm.lab.sokoban.training.N_HELD_OUT"
SMALL = TrainingConfig(
    boxes=1,
    room=4,
    levels=24,
    steps=14,
    batch_size=16,  # so that an epoch has twelve steps
    learning_rate=3e-3,
    hidden_size=16,
    layers=2,
    heads=2,
    channels=4,
    depth=1,
)
OVERFITTED = replace(SMALL, levels=8, steps=120, batch_size=16, learning_rate=1e-2, hidden_size=32, channels=8)


class Ended(Exception):
    """Stands for whatever ends a process."""


@pytest.fixture(autouse=True)
def few_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(N_HELD_OUT, 20)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights of a training that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(N_HELD_OUT, 20)
        return train(SMALL, tmp_path_factory.mktemp("whole") / "model", save_every=None).hash


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a model that was trained on a few levels many times over."""
    folder = tmp_path_factory.mktemp("sokoban") / "model"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(N_HELD_OUT, 20)
        train(OVERFITTED, folder)
        yield folder


def interrupted(config: TrainingConfig, folder: Path, at: int, save_every: int) -> None:
    """Train until a step is done, and end there before its checkpoint is written."""

    def stop(done: int, _total: int) -> None:
        if done == at:
            raise Ended

    with pytest.raises(Ended):
        train(config, folder, save_every=save_every, on_progress=stop)
    assert not folder.exists()


def test_lessons_are_solved_levels_without_copies_of_held_out_ones() -> None:
    out = {canonical_board(level) for level, _ in generate(20, seed=2**31, boxes=1, room=3)}
    config = replace(SMALL, room=3, levels=40)
    generated = list(generate(80, seed=config.seed, boxes=1, room=3))
    kept = [(level, moves) for level, moves in generated if canonical_board(level) not in out]
    assert len(generated) - len(kept) > 5
    assert list(training_levels(config)) == kept[:40]
    assert {len(level.boxes) for level, _ in kept} == {1}
    assert all(replay(level, moves)[0] for level, moves in training_levels(config))


def test_other_seeds_give_other_lessons() -> None:
    assert not set(training_levels(SMALL)) & set(training_levels(replace(SMALL, seed=1)))


def test_a_fifth_of_the_held_out_levels_is_for_validation() -> None:
    questions = held_out_task(boxes=1, room=4, max_steps=33)
    assert (len(questions.validation), len(questions.test)) == (4, 16)
    assert [e.prompt for e in questions.every] == [level.text for level, _ in generate(20, seed=2**31, boxes=1, room=4)]
    assert questions.test.decoding.new_tokens == 33
    assert held_out_task().every.examples[0].group == "boxes: 2"


def test_training_writes_a_model_that_is_loaded_and_not_trained_again(trained: Path) -> None:
    assert json.loads((trained / "recipe.json").read_text()) == asdict(OVERFITTED)
    seen: list[int] = []
    again = train(OVERFITTED, trained, on_progress=lambda done, _: seen.append(done))
    assert not seen
    assert again.hash == load(trained).hash
    assert again.model.config.hidden_size == 32
    assert {m.layer for m in again.matrices} == {0, 1}


def test_the_loss_on_a_few_levels_falls_and_more_of_them_are_solved(trained: Path, tmp_path: Path) -> None:
    learnt = task(training_levels(OVERFITTED), max_steps=20).every
    before = evaluate(train(replace(OVERFITTED, steps=1, learning_rate=0.0), tmp_path / "fresh", save_every=None), learnt)
    after = evaluate(load(trained), learnt)
    assert before.loss == pytest.approx(math.log(4), abs=0.1)
    assert after.loss < 0.7 * before.loss
    assert after.accuracy > before.accuracy


def test_every_step_is_reported_and_equal_configurations_give_equal_weights(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = train(SMALL, tmp_path / "first", save_every=None, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 14) for step in range(1, 15)]
    assert {f.name for f in tmp_path.iterdir()} == {"first"}  # checkpoints are gone where training has come to its end
    assert train(SMALL, tmp_path / "second", save_every=5).hash == first.hash
    assert train(replace(SMALL, seed=1), tmp_path / "other", save_every=None).hash != first.hash


@pytest.mark.parametrize(("at", "begins"), [(3, 1), (5, 5), (13, 13)])
def test_an_interrupted_training_goes_on_from_its_checkpoint_to_the_same_weights(
    full: str, tmp_path: Path, at: int, begins: int
) -> None:
    interrupted(SMALL, tmp_path / "model", at, save_every=4)
    seen: list[int] = []
    lm = train(SMALL, tmp_path / "model", save_every=4, on_progress=lambda done, _: seen.append(done))
    assert seen == list(range(begins, 15))
    assert lm.hash == full


def test_a_training_that_was_ended_after_its_last_step_takes_no_further_one(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object, **__: object) -> None:
        raise Ended

    with monkeypatch.context() as patch:
        patch.setattr("laserlm.lab.sokoban.training.tokenizer", ended)
        with pytest.raises(Ended):
            train(SMALL, tmp_path / "model", save_every=4)
    seen: list[int] = []
    assert train(SMALL, tmp_path / "model", on_progress=lambda done, _: seen.append(done)).hash == full
    assert not seen


def test_where_held_out_levels_leave_too_few_others_that_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(N_HELD_OUT, 100)
    with pytest.raises(TaskError, match="of 50 levels that are not held out"):
        train(replace(SMALL, room=3, levels=50), tmp_path / "model")
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_that_was_being_written_is_passed_over(full: str, tmp_path: Path) -> None:
    interrupted(SMALL, tmp_path / "model", 7, save_every=4)
    half = tmp_path / "model.checkpoints" / "checkpoint-6"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"")
    assert train(SMALL, tmp_path / "model", save_every=4).hash == full


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_saved_copy_loads_in_a_process_of_its_own(trained: Path, tmp_path: Path, form: str) -> None:
    laserlm.save(load(trained), "1.fc_in@0.2", tmp_path / "out", form=form)  # type: ignore[arg-type]
    checked = laserlm.load_check(tmp_path / "out")
    assert checked.form == form
    assert checked.imported_laserlm
    assert checked.difference == pytest.approx(0, abs=1e-5)


def test_a_folder_with_another_configuration_is_refused_finished_or_not(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="another configuration"):
        train(replace(OVERFITTED, seed=1), trained)
    interrupted(SMALL, tmp_path / "part", 2, save_every=4)
    with pytest.raises(TaskError, match="another configuration"):
        train(replace(SMALL, steps=15), tmp_path / "part")


def test_a_search_ranks_by_the_solutions_and_chooses_by_playing(trained: Path, tmp_path: Path) -> None:
    lm = load(trained)
    questions = task(generate(20, seed=77, boxes=1, room=4), max_steps=15)
    result = laserlm.search(lm, questions, grid="all.all@0,0.5", store=tmp_path / "runs.db")
    assert result.candidates == 2 * 6 * 2  # blocks, matrices of each, shares kept
    played = {}
    for text, share in result.finalists.items():
        with applied(lm, text):
            played[text] = evaluate(lm, questions.validation)
        assert share == pytest.approx(played[text].accuracy)
    assert "" in result.finalists
    assert len(result.finalists) > 1
    assert result.finalists[str(result.best)] == max(result.finalists.values())
    with applied(lm, result.best):
        edited = evaluate(lm, questions.test)
    assert result.test.n == 16
    assert result.test.base == pytest.approx(evaluate(lm, questions.test).accuracy)
    assert result.test.edited == pytest.approx(edited.accuracy)
    assert result.test.edited_loss == pytest.approx(edited.loss, abs=1e-5)
    with Store.open(tmp_path / "runs.db") as store:
        page = write_report(store, result.run, tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.lower().startswith("<!doctype html>")
    assert result.run in page
    assert "sokoban" in page


def test_the_model_that_comes_with_laserlm_solves_most_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(N_HELD_OUT, 60)
    assert json.loads((SHIPPED_MODEL / "recipe.json").read_text()) == asdict(TrainingConfig())
    assert sum(f.stat().st_size for f in SHIPPED_MODEL.iterdir()) < 5e6
    played = evaluate(load(SHIPPED_MODEL), held_out_task().test)
    assert played.n == 48
    assert played.accuracy_interval.low > 0.4
    best = 10 + 2  # of a level with two boxes, but for its steps
    assert played.figures["return"] < best
