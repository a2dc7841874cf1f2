"""Connect to the results database: open and migrate it, and report every failure as a StoreError."""

from __future__ import annotations

import hashlib
import logging
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from sqlalchemy import URL, BigInteger, Connection, Engine, create_engine, event, func, inspect, literal, make_url, select, text
from sqlalchemy.engine.interfaces import DBAPIConnection, DBAPICursor
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from laserlm.errors import LaserError, MissingExtraError, StoreError
from laserlm.paths import network_disk, similar_paths

log = logging.getLogger(__name__)
SCHEMA = "0003"
"""The newest of ``migrations``. A database with this schema is opened without Alembic, whose import takes time."""
LOCK_TIMEOUT_SECONDS = 30
DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
# On SQLite a writer locks the database before it reads, because a transaction that has read cannot wait for the lock. On
# PostgreSQL a writer waits for the row of another writer and then reads what that writer committed.
READ_OPTIONS: dict[str, dict[str, Any]] = {
    "sqlite": {"laserlm_begin": "BEGIN"},
    "postgresql": {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True},
}
WRITE_OPTIONS: dict[str, dict[str, Any]] = {
    "sqlite": {"laserlm_begin": "BEGIN IMMEDIATE"},
    "postgresql": {"isolation_level": "READ COMMITTED", "laserlm_begin": f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT_SECONDS}s'"},
}
BUSY_HINT = "another process is writing to it; try again later"
DAMAGED_HINT = "the file is damaged; restore a copy or give another file with --store"
DISK_FULL_HINT = "free space on its disk and start again; recorded trials are kept"
HINTS = {
    "locked": BUSY_HINT,
    "lock timeout": BUSY_HINT,
    "full": DISK_FULL_HINT,
    "No space left": DISK_FULL_HINT,
    "readonly": "make the file and its folder writable, or give another file with --store",
    "unable to open": "make the folder writable, or give another file with --store",
    "not a database": "give another file with --store",
    "malformed": DAMAGED_HINT,
    "permission denied": "ask for the right to create and write tables there, or give another database with --store",
    "does not exist": "create it on the server, or give another database with --store",
    "no equivalent": "give a database with the encoding UTF8 with --store",
    "surrogates": "give text without unpaired surrogates",
    "JSON": "give plain JSON values",
    "can't decode": DAMAGED_HINT,
    "not decode": DAMAGED_HINT,
    "Expecting": DAMAGED_HINT,  # of JSON
    "isoformat": DAMAGED_HINT,
    "no such column": DAMAGED_HINT,
    "no such table": DAMAGED_HINT,
    "already exists": DAMAGED_HINT,
}
CONNECTION_LOST_HINT = "start again when the server can be reached; recorded trials are kept"
DEFAULT_HINT = "check that it can be reached and written, or give another database with --store"


class Database:
    """An open database with the current schema.

    Args:
        where: path of an SQLite file, or a SQLAlchemy URL of SQLite or PostgreSQL if it contains ``://``.
        create: whether an SQLite file that does not exist is created, with its folder.

    Raises:
        StoreError: if it does not exist, cannot be opened or was written by a newer laserlm.
        MissingExtraError: if it is a PostgreSQL database and the driver is not installed.
    """

    def __init__(self, where: str | Path, *, create: bool = True) -> None:
        url = _parse(where, create=create)
        self.name = url.database or "" if url.drivername == "sqlite" else _without_password(url)
        try:
            with self._store_errors("open"):
                self.engine = _engine(url)
        except ImportError as error:
            raise MissingExtraError(f"results in PostgreSQL need psycopg ({error}): pip install 'laserlm[cluster]'") from error
        self._reader = self.engine.execution_options(**READ_OPTIONS[self.engine.name])
        self._writer = self.engine.execution_options(**WRITE_OPTIONS[self.engine.name])
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
        """Yield a session that reads one consistent state of the database."""
        with self._store_errors("read"), Session(self._reader) as session, session.begin():
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """Yield a session whose changes are committed at the end, or discarded after an exception."""
        with self._store_errors("write to"), Session(self._writer) as session, session.begin():
            yield session

    @contextmanager
    def _store_errors(self, action: str) -> Iterator[None]:
        try:
            yield
        except LaserError:
            raise
        # Values of a damaged file are no text, JSON or time. Text with an unpaired surrogate cannot be written.
        except (SQLAlchemyError, ValueError) as error:
            reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
            hint = next((hint for sign, hint in HINTS.items() if sign in reason), DEFAULT_HINT)
            if getattr(error, "connection_invalidated", False):
                hint = CONNECTION_LOST_HINT
            raise StoreError(f"could not {action} the results database {self.name}: {reason}; {hint}") from error

    def _migrate(self) -> None:
        with self._store_errors("open"):
            with self._reader.begin() as connection:
                if _schemas(connection) == {SCHEMA}:
                    return
            from alembic import command
            from alembic.config import Config
            from alembic.script import ScriptDirectory

            config = Config()
            config.set_main_option("script_location", "laserlm.store:migrations")
            known = {revision.revision for revision in ScriptDirectory.from_config(config).walk_revisions()}
            # A second process waits here for the lock and then has nothing left to upgrade.
            with self._writer.begin() as connection:
                lock(connection, "schema")
                if unknown := _schemas(connection) - known:
                    raise StoreError(
                        f"the results database {self.name} has schema {', '.join(sorted(unknown))}, this laserlm knows "
                        f"schemas up to {SCHEMA}; upgrade laserlm or give another file with --store"
                    )
                config.attributes["connection"] = connection
                command.upgrade(config, "head")


