"""What trackers are told of a search, with stand-ins for their packages that record every call."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from laserlm.cli import tracking

Run = Callable[..., tuple[int, str, str]]
Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


class Recorder(ModuleType):
    """A module whose functions record that they were called."""

    def __init__(self, name: str, calls: Calls) -> None:
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def function(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            if name == "SummaryWriter":
                return self
            summary = SimpleNamespace(update=lambda texts: self.calls.append(("summary", (texts,), {})))
            return SimpleNamespace(summary=summary) if self.__name__ == "wandb" else SimpleNamespace()

        return function


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The calls of all trackers' packages."""
    calls: Calls = []
    for module, _ in tracking.TRACKERS.values():
        monkeypatch.setitem(sys.modules, module, Recorder(module, calls))
    for name in ("WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "TRACKIO_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def command(folder: Path, tmp_path: Path) -> list[Any]:
    questions = tmp_path / "questions.jsonl"
    rows = [{"prompt": f"The capital number {i} is", "answer": "Rome" if i % 2 else "Paris"} for i in range(10)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    grid = ("--grid", "1.mlp@0.5", "--strategy", "exhaustive", "--metric", "loss")
    return ["search", folder, "--task", f"jsonl:{questions}", *grid, "--store", tmp_path / "runs.db", "--json"]


def logged(name: str, calls: Calls) -> list[tuple[dict[str, float], int]]:
    """Return the figures that a tracker was told, with their steps."""
    if name == "tensorboard":
        return [({args[0]: args[1]}, args[2]) for call, args, _ in calls if call == "add_scalar"]
    function = "log_metrics" if name == "mlflow" else "log"
    return [(args[0], options["step"]) for call, args, options in calls if call == function and options]


@pytest.mark.parametrize("name", list(tracking.TRACKERS))
def test_a_tracker_gets_the_options_the_progress_and_the_result(name: str, run: Run, command: list[Any], calls: Calls) -> None:
    code, out, err = run(*command, "--track", name)
    assert code == 0, err
    result = json.loads(out)
    figures: dict[str, float] = {}
    for some, _ in logged(name, calls):
        figures |= some
    steps = [step for _, step in logged(name, calls)]
    assert steps == sorted(steps)
    assert steps[-1] > 0
    assert figures["work/done"] == pytest.approx(figures["work/total"])
    assert figures["test/edited_accuracy"] == result["test"]["best"]
    assert figures["test/gain"] == result["test"]["gain"]
    assert figures["harm/self"] == result["harms"][0]["ratio"]
    assert figures["harm_low/self"] < figures["harm/self"] < figures["harm_high/self"]
    assert {"best/loss", "best/accuracy", "best/questions", "validation/base_loss"} <= set(figures)
    names = [call for call, _, _ in calls]
    output = str(calls)
    assert result["run"] in output
    assert "'grid'" in output or "options/grid" in output
    first, last = {
        "trackio": ("init", "finish"),
        "wandb": ("init", "finish"),
        "mlflow": ("set_experiment", "end_run"),
        "tensorboard": ("SummaryWriter", "close"),
    }[name]
    assert (names[0], names[-1]) == (first, last)
    if name == "wandb":
        assert calls[0][2]["project"] == "laserlm"
        assert calls[-1][2] == {"exit_code": 0}


def test_a_search_that_fails_ends_the_run_of_its_tracker(
    run: Run, command: list[Any], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("laserlm.searching.search", interrupted)
    code, out, err = run(*command, "--track", "mlflow")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].startswith("Interrupted. Best so far on validation: no candidate was scored yet.")
    assert calls[-1] == ("end_run", ("FAILED",), {})


def test_a_tracker_that_fails_later_does_not_end_the_search(
    run: Run, command: list[Any], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        calls.append(("log", (), {}))
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["trackio"], "log", failing, raising=False)
    code, out, err = run(*command, "--track", "trackio")
    assert (code, json.loads(out)["strategy"]) == (0, "exhaustive")
    assert err.count("the tracker failed, and nothing more is reported to it: OSError: no network") == 1
    assert [call for call, _, _ in calls] == ["init", "log", "log", "finish"]


def test_a_tracker_that_fails_once_ends_its_run_as_failed(
    run: Run, command: list[Any], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", failing, raising=False)
    code, _, err = run(*command, "--track", "mlflow")
    assert code == 0, err
    assert [call for call in calls if call[0] == "end_run"] == [("end_run", ("FAILED",), {})]


def test_a_guard_that_is_a_file_is_reported_by_the_name_of_the_file(
    run: Run, command: list[Any], calls: Calls, tmp_path: Path
) -> None:
    texts = [tmp_path / name / "harm less.txt" for name in ("a", "b")]
    for text in texts:
        text.parent.mkdir()
        text.write_text("the capital of France is Paris and Rome is a city in Italy " * 200)
    code, _, err = run(*command, "--track", "mlflow", "--guard", texts[0], "--guard", texts[1])
    assert code == 0, err
    figures = {name: value for some, _ in logged("mlflow", calls) for name, value in some.items()}
    assert [name for name in figures if name.startswith("harm/")] == ["harm/harm less.txt", "harm/harm less.txt 2"]


def test_a_tracker_that_does_not_begin_ends_the_command(
    run: Run, command: list[Any], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(**_: Any) -> None:
        raise ValueError("no key")

    monkeypatch.setattr(sys.modules["wandb"], "init", failing, raising=False)
    code, out, err = run(*command, "--track", "wandb")
    assert (code, out) == (1, "")
    assert "the tracker did not begin: ValueError: no key; see its own settings" in err


@pytest.mark.parametrize("name", list(tracking.TRACKERS))
def test_without_its_package_the_command_names_the_extra(
    name: str, run: Run, command: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, tracking.TRACKERS[name][0], None)
    code, out, err = run(*command, "--track", name)
    assert (code, out) == (1, "")
    assert f"pip install 'laserlm[{name}]'; or leave out --track" in err
    assert "loading" not in err  # it is told first


def test_an_unknown_tracker_is_a_wrong_option(run: Run, command: list[Any]) -> None:
    code, _, err = run(*command, "--track", "wnb")
    assert code == 2
    assert "no tracker 'wnb'; there are trackio, wandb, mlflow, tensorboard" in err


def test_every_tracker_has_an_extra() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(tracking.TRACKERS) <= set(project["optional-dependencies"])
