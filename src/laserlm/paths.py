"""Where files are kept, and how they are written so that an interruption leaves nothing that is taken for whole."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import platformdirs

__all__ = ["atomic_file", "atomic_folder", "cache_folder", "cached", "default_store", "lab_folder"]

Existing = Literal["keep", "refuse", "replace"]


def cache_folder() -> Path:
    """Return the user's cache folder of laserlm (not necessarily there yet)."""
    return platformdirs.user_cache_path("laserlm", appauthor=False)


def cached(cache: Path) -> dict[str, list[Path]]:
    """Return what laserlm itself has put into a cache folder, by kind, and nothing else that may lie there."""
    patterns = {
        "decompositions": f"decompositions/{'[0-9a-f]' * 64}.safetensors",
        "models": f"models/smollm2-135m-instruct-{'[0-9a-f]' * 12}",
        "data": f"data/{'[0-9a-f]' * 16}-*",
    }
    return {kind: sorted(cache.glob(pattern)) for kind, pattern in patterns.items()}


def default_store() -> Path:
    """Return the results database that the command line uses unless told otherwise (not necessarily there yet)."""
    return platformdirs.user_data_path("laserlm", appauthor=False) / "runs.db"


def lab_folder(name: str) -> Path:
    """Return the folder in which a study of the lab keeps its models unless told otherwise (not necessarily there yet)."""
    return platformdirs.user_data_path("laserlm", appauthor=False) / "lab" / name


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target`` and move it there at the end; after an exception ``target`` is as before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(target)
    part.touch(exist_ok=False)  # not mkstemp, which would keep the file from all other users
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, existing: Existing = "keep") -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` and move it there at the end.

    Args:
        target: where the folder shall be.
        existing: what becomes of a ``target`` that is there by then, an empty one aside: ``keep`` it and drop the new one,
            ``refuse`` with a FileExistsError, or ``replace`` it once the new one is whole.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    part, old = _part_of(target), _part_of(target)
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


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