def lock(connection: Connection, name: str, *, shared: bool = False) -> None:
    """Acquire the lock with this name until the end of the transaction; wait for other writers that hold it.

    Shared locks do not wait for each other. SQLite allows one writer at a time and needs no lock.
    """
    if connection.dialect.name == "postgresql":
        acquire = func.pg_advisory_xact_lock_shared if shared else func.pg_advisory_xact_lock
        number = int.from_bytes(hashlib.sha256(f"laserlm {name}".encode()).digest()[:8], "big", signed=True)
        connection.execute(select(acquire(literal(number, BigInteger))))


def _schemas(connection: Connection) -> set[str]:
    """Return the schema that a database has, as Alembic notes it; a new database has none."""
    if not inspect(connection).has_table("alembic_version"):
        return set()
    return set(connection.scalars(text("SELECT version_num FROM alembic_version")))


def _parse(where: str | Path, *, create: bool) -> URL:
    if isinstance(where, str) and "://" in where:
        try:
            url = make_url(where)
        except (ArgumentError, ValueError) as error:
            masked = re.sub(r"//[^/]*@", "//***@", where)
            raise StoreError(
                f"cannot read the database URL {masked!r}; write a file path, or a URL such as sqlite:///runs.db"
            ) from error
        if url.drivername not in DRIVERS:
            raise StoreError(
                f"cannot store results in {_without_password(url)}; write a file path, or a URL that begins with sqlite:// or postgresql://"
            )
        url = url.set(drivername=DRIVERS[url.drivername])
        if url.drivername != "sqlite":
            return url
    else:
        url = URL.create("sqlite", database=str(where))
    if not url.database or url.database == ":memory:":
        raise StoreError(f"no file for the results database in {str(where)!r}; write a file path, such as runs.db")
    # Later connections may be opened from another working folder.
    path = Path(url.database).expanduser().absolute()
    if not create:
        _require_file(path)
        return url.set(database=str(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"no folder for the results database {path}: {error.strerror}; give another file with --store"
        ) from error
    return url.set(database=str(path))


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise StoreError(f"{path} is a folder, not a results database; give a file with --store (LASER_STORE)")
    if not path.exists():
        near = similar_paths(path) or (sorted(path.parent.glob("*.db"))[:3] if path.parent.is_dir() else [])
        hint = f"; near it: {', '.join(map(str, near))}" if near else ""
        raise StoreError(
            f"there is no results database {path}{hint}; give another file with --store (LASER_STORE), or let 'laser search' "
            "create one"
        )


def _without_password(url: URL) -> str:
    return url.difference_update_query(["password", "sslpassword"]).render_as_string(hide_password=True)


def _engine(url: URL) -> Engine:
    if url.drivername == "sqlite":
        engine = create_engine(url, connect_args={"timeout": LOCK_TIMEOUT_SECONDS})
        kind = network_disk(Path(url.database or ""))
        if kind:
            log.warning(
                "%s is on a network disk (%s), whose locks SQLite cannot rely on; write to it from one machine at a time, or "
                "give a PostgreSQL database with --store",
                url.database,
                kind,
            )
        # The write-ahead log needs memory that all processes share, which machines of a network disk have not.
        event.listen(engine, "connect", partial(_prepare_sqlite, journal="DELETE" if kind else "WAL"))
    else:
        # psycopg returns bytes if neither the client nor the database sets an encoding.
        engine = create_engine(url, pool_pre_ping=True, connect_args={"client_encoding": "utf8"})

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if statement := connection.get_execution_options().get("laserlm_begin"):
            connection.exec_driver_sql(statement)

    return engine


def _prepare_sqlite(connection: DBAPIConnection, _: ConnectionPoolEntry, *, journal: str) -> None:
    # The driver starts no transaction before CREATE TABLE. Its own transactions are disabled; BEGIN is sent explicitly.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    _set_journal(cursor, journal)
    cursor.close()


def _set_journal(cursor: DBAPICursor, journal: str) -> None:
    # SQLite does not wait for the lock here if two processes switch a new file at the same time.
    deadline = time.monotonic() + LOCK_TIMEOUT_SECONDS
    while True:
        try:
            cursor.execute(f"PRAGMA journal_mode = {journal}")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
