"""Locations of laserlm's files, and atomic writing, so that an interruption leaves no partial file or folder."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import platformdirs

__all__ = ["atomic_file", "atomic_folder", "cache_folder", "cached_files", "default_store", "lab_folder"]

Existing = Literal["keep", "refuse", "replace"]


def cache_folder() -> Path:
    """Return the user's cache folder of laserlm, which may not exist yet."""
    return platformdirs.user_cache_path("laserlm", appauthor=False)


def cached_files(cache: Path) -> dict[str, list[Path]]:
    """Return the files and folders that laserlm wrote to a cache folder, by kind. Other files there are left out."""
    patterns = {
        "decompositions": f"decompositions/{'[0-9a-f]' * 64}.safetensors",
        "models": f"models/smollm2-135m-instruct-{'[0-9a-f]' * 12}",
        "data": f"data/{'[0-9a-f]' * 16}-*",
    }
    return {kind: sorted(cache.glob(pattern)) for kind, pattern in patterns.items()}


def default_store() -> Path:
    """Return the default results database of the command line, which may not exist yet."""
    return platformdirs.user_data_path("laserlm", appauthor=False) / "runs.db"


def lab_folder(name: str) -> Path:
    """Return the default folder for the models of a study of the lab, which may not exist yet."""
    return platformdirs.user_data_path("laserlm", appauthor=False) / "lab" / name


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target`` and rename it to ``target`` at the end, unless an exception is raised."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _temporary_path(target)
    part.touch(exist_ok=False)  # mkstemp would make the file unreadable for other users
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, existing: Existing = "keep") -> Iterator[Path]:
    """Yield a temporary folder next to ``target`` and rename it to ``target`` at the end.

    Args:
        target: path of the folder.
        existing: what to do if ``target`` exists by then and is not empty: ``keep`` it and drop the new folder, ``refuse``
            with an OSError, or ``replace`` it by the complete new folder.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    part, old = _temporary_path(target), _temporary_path(target)
    part.mkdir()
    try:
        yield part
        if existing == "replace" and target.exists():
            target.rename(old)
        try:
            part.rename(target)
        except OSError:
            if existing != "keep" or not target.is_dir():
                raise
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
