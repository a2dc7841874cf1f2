"""Decompose all matrices of a model for a text, and choose their ranks for a budget of parameters."""

from __future__ import annotations

import logging
import math
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import label_as_edited, replaced_parameters
from laserlm.edit.factors import StoredMatrix, low_rank_layer, pivoted_factors, reason_not_factorable, replaced_modules
from laserlm.errors import ExportError
from laserlm.export.checkpoint import Form
from laserlm.export.gradient_moments import gradient_moments
from laserlm.export.moments import moments_by_block
from laserlm.export.refinement import read_factors, refine
from laserlm.export.tensor_folder import DecompositionFolder, TensorFolder, storage_error
from laserlm.linalg.allocation import Spectrum, allocate, uniform
from laserlm.linalg.decomposition import Decomposition, component_losses, decompose, whitened
from laserlm.linalg.pivots import Pivoted, parameters
from laserlm.low_rank import LowRankLinear
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, default_matrices, read_matrix
from laserlm.out_of_memory import return_freed_memory
from laserlm.scoring.identity import digest
from laserlm.scoring.records import TokenSequence
from laserlm.searching.memory_plan import GIB, memory_option
from laserlm.searching.screen import sensitivities

log = logging.getLogger(__name__)

Method = Literal["plain", "scaled", "whitened", "two-sided"]
Allocation = Literal["uniform", "sensitivity", "curvature"]
DENSE_ABOVE = 0.9
"""Default share of the dense parameters above which a matrix stays dense: its factors would be slower."""
RANK_MULTIPLE = 32
"""Default of what ranks are multiples of. Libraries have faster kernels for such shapes, and need fewer of them."""
OnStep = Callable[[str, int, int], object]
"""Is called with the stage, and how many of its steps are done, of how many: tokens, gradients or decompositions."""


