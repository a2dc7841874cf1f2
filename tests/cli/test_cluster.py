"""A search on a cluster from the command line, and what it will take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from searching.fake_ray import instead_of_ray

from laserlm.store import Store

Run = Callable[..., tuple[int, str, str]]


def test_what_a_search_will_take_is_reported_and_leaves_no_database(run: Run, folder: Path, tmp_path: Path) -> None:
    command = ("search", folder, "--task", "worldfacts", "--limit", 70, "--dry-run", "--store", tmp_path / "runs.db")
    values = json.loads(run(*command, "--executor", "ray", "--workers", 3, "--json")[1])
    assert [row["workers"] for row in values["on_ray"]] == [3]
    assert values["flop"]["all"] == pytest.approx(sum(v for k, v in values["flop"].items() if k != "all"))
    assert values["memory"]["all"] == sum(v for k, v in values["memory"].items() if k != "all")
    assert values["seconds"] > 0
    assert "A choice of strengths of all components of 21 matrices" in run(*command)[1]
    text = run(*command, "--strategy", "race")[1]
    assert "A race among" in text
    assert "rung to example 70" in text
    assert not (tmp_path / "runs.db").exists()


def test_options_that_do_not_fit_are_reported(run: Run, folder: Path) -> None:
    for options, expected, message in (
        (("--executor", "dask"), 2, "no executor 'dask'; there are local and ray"),
        (("--workers", 2), 2, "add --executor ray"),
        (("--executor", "ray", "--device", "cuda"), 2, "give workers GPUs with --gpus-per-worker"),
        (("--executor", "ray", "--address", "ray://here:1"), 1, "run the search on a node of the cluster"),
    ):
        code, _, err = run("search", folder, "--task", "worldfacts", *options)
        assert code == expected
        assert message in err


def test_a_search_on_workers_prints_what_one_here_prints(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = (
        "search",
        folder,
        "--task",
        "worldfacts",
        "--limit",
        40,
        "--strategy",
        "exhaustive",
        "--grid",
        "0-1.mlp@0.5",
        "--json",
    )
    here = json.loads(run(*command, "--store", tmp_path / "here.db")[1])
    with instead_of_ray(monkeypatch) as ray:
        there = json.loads(run(*command, "--store", tmp_path / "there.db", "--executor", "ray", "--workers", 2)[1])
        assert len(ray.workers) == 2
    own = ("run", "seconds", "phases", "boundary_bytes", "decomposition_bytes", "validation", "test")
    assert {k: v for k, v in there.items() if k not in own} == {k: v for k, v in here.items() if k not in own}
    for split in ("validation", "test"):
        assert there[split]["best_loss"] == pytest.approx(here[split]["best_loss"], rel=1e-5)
        assert there[split]["corrected"] == here[split]["corrected"]
    with Store.open(tmp_path / "there.db") as store:
        assert store.find(there["run"]).provenance["ray"]["workers"] == 2
