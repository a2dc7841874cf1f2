"""Keep tensors in the files of a folder: only what is used is in memory, and a computation that was killed can continue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import quote, unquote

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laserlm.errors import ExportError
from laserlm.linalg.decomposition import Decomposition
from laserlm.paths import atomic_file

SUFFIX = ".safetensors"
KEY = "tensor"
"""Name of the tensor in its file."""


class TensorFolder(Mapping[str, Tensor]):
    """Tensors by name, each in a file that is complete or absent.

    Args:
        folder: a folder on a disk. It is made if it does not exist; tensors that are there already belong to the mapping.

    Raises:
        ExportError: if the folder cannot be written, or a file in it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor. It replaces an earlier one of the same name.

        Raises:
            ExportError: if the disk is full.
        """
        try:
            with atomic_file(self._file(name)) as part:
                save_file({KEY: tensor.cpu().contiguous()}, part, metadata={"device": str(tensor.device)})
        except (OSError, SafetensorError) as error:
            raise storage_error(self.folder, error) from error

    def discard(self, name: str) -> None:
        """Remove a tensor, if there is one of this name.

        Raises:
            ExportError: if its file cannot be removed.
        """
        try:
            self._file(name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(self.folder, error) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        try:
            with safe_open(self._file(name), "pt") as opened:
                tensor: Tensor = opened.get_tensor(KEY)
                return tensor.to(opened.metadata()["device"])
        except (OSError, SafetensorError) as error:
            raise storage_error(self.folder, error) from error

    def __contains__(self, name: object) -> bool:
        return self._file(str(name)).is_file()

    def __iter__(self) -> Iterator[str]:
        return (unquote(file.name.removesuffix(SUFFIX)) for file in sorted(self.folder.glob(f"*{SUFFIX}")))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _file(self, name: str) -> Path:
        return self.folder / (quote(name, safe="") + SUFFIX)


class DecompositionFolder(Mapping[str, Decomposition]):
    """Decompositions by name in a folder.

    Args:
        folder: as for ``TensorFolder``.

    Raises:
        ExportError: as ``TensorFolder``.
    """

    def __init__(self, folder: Path) -> None:
        self._left, self._right = TensorFolder(folder / "left"), TensorFolder(folder / "right")

    def add(self, name: str, decomposition: Decomposition) -> None:
        """Write a decomposition.

        Raises:
            ExportError: if the disk is full.
        """
        self._left.add(name, decomposition.left)
        self._right.add(name, decomposition.right)  # the last: what has a right factor is complete

    def __getitem__(self, name: str) -> Decomposition:
        return Decomposition(self._left[name], self._right[name])

    def __contains__(self, name: object) -> bool:
        return name in self._right

    def __iter__(self) -> Iterator[str]:
        return iter(self._right)

    def __len__(self) -> int:
        return len(self._right)


def storage_error(folder: Path, error: Exception) -> ExportError:
    """Return the error of a folder that cannot be written or read, with the next step."""
    return ExportError(
        f"cannot keep the decompositions in {folder}: {error}; free space there, or give another folder with --cache"
    )
