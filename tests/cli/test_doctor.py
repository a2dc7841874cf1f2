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

Run = Callable[..., tuple[int, str, str]]
SHELLS = ("bash", "zsh", "fish", "powershell")


def test_version_names_torch_and_transformers(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0
    assert out.splitlines()[0] == f"laser {importlib.metadata.version('laserlm')}"
    assert f"torch {torch.__version__}, transformers {transformers.__version__}" in out


def test_doctor_finds_nothing_missing_where_the_tests_run(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("doctor", "--json", "--cache", tmp_path, "--store", tmp_path / "runs.db")
    found = json.loads(out)
    assert code == 0
    assert not any(extra["missing"] for extra in found["extras"].values())
    assert found["devices"][0]["device"] == ("cuda:0" if torch.cuda.is_available() else "cpu")
    assert (found["bundled"]["ready"], found["cache"]["bytes"]) == (False, {"decompositions": 0, "models": 0, "data": 0})
    assert found["store"]["bytes"] is None


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
    said = completed(_LASER_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(typed.split()) - 1))
    assert set(said.split()) == proposed
