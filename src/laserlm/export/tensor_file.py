"""Keep tensors in a temporary file, so that only what is used is in memory."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from laserlm.errors import ExportError
from laserlm.linalg.decomposition import Decomposition

__all__ = ["DecompositionFile", "TensorFile"]

Entry = tuple[int, torch.Size, torch.dtype, torch.device]
"""Where a tensor begins in the file, and what it is."""


class TensorFile(Mapping[str, Tensor]):
    """Tensors by name in a temporary file without a name, which is gone with this object or with the process.

    Args:
        folder: a folder for the file, on a disk.

    Raises:
        ExportError: if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._entries: dict[str, Entry] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by the next line
            weakref.finalize(self, self._file.close)
        except OSError as error:
            raise self._error(error) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. It replaces an earlier one of the same name, whose space is not used again.

        Raises:
            ExportError: if the disk is full.
        """
        start = self._file.seek(0, 2)
        try:
            self._file.write(_memory(tensor.cpu().contiguous()))
            self._file.flush()
        except OSError as error:
            raise self._error(error) from error
        self._entries[name] = start, tensor.shape, tensor.dtype, tensor.device

    def __getitem__(self, name: str) -> Tensor:
        start, shape, dtype, device = self._entries[name]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(start)
        self._file.readinto(_memory(tensor))
        return tensor.to(device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _error(self, error: OSError) -> ExportError:
        return ExportError(
            f"cannot keep the decompositions in {self._folder}: {error}; free space there, or give another folder with --cache"
        )


class DecompositionFile(Mapping[str, Decomposition]):
    """Decompositions by name in a temporary file.

    Args:
        folder: as for ``TensorFile``.

    Raises:
        ExportError: as ``TensorFile``.
    """

    def __init__(self, folder: Path) -> None:
        self._left, self._right = TensorFile(folder), TensorFile(folder)

    def add(self, name: str, decomposition: Decomposition) -> None:
        """Write a decomposition.

        Raises:
            ExportError: if the disk is full.
        """
        self._left.add(name, decomposition.left)
        self._right.add(name, decomposition.right)

    def __getitem__(self, name: str) -> Decomposition:
        return Decomposition(self._left[name], self._right[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._left)

    def __len__(self) -> int:
        return len(self._left)


def _memory(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
