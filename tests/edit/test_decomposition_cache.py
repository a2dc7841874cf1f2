from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from laserlm.edit import decomposition_cache as module
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import LaserError
from laserlm.linalg import reference_truncation


def matrix(seed: int = 0, m: int = 20, n: int = 12) -> torch.Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("computed again")


def test_a_basis_is_computed_once_and_then_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = DecompositionCache(tmp_path).get(matrix())
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    monkeypatch.setattr(module, "basis_of", refuse)
    again = DecompositionCache(tmp_path).get(matrix())
    assert torch.equal(first.left, again.left)
    assert torch.equal(first.right, again.right)
    with pytest.raises(AssertionError, match="computed again"):
        DecompositionCache(tmp_path).get(matrix(seed=1))


@pytest.mark.parametrize("change", ["value", "dtype", "shape"])
def test_other_content_has_another_key(change: str) -> None:
    weight = matrix()
    other = weight.clone()
    if change == "value":
        other[3, 3] += 1e-6
    other = {"value": other, "dtype": weight.double(), "shape": weight.reshape(12, 20)}[change]
    assert module.content_key(weight) != module.content_key(other)
    assert module.content_key(weight) == module.content_key(weight.clone())
    assert module.content_key(weight) == module.content_key(weight.T.contiguous().T)


def test_the_same_bytes_of_another_dtype_have_another_key() -> None:
    half = matrix().half()
    assert module.content_key(half) != module.content_key(half.view(torch.bfloat16))


