"""Locations of laserlm's files, and atomic writing, so that an interruption leaves no partial file or folder."""

from __future__ import annotations

import errno
import glob
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

import platformdirs

from laserlm.errors import LaserError, WriteError

log = logging.getLogger(__name__)

DISK_VARIABLE = "LASER_CACHE_GIB"
"""Environment variable with the most GiB of decompositions on disk."""
MOUNTS = Path("/proc/mounts")
"""Where Linux lists its disks; other systems have no such file."""
NETWORK_DISKS = frozenset(
    "9p afs beegfs ceph cifs fuse.glusterfs fuse.sshfs glusterfs gpfs lustre ncpfs nfs nfs4 smb2 smb3 smbfs".split()
)
"""Types of file systems that several machines share."""
DISK_GIB = 20.0
"""The most GiB of decompositions on disk if the variable is not set: all of a model with 7 billion parameters."""
HEX = "[0-9a-f]"
BASIS = f"{HEX * 64}.safetensors"
"""Pattern of the names of files with decompositions."""
PART_SECONDS = 3600.0
"""A temporary file or folder that was not written to for this long was left by a process that was killed."""

Existing = Literal["keep", "refuse", "replace"]
_FREE = "free space on its disk, or give a path on another one"
_PERMIT = "make its folder writable, or give another path"
_MOVE = "give another path"
STEPS = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: _FREE,
    errno.EACCES: _PERMIT,
    errno.EPERM: _PERMIT,
    errno.EROFS: _PERMIT,
    errno.ENOTDIR: _MOVE,
    errno.EISDIR: _MOVE,
    errno.EEXIST: _MOVE,
    errno.ENOTEMPTY: _MOVE,
    errno.ENOENT: _MOVE,
    errno.ENAMETOOLONG: "give a shorter name",
}
"""What to do about an error of writing, by its number."""


def cache_folder() -> Path:
    """Return the user's cache folder of laserlm, which may not exist yet."""
    return platformdirs.user_cache_path("laserlm", appauthor=False)


def cached_files(cache: Path) -> dict[str, list[Path]]:
    """Return the files and folders that laserlm wrote to a cache folder, by kind. Other files there are left out.

    Among them are temporary ones that killed processes left.
    """
    patterns = {
        "decompositions": [BASIS],
        "models": [f"smollm2-135m-instruct-{HEX * 12}", f"gguf-{HEX * 12}"],
        "data": [f"{HEX * 16}-*"],
        "texts": [f"{HEX * 64}.json", BASIS],
        "compressions": [HEX * 16],
        "scores": [f"{HEX * 64}.json"],
    }
    return {
        kind: sorted(path for name in names for path in (*(cache / kind).glob(name), *_leftovers(cache / kind, name)))
        for kind, names in patterns.items()
    }


def disk_limit() -> float:
    """Return the most bytes of decompositions on disk: ``LASER_CACHE_GIB`` GiB, or 20 GiB if it is not set.

    Raises:
        LaserError: if the variable is not a number from 0.
    """
    text = os.environ.get(DISK_VARIABLE, str(DISK_GIB))
    try:
        limit = float(text)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise LaserError(f"{DISK_VARIABLE}={text} is no size; give the most GiB of cached decompositions, such as 20, or 0")
    return limit * 2**30


def default_store() -> Path:
    """Return the default results database of the command line, which may not exist yet."""
    return platformdirs.user_data_path("laserlm", appauthor=False) / "runs.db"


def lab_folder(name: str) -> Path:
    """Return the default folder for the models of a study of the lab, which may not exist yet."""
    return platformdirs.user_data_path("laserlm", appauthor=False) / "lab" / name


