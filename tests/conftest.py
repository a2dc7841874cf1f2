"""Tiers, and fixtures: tiny models, the bundled model, real data, and the command line, run in this process."""

from __future__ import annotations

import gc
import os
import shutil
import sys

# No test reaches for a hub. The hub's library reads this once, when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Two workers share two cores, and one thread is faster on tiny matrices. PyTorch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

Run = Callable[..., tuple[int, str, str]]

if TYPE_CHECKING:
    from laserlm.models import LanguageModel


SERVERS = ("browser", "postgresql", "ray")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave what needs a server or a browser to the full tier, and give each of these to one worker.

    Tests on the bundled model take longest. They come first, so that no worker is left with one of them at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("bundled") is None)
    for item in items:
        for name in SERVERS:
            if item.get_closest_marker(name):
                item.add_marker("slow")
                item.add_marker(pytest.mark.xdist_group(name))


def pytest_collection_finish() -> None:
    """Leave what imports and collection built out of every later garbage collection: a tenth of the tests' time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)


@pytest.fixture(scope="session")
def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caller")


@pytest.fixture(autouse=True)
def caller_folder(empty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run every test in an empty folder, which it has to leave empty: no command writes where it was not told to."""
    monkeypatch.chdir(empty_folder)
    yield
    left = list(empty_folder.iterdir())
    for path in left:  # the next test is not blamed for it
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert [path.name for path in left] == []


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what tests cache and store out of the user's folders."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture(scope="session", autouse=True)
def short_own_text() -> Iterator[dict[str, int]]:
    """Let models write short texts for the guard of a search; return the usual sizes."""
    usual: dict[str, int] = {}
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:  # else no test makes a search in this process
            from laserlm.searching import guard

            for name, short in (("PASSAGES", 4), ("PASSAGE_TOKENS", 8)):
                usual[name] = getattr(guard, name)
                patch.setattr(guard, name, short)
        yield usual


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    from laserlm.cli import main

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["laser", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A results database without runs, which tests copy."""
    from laserlm.store import Store

    path = tmp_path_factory.mktemp("database") / "runs.db"
    with Store.open(path):
        pass
    return path


@pytest.fixture
def make() -> Callable[..., LanguageModel]:
    """Build a tiny model of a named family."""
    from families import build

    return build


@pytest.fixture
def llama(make: Callable[..., LanguageModel]) -> LanguageModel:
    return make("llama")


@pytest.fixture(scope="session")
def bundled() -> LanguageModel:
    """The bundled model, or a skip where it is not installed."""
    from laserlm.models import bundled as package
    from laserlm.models import load
    from laserlm.paths import cache_folder

    if package.packaged_file() is None and not package.converted(cache_folder()).is_dir():
        pytest.skip("the bundled model is not installed; run 'laser setup'")
    return load("bundled")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip where there is none."""
    folder = os.environ.get("LASER_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("LASER_DATA names no folder of real data sets")
    return Path(folder)
