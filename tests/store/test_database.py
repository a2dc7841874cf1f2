"""Opening and migrating, and the errors of it."""

from __future__ import annotations

import os
import random
import sqlite3
import sys
from contextlib import closing, suppress
from pathlib import Path

import alembic.command
import alembic.config
import alembic.op
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, event, select, text

from laserlm.errors import MissingExtraError, StoreError
from laserlm.store import Store, database
from laserlm.store.database import SCHEMA
from laserlm.store.schema import Base, RunRow


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs.db"


def test_the_migrations_make_the_tables_of_the_models(store, store_url):
    engine = create_engine(store_url)

    def same(thing, name, *_):
        return engine.name == "sqlite" or name != "uq_trials_run_id_split_intervention"  # elsewhere over a digest

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_object": same})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == SCHEMA
    engine.dispose()


def test_a_database_of_a_newer_version_asks_for_an_upgrade(store, store_url, sql):
    sql("update alembic_version set version_num = '9999'")
    with pytest.raises(StoreError, match="has schema 9999, this laserlm knows schemas up to 0003; upgrade laserlm"):
        Store.open(store_url)


def test_a_database_of_the_first_version_is_brought_up_to_date(store_url, sample):
    engine = create_engine(store_url)
    config = alembic.config.Config()
    config.set_main_option("script_location", "laserlm.store:migrations")
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "0001")
        columns = "number, id, key, kind, status, model, task, settings, provenance, created, updated"
        values = "1, 'abc', 'work', 'search', 'interrupted', 'tiny', 'capitals', '{}', '{}', '2026-01-02', '2026-01-02'"
        connection.execute(text(f"insert into runs ({columns}) values ({values})"))
    engine.dispose()
    with Store.open(store_url) as store, store.run(**sample.work()) as run:
        assert (run.id, run.resumed, run.notes) == ("abc", True, {})
        run.note("order", [1, 2])
        run.record(sample.evaluation("a"), sample.EXAMPLES)


def test_a_migration_that_fails_leaves_nothing(store_url, sql, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(alembic.op, "create_index", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            Store.open(store_url)
    engine = create_engine(store_url)
    with engine.connect() as connection:
        assert engine.dialect.get_table_names(connection) == []
    engine.dispose()
    with Store.open(store_url) as store:
        assert store.runs() == []


def test_opening_again_keeps_what_is_there(store, store_url, sample):
    with store.run(**sample.work()) as run:
        pass
    with Store.open(store_url) as again:
        assert [r.id for r in again.runs()] == [run.id]


def test_sqlite_keeps_a_write_ahead_log_and_foreign_keys(path):
    with Store.open(path) as store, store.database.read() as session:
        connection = session.connection()
        for name, value in (("journal_mode", "wal"), ("foreign_keys", 1), ("busy_timeout", 30_000)):
            assert connection.exec_driver_sql(f"PRAGMA {name}").scalar() == value


def test_on_a_network_disk_sqlite_keeps_no_write_ahead_log(path, monkeypatch, caplog):
    with Store.open(path):
        pass
    mounts = path.parent / "mounts"
    mounts.write_text(f"/dev/vda / ext4 rw 0 0\nhost:/home {path.parent} nfs4 rw 0 0\n")
    monkeypatch.setattr("laserlm.paths.MOUNTS", mounts)
    with Store.open(path) as store, store.database.read() as session:
        assert session.connection().exec_driver_sql("PRAGMA journal_mode").scalar() == "delete"
    assert f"{path} is on a network disk (nfs4), whose locks SQLite cannot rely on" in caplog.text


def test_a_path_is_fixed_when_opened(path, sample, monkeypatch):
    monkeypatch.chdir(path.parent)
    with Store.open("new/folder/runs.db") as store:
        monkeypatch.chdir("/")
        store.close()
        with store.run(**sample.work()):
            pass
    assert (path.parent / "new" / "folder" / "runs.db").exists()


@pytest.mark.parametrize("content", [b"prompt,answer\n" * 100, b"short"])
def test_a_file_that_is_no_database_is_refused_and_kept(path, content):
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"could not open .*{path}: file is not a database; give another file") as raised:
        Store.open(path)
    assert raised.value.__cause__ is not None
    assert path.read_bytes() == content


def test_a_folder_is_no_database(tmp_path):
    with pytest.raises(StoreError, match=f"{tmp_path}: unable to open database file; make the folder writable"):
        Store.open(tmp_path)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=f"no folder for the results database {tmp_path}/file/runs.db"):
        Store.open(tmp_path / "file" / "runs.db")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="unable to open database file; make the folder writable"):
        Store.open(tmp_path / "runs.db")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("where", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_refused(where):
    with pytest.raises(StoreError, match=f"no file .* in '{where}'; write a file path"):
        Store.open(where)


@pytest.mark.parametrize("where", ["://", "postgresql://me:secret@host:port/runs"])
def test_a_bad_url_is_refused_without_its_password(where):
    with pytest.raises(StoreError, match="cannot read the database URL") as raised:
        Store.open(where)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("driver", ["nosuch", "sqlite+nosuch", "mysql+mysqlconnector", "postgresql+psycopg2"])
def test_another_database_is_refused_without_the_password(driver):
    with pytest.raises(StoreError, match=r"cannot store results in .*; write a file path, or a URL that begins") as raised:
        Store.open(f"{driver}://me:secret@host/runs?password=secret")
    assert "secret" not in str(raised.value)


def test_a_missing_driver_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"results in PostgreSQL need psycopg .*pip install 'laserlm\[cluster\]'"):
        Store.open("postgresql://me:secret@host/runs")


