"""A connection to the results database: opened, migrated, and every failure told as a StoreError."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, BigInteger, Connection, Engine, create_engine, event, func, literal, make_url, select
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from laserlm.errors import MissingExtraError, StoreError

__all__ = ["Database", "lock"]

BUSY_SECONDS = 30
DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
# On SQLite a writer takes the lock at once: one that has read first cannot wait for it. On PostgreSQL it waits for the row
# of another one, and then sees what that one left.
READING: dict[str, dict[str, Any]] = {
    "sqlite": {"laserlm_begin": "BEGIN"},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
WRITING: dict[str, dict[str, Any]] = {
    "sqlite": {"laserlm_begin": "BEGIN IMMEDIATE"},
    "postgresql": {"isolation_level": "READ COMMITTED", "laserlm_begin": f"SET LOCAL lock_timeout = '{BUSY_SECONDS}s'"},
}
BUSY = "another process is writing to it; try again when that one is done"
FULL = "free space on its disk and start again; what was recorded is kept"
NEXT_STEPS = {
    "locked": BUSY,
    "lock timeout": BUSY,
    "full": FULL,
    "No space left": FULL,
    "readonly": "make the file and its folder writable, or give another file with --store",
    "unable to open": "make the folder writable, or give another file with --store",
    "not a database": "give another file with --store",
    "malformed": "the file is damaged; restore a copy or give another file with --store",
    "permission denied": "ask for the right to make tables there and to write to them, or give another with --store",
    "does not exist": "make it on the server, or give another with --store",
    "no equivalent": "give a database with the encoding UTF8 with --store",
    "surrogates": "give text without half surrogate pairs",
    "JSON": "give plain JSON values",
}
LOST = "start again when the server can be reached; what was recorded is kept"
OTHERWISE = "check that it can be reached and written, or give another with --store"


class Database:
    """An open database with the current schema.

    Args:
        where: path of an SQLite file, or a SQLAlchemy URL of SQLite or PostgreSQL if it contains ``://``.

    Raises:
        StoreError: if it cannot be opened, or was written by a newer laserlm.
        MissingExtraError: if it is a PostgreSQL database and the driver is not installed.
    """

    def __init__(self, where: str | Path) -> None:
        url = _parse(where)
        self.name = url.database or "" if url.drivername == "sqlite" else _shown(url)
        try:
            with self._failures("open"):
                self.engine = _engine(url)
        except ImportError as error:
            raise MissingExtraError(f"results in PostgreSQL need psycopg ({error}): pip install 'laserlm[cluster]'") from error
        self._reader = self.engine.execution_options(**READING[self.engine.name])
        self._writer = self.engine.execution_options(**WRITING[self.engine.name])
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """Yield a session that sees one state of the database throughout."""
        with self._failures("read"), Session(self._reader) as session, session.begin():
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
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            step = next((step for sign, step in NEXT_STEPS.items() if sign in reason), OTHERWISE)
            if getattr(error, "connection_invalidated", False):
                step = LOST
            raise StoreError(f"could not {doing} the results database {self.name}: {reason}; {step}") from error

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", "laserlm.store:migrations")
        script = ScriptDirectory.from_config(config)
        with self._failures("open"):
            with self._reader.begin() as connection:
                if _revisions(connection) == set(script.get_heads()):
                    return
            # A second process waits here for the lock and then finds nothing left to do.
            with self._writer.begin() as connection:
                lock(connection, "schema")
                known = {step.revision for step in script.walk_revisions()}
                if unknown := _revisions(connection) - known:
                    raise StoreError(
                        f"the results database {self.name} has schema {', '.join(sorted(unknown))}, this laserlm knows "
                        f"up to {script.get_current_head()}; upgrade laserlm or give another file with --store"
                    )
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def lock(connection: Connection, name: str, *, shared: bool = False) -> None:
    """Wait until no other writer holds the lock of this name, and hold it to the end of the transaction.

    Those that share it do not wait for each other. On SQLite there is one writer at a time, and nothing to do.
    """
    if connection.dialect.name == "postgresql":
        take = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
        number = int.from_bytes(hashlib.sha256(f"laserlm {name}".encode()).digest()[:8], "big", signed=True)
        connection.execute(select(take(literal(number, BigInteger))))


def _revisions(connection: Connection) -> set[str]:
    return set(MigrationContext.configure(connection).get_current_heads())


def _parse(where: str | Path) -> URL:
    if isinstance(where, str) and "://" in where:
        try:
            url = make_url(where)
        except (ArgumentError, ValueError) as error:
            shown = re.sub(r"//[^/]*@", "//***@", where)
            raise StoreError(
                f"cannot read the database URL {shown!r}; write a file path, or a URL such as sqlite:///runs.db"
            ) from error
        if url.drivername not in DRIVERS:
            raise StoreError(
                f"cannot keep results in {_shown(url)}; write a file path, or a URL that begins with sqlite:// or postgresql://"
            )
        url = url.set(drivername=DRIVERS[url.drivername])
        if url.drivername != "sqlite":
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


def _shown(url: URL) -> str:
    return url.difference_update_query(["password", "sslpassword"]).render_as_string(hide_password=True)


def _engine(url: URL) -> Engine:
    if url.drivername == "sqlite":
        engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare)
    else:
        # psycopg returns bytes where the encoding is left to a database that has none.
        engine = create_engine(url, pool_pre_ping=True, connect_args={"client_encoding": "utf8"})

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if statement := connection.get_execution_options().get("laserlm_begin"):
            connection.exec_driver_sql(statement)

    return engine


def _prepare(connection: DBAPIConnection, _: ConnectionPoolEntry) -> None:
    # The driver begins no transaction before a CREATE TABLE, so that it is switched off and we write BEGIN ourselves.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    _write_ahead(cursor)
    cursor.close()


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