@dataclass(frozen=True)
class Compression:
    """The decompositions of a model's matrices and the loss of each component, which give ranks for any budget.

    Args:
        method: ``plain``, ``scaled``, ``whitened`` or ``two-sided``.
        allocation: ``uniform``, ``sensitivity`` or ``curvature``.
        matrices: the compressed matrices; fused matrices are compressed as a whole.
        left_out: the other matrices and the reason for each.
        decompositions: decomposition of each matrix, by the matrix's id, on the disk.
        losses: (k,) loss of dropping each component, by the matrix's id, on the disk; empty for uniform ranks.
        pivots: each matrix at each rank that was asked for, as pivots and coefficients, on the disk.
        refined: files of trained factors, by ratio.
        dense_above: share of the dense parameters above which a matrix stays dense instead of being factored. Uniform ranks
            have no such share.
        rank_multiple: ranks are multiples of this number, or of a smaller power of two in a matrix with fewer rows or columns
            than six times the number. Uniform ranks are not.
    """

    method: Method
    allocation: Allocation
    matrices: tuple[Matrix, ...]
    left_out: dict[Matrix, str]
    decompositions: Mapping[str, Decomposition] = field(repr=False)
    losses: Mapping[str, Tensor] = field(repr=False)
    pivots: TensorFolder = field(repr=False)
    refined: Mapping[float, Path] = field(default_factory=dict, repr=False)
    dense_above: float = DENSE_ABOVE
    rank_multiple: int = RANK_MULTIPLE

    @property
    def parameters(self) -> int:
        """Number of parameters of the compressed matrices before compression."""
        return sum(m.shape[0] * m.shape[1] for m in self.matrices)

    def ranks(self, ratio: float) -> dict[str, int | None]:
        """Return the rank of each matrix, by its id, that keeps this share of the parameters; None keeps a matrix dense.

        Matrices that are left out count with all their parameters.

        Raises:
            ExportError: if the ratio is not above 0 and at most 1, or the matrices that are left out exceed it.
        """
        check_fit(self.method, self.allocation, [ratio])
        budget = budget_of(self.matrices, self.left_out, ratio)
        if self.allocation == "uniform":
            ranks = uniform([m.shape for m in self.matrices], budget / self.parameters)
        else:
            spectra = [
                Spectrum(m.shape, self.losses[m.id].cpu(), self.dense_above, rank_step(m.shape, self.rank_multiple))
                for m in self.matrices
            ]
            ranks = allocate(spectra, int(budget))
        return {m.id: rank for m, rank in zip(self.matrices, ranks, strict=True)}

    def layers(self, lm: LanguageModel, ratio: float) -> dict[str, LowRankLinear]:
        """Return the low-rank layers by path, with the trained factors if there are some for this ratio."""
        layers: dict[str, LowRankLinear] = {}
        ranks = self.ranks(ratio)
        for m in self.matrices:
            if (rank := ranks[m.id]) is not None:
                layer = lm.model.get_submodule(_module_path(m))
                layers[_module_path(m)] = low_rank_layer(layer, [(m, [self._pivoted(lm, m, rank)])])
        if ratio in self.refined:
            read_factors(layers, self.refined[ratio])
        return layers

    def _pivoted(self, lm: LanguageModel, matrix: Matrix, rank: int) -> Pivoted:
        """Return a matrix at a rank from the disk, or make it: the same one is trained, measured and written."""
        dtype = str(lm.model.get_parameter(matrix.path).dtype).removeprefix("torch.")
        order, rows, coefficients = (f"{matrix.id}@{rank} {dtype} {part}" for part in ("order", "rows", "coefficients"))
        if coefficients not in self.pivots:
            (made,) = pivoted_factors(lm, matrix, [self.decompositions[matrix.id].factors(rank)])
            self.pivots.add(order, made.order)
            self.pivots.add(rows, made.rows)
            self.pivots.add(coefficients, made.coefficients)  # the last: all are complete
        return Pivoted(self.pivots[order], self.pivots[rows], self.pivots[coefficients])

    def refine(
        self,
        lm: LanguageModel,
        ratio: float,
        rows: Sequence[TokenSequence],
        folder: Path,
        *,
        steps: int,
        products: str,
        on_step: Callable[[int, int], object] = lambda done, total: None,
    ) -> Compression:
        """Return the compression with factors that were trained at this ratio; see ``laserlm.export.refinement.refine``.

        Args:
            lm: the unchanged model.
            ratio: kept share of the parameters.
            rows: passages to train on.
            folder: where the trained factors are kept. What an earlier call with the same arguments left there is used.
            steps: number of steps, one passage each.
            products: dtype of the products, ``bfloat16`` or the model's own.
            on_step: called with the number of steps that are done, and with that of all.

        Raises:
            ExportError: as ``ranks`` and ``refine``.
            WeightError: as ``refine``.
        """
        identity = [ratio, self.dense_above, self.rank_multiple, steps, products, [row.ids for row in rows]]
        file = folder / f"refined-{digest(identity)[:16]}.safetensors"
        refine(lm, rows, self.layers(lm, ratio), file, steps=steps, products=products, on_step=on_step)
        return replace(self, refined={**self.refined, ratio: file})

    @contextmanager
    def applied(self, lm: LanguageModel, ratio: float, form: Form = "factored") -> Iterator[tuple[StoredMatrix, ...]]:
        """Compress the model inside a ``with`` block, with factors or with their products (``dense``)."""
        ranks = self.ranks(ratio)
        layers = self.layers(lm, ratio)
        stored = [_stored_matrix(m, ranks[m.id], form) for m in self.matrices]
        stored += [
            StoredMatrix(m.id, m.path, m.shape, m.max_rank, m.shape[0] * m.shape[1], why) for m, why in self.left_out.items()
        ]
        with (
            replaced_modules(lm.model, layers) if form == "factored" else _replaced_by_products(lm, layers),
            label_as_edited(lm, f"{self.method}/{self.allocation}@{ratio:g}"),
        ):
            yield tuple(stored)


