"""What is particular to a results database on a PostgreSQL server."""

from __future__ import annotations

import threading

import pytest
from searching.support import build_task
from sqlalchemy import create_engine, event, make_url, text
from sqlalchemy.orm import Session

from laserlm.errors import StoreError
from laserlm.searching import search
from laserlm.store import Store, claim, database

pytestmark = pytest.mark.postgresql


@pytest.fixture
def store_url(postgresql_url):
    return postgresql_url


@pytest.fixture
def end_connections(store_url):
    """End those of the store, as a server does that is stopped."""
    engine = create_engine(store_url)

    def run():
        with engine.begin() as connection:
            others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
            ended = connection.execute(text(f"select pg_terminate_backend(pid, 5000) {others}")).all()
            assert ended
            assert all(done for (done,) in ended)

    yield run
    engine.dispose()


@pytest.mark.parametrize("driver", ["postgresql", "postgres", "postgresql+psycopg"])
def test_the_driver_need_not_be_named(store_url, sample, driver):
    url = make_url(store_url).set(drivername=driver).render_as_string(hide_password=False)
    with Store.open(url) as store, store.run(**sample.work()) as run:
        run.record(sample.evaluation("a"), sample.EXAMPLES)
        assert run.evaluation("validation", "a") == sample.evaluation("a")


def test_a_missing_database_is_reported_without_the_password(store_url):
    url = make_url(store_url).set(password="secret", database="nosuch").update_query_dict({"sslpassword": "secret"})
    with pytest.raises(StoreError, match=r'could not open .*/nosuch: .*"nosuch" does not exist; create it on the') as raised:
        Store.open(url.render_as_string(hide_password=False))
    assert "secret" not in str(raised.value)


def test_a_missing_server_is_reported():
    with pytest.raises(StoreError, match=r"could not open .*refused.*; check that it can be reached"):
        Store.open("postgresql://127.0.0.1:1/runs")


def test_a_role_without_rights_learns_what_it_needs(store_url, sql):
    sql("revoke create on schema public from public")
    sql(f"alter database {make_url(store_url).database} set role pg_monitor")
    with pytest.raises(StoreError, match=r"could not open .*permission denied for schema public; ask for the right"):
        Store.open(store_url)


def test_a_database_without_an_encoding_keeps_all_text(sample, make_database):
    url = make_database("ENCODING SQL_ASCII LC_COLLATE 'C' LC_CTYPE 'C'")
    with Store.open(url) as store, store.run(**sample.work("Zürich \u2028")) as run:
        assert store.find(run.id).key == "Zürich \u2028"


def test_a_database_of_another_encoding_refuses_what_it_lacks(sample, make_database):
    url = make_database("ENCODING LATIN1 LC_COLLATE 'C' LC_CTYPE 'C'")
    with Store.open(url) as store, store.run(**sample.work("Zürich")) as run:
        with pytest.raises(StoreError, match=r"no equivalent .*; give a database with the encoding UTF8"):
            run.fail("validation", "a", "\u2028")
        assert store.find(run.id).key == "Zürich"


def test_the_isolation_does_not_depend_on_the_server(store_url, sql, sample):
    sql(f"alter database {make_url(store_url).database} set default_transaction_isolation = 'serializable'")
    with Store.open(store_url) as store:
        for session_of, level in ((store.database.read, "repeatable read"), (store.database.write, "read committed")):
            with session_of() as session:
                assert session.scalar(text("show transaction_isolation")) == level


def test_waiting_for_another_writer_ends(store_url, sample, monkeypatch):
    monkeypatch.setitem(database.WRITE_OPTIONS["postgresql"], "laserlm_begin", "SET LOCAL lock_timeout = '50ms'")
    with Store.open(store_url) as store, store.run(**sample.work()) as run:
        with store.database.write() as session:
            session.execute(text("select * from runs for update"))
            with pytest.raises(StoreError, match=r"could not write to .*lock timeout.*; another process is writing"):
                run.record(sample.evaluation("a"), sample.EXAMPLES)
            assert store.runs()[0].trials == 0  # a reader does not wait for a writer
        run.record(sample.evaluation("a"), sample.EXAMPLES)


def test_a_connection_that_the_server_ended_is_opened_again(store_url, sample, end_connections):
    with Store.open(store_url) as store, store.run(**sample.work()) as run:
        end_connections()
        run.record(sample.evaluation("a"), sample.EXAMPLES)
        end_connections()
        assert run.evaluation("validation", "a") == sample.evaluation("a")


def test_a_connection_lost_while_writing_says_so_and_loses_only_the_trial(store_url, sample, end_connections):
    with Store.open(store_url) as store, store.run(**sample.work()) as run:
        run.record(sample.evaluation("a"), sample.EXAMPLES)
        event.listen(Session, "before_commit", lambda session: end_connections(), once=True)
        with pytest.raises(StoreError, match=r"could not write to .*; start again when the server can be reached") as raised:
            run.record(sample.evaluation("b"), sample.EXAMPLES)
        assert "\n" not in str(raised.value)
        assert [t.intervention for t in store.trials(run.id)] == ["a"]
        run.record(sample.evaluation("b"), sample.EXAMPLES)
        assert [t.intervention for t in store.trials(run.id)] == ["a", "b"]


def test_the_heartbeat_survives_a_lost_connection(store_url, sample, end_connections, monkeypatch, caplog):
    lost, beaten = [], threading.Event()
    real = claim.update_owned

    def hold(session, *arguments, **values):
        if not lost:
            lost.append(session.connection())
            end_connections()
        real(session, *arguments, **values)
        beaten.set()

    monkeypatch.setattr(claim, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(claim, "update_owned", hold)
    with Store.open(store_url) as store, store.run(**sample.work()) as run:
        assert beaten.wait(30)
        run.record(sample.evaluation("a"), sample.EXAMPLES)
    (warning,) = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert warning.startswith(f"no heartbeat of run {run.id}, trying again: could not write to")


def test_a_search_that_goes_on_with_other_hardware_warns_there_too(store_url, llama, caplog):
    options = {"strategy": "exhaustive", "grid": "0-1.mlp@0.5", "store": store_url}

    def interrupt(step):
        if step.scored > len(build_task().test):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(llama, build_task(), on_step=interrupt, **options)
    result = search(llama, build_task(), batch_size=4, **options)
    assert [r.message for r in caplog.records if f"run {result.run} goes on with cpu" in r.message]
    with Store.open(store_url) as store:
        assert [one["batch_size"] for one in store.notes(result.run)["computed_on"]] == [32, 4]
