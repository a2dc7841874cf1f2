"""Hold the matrices of an intervention as two factors, where that takes fewer parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import Edit, InterventionLike, default_cache, label_as_edited, replaced_weights, resolve, truncation
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.linalg.decomposition import decompose
from laserlm.low_rank import LowRankLinear, Part
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix
from laserlm.reductions import Intervention

__all__ = ["StoredMatrix", "factored", "low_rank_layer", "reason_not_factorable", "replaced"]


@dataclass(frozen=True)
class StoredMatrix:
    """How a reduced matrix is held.

    Args:
        matrix: its id, such as ``27.fc_in``.
        path: path of its parameter.
        shape: (out, in).
        rank: singular values kept, of each block of rows.
        parameters: numbers that hold it.
        dense: why it is one matrix, or empty where it is two factors.
    """

    matrix: str
    path: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    dense: str = ""

    @classmethod
    def of(cls, edit: Edit, dense: str = "") -> StoredMatrix:
        """Return how a matrix is held that an edit reduces."""
        matrix = edit.matrix
        m, n = matrix.shape
        parameters = m * n if dense else edit.rank * (m + edit.reduction.split * n)
        return cls(matrix.id, matrix.path, matrix.shape, edit.rank, parameters, dense)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self) | {"shape": list(self.shape)}


@contextmanager
def factored(
    lm: LanguageModel, intervention: InterventionLike, *, cache: DecompositionCache | None = None, seed: int = 0
) -> Iterator[tuple[StoredMatrix, ...]]:
    """Apply an intervention inside a ``with`` block, its matrices held as two factors where that takes fewer parameters.

    A matrix (m, n) at rank r is two factors where r (m + n) < m n. It stays one where it is not the weight of a linear
    layer, or is shared by several blocks. At the end of the block the very same modules and tensors are back in place.

    Args:
        lm: the model.
        intervention: as for ``applied``.
        cache: decompositions to use; None takes the one kept under ``lm.cache``.
        seed: of ``:reference`` decompositions.

    Yields:
        How each reduced matrix is held.

    Raises:
        LaserError: as ``applied``.
    """
    intervention = Intervention.parse(intervention)
    cache = cache or default_cache(lm.cache)
    edits = [e for e in resolve(lm.matrices, intervention) if not e.is_identity]
    reasons = {e.matrix.id: _why_dense(lm, e) for e in edits}
    factors = {e.matrix.id: _factors(lm, e, cache, seed) for e in edits if not reasons[e.matrix.id]}
    holdings = tuple(StoredMatrix.of(e, reasons[e.matrix.id]) for e in edits)
    by_module: dict[str, list[Edit]] = {}
    for edit in edits:
        if edit.matrix.id in factors:
            by_module.setdefault(edit.matrix.path.rpartition(".")[0], []).append(edit)
    dense = [e for e in edits if reasons[e.matrix.id]]
    with replaced_weights(lm, dense, lambda edit: truncation(lm, edit, cache, seed)), label_as_edited(lm, intervention):
        layers = {
            path: low_rank_layer(lm.model.get_submodule(path), [(e.matrix, factors[e.matrix.id]) for e in group])
            for path, group in by_module.items()
        }
        with replaced(lm.model, layers):
            yield holdings


@contextmanager
def replaced(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put modules in the place of those at these paths until the end of the block."""
    before = {path: model.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


Factors = list[tuple[Tensor, Tensor]]
"""Second and first factor, (rows, r) and (r, n), of each block of rows."""


@torch.no_grad()
def low_rank_layer(old: nn.Module, reduced: Sequence[tuple[Matrix, Factors]]) -> LowRankLinear:
    """Return a layer that computes what a linear layer does, with some of its matrices as two factors.

    Args:
        old: a linear layer or Conv1D; what is not reduced is taken from it.
        reduced: matrices of it that do not overlap, and their factors.
    """
    weight = old.get_parameter("weight")
    bias = None if old.bias is None else old.get_parameter("bias")
    dense = weight.T if isinstance(old, Conv1D) else weight  # (m, n)
    m, n = dense.shape
    groups = max(1 if matrix.rows is None else matrix.rows.groups for matrix, _ in reduced)
    stride = m // groups
    parts: list[Part] = []
    widths: list[Tensor] = []
    ups: list[Tensor | None] = []
    done = 0  # rows of each group so far

    def keep_dense(to: int) -> None:
        if to > done:
            rows = dense.unflatten(0, (groups, stride))[:, done:to].flatten(0, 1)
            parts.append(Part(len(rows)))
            widths.append(rows)
            ups.append(None)

    for matrix, factors in sorted(reduced, key=lambda r: 0 if r[0].rows is None else r[0].rows.start):
        start, length = (0, stride) if matrix.rows is None else (matrix.rows.start, matrix.rows.length)
        keep_dense(start)
        for up, down in factors:
            parts.append(Part(*up.shape))
            widths.append(down)
            ups.append(up)
        done = start + length
    keep_dense(stride)
    new = LowRankLinear(n, m, parts, groups=groups, bias=bias is not None, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(torch.cat([w.to(weight) for w in widths]), weight.requires_grad)
    for i, second in enumerate(ups):
        if second is not None:
            setattr(new, f"up{i}", nn.Parameter(second.to(weight).contiguous(), weight.requires_grad))
    new.bias = bias
    return new.train(old.training)


def reason_not_factorable(lm: LanguageModel, matrix: Matrix) -> str:
    """Return why a matrix cannot be held as two factors, or nothing where it can."""
    if not isinstance(lm.model.get_submodule(matrix.path.rpartition(".")[0]), nn.Linear | Conv1D):
        return "not the weight of a linear layer"
    if any(m.tied_to == matrix.path or (m.path == matrix.path and m.tied_to) for m in lm.matrices):
        return "shared by several blocks"
    return ""


def _why_dense(lm: LanguageModel, edit: Edit) -> str:
    """Return why an edited matrix is not held as two factors, or nothing where it is."""
    matrix = edit.matrix
    m, n = matrix.shape
    k = edit.reduction.split
    if reason := reason_not_factorable(lm, matrix):
        return reason
    if k > 1 and matrix.rows is not None and matrix.rows.groups > 1:
        return "its blocks of rows lie across heads"
    if edit.rank * (m + k * n) >= m * n:
        return f"rank {edit.rank} would take {edit.rank * (m + k * n)} parameters as factors, {m * n} as a matrix"
    return ""


@torch.no_grad()
def _factors(lm: LanguageModel, edit: Edit, cache: DecompositionCache, seed: int) -> Factors:
    if edit.reduction.method == "reference":
        d = decompose(truncation(lm, edit, cache, seed))  # of that rank already
        return [d.factors(edit.rank)]
    blocks = read_matrix(lm.model, edit.matrix).chunk(edit.reduction.split)
    return [cache.get(block).factors(edit.rank, edit.reduction.keep) for block in blocks]