def fit_ranks(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    *,
    method: Method = "two-sided",
    allocation: Allocation = "curvature",
    dense_above: float | None = None,
    rank_multiple: int | None = None,
    memory: float = math.inf,
    products: str | None = None,
    folder: Path | None = None,
    on_step: OnStep = lambda *_: None,
) -> Compression:
    """Decompose all matrices of a model's linear layers, and estimate the loss of dropping each component.

    ``plain`` decomposes the weights. ``scaled`` scales each input by its root mean square on the text (as ASVD, arXiv
    2312.05821, which takes a power of the mean). ``whitened`` minimises the change of the layers' outputs (SVD-LLM).
    ``two-sided`` minimises the expected change of the loss: it weighs the outputs by the loss's gradients on the text.
    ``uniform`` keeps the same share of every matrix. The other two choose the ranks by an estimate of the loss: ``curvature``
    by the second moments of each layer's inputs and gradients, ``sensitivity`` by the gradient along each component.

    Args:
        lm: the unchanged model.
        rows: passages; may be empty for the plain method with uniform ranks.
        method: ``plain``, ``scaled``, ``whitened`` or ``two-sided``.
        allocation: ``uniform``, ``sensitivity`` or ``curvature``.
        dense_above: share of its parameters above which a matrix stays dense; None is 0.9, and 1 for uniform ranks.
        rank_multiple: what ranks are multiples of; None is 32, and 1 for uniform ranks. See ``Compression``.
        memory: bytes of what goes into the blocks. That of a passage into all blocks and of all passages into two is kept in
            any case. A model whose blocks do not run one after another keeps the whole graph of a passage in any case.
        products: dtype of the products of the passes for gradients, ``bfloat16`` or the model's own; None takes its own.
        folder: where moments and decompositions are kept. What an earlier call with the same arguments left there is used.
            None keeps them in the cache as long as the result exists.
        on_step: is called after each matrix.

    Raises:
        ExportError: if the method or allocation is unknown, no matrix can be compressed, or the disk is full.
        WeightError: if a weight cannot be decomposed.
    """
    check_fit(method, allocation, dense_above=dense_above, rank_multiple=rank_multiple)
    dense_above, rank_multiple = with_defaults(allocation, dense_above, rank_multiple)
    matrices, left_out = compressible(lm)
    kept = folder or _temporary_folder(lm)
    decompositions = DecompositionFolder(kept / "decompositions")
    if folder is None:
        weakref.finalize(decompositions, shutil.rmtree, kept, ignore_errors=True)
    with_gradients = needs_gradients(method, allocation)
    steps = _Steps(on_step, len(matrices) * (2 if with_gradients else 1))
    if rows:
        _warn_of_little_memory(lm, rows, memory, method, allocation)
    gradients = _gradients(lm, rows, matrices, kept, steps, memory, products) if with_gradients else None
    return_freed_memory()
    missing = [m for m in matrices if m.id not in decompositions]
    steps.done = steps.total - len(missing)
    curvatures = TensorFolder(kept / "losses")
    for m, decomposition, of_components in _decomposed(lm, rows, missing, method, gradients):
        if allocation == "curvature" and of_components is not None:
            curvatures.add(m.id, of_components)
        decompositions.add(m.id, decomposition)
        del decomposition, of_components  # before the next one is computed
        steps.advance("decompositions")
    reason = f"no {'token' if gradients is None else 'gradient of the loss'} of the text reaches it"
    left_out |= {m: reason for m in matrices if m.id not in decompositions}
    matrices = tuple(m for m in matrices if m not in left_out)
    losses: Mapping[str, Tensor] = curvatures
    if allocation == "sensitivity":
        losses = sensitivities(lm, rows, matrices, lambda m: decompositions[m.id], memory=memory)
    pivots = TensorFolder(kept / "pivots")
    fitted = Compression(method, allocation, matrices, left_out, decompositions, losses, pivots)
    return replace(fitted, dense_above=dense_above, rank_multiple=rank_multiple)


def with_defaults(allocation: Allocation, dense_above: float | None, rank_multiple: int | None) -> tuple[float, int]:
    """Return the share above which matrices stay dense and what ranks are multiples of; see ``fit_ranks``."""
    share, multiple = (1.0, 1) if allocation == "uniform" else (DENSE_ABOVE, RANK_MULTIPLE)
    return share if dense_above is None else dense_above, multiple if rank_multiple is None else rank_multiple