def test_a_locked_database_says_so(path, sample, monkeypatch):
    monkeypatch.setattr(database, "LOCK_TIMEOUT_SECONDS", 0.05)
    with Store.open(path) as store, store.run(**sample.work()) as run:
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreError, match=r"could not write to .*locked; another process") as raised:
            run.record(sample.evaluation("a"), sample.EXAMPLES)
        assert isinstance(raised.value.__cause__.orig, sqlite3.OperationalError)
        assert store.runs()[0].trials == 0  # a reader does not wait for a writer
        other.execute("ROLLBACK")
        other.close()
        run.record(sample.evaluation("a"), sample.EXAMPLES)


def test_opening_waits_for_a_process_that_is_writing_a_new_file(path, monkeypatch):
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("CREATE TABLE begun (x)")
    other.execute("BEGIN IMMEDIATE")  # the lock at which SQLite refuses the switch to WAL at once
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if other.in_transaction:
            other.execute("ROLLBACK")

    monkeypatch.setattr(database.time, "sleep", sleep)
    with Store.open(path) as store:
        assert store.runs() == []
    assert len(waits) == 1
    other.close()


def test_the_first_error_is_the_one_raised_where_the_release_fails_too(path, sample, monkeypatch):
    monkeypatch.setattr(database, "LOCK_TIMEOUT_SECONDS", 0.05)
    other = sqlite3.connect(path, isolation_level=None)

    def lock_and_interrupt():
        other.execute("BEGIN IMMEDIATE")
        raise KeyboardInterrupt

    with Store.open(path) as store:
        with pytest.raises(KeyboardInterrupt) as raised, store.run(**sample.work()):
            lock_and_interrupt()
        other.execute("ROLLBACK")
        assert "could not be released" in raised.value.__notes__[0]
    other.close()


def test_a_full_disk_says_so_and_loses_only_the_trial(path, sample):
    with Store.open(path) as store, store.run(**sample.work()) as run:
        run.record(sample.evaluation("a"), sample.EXAMPLES)

        def fill(connection, _):
            connection.execute("PRAGMA max_page_count = 1")  # SQLite takes it as the present size

        event.listen(store.database.engine, "connect", fill)
        store.database.engine.dispose()
        tried = []

        def record_more():
            while len(tried) < 1000:
                tried.append(f"b{len(tried)}")
                run.record(sample.evaluation(tried[-1]), sample.EXAMPLES)

        with pytest.raises(StoreError, match="disk is full; free space"):
            record_more()
        assert [t.intervention for t in store.trials(run.id)] == ["a", *tried[:-1]]
        event.remove(store.database.engine, "connect", fill)
        store.database.engine.dispose()
        run.record(sample.evaluation(tried[-1]), sample.EXAMPLES)


