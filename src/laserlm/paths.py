"""Where files are kept, and how they are written so that an interruption leaves nothing that is taken for whole."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

__all__ = ["atomic_file", "atomic_folder", "cache_folder", "default_store"]


def cache_folder() -> Path:
    """Return the user's cache folder of laserlm (not necessarily there yet)."""
    return platformdirs.user_cache_path("laserlm", appauthor=False)


def default_store() -> Path:
    """Return the results database that the command line uses unless told otherwise (not necessarily there yet)."""
    return platformdirs.user_data_path("laserlm", appauthor=False) / "runs.db"


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
def atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``target`` and move it there at the end.

    Where another process has made ``target`` in the meantime, that one stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(target)
    part.mkdir()
    try:
        yield part
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
