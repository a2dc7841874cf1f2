"""The place where a test takes part in what a search does."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from families import build
from searching.fake_ray import FakeRay, instead_of_ray
from searching.support import GIVEN, Scored, build_task, search

from laserlm.models import LanguageModel, load
from laserlm.scoring.evaluate import evaluate_rows
from laserlm.tasks import Split, Task

BeforeScoring = Callable[..., None]


@pytest.fixture
def before_scoring(monkeypatch: pytest.MonkeyPatch) -> BeforeScoring:
    """Have a function called with the intervention and the examples before a search scores them; what it raises counts."""

    def install(before: Callable[[str, Split], object], after: Callable[[], object] = lambda: None) -> None:
        def scored(lm: LanguageModel, split: Split, *rest: Any) -> Any:
            before(lm.intervention, split)
            try:
                return evaluate_rows(lm, split, *rest)
            finally:
                after()

        modules = [module for name, module in sys.modules.items() if name.startswith("laserlm.searching.")]
        scoring = [module for module in modules if vars(module).get("evaluate_rows") is evaluate_rows]
        assert scoring
        for module in scoring:
            monkeypatch.setattr(module, "evaluate_rows", scored)

    return install


@pytest.fixture
def task() -> Task:
    return build_task()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as every worker finds it."""
    folder = tmp_path_factory.mktemp("cluster") / "llama"
    lm = build("llama")
    lm.model.save_pretrained(folder)
    lm.require_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def lm(folder: Path, tmp_path: Path) -> LanguageModel:
    """A model that workers can load, too."""
    return load(folder, cache=tmp_path / "cache", device="cpu")


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scored]:
    """What the searches find in one process, by their names."""
    place = tmp_path_factory.mktemp("alone")
    lm = load(folder, cache=place / "cache", device="cpu")
    return {name: search(lm, build_task(), place / f"{name}.db", **options) for name, options in GIVEN.items()}


@pytest.fixture
def local(alone: dict[str, Scored]) -> Scored:
    """What the exhaustive search finds in one process."""
    return alone["exhaustive"]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRay]:
    """A cluster that is none: a head that no worker fits on, and a node with four CPUs."""
    with instead_of_ray(monkeypatch, 0, 4) as ray:
        yield ray