def network_disk(path: Path) -> str:
    """Return the type of the network disk that a path is on, such as nfs4; empty if it is on none."""
    try:
        lines = [line.split(" ") for line in MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:
        return ""
    # The list writes a space as \040. Of several disks the path is on the one that was mounted deepest, and last there.
    mounts = [(Path(fields[1].replace("\\040", " ")), fields[2]) for fields in lines if len(fields) > 2]
    path = path.resolve()
    around = [(len(place.parts), i, kind) for i, (place, kind) in enumerate(mounts) if path.is_relative_to(place)]
    kind = max(around)[2] if around else ""
    return kind if kind in NETWORK_DISKS else ""


def similar_paths(path: Path) -> list[Path]:
    """Return up to three paths next to the first part of a path that does not exist, with similar names.

    For ``/data/rums/a.db`` this is ``/data/runs``, if ``/data`` has no ``rums``.
    """
    path = Path(path).expanduser().absolute()
    while not path.parent.exists():
        path = path.parent
    names = [other.name for other in path.parent.iterdir()] if os.access(path.parent, os.R_OK) and path.parent.is_dir() else []
    return [path.parent / name for name in get_close_matches(path.name, names, n=3, cutoff=0.5)]


def check_new_file(target: Path, *, kind: str, is_ours: Callable[[bytes], bool], overwrite: bool = False) -> None:
    """Raise an error if a file cannot be written there, or would replace another one.

    Args:
        target: path of the file.
        kind: what is written, such as ``a report``.
        is_ours: tells from the first kilobyte of an existing file whether it is of this kind.
        overwrite: whether an existing file of this kind may be replaced.

    Raises:
        WriteError: if the path is empty or a folder, or a file is there that may not be replaced.
    """
    _check_is_file(target)
    if target.exists():
        with target.open("rb") as stream:
            if not is_ours(stream.read(1024)):
                raise WriteError(f"{target} exists and is not {kind} of laserlm; move it away, or give another file")
        if not overwrite:
            raise WriteError(f"{target} exists already; give another file, or --overwrite (overwrite=True)")


def _check_is_file(target: Path) -> None:
    if target.is_dir():  # an empty path is the current folder
        raise WriteError(f"{target.absolute()} is a folder; give a file, such as {target.absolute() / 'NAME'}")
    if target.exists() and not target.is_file():
        raise WriteError(f"{target} is a device or a pipe, which no file replaces; give another path")


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target`` and rename it to ``target`` at the end, unless an exception is raised.

    Raises:
        WriteError: if the file cannot be written, with the reason and the next step.
    """
    _check_is_file(target)
    part = _temporary_path(target)
    try:
        with _write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            part.touch(exist_ok=False)  # mkstemp would make the file unreadable for other users
            yield part
            part.replace(target)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, *, existing: Existing = "keep") -> Iterator[Path]:
    """Yield a temporary folder next to ``target`` and rename it to ``target`` at the end.

    Temporary folders that killed processes left for the same target are removed.

    Args:
        target: path of the folder.
        existing: what to do if ``target`` exists by then and is not empty: ``keep`` it and drop the new folder, ``refuse``
            with an OSError, or ``replace`` it by the complete new folder.

    Raises:
        WriteError: if the folder cannot be written, or is the current folder or one above it.
    """
    target = target.absolute()
    check_new_folder(target)
    part, old = _temporary_path(target), _temporary_path(target).with_suffix(".old")
    try:
        with _write_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(target.parent, glob.escape(target.name))
            part.mkdir()
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


def check_new_folder(target: Path) -> None:
    """Raise a WriteError if a folder is the current one or one above it, which cannot be replaced."""
    here = Path.cwd()
    target = Path(os.path.abspath(target))
    if target == here or target in here.parents:
        raise WriteError(f"{target} is the current folder or one above it; give a new folder, such as {here / 'NAME'}")


@contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Give errors of writing a target its path and the next step. Errors of other files pass through."""
    try:
        yield
    except OSError as error:
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        is_of_target = all(name.startswith(str(target.parent)) for name in names)
        if isinstance(error, LaserError) or error.errno not in STEPS or not is_of_target:
            raise
        raise WriteError(f"cannot write {target}: {error.strerror}; {STEPS[error.errno]}") from error


def warn_of_full_disk(folder: Path, needed: int, what: str, option: str) -> None:
    """Warn where the disk of a folder, which may not exist yet, has less than ``needed`` bytes and a tenth more.

    Args:
        folder: the folder.
        needed: bytes.
        what: what takes them, with its verb.
        option: with which another folder is given.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < 1.1 * needed:
        log.warning(
            "%s %.1f GiB in %s, whose disk has %.1f GiB left; free space there, or give another folder with %s",
            *(what, needed / 2**30, folder, free / 2**30, option),
        )


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed processes left in a folder of the files and folders whose names match the pattern ``name``."""
    for path in _leftovers(folder, name):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _leftovers(folder: Path, name: str) -> list[Path]:
    """Return temporary files and folders, of targets whose names match a pattern, that were not written to for an hour."""
    latest = time.time() - PART_SECONDS
    parts = folder.glob(f".{name}.{HEX * 12}.part")
    return [part for part in parts if all(_changed(path) < latest for path in (part, *part.rglob("*")))]


def _changed(path: Path) -> float:
    """Return when a file or folder was changed, as time.time(); never, if it is gone by now."""
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:
        return 0.0


def _temporary_path(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(6)}.part")
