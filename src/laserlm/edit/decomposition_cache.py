"""A cache of decompositions, keyed by the matrix's content, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from laserlm.linalg.decomposition import ALGORITHM, Decomposition, as_float_matrix, basis_of, reference_decomposition
from laserlm.linalg.quick_hash import quick_hash
from laserlm.paths import BASIS, DISK_VARIABLE, atomic_file, disk_limit, remove_leftovers

log = logging.getLogger(__name__)

GIB = 2.0**30
FREE = GIB
"""Bytes of the disk that the cache leaves free, for the results database that is often on the same disk."""
LONG_UNUSED = 4
"""Requests, for each decomposition in memory, after which one that was not asked for may go."""
HEADER = 1024
"""Bytes of a file, at most, in addition to those of its tensor."""


class DecompositionCache:
    """Decompose each matrix once, and return the cached decomposition for equal matrices.

    The disk stores only the (k, k) basis, k = min(m, n); one product gives the other factor. The key of a basis is the
    sha256 of the weight's bytes, shape and dtype and of the algorithm's version. A checksum of the basis is stored with it
    and compared when a process first reads it. A damaged file is computed again. A disk that cannot be written is not
    used. Both are logged as warnings.

    Interventions that change many matrices ask for all of them in the same order again and again. If they do not fit into
    memory together, dropping the least recently used would drop each just before it is asked for. So the one before the newest
    is dropped, unless another one has not been used for long.

    If the files would take more than ``disk`` bytes, or leave less than 1 GiB of the disk free, the least recently used
    are removed. The first time this is logged as a warning.

    Args:
        folder: folder of the bases, or None for memory only.
        memory: maximum bytes of decompositions in memory.
        disk: maximum bytes of bases in the folder; None takes ``LASER_CACHE_GIB`` or 20 GiB.

    Attributes:
        peak: maximum number of bytes that were in memory.
    """

    def __init__(self, folder: Path | None = None, memory: float = 512 * 2**20, disk: float | None = None) -> None:
        self.folder = folder
        self.memory = memory
        self.disk = disk_limit() if disk is None else disk
        self.peak = 0
        self._in_memory: OrderedDict[Hashable, Decomposition] = OrderedDict()
        self._last_use: dict[Hashable, int] = {}  # numbers of requests
        self._requests = 0
        self._files: dict[str, Path] = {}  # of bases that were read or written before, by the quick hash of the weight
        self._room = 0.0  # bytes that may be written before the folder is looked at again
        self._is_announced = False

    def get(self, weight: Tensor) -> Decomposition:
        """Return the decomposition of a matrix (m, n), on its device.

        Raises:
            WeightError: if the matrix holds NaN or inf.
        """
        key = quick_hash(weight)

        def make() -> Decomposition:
            full = as_float_matrix(weight)
            return Decomposition.from_basis(full, self._basis(key, weight, full))

        return self._held((key, weight.device), make)

    def get_reference(self, weight: Tensor, rank: int, *, niter: int, seed: int) -> Decomposition:
        """Return the randomised decomposition of a matrix (m, n) for one rank. It is held in memory only.

        Args:
            weight: (m, n).
            rank: as for ``reference_decomposition``.
            niter: as for ``reference_decomposition``.
            seed: as for ``reference_decomposition``.

        Raises:
            WeightError: if the matrix holds NaN or inf.
        """
        key = (quick_hash(weight), weight.device, rank, niter, seed)
        return self._held(key, lambda: reference_decomposition(weight, rank, niter=niter, seed=seed))

    def clear(self) -> bool:
        """Drop the decompositions in memory, and return whether there were any; files on disk stay."""
        held = bool(self._in_memory)
        self._in_memory.clear()
        self._last_use.clear()
        return held

    def _held(self, key: Hashable, make: Callable[[], Decomposition]) -> Decomposition:
        """Return the decomposition in memory with this key, or make it and keep it while there is room."""
        decomposition = self._in_memory.get(key)
        if decomposition is None:
            decomposition = self._in_memory[key] = make()
        self._in_memory.move_to_end(key)
        self._requests += 1
        self._last_use[key] = self._requests
        while (total := sum(d.bytes for d in self._in_memory.values())) > self.memory and len(self._in_memory) > 1:
            dropped = self._to_drop()
            del self._in_memory[dropped], self._last_use[dropped]
        self.peak = max(self.peak, total)
        return decomposition

    def _to_drop(self) -> Hashable:
        """Return the least recently used one if it was not used for long, and otherwise the one used just before the newest."""
        oldest, (_, before, *_) = next(iter(self._in_memory)), reversed(self._in_memory)
        is_old = self._requests - self._last_use[oldest] > LONG_UNUSED * len(self._in_memory)
        return oldest if is_old else before

    def _basis(self, key: str, weight: Tensor, full: Tensor) -> Tensor:
        """Return the basis of a weight, which is ``full`` in float32 or float64."""
        if self.folder is None:
            return basis_of(full)
        file = self._files.get(key) or self.folder / f"{content_key(weight)}.safetensors"
        basis = _load(file, full, is_checked=key in self._files)
        if basis is None:
            basis = basis_of(full)
            self._save(file, basis)
        self._files[key] = file
        return basis

    def _save(self, file: Path, basis: Tensor) -> None:
        stored = basis.cpu().contiguous()
        metadata = {"sha256": hashlib.sha256(_bytes(stored)).hexdigest(), "algorithm": ALGORITHM}
        try:
            if self._has_room(file.parent, stored.nbytes + HEADER):
                with atomic_file(file) as part:
                    save_file({"basis": stored}, part, metadata=metadata)
        except (OSError, SafetensorError) as error:
            log.warning("cannot write a decomposition to %s (%s); it will be computed again next time", file.parent, error)

    def _has_room(self, folder: Path, size: int) -> bool:
        """Return whether a file of ``size`` bytes may be written, after older files were removed if need be."""
        if size > self._room:
            self._make_room(folder, size)
        if size > self._room:
            return False
        self._room -= size
        return True

    def _make_room(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder, BASIS)
        files = [(s.st_mtime, s.st_size, file) for file in folder.glob(BASIS) if (s := _status(file)) is not None]
        used = sum(length for _, length, _ in files)
        limit = min(self.disk, used + shutil.disk_usage(folder).free - FREE)
        removed = 0
        if used + size > limit:
            for _, length, file in sorted(files):
                if used + size <= 0.9 * limit:  # so that the next file finds room at once
                    break
                file.unlink(missing_ok=True)
                used, removed = used - length, removed + 1
            if not self._is_announced:
                log.warning(
                    "%s may take %.1f GiB of the disk: %d decompositions that were not used for longest are removed; "
                    "the environment variable %s sets another bound",
                    folder,
                    max(0.0, limit / GIB),
                    removed,
                    DISK_VARIABLE,
                )
                self._is_announced = True
        # Other processes may write there too, so the folder is looked at again before long.
        self._room = min(limit - used, GIB)


def content_key(weight: Tensor) -> str:
    """Return the sha256 of a matrix's shape, dtype and bytes and of the algorithm's version."""
    digest = hashlib.sha256(f"{ALGORITHM} {tuple(weight.shape)} {weight.dtype}\n".encode())
    digest.update(_bytes(weight))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _status(file: Path) -> os.stat_result | None:
    """Return size and times of a file, or None if another process has removed it."""
    try:
        return file.stat()
    except FileNotFoundError:
        return None


def _load(file: Path, weight: Tensor, *, is_checked: bool) -> Tensor | None:
    """Return the basis in a file, or None if the file is missing or damaged. Its time becomes that of its last use."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            basis: Tensor = stored.get_tensor("basis")
        is_intact = is_checked or hashlib.sha256(_bytes(basis)).hexdigest() == metadata.get("sha256")
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        log.warning("the cached decomposition %s cannot be read (%s); it is computed again", file, error)
        return None
    if not is_intact:
        log.warning("the cached decomposition %s does not match its checksum; it is computed again", file)
        return None
    with suppress(OSError):  # the folder may be another user's
        os.utime(file)
    return basis.to(weight)
