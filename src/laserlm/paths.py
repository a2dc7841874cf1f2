"""Where files are kept, and how they are written so that an interruption leaves nothing that is taken for whole."""

from __future__ import annotations

import os
import shutil
import tempfile
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
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    part = Path(name)
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
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        yield part
        try:
            part.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
