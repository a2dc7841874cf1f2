"""A run says what computed its scores, and warns where it goes on with something else."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from laserlm.models import LanguageModel
from laserlm.searching import SearchResult, search
from laserlm.store import Store
from laserlm.tasks import Task

Run = Callable[..., tuple[int, str, str]]
HERE = {"device": "cpu", "dtype": "float32", "attention": "sdpa", "batch_size": 32}


@pytest.fixture
def search_here(llama: LanguageModel, task: Task, tmp_path: Path) -> Callable[..., SearchResult]:
    """Search in the database ``runs.db``; with ``stop`` only until so many parts of the work are done."""

    def run(stop: int | None = None, **settings: Any) -> SearchResult:
        steps = []

        def on_step(step: Any) -> None:
            steps.append(step)
            if len(steps) == stop:
                raise KeyboardInterrupt

        options = {"strategy": "exhaustive", "grid": "0-1.mlp@0.5", "store": tmp_path / "runs.db"} | settings
        return search(llama, task, on_step=on_step, **options)

    return run


def stop(search_here: Callable[..., SearchResult], **settings: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        search_here(stop=3, **settings)


def noted(tmp_path: Path) -> list[dict[str, Any]]:
    with Store.open(tmp_path / "runs.db") as store:
        computed_on: list[dict[str, Any]] = store.notes(store.find("last").id)["computed_on"]
        return computed_on


def test_a_run_notes_what_computed_it_and_shows_it(search_here: Callable[..., SearchResult], run: Run, tmp_path: Path) -> None:
    search_here()
    assert noted(tmp_path) == [HERE]
    out = run("runs", "show", "last", "--store", tmp_path / "runs.db")[1]
    assert "  computed on: cpu, float32, attention sdpa, batch size 32\n" in out
    assert re.search(r"^  seconds: start \d+\.\d, test \d+\.\d, exhaustive \d+\.\d, harm \d+\.\d$", out, re.MULTILINE)


def test_a_run_that_goes_on_as_it_began_says_nothing(
    search_here: Callable[..., SearchResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop(search_here)
    search_here()
    assert noted(tmp_path) == [HERE]
    assert "goes on with" not in caplog.text


@pytest.mark.parametrize("change", ["attention", "batch_size"])
def test_a_run_that_goes_on_with_something_else_warns_once_and_names_both(
    change: str,
    search_here: Callable[..., SearchResult],
    llama: LanguageModel,
    tmp_path: Path,
    run: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stop(search_here)
    settings = {"batch_size": 4} if change == "batch_size" else {}
    if change == "attention":
        llama.model.set_attn_implementation("eager")
    now = HERE | ({"attention": "eager"} if change == "attention" else settings)
    with caplog.at_level(logging.WARNING):
        result = search_here(**settings)
    assert result.complete
    (warning,) = [r.getMessage() for r in caplog.records if "goes on with" in r.getMessage()]
    assert (
        f"run {result.run} goes on with cpu, float32, attention {now['attention']}, batch size {now['batch_size']}" in warning
    )
    assert "earlier scores are from cpu, float32, attention sdpa, batch size 32" in warning
    assert "\n" not in warning
    assert noted(tmp_path) == [HERE, now]
    caplog.clear()
    assert search_here(**settings) == result  # a finished run computes nothing
    assert "goes on with" not in caplog.text
    assert run("runs", "show", "last", "--store", tmp_path / "runs.db")[1].count("computed on: cpu") == 2


def test_a_batch_that_was_halved_is_noted_and_is_no_reason_to_warn(
    search_here: Callable[..., SearchResult], llama: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def tight(_module: Any, _args: Any, inputs: dict[str, Any]) -> None:
        if len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("no room")

    llama.model.register_forward_pre_hook(tight, with_kwargs=True)
    stop(search_here, batch_size=7)
    sizes = [hardware["batch_size"] for hardware in noted(tmp_path)]
    assert sizes[-1] < 7
    search_here(batch_size=7)
    assert [hardware["batch_size"] for hardware in noted(tmp_path)] == sizes
    assert "goes on with" not in caplog.text


def test_a_run_of_an_earlier_version_goes_on_without_a_warning(
    search_here: Callable[..., SearchResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop(search_here)
    with Store.open(tmp_path / "runs.db") as store:
        info = store.find("last")
        options = {"kind": info.kind, "key": info.key, "settings": info.settings, "provenance": info.provenance}
        with store.run(**options) as earlier:
            earlier.note("computed_on", [])
    search_here(batch_size=4)
    assert noted(tmp_path) == [HERE | {"batch_size": 4}]
    assert "goes on with" not in caplog.text