@pytest.mark.parametrize("damage", ["flipped bits", "cut short", "no file of this kind", "empty"])
def test_a_damaged_file_is_reported_and_rebuilt(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = DecompositionCache(tmp_path).get(matrix())
    file = next(tmp_path.glob("*.safetensors"))
    content = file.read_bytes()
    damaged = {
        "flipped bits": content[:-5] + bytes(255 - b for b in content[-5:]),
        "cut short": content[: len(content) // 2],
        "no file of this kind": b"hello",
        "empty": b"",
    }[damage]
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        decomposition = DecompositionCache(tmp_path).get(matrix())
    assert "it is computed again" in caplog.text
    assert str(file) in caplog.text
    assert torch.equal(decomposition.left, expected.left)
    monkeypatch.setattr(module, "basis_of", refuse)
    assert torch.equal(DecompositionCache(tmp_path).get(matrix()).left, expected.left)


def test_a_full_disk_costs_the_cache_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Any, file: Path, **__: Any) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with caplog.at_level(logging.WARNING):
        decomposition = DecompositionCache(tmp_path).get(matrix())
    assert "No space left on device" in caplog.text
    torch.testing.assert_close(decomposition.left @ decomposition.right, matrix(), atol=1e-5, rtol=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_costs_the_cache_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        decomposition = DecompositionCache(tmp_path / "file" / "cache").get(matrix())
    assert "cannot write a decomposition" in caplog.text
    torch.testing.assert_close(decomposition.left @ decomposition.right, matrix(), atol=1e-5, rtol=0)


def test_memory_holds_what_fits_and_drops_the_one_used_before_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    one = DecompositionCache().get(matrix()).bytes
    cache = DecompositionCache(memory=2 * one)
    a = cache.get(matrix(0))
    cache.get(matrix(1))
    newest = cache.get(matrix(2))
    monkeypatch.setattr(module, "basis_of", refuse)
    assert cache.get(matrix(2)) is newest
    assert cache.get(matrix(0)) is a
    with pytest.raises(AssertionError, match="computed again"):
        cache.get(matrix(1))


def test_matrices_asked_for_in_turns_are_mostly_in_memory_where_most_of_them_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    one = DecompositionCache().get(matrix()).bytes
    cache = DecompositionCache(memory=6 * one)
    calls = counted(monkeypatch, "basis_of")
    for _ in range(5):
        for seed in range(8):
            assert cache.get(matrix(seed)).bytes == one
    assert cache.peak == 6 * one
    # The first round computes all 8; each later one the 2 that have no room, and one more at the place where room ran out.
    assert 8 + 4 * 2 <= len(calls) <= 8 + 4 * 3


def test_what_was_not_asked_for_for_long_is_dropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    one = DecompositionCache().get(matrix()).bytes
    cache = DecompositionCache(memory=2 * one)
    for seed in (0, 1):
        cache.get(matrix(seed))
    for _ in range(20):
        cache.get(matrix(1))
    last = cache.get(matrix(2))
    monkeypatch.setattr(module, "basis_of", refuse)
    cache.get(matrix(1))
    assert cache.get(matrix(2)) is last
    with pytest.raises(AssertionError, match="computed again"):
        cache.get(matrix(0))


def counted(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Count the calls of a function of the module."""
    calls: list[str] = []
    function = getattr(module, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_the_bytes_of_a_weight_are_hashed_once_in_a_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = DecompositionCache().get(matrix()).bytes
    calls = counted(monkeypatch, "content_key")
    cache = DecompositionCache(tmp_path, memory=one)
    expected = cache.get(matrix())
    for _ in range(5):
        assert cache.get(matrix()) is expected
    cache.get(matrix(1))  # drops the first from memory
    again = cache.get(matrix())
    assert again is not expected
    assert torch.equal(again.left, expected.left)
    assert len(calls) == 2


@pytest.mark.parametrize("folder", [True, False])
def test_a_weight_that_is_changed_in_place_is_decomposed_again(folder: bool, tmp_path: Path) -> None:
    cache = DecompositionCache(tmp_path if folder else None)
    weight = torch.nn.Parameter(matrix())
    for change in (lambda W: W.mul_(-1), lambda W: W.data[3].zero_(), lambda W: W.data.copy_(matrix(4))):
        cache.get(weight)
        with torch.no_grad():
            change(weight)
        full = cache.get(weight).truncate(12)
        torch.testing.assert_close(full, weight.detach(), atol=1e-5, rtol=0)


def test_a_reference_decomposition_is_computed_once_for_each_matrix_rank_seed_and_iterations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, calls = DecompositionCache(), counted(monkeypatch, "reference_decomposition")
    settings = [(0, 4, 2, 0), (1, 4, 2, 0), (0, 5, 2, 0), (0, 4, 20, 0), (0, 4, 2, 1)]
    for _ in range(2):
        for seed_of_matrix, rank, niter, seed in settings:
            weight = matrix(seed_of_matrix)
            actual = cache.get_reference(weight, rank, niter=niter, seed=seed).truncate(rank)
            assert torch.equal(actual, reference_truncation(weight, rank, niter=niter, seed=seed))
    assert len(calls) == len(settings)


def stored(folder: Path) -> set[str]:
    return {file.name for file in folder.glob("*.safetensors")}


def test_on_disk_the_least_recently_used_are_removed_beyond_the_bound(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def name(seed: int) -> str:
        return f"{module.content_key(matrix(seed, 80, 64))}.safetensors"

    mine = tmp_path / "notes.safetensors"
    mine.write_bytes(bytes(100_000))
    bound = 60_000  # of files with 64 x 64 values of 4 bytes, three
    for seed in range(3):
        DecompositionCache(tmp_path, disk=bound).get(matrix(seed, 80, 64))
        os.utime(tmp_path / name(seed), (1000 + seed, 1000 + seed))
    assert not caplog.text
    DecompositionCache(tmp_path, disk=bound).get(matrix(0, 80, 64))  # used again, so the next is the oldest
    cache = DecompositionCache(tmp_path, disk=bound)
    with caplog.at_level(logging.WARNING):
        for seed in (3, 4):
            cache.get(matrix(seed, 80, 64))
    assert stored(tmp_path) == {mine.name, name(0), name(3), name(4)}
    assert len(caplog.records) == 1
    assert "1 decompositions that were not used for longest are removed" in caplog.text
    assert "LASER_CACHE_GIB" in caplog.text


def test_the_disk_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=2**30 + 1000))
    with caplog.at_level(logging.WARNING):
        decomposition = DecompositionCache(tmp_path).get(matrix(0, 80, 64))
    assert stored(tmp_path) == set()
    assert "may take 0.0 GiB of the disk" in caplog.text
    torch.testing.assert_close(decomposition.truncate(64), matrix(0, 80, 64), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("gib", "files"), [("0", 0), ("1", 1), (None, 1)])
def test_the_bound_is_read_from_the_environment(
    gib: str | None, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LASER_CACHE_GIB", raising=False)
    if gib is not None:
        monkeypatch.setenv("LASER_CACHE_GIB", gib)
    DecompositionCache(tmp_path).get(matrix())
    assert len(stored(tmp_path)) == files


@pytest.mark.parametrize("text", ["", "much", "-1", "nan"])
def test_a_bound_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LASER_CACHE_GIB", text)
    with pytest.raises(LaserError, match=f"LASER_CACHE_GIB={text} is no size; give the most GiB"):
        DecompositionCache()


def test_what_killed_processes_left_is_removed_with_the_next_write(tmp_path: Path) -> None:
    part = tmp_path / f".{'0' * 64}.safetensors.{'a' * 12}.part"
    part.write_bytes(b"half")
    os.utime(part, (1000, 1000))
    DecompositionCache(tmp_path).get(matrix())
    assert not part.exists()
