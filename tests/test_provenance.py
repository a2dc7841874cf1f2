"""What is recorded about how a saved thing was made."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers

import laserlm
from laserlm import provenance as module
from laserlm.provenance import git_revision, provenance, versions


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder, as nobody in particular and without the user's settings."""
    identity = ["-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def source_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that laserlm seems to run from, without a repository."""
    monkeypatch.setattr(module, "__file__", str(tmp_path / "src" / "laserlm" / "provenance.py"))
    return tmp_path


def test_versions_are_those_of_the_imported_packages() -> None:
    by_package = versions()
    assert by_package["python"] == platform.python_version()
    # PyPI's package with CUDA does not name the build, which the module does.
    assert by_package["torch"] == version("torch")
    assert torch.__version__.partition("+")[0] == by_package["torch"].partition("+")[0]
    assert by_package["transformers"] == transformers.__version__
    assert by_package["laserlm"] == laserlm.__version__
    assert {"tokenizers", "safetensors"} <= set(by_package)


def test_a_package_that_is_missing_is_reported_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PACKAGES", ("torch", "no-such-package-of-laserlm"))
    assert versions()["no-such-package-of-laserlm"] == "not installed"
    assert versions()["torch"] == version("torch")


def test_the_revision_is_that_of_the_last_commit_of_the_source_tree(source_tree: Path) -> None:
    git(source_tree, "init", "--quiet")
    git(source_tree, "commit", "--quiet", "--allow-empty", "--message", "first")
    first = git_revision()
    git(source_tree, "commit", "--quiet", "--allow-empty", "--message", "second")
    assert first == git(source_tree, "rev-parse", "HEAD~1")
    assert git_revision() == git(source_tree, "rev-parse", "HEAD")


def test_an_installed_copy_has_no_revision_even_inside_another_repository(
    source_tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(source_tree, "init", "--quiet")
    git(source_tree, "commit", "--quiet", "--allow-empty", "--message", "first")
    installed = source_tree / "venv" / "site-packages" / "laserlm" / "provenance.py"
    installed.parent.mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(installed))
    assert git_revision() is None


def test_without_git_there_is_no_revision(source_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(source_tree, "init", "--quiet")
    git(source_tree, "commit", "--quiet", "--allow-empty", "--message", "first")
    monkeypatch.setenv("PATH", str(source_tree / "nothing-here"))
    assert git_revision() is None


def test_a_repository_without_a_commit_has_no_revision(source_tree: Path) -> None:
    git(source_tree, "init", "--quiet")
    assert git_revision() is None


def test_provenance_is_plain_json_and_keeps_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["laser", "search", "bundled"])
    record = provenance(device="cuda", dtype="bfloat16", seed=7)
    assert json.loads(json.dumps(record)) == record
    assert (record["device"], record["dtype"], record["seed"]) == ("cuda", "bfloat16", 7)
    assert record["command"] == ["laser", "search", "bundled"]
    assert record["versions"] == versions()
    assert record["git_revision"] == git_revision()
    assert platform.machine() in record["machine"]
    assert provenance(device="cpu", dtype="float32")["seed"] is None


def test_the_time_is_now_in_utc() -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)  # the record has whole seconds
    recorded = datetime.fromisoformat(provenance(device="cpu", dtype="float32")["time"])
    assert recorded.utcoffset() == timedelta(0)
    assert before <= recorded <= datetime.now(UTC)
