from __future__ import annotations

import errno
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from laserlm.edit import decomposition_cache as module
from laserlm.edit.decomposition_cache import DecompositionCache


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
def test_a_damaged_file_is_said_and_made_again(
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


def test_memory_holds_what_fits_and_drops_the_least_recently_used(monkeypatch: pytest.MonkeyPatch) -> None:
    one = DecompositionCache().get(matrix()).bytes
    cache = DecompositionCache(memory=2 * one)
    a = cache.get(matrix(0))
    cache.get(matrix(1))
    assert cache.get(matrix(0)) is a
    cache.get(matrix(2))
    monkeypatch.setattr(module, "basis_of", refuse)
    assert cache.get(matrix(0)) is a
    cache.get(matrix(2))
    with pytest.raises(AssertionError, match="computed again"):
        cache.get(matrix(1))
