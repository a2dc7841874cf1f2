from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from laserlm.models import LanguageModel

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


def test_the_harness_gets_the_flag_for_code_of_a_checkpoint(
    run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: calls.append(sys.argv[1:]))
    assert run("lm-eval", "--model", "laser", "--allow-remote-code", "--tasks", "piqa")[0] == 0
    assert calls == [["--model", "laser", "--trust_remote_code", "--tasks", "piqa"]]


@pytest.mark.parametrize("flag", ["trust_remote_code", "allow_remote_code"])
def test_the_harness_model_runs_code_of_a_checkpoint_if_it_is_asked_to(
    flag: str, llama: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from laserlm.scoring import harness_model

    allowed = []

    def load(name: str, **options: Any) -> LanguageModel:
        allowed.append(options["allow_remote_code"])
        return llama

    monkeypatch.setattr(harness_model, "load", load)
    monkeypatch.setattr(harness_model.HFLM, "__init__", lambda self, **options: None)
    harness_model.LaserLM("folder", **{flag: True})
    harness_model.LaserLM("folder")
    assert allowed == [True, False]
