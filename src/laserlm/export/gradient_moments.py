"""Second moments of the gradients of the loss by what comes out of the linear layers of a model."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from laserlm.errors import WeightError
from laserlm.export.products import own_products, products_in
from laserlm.export.tensor_folder import TensorFolder
from laserlm.linalg.precision import full_precision
from laserlm.models.finite import overflow
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix
from laserlm.scoring.records import TokenSequence
from laserlm.searching.gradients import Coefficients, ComponentGradients
from laserlm.searching.gradients.components import Reduce
from laserlm.searching.gradients.sums import ComponentSums
from laserlm.searching.screen import gradient_scales

OnMatrix = Callable[[int, int], object]


@full_precision()
def gradient_moments(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    matrices: Sequence[Matrix],
    folder: Path,
    *,
    batch_size: int = 4,
    memory: float = math.inf,
    products: str | None = None,
    on_matrix: OnMatrix = lambda done, total: None,
) -> TensorFolder:
    """Return the mean over tokens of g g^T, (m, m), by the matrix's id, in a folder.

    g is the gradient of a row's summed loss by the outputs of the matrix's layer for one token. A matrix that is not used by a
    linear layer alone, or that no gradient reaches, has none.

    Args:
        lm: the unchanged model.
        rows: texts, one example each.
        matrices: weights of linear layers, no parts of fused ones.
        folder: is empty; the result is one of its folders.
        batch_size: rows in one pass. It is halved where memory runs out.
        memory: bytes of what goes into the blocks. Rows are taken in chunks that keep it; one row is always taken.
        products: dtype of the products of the passes, ``bfloat16`` or the model's own; None takes the model's own.
        on_matrix: called after each matrix of a chunk with how much is done, and of how much: rows times matrices.

    Raises:
        WeightError: if a gradient is not finite.
        ExportError: if the disk is full.
        ScoringError: if a single row does not fit into memory.
    """
    tokens = sum(len(row.targets) for row in rows)
    products = products or own_products(lm)
    gradients = _OutputGradients(
        lm, rows, matrices, batch_size=batch_size, memory=memory, products=products, on_matrix=on_matrix
    )
    for scale in gradient_scales(lm):
        gradients.rows_done = 0
        whole = of_chunk = TensorFolder(folder / f"{scale:g}-0")

        def keep(matrix: Matrix, total: Tensor) -> Tensor:
            trace = total.diagonal().sum()
            # A pass that ran out of memory on more rows may have left moments of this matrix.
            if bool(trace):
                of_chunk.add(matrix.id, total.div_(tokens))  # noqa: B023
            else:
                of_chunk.discard(matrix.id)  # noqa: B023
            return trace[None]

        traces: list[Tensor] = []
        for number, (_, reduced) in enumerate(gradients.chunks(range(len(rows)), keep, scale=scale), start=1):
            traces += reduced.values()
            if of_chunk is not whole:
                _add(whole, of_chunk)
            of_chunk = TensorFolder(folder / f"{scale:g}-{number}")
        if all(bool(trace.isfinite()) for trace in traces):
            return whole
    raise WeightError(f"the gradients of the calibration text are not finite: {overflow(lm.model, lm.dtype)}")


def _add(whole: TensorFolder, part: TensorFolder) -> None:
    """Add the tensors of a folder to those of the same names in another one, and remove the folder."""
    for name, tensor in part.items():
        whole.add(name, whole[name] + tensor if name in whole else tensor)
    shutil.rmtree(part.folder)


class _OutputGradients(ComponentGradients):
    """Sums g g^T where the base class sums the contributions of components.

    Attributes:
        rows_done: rows of the chunks before.
    """

    def __init__(
        self,
        lm: LanguageModel,
        rows: Sequence[TokenSequence],
        matrices: Sequence[Matrix],
        *,
        batch_size: int,
        memory: float,
        products: str,
        on_matrix: OnMatrix,
    ) -> None:
        coefficients: list[Coefficients] = [(-1.0, []) for _ in rows]
        options: dict[str, Any] = {"batch_size": batch_size, "memory": memory, "squared": True}
        super().__init__(lm, rows, coefficients, matrices, lambda _: _never_decomposed(), **options)
        self.rows_done = 0
        self._products = products
        self._on_matrix = on_matrix

    def _run(self, chunk: Sequence[int], reduce: Reduce, scale: float) -> dict[str, Tensor]:
        n_reduced = 0

        def counted(matrix: Matrix, sums: Tensor) -> Tensor:
            nonlocal n_reduced
            reduced = reduce(matrix, sums)
            n_reduced += 1
            n = len(self._matrices)
            self._on_matrix(self.rows_done * n + len(chunk) * n_reduced, len(self.rows) * n)
            return reduced

        with products_in(self.lm, self._products):
            of_chunk = super()._run(chunk, counted, scale)
        self.rows_done += len(chunk)
        return of_chunk

    def _new_sums(self, matrix: Matrix, n_rows: int) -> ComponentSums:
        m = matrix.shape[0]
        sums = _OutputSums.of(self.lm, matrix, n_rows, (2,), _never_decomposed)
        return replace(sums, values=sums.values.new_zeros(m, m))

    _lazy_sums = _new_sums


class _OutputSums(ComponentSums):
    """The sum over tokens of g g^T, (m, m)."""

    def add(self, rows: Tensor, x: Tensor, d: Tensor) -> None:
        """Add the gradients of outputs (B, T, m)."""
        flat = d.flatten(0, -2).to(self.values)  # (tokens, m)
        self.values.addmm_(flat.T, flat)

    def add_gradient(self, row: int, gradient: Tensor) -> None:
        """Add nothing: a parameter's gradient does not tell the gradients of outputs."""


def _never_decomposed() -> NoReturn:
    raise AssertionError("moments of gradients need no decomposition")