def rank_step(shape: tuple[int, int], rank_multiple: int) -> int:
    """Return what the ranks of a matrix (m, n) are multiples of; see ``Compression``."""
    most = max(1, min(shape) // 6)
    return rank_multiple if rank_multiple <= most else 2 ** (most.bit_length() - 1)


def check_fit(
    method: str,
    allocation: str,
    ratios: Sequence[float] = (),
    dense_above: float | None = None,
    rank_multiple: int | None = None,
) -> None:
    """Raise an ExportError if a method or allocation is unknown, a number is out of range, or uniform ranks cannot have it."""
    for name, value, known in (("method", method, Method), ("allocation", allocation, Allocation)):
        if value not in get_args(known):
            raise ExportError(f"no {name} {value!r}; there are {', '.join(get_args(known))}")
    for ratio in ratios:
        if not 0 < ratio <= 1:
            raise ExportError(f"a ratio of {ratio} is out of range; the kept share of the parameters is above 0 and at most 1")
    if dense_above is not None and not 0 < dense_above <= 1:
        raise ExportError(
            f"a share of {dense_above} above which matrices stay dense is out of range; give more than 0, up to 1"
        )
    if rank_multiple is not None and rank_multiple < 1:
        raise ExportError(f"ranks cannot be multiples of {rank_multiple}; give 1 or more")
    if allocation == "uniform" and dense_above is not None and dense_above < 1:
        raise ExportError(
            f"uniform ranks keep no matrix dense, so that --dense-above {dense_above:g} has no effect; leave it out, or give "
            "another --allocation"
        )
    if allocation == "uniform" and rank_multiple is not None and rank_multiple > 1:
        raise ExportError(
            f"uniform ranks are those of the share alone, so that --rank-multiple {rank_multiple} has no effect; leave it out, "
            "or give another --allocation"
        )


def budget_of(matrices: Iterable[Matrix], left_out: Mapping[Matrix, str], ratio: float) -> float:
    """Return how many parameters of some matrices may stay, where all parameters of the others do.

    Args:
        matrices: the matrices to compress.
        left_out: the other matrices and the reason for each.
        ratio: kept share of the parameters of both.

    Raises:
        ExportError: if the other matrices take more than this share.
    """
    size, fixed = (sum(m.shape[0] * m.shape[1] for m in of) for of in (matrices, left_out))
    budget = ratio * (size + fixed) - fixed
    if budget <= 0:
        raise ExportError(
            f"a ratio of {ratio} cannot be reached: matrices that stay dense take {fixed / (size + fixed):.0%} of the "
            f"parameters ({next(iter(left_out.values()))}); give a larger ratio"
        )
    return budget


@dataclass
class _Steps:
    """Counts the gradients and decompositions of matrices."""

    on_step: OnStep
    total: int
    done: int = 0

    def advance(self, stage: str) -> None:
        self.advance_to(stage, self.done + 1)

    def advance_to(self, stage: str, done: int) -> None:
        self.done = max(self.done, min(done, self.total))  # gradients are taken more than once where memory runs out
        self.on_step(stage, self.done, self.total)


def _temporary_folder(lm: LanguageModel) -> Path:
    folder = lm.cache / "compressions" / secrets.token_hex(8)  # 'laser clear-cache' finds it if this process is killed
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise storage_error(lm.cache, error) from error
    return folder


def needs_gradients(method: Method, allocation: Allocation) -> bool:
    """Return whether a compression takes the second moments of gradients."""
    return method == "two-sided" or allocation == "curvature"


def needs_input_moments(method: Method, allocation: Allocation) -> bool:
    """Return whether a compression takes the second moments of the inputs of layers."""
    return method != "plain" or allocation == "curvature"


def _least_memory(lm: LanguageModel, rows: Sequence[TokenSequence], method: Method, allocation: Allocation) -> int:
    """Return the least bound of memory that a compression keeps, in bytes, of a model whose blocks run one after another.

    Gradients keep what goes into all blocks for a passage, moments of inputs what goes into two blocks for all passages.
    """
    of_token = lm.width * lm.dtype.itemsize
    n_blocks = len({(m.stack, m.layer) for m in lm.all_matrices})
    longest, every = max(len(row.ids) for row in rows), sum(len(row.ids) for row in rows)
    of_gradients = (n_blocks + 1) * longest if method == "two-sided" or allocation != "uniform" else 0
    return of_token * max(of_gradients, 2 * every if needs_input_moments(method, allocation) else 0)


def _warn_of_little_memory(
    lm: LanguageModel, rows: Sequence[TokenSequence], memory: float, method: Method, allocation: Allocation
) -> None:
    least = _least_memory(lm, rows, method, allocation)
    if memory < least:
        log.warning(
            "--memory %.6g is less than the %s GiB of what goes into two blocks, or of a passage into all blocks; so the "
            "compression takes more than that; the least bound that it keeps is --memory %s",
            *(memory / GIB, memory_option(least), memory_option(least)),
        )


def _gradients(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    matrices: Sequence[Matrix],
    folder: Path,
    steps: _Steps,
    memory: float,
    products: str | None,
) -> TensorFolder:
    """Return the moments of gradients, which are in the folder once all of them are computed."""
    complete = folder / "gradients"

    def advance(done: int, total: int) -> None:
        steps.advance_to("gradients", len(matrices) * done // total)  # each is taken for every chunk of the rows

    if not complete.is_dir():
        for unfinished in folder.glob("gradients-*"):  # of a process that was killed
            shutil.rmtree(unfinished, ignore_errors=True)
        with tempfile.TemporaryDirectory(prefix="gradients-", dir=folder) as part:
            moments = gradient_moments(lm, rows, matrices, Path(part), memory=memory, products=products, on_matrix=advance)
            moments.folder.rename(complete)
    return TensorFolder(complete)


def _decomposed(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    matrices: Sequence[Matrix],
    method: Method,
    gradients: Mapping[str, Tensor] | None,
) -> Iterator[tuple[Matrix, Decomposition, Tensor | None]]:
    """Yield the decomposition and the components' losses of every matrix that the text reaches; losses need gradients."""
    if method == "plain" and gradients is None:
        for m in matrices:
            yield m, decompose(read_matrix(lm.model, m)), None
        return
    for of_block, moments in moments_by_block(lm, rows, matrices):
        for m in of_block:
            # The caller names a matrix that has no moments.
            if _module_path(m) in moments and (gradients is None or m.id in gradients):
                G = None if gradients is None else gradients[m.id]
                yield m, *_decomposed_for(read_matrix(lm.model, m), moments[_module_path(m)], G, method)
        moments.clear()  # before the next block has its own


def _decomposed_for(W: Tensor, M: Tensor, G: Tensor | None, method: Method) -> tuple[Decomposition, Tensor | None]:
    """Return the decomposition of a weight for the moments of its inputs and gradients, and the losses of its components."""
    if method == "plain":
        decomposition = decompose(W)
    else:
        kept = M.diagonal().diag() if method == "scaled" else M
        decomposition = whitened(W, kept, G if method == "two-sided" else None)
    return decomposition, None if G is None else component_losses(decomposition, M, G).cpu()


def _module_path(m: Matrix) -> str:
    return m.path.rpartition(".")[0]


def compressible(lm: LanguageModel) -> tuple[tuple[Matrix, ...], dict[Matrix, str]]:
    """Return the matrices that can be stored as factors, and the reason for each of the others.

    Raises:
        ExportError: if there is none.
    """
    in_grid = default_matrices(lm.matrices)  # text gives no moments of the inputs of a vision tower
    left_out = {m: why for m in in_grid if m.part_of is None and (why := reason_not_factorable(lm, m))}
    matrices = tuple(m for m in in_grid if m.part_of is None and m not in left_out)
    if not matrices:
        why = next(iter(left_out.values()), "it has no matrices")
        raise ExportError(f"{lm.name} has no matrix that can be stored as two factors: {why}")
    return matrices, left_out


def _stored_matrix(m: Matrix, rank: int | None, form: Form) -> StoredMatrix:
    size = m.shape[0] * m.shape[1]
    if rank is None:
        return StoredMatrix(m.id, m.path, m.shape, m.max_rank, size, "kept dense by the allocation of ranks")
    if form == "dense":
        return StoredMatrix(m.id, m.path, m.shape, rank, size, "saved in the dense form")
    return StoredMatrix(m.id, m.path, m.shape, rank, parameters(m.shape, rank))


def _replaced_by_products(lm: LanguageModel, layers: dict[str, LowRankLinear]) -> AbstractContextManager[None]:
    """Return a context in which weights are replaced by the products of their factors, which are taken from ``layers``."""

    def product(path: str) -> Tensor:
        module = path.rpartition(".")[0]
        dense = layers.pop(module).dense().to(lm.model.get_parameter(path))
        return dense.T.contiguous() if isinstance(lm.model.get_submodule(module), Conv1D) else dense

    return replaced_parameters(lm, [f"{module}.weight" for module in layers], product)
