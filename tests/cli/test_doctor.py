"""What doctor tells is so, clear-cache removes what laserlm made and nothing else, and the shell is told what there is."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from laserlm.cli import app, doctor
from laserlm.cli.tracking import TRACKERS
from laserlm.searching.device_check import DeviceCheck

Run = Callable[..., tuple[int, str, str]]
SHELLS = ("bash", "zsh", "fish", "powershell")


def test_version_names_torch_and_transformers(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.splitlines()[0] == f"laser {importlib.metadata.version('laserlm')}"
    assert f"torch {importlib.metadata.version('torch')}, transformers {transformers.__version__}" in out


def test_doctor_finds_nothing_missing_where_the_tests_run(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--json", "--cache", tmp_path, "--store", tmp_path / "runs.db")
    values = json.loads(out)
    assert code == 0
    assert not any(extra["missing"] for name, extra in values["extras"].items() if name not in TRACKERS)
    assert values["devices"][0]["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert not values["bundled"]["ready"]
    assert values["cache"]["bytes"] == {"decompositions": 0, "models": 0, "data": 0, "texts": 0, "compressions": 0, "scores": 0}
    assert values["store"]["bytes"] is None


def test_every_extra_for_users_is_looked_for() -> None:
    offered = set(importlib.metadata.metadata("laserlm").get_all("Provides-Extra") or [])
    assert set(doctor.PURPOSES) == offered - {"docs", "test"}


def test_doctor_says_what_is_missing_and_what_installs_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "gradio":
            raise importlib.metadata.PackageNotFoundError(name)
        return "2.59.0" if name == "ray" else real(name)

    monkeypatch.setattr(doctor, "version", version)
    _, out, _ = run("doctor")
    lines = {line[:15].strip(): line[15:] for line in out.splitlines()}
    assert lines["extra app"].startswith("missing gradio<7,>=6: pip install 'laserlm[app]'")
    assert lines["extra cluster"].startswith("missing ray<3,>=2.60: pip install 'laserlm[cluster]'")
    assert lines["extra rl"].startswith("installed")
    assert lines["bundled model"] == "not set up: laser setup"
    assert lines["cache"].endswith(": empty")


def test_doctor_says_in_one_line_that_there_is_no_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    code, out, _ = run("doctor")
    (line,) = [line for line in out.splitlines() if "GPU" in line]
    assert code == 0
    assert line == f"gpu check      no CUDA GPU found: PyTorch {torch.__version__} is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "sees no GPU; see 'nvidia-smi'" in run("doctor")[1]
    values = json.loads(run("doctor", "--json")[1])["gpu_check"]
    assert (values["device"], values["checks"], values["reason"][:18]) == (None, [], "no CUDA GPU found:")


@pytest.mark.slow
def test_doctor_checks_a_device_and_prints_a_line_for_each_check(run: Run) -> None:
    code, out, _ = run("doctor", "--device", "cpu")
    lines = [line for line in out.splitlines() if line.startswith("check ")]
    assert code == 0
    assert len(lines) == 20
    assert all(line.startswith("check          passed  ") for line in lines)
    assert lines[-1].startswith("check          passed  out of memory: 3 batches did not fit")
    assert "no CUDA GPU found" not in out


def test_a_failed_check_ends_doctor_with_exit_code_1(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = DeviceCheck("choices", False, "3 differ clearly")
    monkeypatch.setattr("laserlm.searching.device_check.check_device", lambda _: [failure])
    code, out, _ = run("doctor", "--device", "cpu")
    assert code == 1
    assert "check          FAILED  choices: 3 differ clearly\n1 checks of cpu failed: its scores may be wrong" in out
    code, _, err = run("doctor", "--device", "cuda:7")
    assert code == 1
    assert "no device 'cuda:7' here; there are cpu" in err


def test_doctor_hides_the_password_of_a_database(run: Run) -> None:
    _, out, _ = run("doctor", "--store", "postgresql://me:secret@host/results")
    assert "secret" not in out


def test_clear_cache_frees_what_doctor_counted_and_leaves_the_rest(run: Run, folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    run("search", folder, "--limit", "4", "--grid", "1.fc_in@0.5", "--cache", cache, "--store", tmp_path / "runs.db")
    own = [
        cache / "models" / "my-model" / "weights",
        cache / "decompositions" / "notes.safetensors",
        cache / "data" / "mine.json",
    ]
    for file in own:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    counted = json.loads(run("doctor", "--json", "--cache", cache)[1])["cache"]["bytes"]
    assert counted["decompositions"] > 1000
    assert (counted["models"], counted["data"]) == (0, 0)
    code, out, _ = run("clear-cache", "--json", "--cache", cache)
    assert (code, json.loads(out)["freed_bytes"]) == (0, counted)
    assert sorted(f for f in cache.rglob("*") if f.is_file()) == sorted(own)
    assert run("clear-cache", "--cache", cache)[1] == f"0 bytes freed in {cache}\n"


@pytest.fixture
def completed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Ask as a shell does, with what it sets in the environment, and return what is printed."""

    def ask(**environment: str) -> str:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as left:
            app(prog_name="laser")
        assert not left.value.code
        return capsys.readouterr().out

    return ask


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_scripts_for_every_shell(shell: str, completed: Callable[..., str]) -> None:
    assert "_LASER_COMPLETE" in completed(_LASER_COMPLETE=f"source_{shell}")


@pytest.mark.parametrize(
    ("typed", "proposed"),
    [
        ("laser sea", {"search"}),
        ("laser analyze pa", {"paraphrases"}),
        ("laser search b", {"bundled"}),
        ("laser search bundled --task w", {"web-of-lies", "wikidata-qa", "worldfacts"}),
        ("laser search bundled --dry", {"--dry-run"}),
    ],
)
def test_completion_proposes_commands_options_and_names(typed: str, proposed: set[str], completed: Callable[..., str]) -> None:
    output = completed(_LASER_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1))
    assert set(output.split()) == proposed
