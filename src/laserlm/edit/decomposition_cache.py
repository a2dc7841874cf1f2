"""Decompositions kept by content: in memory while there is room, and on disk."""

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
    """Decompose matrices, each content once.

    Only the (k, k) basis is on disk, k = min(m, n); the other factor is one product away. A basis is kept under the
    sha256 of the weight's bytes, shape and dtype and the version of the algorithm, with a checksum of its own bytes.
    A damaged file is made again, and a disk that cannot be written to is gone without; both are logged as warnings.

    Args:
        folder: where bases are kept, or None for memory only.
        memory: bytes of decompositions held in memory; the least recently used go first.

    Attributes:
        peak: most bytes that were held.
    """

    def __init__(self, folder: Path | None = None, memory: float = 512 * 2**20) -> None:
        self.folder = folder
        self.memory = memory
        self.peak = 0
        self._held: OrderedDict[str, Decomposition] = OrderedDict()

    def get(self, weight: Tensor) -> Decomposition:
        """Return the decomposition of a matrix (m, n), on its device.

        Raises:
            WeightError: if the matrix holds NaN or inf.
        """
        key = content_key(weight)
        held = self._held.get(key)
        if held is None or held.left.device != weight.device:
            full = as_float_matrix(weight)
            held = self._held[key] = Decomposition.from_basis(full, self._basis(key, full))
        self._held.move_to_end(key)
        while (total := sum(d.bytes for d in self._held.values())) > self.memory and len(self._held) > 1:
            self._held.popitem(last=False)
        self.peak = max(self.peak, total)
        return held

    def clear(self) -> None:
        """Free the memory; what is on disk stays."""
        self._held.clear()

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
    """Return the sha256 of a matrix's shape, dtype and bytes and of the decomposition's version."""
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
        log.warning("cannot keep a decomposition at %s (%s); it will be computed again next time", file.parent, error)


def _load(file: Path, weight: Tensor) -> Tensor | None:
    """Return the basis in a file, or None where there is none or it is damaged."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            basis: Tensor = stored.get_tensor("basis")
        whole = hashlib.sha256(_bytes(basis)).hexdigest() == metadata.get("sha256")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        log.warning("the cached decomposition %s cannot be read (%s); making it again", file, error)
        return None
    if not whole:
        log.warning("the cached decomposition %s does not match its checksum; making it again", file)
        return None
    return basis.to(weight)
