"""Apply an intervention to a model, and take it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import MatrixError, WeightError
from laserlm.linalg.decomposition import reference_truncation
from laserlm.linalg.ranks import rank_of
from laserlm.models.architectures import ARCHITECTURES
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix, select, view
from laserlm.reductions import Intervention, Layers, Reduction, Size

InterventionLike = str | Iterable[str] | Intervention
"""An intervention, or the text of one; several texts are joined."""

__all__ = [
    "Edit",
    "InterventionLike",
    "applied",
    "default_cache",
    "label_as_edited",
    "removed_part",
    "replaced_weights",
    "resolve",
    "truncation",
]


@dataclass(frozen=True)
class Edit:
    """One matrix of a model and what becomes of it.

    Args:
        matrix: the matrix.
        rank: number of singular values kept, of each block of rows.
        max_rank: number of singular values of each block of rows; the matrix is one block unless it is to be split.
        reduction: the reduction that asks for it.
    """

    matrix: Matrix
    rank: int
    max_rank: int
    reduction: Reduction

    @classmethod
    def of(cls, matrix: Matrix, reduction: Reduction) -> Edit:
        """Return what a reduction makes of a matrix that it means.

        Raises:
            MatrixError: if the matrix cannot be split into so many equal blocks of rows.
        """
        m, n = matrix.shape
        if m % reduction.split:
            raise MatrixError(
                f"{reduction}: the {m} rows of {matrix.id} cannot be cut into {reduction.split} equal blocks; "
                "give a divisor after ':split'"
            )
        max_rank = min(m // reduction.split, n)
        return cls(matrix, rank_of(reduction.size, max_rank), max_rank, reduction)

    @property
    def is_identity(self) -> bool:
        """Whether every singular value is kept, so that the matrix is left as it is."""
        return self.rank == self.max_rank

    def repeats(self, other: Edit) -> bool:
        """Whether this is the same edit of tied weights once more, as where ``all.mlp@0.1`` meets shared blocks."""
        same = self.matrix.overlaps(other.matrix) and self.matrix.rows == other.matrix.rows
        return same and self.reduction == other.reduction and self.matrix.path != other.matrix.path


def resolve(matrices: Sequence[Matrix], intervention: InterventionLike) -> tuple[Edit, ...]:
    """Return what an intervention means for these matrices; tied weights are edited once.

    Raises:
        MatrixError: if it names a matrix that is not there, a rank no chosen matrix has, or one matrix twice (also by
            way of a fused matrix and its part, or of tied weights).
    """
    edits: list[Edit] = []
    for reduction in Intervention.parse(intervention).reductions:
        chosen = select(matrices, reduction.layers, reduction.matrix, reduction.stack)
        meant = [Edit.of(m, reduction) for m in chosen]
        largest = max(edit.max_rank for edit in meant)
        if reduction.size.rank is not None and reduction.size.rank > largest:
            raise MatrixError(f"{reduction} asks for rank {reduction.size.rank}; the matrices it means have {largest} at most")
        edits += meant
    by_parameter: dict[str, list[Edit]] = {}
    for edit in edits:
        earlier = by_parameter.setdefault(edit.matrix.tied_to or edit.matrix.path, [])
        for other in earlier:
            if edit.matrix.overlaps(other.matrix) and not edit.repeats(other):
                raise MatrixError(
                    f"{other.matrix.id} of {other.reduction} and {edit.matrix.id} of {edit.reduction} are the same weights; "
                    "reduce a matrix once"
                )
        if not any(edit.repeats(other) for other in earlier):
            earlier.append(edit)
    return tuple(edit for group in by_parameter.values() for edit in group)


@contextmanager
def applied(
    lm: LanguageModel, intervention: InterventionLike, *, cache: DecompositionCache | None = None, seed: int = 0
) -> Iterator[LanguageModel]:
    """Apply an intervention inside a ``with`` block; at its end the very same tensors are back in place.

    Matrices are decomposed in float32 (float64 for float64 weights) and written in the model's dtype; biases are
    untouched. Blocks nest: an inner one acts on the weights as the outer one left them. A parameter that several
    modules share changes for all of them.

    Args:
        lm: the model.
        intervention: text such as ``27.fc_in@0.01``; empty changes nothing.
        cache: decompositions to use; None takes the one kept under ``lm.cache``.
        seed: of ``:reference`` decompositions.

    Raises:
        SpecError: if the text cannot be read.
        MatrixError: if it names a matrix that the model does not have.
        WeightError: if a matrix holds NaN or inf, is quantised or is not in memory.
    """
    intervention = Intervention.parse(intervention)
    edits = resolve(lm.matrices, intervention) if intervention else ()  # a quantised model has no matrices, but can be scored
    kept = cache or default_cache(lm.cache)
    with replaced_weights(lm, edits, lambda edit: truncation(lm, edit, kept, seed)), label_as_edited(lm, intervention):
        yield lm


@contextmanager
def replaced_weights(lm: LanguageModel, edits: Sequence[Edit], make: Callable[[Edit], Tensor]) -> Iterator[None]:
    """Put what ``make`` returns for each edit, (out, in), in the place of its matrix until the end of the block."""
    originals: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for path, group in _by_parameter(edits):
            parameter = lm.model.get_parameter(path)
            new = parameter.data.clone()
            for edit in group:
                _write(new, edit.matrix, make(edit))
            originals.append((parameter, parameter.data))
            parameter.data = new
        yield
    finally:
        for parameter, original in reversed(originals):
            parameter.data = original


@contextmanager
def label_as_edited(lm: LanguageModel, what: Intervention | str) -> Iterator[None]:
    """Let the model say that it is changed, and how, until the end of the block."""
    if not what:
        yield
        return
    lm.active.append(str(what))
    try:
        yield
    finally:
        lm.active.pop()


@torch.no_grad()
def truncation(lm: LanguageModel, edit: Edit, cache: DecompositionCache, seed: int = 0) -> Tensor:
    """Return what an edit makes of its matrix: (out, in), in float32 or float64."""
    weight = read_matrix(lm.model, edit.matrix)
    try:
        if edit.reduction.method == "reference":
            row = ARCHITECTURES.get(lm.family)
            return reference_truncation(weight, edit.rank, niter=row.reference_niter if row else 2, seed=seed)
        blocks = weight.chunk(edit.reduction.split)
        kept = [cache.get(block).truncate(edit.rank, edit.reduction.keep) for block in blocks]
        return kept[0] if len(kept) == 1 else torch.cat(kept)
    except WeightError as error:
        raise WeightError(f"cannot reduce {edit.matrix.id} ({edit.matrix.path}): {error}") from None


def removed_part(matrices: Sequence[Matrix], intervention: InterventionLike) -> Intervention:
    """Return the intervention that keeps exactly what this one drops: the other end of every spectrum.

    A reduction to the largest r singular values becomes one to the smallest k - r; a matrix kept whole becomes zero.
    """
    return Intervention(
        tuple(
            Reduction(
                layers=Layers(first=edit.matrix.layer, last=edit.matrix.layer),
                matrix=edit.matrix.name,
                size=Size(rank=edit.max_rank - edit.rank),
                keep="bottom" if edit.reduction.keep == "top" else "top",
                stack=edit.matrix.stack,
                split=edit.reduction.split,
            )
            for edit in resolve(matrices, intervention)
        )
    )


@lru_cache(maxsize=8)
def default_cache(folder: Path) -> DecompositionCache:
    """Return the decompositions kept under a model's cache folder."""
    return DecompositionCache(folder / "decompositions")


def _by_parameter(edits: Sequence[Edit]) -> list[tuple[str, list[Edit]]]:
    """Group the edits that change something by the parameter they change."""
    groups: dict[str, list[Edit]] = {}
    for edit in edits:
        if not edit.is_identity:
            groups.setdefault(edit.matrix.path, []).append(edit)
    return list(groups.items())


def _write(parameter: Tensor, matrix: Matrix, value: Tensor) -> None:
    place = view(parameter, matrix)
    place.copy_(value.unflatten(0, place.shape[:2]) if matrix.rows is not None else value)
