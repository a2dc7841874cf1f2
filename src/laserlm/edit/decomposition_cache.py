"""A cache of decompositions, keyed by the matrix's content, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laserlm.linalg.decomposition import ALGORITHM, Decomposition, as_float_matrix, basis_of
from laserlm.paths import atomic_file

__all__ = ["DecompositionCache"]

log = logging.getLogger(__name__)


class DecompositionCache:
    """Decompose each matrix once, and return the cached decomposition for equal matrices.

    The disk stores only the (k, k) basis, k = min(m, n); one product gives the other factor. The key of a basis is the
    sha256 of the weight's bytes, shape and dtype and of the algorithm's version. A checksum of the basis is stored with it.
    A damaged file is computed again. A disk that cannot be written is not used. Both are logged as warnings.

    Args:
        folder: folder of the bases, or None for memory only.
        memory: maximum bytes of decompositions in memory; the least recently used are dropped first.

    Attributes:
        peak: maximum number of bytes that were in memory.
    """

    def __init__(self, folder: Path | None = None, memory: float = 512 * 2**20) -> None:
        self.folder = folder
        self.memory = memory
        self.peak = 0
        self._in_memory: OrderedDict[str, Decomposition] = OrderedDict()

    def get(self, weight: Tensor) -> Decomposition:
        """Return the decomposition of a matrix (m, n), on its device.

        Raises:
            WeightError: if the matrix holds NaN or inf.
        """
        key = content_key(weight)
        decomposition = self._in_memory.get(key)
        if decomposition is None or decomposition.left.device != weight.device:
            full = as_float_matrix(weight)
            decomposition = self._in_memory[key] = Decomposition.from_basis(full, self._basis(key, full))
        self._in_memory.move_to_end(key)
        while (total := sum(d.bytes for d in self._in_memory.values())) > self.memory and len(self._in_memory) > 1:
            self._in_memory.popitem(last=False)
        self.peak = max(self.peak, total)
        return decomposition

    def clear(self) -> None:
        """Drop the decompositions in memory; files on disk stay."""
        self._in_memory.clear()

    def _basis(self, key: str, weight: Tensor) -> Tensor:
        if self.folder is None:
            return basis_of(weight)
        file = self.folder / f"{key}.safetensors"
        basis = _load(file, weight)
        if basis is None:
            basis = basis_of(weight)
            _save(file, basis)
        return basis


def content_key(weight: Tensor) -> str:
    """Return the sha256 of a matrix's shape, dtype and bytes and of the algorithm's version."""
    digest = hashlib.sha256(f"{ALGORITHM} {tuple(weight.shape)} {weight.dtype}\n".encode())
    digest.update(_bytes(weight))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _save(file: Path, basis: Tensor) -> None:
    stored = basis.cpu().contiguous()
    metadata = {"sha256": hashlib.sha256(_bytes(stored)).hexdigest(), "algorithm": ALGORITHM}
    try:
        with atomic_file(file) as part:
            save_file({"basis": stored}, part, metadata=metadata)
    except (OSError, SafetensorError) as error:
        log.warning("cannot write a decomposition to %s (%s); it will be computed again next time", file.parent, error)


def _load(file: Path, weight: Tensor) -> Tensor | None:
    """Return the basis in a file, or None if the file is missing or damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            basis: Tensor = stored.get_tensor("basis")
        is_intact = hashlib.sha256(_bytes(basis)).hexdigest() == metadata.get("sha256")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        log.warning("the cached decomposition %s cannot be read (%s); it is computed again", file, error)
        return None
    if not is_intact:
        log.warning("the cached decomposition %s does not match its checksum; it is computed again", file)
        return None
    return basis.to(weight)
