"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from laserlm.errors import LaserError, WriteError
from laserlm.paths import (
    atomic_file,
    atomic_folder,
    cache_folder,
    cached_files,
    check_new_file,
    check_new_folder,
    default_store,
    network_disk,
    similar_paths,
)


def contents(folder: Path) -> dict[str, str]:
    """Return the text of every file below a folder by its relative path."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def interrupted_file(target: Path, error: BaseException) -> None:
    """Write half of a file and fail."""
    with atomic_file(target) as part:
        part.write_text("half of the new te")
        raise error


def interrupted_folder(target: Path, error: BaseException) -> None:
    """Write half of a folder and fail."""
    with atomic_folder(target) as part:
        (part / "inner").mkdir()
        (part / "inner" / "first.txt").write_text("new")
        raise error


INTERRUPTIONS = pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError("disk full")], ids=repr)


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "runs.json"
    with atomic_file(target) as part:
        assert part.parent == target.parent
        part.write_text("new")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/er/runs.json": "new"}


def test_the_old_file_stays_until_the_new_one_replaces_it(tmp_path: Path) -> None:
    target = tmp_path / "runs.json"
    target.write_text("old")
    with atomic_file(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
    assert contents(tmp_path) == {"runs.json": "new"}


@INTERRUPTIONS
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "runs.json"
    target.write_text("old")
    with pytest.raises(type(error)):
        interrupted_file(target, error)
    assert contents(tmp_path) == {"runs.json": "old"}


@INTERRUPTIONS
def test_an_exception_leaves_no_file_where_there_was_none(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        interrupted_file(tmp_path / "runs.json", error)
    assert list(tmp_path.iterdir()) == []


def test_two_writers_of_one_file_do_not_meet_in_one_part(tmp_path: Path) -> None:
    target = tmp_path / "runs.json"
    with atomic_file(target) as first, atomic_file(target) as second:
        first.write_text("first")
        second.write_text("second")
        assert first != second
    assert contents(tmp_path) == {"runs.json": "first"}


def test_a_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as part:
        assert part.parent == target.parent
        (part / "a.txt").write_text("new")
        assert not target.exists()
    assert contents(tmp_path) == {"deep/model/a.txt": "new"}
    assert [p.name for p in target.parent.iterdir()] == ["model"]


@INTERRUPTIONS
def test_an_exception_leaves_no_folder(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        interrupted_folder(tmp_path / "model", error)
    assert list(tmp_path.iterdir()) == []


@INTERRUPTIONS
def test_an_exception_leaves_the_old_folder_as_it_was(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "first.txt").write_text("old")
    with pytest.raises(type(error)):
        interrupted_folder(target, error)
    assert contents(tmp_path) == {"model/first.txt": "old"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_another_process_made_in_the_meantime_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as part:
        (part / "mine.txt").write_text("mine")
        target.mkdir()
        (target / "theirs.txt").write_text("theirs")
    assert contents(tmp_path) == {"model/theirs.txt": "theirs"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_place_of_the_folder_is_an_error_and_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("a file")

    def write() -> None:
        with atomic_folder(target) as part:
            (part / "mine.txt").write_text("mine")

    with pytest.raises(OSError, match="model"):
        write()
    assert contents(tmp_path) == {"model": "a file"}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.skipif(os.name != "posix", reason="file modes are a matter of POSIX")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_written_has_the_mode_that_an_ordinary_new_one_has(tmp_path: Path, kind: str) -> None:
    ordinary, target = tmp_path / "ordinary", tmp_path / "target"
    if kind == "file":
        ordinary.touch()
        with atomic_file(target) as part:
            part.write_text("new")
    else:
        ordinary.mkdir()
        with atomic_folder(target) as part:
            (part / "a.txt").write_text("new")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


@pytest.mark.skipif(sys.platform != "linux", reason="these variables name the folders on Linux")
def test_cache_and_results_are_in_the_users_folders_and_are_not_made_by_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert cache_folder() == tmp_path / "cache" / "laserlm"
    assert default_store() == tmp_path / "share" / "laserlm" / "runs.db"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for name in ("old", "new"):
        with atomic_folder(target, existing="replace") as part:
            (part / name).touch()
    assert [f.name for f in target.iterdir()] == ["new"]
    with pytest.raises(KeyboardInterrupt), atomic_folder(target, existing="replace") as part:
        raise KeyboardInterrupt
    assert [f.name for f in target.iterdir()] == ["new"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_the_old_folder_is_back_where_the_new_one_cannot_be_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    rename = Path.rename

    def interrupted(self: Path, to: Path) -> Path:
        if to == target and (self / "new").exists():
            raise KeyboardInterrupt
        return rename(self, to)

    def write() -> None:
        with atomic_folder(target, existing="replace") as part:
            (part / "new").touch()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write()
    assert [f.name for f in target.iterdir()] == ["old"]


def test_a_folder_that_appeared_in_the_meantime_can_be_an_error(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def write() -> None:
        with atomic_folder(target, existing="refuse") as part:
            (part / "new").touch()
            target.mkdir()
            (target / "theirs").touch()

    with pytest.raises(OSError, match="out"):
        write()
    assert [f.name for f in target.iterdir()] == ["theirs"]


def left_behind(path: Path, *, hours: float) -> Path:
    """Write a folder as a killed process would leave it, some hours ago."""
    path.mkdir(parents=True)
    (path / "model.safetensors").write_text("half")
    then = time.time() - 3600 * hours
    for written in (path / "model.safetensors", path):
        os.utime(written, (then, then))
    return path


def test_a_write_removes_what_killed_writes_of_the_same_folder_left_an_hour_ago(tmp_path: Path) -> None:
    old = left_behind(tmp_path / f".out.{'1' * 12}.part", hours=2)
    fresh = left_behind(tmp_path / f".out.{'2' * 12}.part", hours=0.5)
    busy = left_behind(tmp_path / f".out.{'3' * 12}.part", hours=2)
    os.utime(busy / "model.safetensors")  # its writer lives
    others = [left_behind(tmp_path / f".{name}.{'4' * 12}.part", hours=2) for name in ("out2", "o[u]t", "out.dense")]
    own = left_behind(tmp_path / ".out.notes.part", hours=2)
    with atomic_folder(tmp_path / "out") as part:
        (part / "new").touch()
    assert not old.exists()
    assert all(path.exists() for path in (fresh, busy, own, *others))
    with atomic_folder(tmp_path / "o[u]t") as part:
        (part / "new").touch()
    assert [path.exists() for path in others] == [True, False, True]


def test_a_folder_that_is_being_replaced_is_not_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    left_behind(target, hours=2)
    rename = Path.rename

    def killed(self: Path, to: Path) -> Path:
        if to == target:
            monkeypatch.undo()
            with atomic_folder(target) as part:  # another process writes there at this moment
                (part / "theirs").touch()
            raise OSError("no")
        return rename(self, to)

    def write() -> None:
        with atomic_folder(target, existing="replace") as part:
            (part / "new").touch()
            monkeypatch.setattr(Path, "rename", killed)

    with pytest.raises(OSError, match="no"):
        write()
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_leftovers_in_the_cache_are_listed_with_what_they_were_to_become(tmp_path: Path) -> None:
    names = {
        "decompositions": f"{'a' * 64}.safetensors",
        "models": f"smollm2-135m-instruct-{'b' * 12}",
        "data": f"{'c' * 16}-questions.json",
        "texts": f"{'d' * 64}.json",
        "compressions": "f" * 16,
        "scores": f"{'e' * 64}.json",
    }
    expected = {}
    for kind, name in names.items():
        folder = tmp_path / kind
        expected[kind] = sorted(
            [left_behind(folder / f".{name}.{'d' * 12}.part", hours=2), left_behind(folder / name, hours=2)]
        )
        left_behind(folder / f".{name}.{'e' * 12}.part", hours=0)
        left_behind(folder / f".mine.{'d' * 12}.part", hours=2)
    gguf = left_behind(tmp_path / "models" / f"gguf-{'f' * 12}", hours=0)
    expected["models"] = sorted([*expected["models"], gguf])
    assert cached_files(tmp_path) == expected


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (errno.ENOSPC, "free space on its disk"),
        (errno.EDQUOT, "free space on its disk"),
        (errno.EROFS, "make its folder writable"),
        (errno.EACCES, "make its folder writable"),
        (errno.ENAMETOOLONG, "give a shorter name"),
    ],
)
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_an_error_of_writing_names_the_target_and_the_next_step(
    tmp_path: Path, atomic: Callable[[Path], AbstractContextManager[Path]], number: int, step: str
) -> None:
    def write() -> None:
        with atomic(tmp_path / "out.html"):
            raise OSError(number, os.strerror(number))  # as a write to an open file, which knows no name

    with pytest.raises(WriteError, match=step) as raised:
        write()
    assert str(raised.value).startswith(f"cannot write {tmp_path / 'out.html'}: {os.strerror(number)}; ")
    assert isinstance(raised.value, LaserError)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_another_file_passes_through(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "out" / "a.html"):
            (tmp_path / "other").read_text()

    with pytest.raises(FileNotFoundError):
        write()


@pytest.mark.parametrize("name", ["", ".", "/", "folder", "folder/"])
def test_a_folder_in_the_place_of_a_file_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for act in (lambda: atomic_file(Path(name)).__enter__(), lambda: check_new_file(Path(name), kind="x", is_ours=bool)):
        with pytest.raises(WriteError, match=r"is a folder; give a file, such as /.*NAME"):
            act()
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_device_or_a_pipe_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for act in (lambda f: atomic_file(f).__enter__(), lambda f: check_new_file(f, kind="x", is_ours=bool)):
        with pytest.raises(WriteError, match="is a device or a pipe"):
            act(tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.html"
    check_new_file(file, kind="a report", is_ours=lambda start: start == b"mine")
    file.write_text("mine")
    check_new_file(file, kind="a report", is_ours=lambda start: start == b"mine", overwrite=True)
    with pytest.raises(WriteError, match=f"{file} exists already; give another file, or --overwrite"):
        check_new_file(file, kind="a report", is_ours=lambda start: start == b"mine")
    file.write_text("notes")
    with pytest.raises(WriteError, match=f"{file} exists and is not a report of laserlm; move it away"):
        check_new_file(file, kind="a report", is_ours=lambda start: start == b"mine", overwrite=True)


def test_similar_paths_are_next_to_the_first_part_that_does_not_exist(tmp_path: Path) -> None:
    for name in ("runs", "models/base", "models/edited"):
        (tmp_path / name).mkdir(parents=True)
    assert similar_paths(tmp_path / "rums" / "a" / "b.db") == [tmp_path / "runs"]
    assert similar_paths(tmp_path / "models" / "bass") == [tmp_path / "models" / "base"]
    assert similar_paths(tmp_path / "zzz") == []


@pytest.mark.parametrize("name", ["", ".", "/", "..", "../..", "../here/../here"])
def test_the_current_folder_and_those_above_are_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(WriteError, match="is the current folder or one above it; give a new folder"):
        check_new_folder(Path(name))

    def write() -> None:
        with atomic_folder(Path(name), existing="replace") as part:
            (part / "a").touch()

    with pytest.raises(WriteError, match="is the current folder or one above it"):
        write()
    assert os.getcwd() == str(tmp_path / "here")
    assert [p.name for p in tmp_path.iterdir()] == ["here"]


def test_a_path_is_on_the_disk_that_was_mounted_deepest_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared, local = tmp_path / "a shared disk", tmp_path / "a shared disk" / "local"
    local.mkdir(parents=True)
    name = str(shared).replace(" ", "\\040")
    mounts = tmp_path / "mounts"
    mounts.write_text(
        f"/dev/vda / ext4 rw 0 0\n/dev/vdb {name} xfs rw 0 0\nh:/x {name} nfs rw 0 0\ntmpfs {name}/local tmpfs rw 0 0\n"
    )
    monkeypatch.setattr("laserlm.paths.MOUNTS", mounts)
    assert network_disk(shared / "runs.db") == "nfs"
    assert network_disk(local / "runs.db") == network_disk(tmp_path / "runs.db") == ""
    monkeypatch.setattr("laserlm.paths.MOUNTS", tmp_path / "none")
    assert network_disk(shared) == ""
