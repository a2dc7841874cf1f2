from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

pytest.importorskip("lm_eval")


def test_the_harness_runs_twice_in_one_process(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.registry import model_registry

    from laserlm.scoring.harness_model import LaserLM

    calls = []

    def cli_evaluate() -> None:
        calls.append((sys.argv[1:], model_registry.get("laser")))

    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", cli_evaluate)
    for task in ("arc_easy", "piqa"):
        code, _, err = run("lm-eval", "--model", "laser", "--tasks", task)
        assert code == 0, err
    assert calls == [(["--model", "laser", "--tasks", task], LaserLM) for task in ("arc_easy", "piqa")]
