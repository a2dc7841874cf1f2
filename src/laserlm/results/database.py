"""A connection to the results database: opened, migrated, and every failure told as a StoreError."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from laserlm.errors import StoreError

__all__ = ["Database"]

BUSY_SECONDS = 30
NEXT_STEPS = {
    "locked": "another process is writing to it; try again when that one is done",
    "full": "free space on its disk and start again; what was recorded is kept",
    "readonly": "make the file and its folder writable, or give another file with --store",
    "unable to open": "make the folder writable, or give another file with --store",
    "not a database": "give another file with --store",
    "malformed": "the file is damaged; restore a copy or give another file with --store",
}
OTHERWISE = "check that it can be reached and written, or give another with --store"


class Database:
    """An open database with the current schema.

    Args:
        where: path of an SQLite file, or a SQLAlchemy URL if it contains ``://``.

    Raises:
        StoreError: if it cannot be opened, or was written by a newer laserlm.
    """

    def __init__(self, where: str | Path) -> None:
        url = _parse(where)
        self.name = url.database if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
        try:
            self._engine = _engine(url)
        except (SQLAlchemyError, ImportError, TypeError) as error:
            raise StoreError(f"no database driver for {self.name}: {error}; install it or give a file path") from error
        self._writer = self._engine.execution_options(sqlite_begin="BEGIN IMMEDIATE")
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session that sees one state of the database throughout."""
        with self._failures("read"), Session(self._engine) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session whose changes are all made at the end, or none after an exception."""
        with self._failures("write to"), Session(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        try:
            yield
        # Python cannot encode half a surrogate pair for the driver, which escapes as it is.
        except (SQLAlchemyError, UnicodeEncodeError) as error:
            reason = str(getattr(error, "orig", None) or error)
            step = next((step for sign, step in NEXT_STEPS.items() if sign in reason), OTHERWISE)
            raise StoreError(f"could not {doing} the results database {self.name}: {reason}; {step}") from error

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", "laserlm.results:migrations")
        script = ScriptDirectory.from_config(config)
        with self._failures("open"):
            with self._engine.begin() as connection:
                if _revisions(connection) == set(script.get_heads()):
                    return
            # A second process waits here for the write lock and then finds nothing left to do.
            with self._writer.begin() as connection:
                known = {step.revision for step in script.walk_revisions()}
                if unknown := _revisions(connection) - known:
                    raise StoreError(
                        f"the results database {self.name} has schema {', '.join(sorted(unknown))}, this laserlm knows "
                        f"up to {script.get_current_head()}; upgrade laserlm or give another file with --store"
                    )
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def _revisions(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection).get_current_heads())


def _parse(where: str | Path) -> URL:
    if isinstance(where, str) and "://" in where:
        try:
            url = make_url(where)
            backend = url.get_backend_name()
        except (ArgumentError, ValueError) as error:
            shown = re.sub(r"//[^/]*@", "//***@", where)
            raise StoreError(
                f"cannot read the database URL {shown!r}; write a file path, or a URL such as sqlite:///runs.db"
            ) from error
        if backend != "sqlite":
            return url
    else:
        url = URL.create("sqlite", database=str(where))
    if not url.database or url.database == ":memory:":
        raise StoreError(f"no file for the results database in {str(where)!r}; write a file path, such as runs.db")
    # Connections are opened later too, perhaps in another working folder.
    path = Path(url.database).absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"no folder for the results database {path}: {error.strerror}; give another file with --store"
        ) from error
    return url.set(database=str(path))


def _engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        return create_engine(url)
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})

    # The driver begins no transaction before a CREATE TABLE, so that it is switched off and we write BEGIN ourselves.
    @event.listens_for(engine, "connect")
    def connect(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute("PRAGMA foreign_keys = ON")
        _write_ahead(cursor)
        cursor.close()

    # A writer takes the lock at once: one that has read first cannot wait for it.
    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("sqlite_begin", "BEGIN"))

    return engine


def _write_ahead(cursor: DBAPICursor) -> None:
    # SQLite does not wait for the lock here when two processes switch a new file at once.
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise
        time.sleep(0.02)