def test_a_damaged_database_says_so(path, sample):
    with Store.open(path) as store, store.run(**sample.work()) as run:
        run.record(sample.evaluation("a"), sample.EXAMPLES)
    content = bytearray(path.read_bytes())
    content[200:] = b"\xff" * (len(content) - 200)
    path.write_bytes(content)
    with pytest.raises(StoreError, match="malformed"):
        Store.open(path)


def test_a_session_that_reads_sees_one_state_of_the_database(store, store_url, sample):
    with store.database.read() as session, Store.open(store_url) as other:
        assert session.scalars(select(RunRow.key)).all() == []
        with other.run(**sample.work()):
            pass
        assert session.scalars(select(RunRow.key)).all() == []
    with store.database.read() as session:
        assert session.scalars(select(RunRow.key)).all() == ["work"]


def _queries(path, run):
    """Use a database in every way that commands do."""
    with Store.open(path) as store:
        for info in store.runs():
            store.trials(info.id)
            store.notes(info.id)
            store.export(info.id)
            store.examples(info.id, "validation")
            store.evaluations(info.id, "validation")
        store.delete(run)


def _damaged_copies(path, sample):
    with Store.open(path) as store, store.run(**sample.work()) as run:
        run.record(sample.evaluation("a"), sample.EXAMPLES)
        run.note("order", [1, 2])
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode = DELETE")
    return run.id, path.read_bytes()


def _try_damage(path, run, content, places):
    for place, flip in places:
        for leftover in path.parent.glob(f"{path.name}-*"):
            leftover.unlink()
        path.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
        with suppress(StoreError):
            _queries(path, run)


def test_a_flipped_byte_in_the_schema_is_reported_as_damage(path, sample):
    run, content = _damaged_copies(path, sample)
    place = content.index(b"CREATE TABLE runs") + 8
    _try_damage(path, run, content, [(place, 0x80), (place, 0x01), (40, 0x80), (100, 0x10)])
    path.write_bytes(content.replace(b"CREATE TABLE runs", b"CREATE TABLE ru\xf4s"))
    with pytest.raises(StoreError, match=rf"results database {path}: .*; the file is damaged; restore a copy or give another"):
        _queries(path, run)


@pytest.mark.slow
def test_flipped_bytes_anywhere_raise_nothing_but_store_errors(path, sample):
    run, content = _damaged_copies(path, sample)
    chosen = random.Random(0)
    used = [i for i, byte in enumerate(content) if byte]
    _try_damage(path, run, content, [(chosen.choice(used), chosen.choice([1, 0x80, 0xFF])) for _ in range(150)])


def test_a_home_in_a_path_is_read(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    with Store.open("~/runs.db"):
        pass
    assert (tmp_path / "runs.db").is_file()


def test_a_database_that_is_only_read_is_not_created_and_similar_paths_are_named(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    with Store.open(tmp_path / "results" / "runs.db"):
        pass
    for mistyped, near in (
        ("results/rums.db", "results/runs.db"),
        ("result/runs.db", "results"),
        ("results/x", "results/runs.db"),
    ):
        for where in (tmp_path / mistyped, f"sqlite:///{tmp_path / mistyped}"):
            with pytest.raises(StoreError) as caught:
                Store.open(where, create=False)
            text = str(caught.value)
            assert f"there is no results database {tmp_path / mistyped}; near it: {tmp_path / near};" in text
            assert "--store (LASER_STORE)" in text
    with pytest.raises(StoreError, match=r"results is a folder, not a results database; give a file"):
        Store.open(tmp_path / "results", create=False)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.suffix not in (".db-wal", ".db-shm")) == [
        "results",
        "runs.db",
    ]
    with Store.open(tmp_path / "results" / "runs.db", create=False) as store:
        assert store.runs() == []
