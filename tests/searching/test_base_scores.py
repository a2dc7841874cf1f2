from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from threading import Event

import pytest
import torch
from searching.conftest import BeforeScoring
from searching.support import scores

from laserlm.linalg.precision import SETTINGS_LOCK, matmul_settings
from laserlm.models import LanguageModel
from laserlm.scoring.tokenize import encode
from laserlm.searching import search
from laserlm.searching.base_scores import find_file
from laserlm.searching.scorer import EncodedSplit
from laserlm.tasks import Split, Task

SHORT = {"strategy": "exhaustive", "grid": "1.fc_in@0.5", "metric": "loss"}
Searched = Callable[..., list[str]]


@pytest.fixture
def base_scored(lm: LanguageModel, task: Task, tmp_path: Path, before_scoring: BeforeScoring) -> Searched:
    """Search, and return the splits that the unchanged model was scored on."""
    splits: list[str] = []
    is_interrupted = False

    def count(intervention: str, split: Split) -> None:
        if is_interrupted and intervention:
            raise KeyboardInterrupt
        splits.extend([] if intervention else [split.name])

    before_scoring(count)

    def run(name: str, of: Task = task, *, interrupted: bool = False, **options: object) -> list[str]:
        nonlocal is_interrupted
        splits.clear()
        is_interrupted = interrupted
        with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
            search(lm, of, store=tmp_path / f"{name}.db", **SHORT | options)
        return sorted(set(splits))

    return run


def test_a_later_search_takes_the_scores_of_the_unchanged_model(base_scored: Searched, lm: LanguageModel) -> None:
    assert base_scored("first") == ["guard 0 choosing", "guard 0 measuring", "test", "validation"]
    assert base_scored("second", max_harm=0.5) == []
    assert base_scored("third", seed=1) == ["guard 0 choosing", "guard 0 measuring", "validation"]  # in another order


def test_restart_computes_them_again(base_scored: Searched) -> None:
    first = base_scored("first")
    assert base_scored("first", restart=True) == first


def test_other_questions_other_batches_and_other_weights_take_none(
    base_scored: Searched, lm: LanguageModel, task: Task
) -> None:
    first = base_scored("first")
    example, *others = task.test.examples
    changed = replace(task, test=replace(task.test, examples=(replace(example, answer=" Paris again"), *others)))
    assert base_scored("second", of=changed) == ["test"]
    assert base_scored("third", batch_size=3) == first
    lm.model.get_parameter(lm.matrices[0].path).data += 1e-3
    assert set(base_scored("fourth")) == set(first)


def test_the_result_is_the_same(lm: LanguageModel, task: Task, tmp_path: Path) -> None:
    outcomes = [search(lm, task, store=tmp_path / f"{name}.db", **SHORT) for name in ("first", "second")]
    first, second = (
        scores(tmp_path / f"{name}.db", outcome) for name, outcome in zip(("first", "second"), outcomes, strict=True)
    )
    assert first.keys() == second.keys()
    for key, evaluation in first.items():
        assert evaluation.scores == second[key].scores
        assert [s.tied for s in evaluation.scores] == [s.tied for s in second[key].scores]
    for field in ("best", "validation", "test", "harms", "points"):
        assert getattr(outcomes[0], field) == getattr(outcomes[1], field)


@pytest.mark.parametrize("damage", ["{", "{}", '{"scores": [{}], "seconds": 1, "classes": []}', '{"scores": 3}'])
def test_a_damaged_file_is_not_read(base_scored: Searched, lm: LanguageModel, damage: str) -> None:
    first = base_scored("first")
    files = list((lm.cache / "scores").iterdir())
    assert len(files) == len(first)
    for file in files:
        file.write_text(damage, encoding="utf-8")
    assert base_scored("second") == first
    assert base_scored("third") == []  # they were written again


def test_generated_texts_are_not_kept(lm: LanguageModel, task: Task, tmp_path: Path) -> None:
    of_texts = replace(task, **{n: replace(getattr(task, n), scorer="contains") for n in ("validation", "test")})
    search(lm, of_texts, store=tmp_path / "s.db", **SHORT)
    assert len(list((lm.cache / "scores").iterdir())) == 3  # validation by loss, and the two parts of the guard


def test_what_an_earlier_process_scored_elsewhere_is_not_kept(base_scored: Searched, lm: LanguageModel) -> None:
    assert base_scored("first", interrupted=True) == ["test", "validation"]
    rmtree(lm.cache / "scores")
    lm.model.set_attn_implementation("eager")
    assert base_scored("first") == ["guard 0 choosing", "guard 0 measuring"]
    assert base_scored("second") == ["test", "validation"]


def test_what_others_grade_and_what_is_rounded_is_not_kept(lm: LanguageModel, task: Task) -> None:
    encoded = EncodedSplit(task.test, encode(lm, task.test.examples, "first_token"), "first_token")
    assert find_file(lm, encoded, {}) is not None
    assert find_file(lm, replace(encoded, split=replace(task.test, judge=lambda *_: [])), {}) is None
    lm.model.to(torch.bfloat16)
    assert find_file(lm, encoded, {}) is None


def test_products_of_less_precision_are_others(lm: LanguageModel, task: Task) -> None:
    encoded = EncodedSplit(task.test, encode(lm, task.test.examples, "first_token"), "first_token")
    files = {find_file(lm, encoded, {}), find_file(lm, encoded, {"device": "other"})}
    torch.set_float32_matmul_precision("high")
    try:
        files.add(find_file(lm, encoded, {}))
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu"):
        files.add(find_file(lm, encoded, {}))
    assert len(files) == 4


def test_a_pass_in_another_thread_does_not_change_the_file(lm: LanguageModel, task: Task) -> None:
    """It sets the precision of one backend for its time, and PyTorch then refuses to name that of all."""
    encoded = EncodedSplit(task.test, encode(lm, task.test.examples, "first_token"), "first_token")
    expected = find_file(lm, encoded, {})
    begun, goes_on = Event(), Event()

    def run() -> None:
        with SETTINGS_LOCK:
            settings = matmul_settings("mkldnn")
            before, settings.fp32_precision = settings.fp32_precision, "bf16"
            begun.set()
            goes_on.wait()
            settings.fp32_precision = before

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(run)
        begun.wait()
        found = pool.submit(find_file, lm, encoded, {})
        wait([found], timeout=0.5)
        goes_on.set()
        running.result()
        assert found.result() == expected
