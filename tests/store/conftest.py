from __future__ import annotations

import os
import runpy
import secrets
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text

from laserlm.store import Store, claim

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """URL of a new SQLite database."""
    return f"sqlite:///{tmp_path / 'runs.db'}"


@pytest.fixture
def make_database() -> Iterator[Callable[..., str]]:
    """Make PostgreSQL databases, dropped afterwards, and return their URLs."""
    if "LASER_TEST_POSTGRESQL" not in os.environ:
        pytest.skip("needs a PostgreSQL server: scripts/with_postgresql.sh COMMAND, or its URL in LASER_TEST_POSTGRESQL")
    url = make_url(os.environ["LASER_TEST_POSTGRESQL"])
    names = []

    def run(options: str = "ENCODING UTF8") -> str:
        names.append(f"laser_test_{secrets.token_hex(6)}")
        server.exec_driver_sql(f"CREATE DATABASE {names[-1]} TEMPLATE template0 {options}")
        return url.set(database=names[-1]).render_as_string(hide_password=False)

    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as server:
        yield run
        for name in names:
            server.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgresql_url(make_database: Callable[..., str]) -> str:
    """URL of a new PostgreSQL database."""
    return make_database()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def store_url(request: pytest.FixtureRequest) -> str:
    """URL of a new database of every kind."""
    return str(request.getfixturevalue(f"{request.param}_url"))


@pytest.fixture
def store(store_url: str, empty_database: Path) -> Iterator[Store]:
    url = make_url(store_url)
    if url.drivername == "sqlite":
        shutil.copy(empty_database, str(url.database))
    with Store.open(store_url) as store:
        yield store


@pytest.fixture(scope="session")
def sample() -> SimpleNamespace:
    """The functions of worker.py, so that this process and the others mean the same; found in any import mode."""
    return SimpleNamespace(**runpy.run_path(str(WORKER)))


@pytest.fixture
def sql(store_url: str) -> Iterator[Callable[..., list[Any]]]:
    """Run SQL beside the store."""
    engine = create_engine(store_url)

    def run(statement: str, **values: Any) -> list[Any]:
        with engine.begin() as connection:
            result = connection.execute(text(statement), values)
            return list(result) if result.returns_rows else []

    yield run
    engine.dispose()


@pytest.fixture
def watching(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let the wait for a heartbeat take no time: a sleep adds to ``seconds``, and calls ``meanwhile`` with their sum."""
    clock = SimpleNamespace(seconds=0.0, meanwhile=lambda seconds: None)

    def sleep(seconds: float) -> None:
        clock.seconds += seconds
        clock.meanwhile(clock.seconds)

    monkeypatch.setattr(claim, "time", SimpleNamespace(sleep=sleep))
    return clock


@pytest.fixture
def start(store_url: str) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start worker.py up to the point where a line of input lets it begin."""
    with ExitStack() as stack:

        def run(*arguments: str) -> subprocess.Popen[str]:
            command = [sys.executable, str(WORKER), arguments[0], store_url, *arguments[1:]]
            process = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            return process

        yield run


@pytest.fixture
def go() -> Callable[..., None]:
    """Let processes begin together once all are ready."""

    def run(*processes: subprocess.Popen[str]) -> None:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()

    return run
