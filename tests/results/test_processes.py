"""Several processes on one database, and processes that are killed."""

from __future__ import annotations

import signal

import pytest

from laserlm.errors import RunBusyError
from laserlm.results import Store


def test_a_killed_run_goes_on_at_once_with_what_it_had(store_url, start, go, sample):
    process = start("two")
    go(process)
    assert process.wait() == -signal.SIGKILL
    with Store.open(store_url) as store:
        (info,) = store.runs()
        assert (info.status, info.trials) == ("interrupted", 2)
        with store.run(**sample.work()) as run:
            assert (run.id, run.resumed) == (info.id, True)
            assert [t.intervention for t in store.trials(run.id)] == ["", "3.fc_in@0.1"]
            for intervention in ("", "3.fc_in@0.1"):
                assert run.evaluation("validation", intervention) == sample.evaluation(intervention)
            run.record(sample.evaluation("b"), sample.EXAMPLES)


def test_a_kill_before_the_commit_leaves_nothing_half_written(store_url, start, go, sql, sample):
    process = start("half")
    go(process)
    assert process.wait() == -signal.SIGKILL
    with Store.open(store_url) as store, store.run(**sample.work()) as run:
        assert [t.intervention for t in store.trials(run.id)] == ["whole"]
        assert run.evaluation("validation", "half") is None
        assert sql("select count(*) from scores") == [(len(sample.EXAMPLES),)]
        run.record(sample.evaluation("half"), sample.EXAMPLES)
        assert run.evaluation("validation", "half") == sample.evaluation("half")


def test_kills_at_any_moment_lose_and_repeat_nothing(store_url, start, go, sample):
    said = 0
    for _ in range(3):
        process = start("endless")
        go(process)
        for _ in range(7):
            assert process.stdout.readline() == f"{said}\n"
            said += 1
        process.kill()
        # What was printed is recorded; the last ones may have been recorded and not read here.
        said += len(process.stdout.read().splitlines())
        process.wait()
        with Store.open(store_url) as store:
            (info,) = store.runs()
            names = [t.intervention for t in store.trials(info.id)]
            assert names == [str(i) for i in range(len(names))]
            assert said <= len(names) <= said + 1
            assert all(store.evaluation(info.id, "validation", n) == sample.evaluation(n) for n in names)
            said = len(names)


def test_two_processes_record_different_runs_together(store_url, start, go, sample):
    processes = [start("trials", key) for key in ("one", "two")]
    go(*processes)
    assert [p.wait() for p in processes] == [0, 0]
    with Store.open(store_url) as store:
        assert {(r.key, r.status, r.trials) for r in store.runs()} == {("one", "done", 30), ("two", "done", 30)}
        for run in store.runs():
            for i in range(30):
                name = f"{run.key}-{i}"
                assert store.evaluation(run.id, "validation", name) == sample.evaluation(name)


def test_a_second_process_on_a_run_is_told_who_works_on_it(store_url, start, go, sample):
    process = start("claim")
    go(process)
    assert process.stdout.readline() == "claimed\n"
    with Store.open(store_url) as store:
        assert store.runs()[0].status == "running"
        with pytest.raises(RunBusyError, match=f"process {process.pid} on "), store.run(**sample.work()):
            pass
        with pytest.raises(RunBusyError, match=f"process {process.pid} on "):
            store.delete(store.runs()[0].id)
        process.communicate("\n")
        with store.run(**sample.work()) as run:
            assert run.outcome == {"by": process.pid}


def test_processes_that_open_a_new_database_together_agree(store_url, start, go):
    processes = [start("open") for _ in range(4)]
    go(*processes)
    assert [p.wait() for p in processes] == [0] * 4
    with Store.open(store_url) as store:
        assert store.runs() == []


def test_of_processes_that_claim_a_run_together_one_gets_it(store_url, start, go):
    processes = [start("claim") for _ in range(3)]
    go(*processes)
    said = [p.stdout.readline() for p in processes]
    assert sorted(said) == ["busy\n", "busy\n", "claimed\n"]
    for process in processes:
        process.communicate("\n")
    with Store.open(store_url) as store:
        assert [r.status for r in store.runs()] == ["done"]
