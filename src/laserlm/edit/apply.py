"""Apply an intervention to a model, and undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import MatrixError, WeightError
from laserlm.linalg.decomposition import Decomposition, as_float_matrix, rank_of
from laserlm.linalg.precision import full_precision
from laserlm.models.architectures import ARCHITECTURES
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, matrix_in, read_matrix, select, view
from laserlm.models.update import WeightUpdate
from laserlm.out_of_memory import OutOfMemoryError, retry_with_room
from laserlm.reductions import Components, Intervention, Layers, Reduction, Size, Strengths, short_form

T = TypeVar("T")
STRENGTH_STEP = Decimal("1e-6")
"""To what strengths are rounded where they are computed from others."""
InterventionLike = str | Iterable[str] | Intervention
"""An intervention or its text; several texts are joined, and ``@FILE`` is read from a file."""


@dataclass(frozen=True)
class Edit:
    """The reduction of one matrix of a model.

    Args:
        matrix: the matrix.
        rank: number of singular values kept in each block of rows.
        max_rank: number of singular values of each block of rows. Without ``:splitK`` the matrix is one block.
        reduction: the reduction that selects the matrix.
    """

    matrix: Matrix
    rank: int
    max_rank: int
    reduction: Reduction

    @classmethod
    def of(cls, matrix: Matrix, reduction: Reduction) -> Edit:
        """Return the edit of a matrix that a reduction selects.

        Raises:
            MatrixError: if ``:splitK`` does not divide the number of rows, or a component to drop does not exist.
        """
        m = matrix.shape[0]
        if m % reduction.split:
            raise MatrixError(
                f"{reduction}: the {m} rows of {matrix.id} cannot be cut into {reduction.split} equal blocks; "
                f"write a divisor of {m} after ':split'"
            )
        if matrix.update_rank is not None and (reduction.split > 1 or reduction.method == "reference"):
            raise MatrixError(f"{reduction}: ':split' and ':reference' are not for the update of an adapter; leave them out")
        max_rank = min(m // reduction.split, matrix.max_rank)
        named = reduction.size.drop or reduction.size.scale
        if named is not None and named.last >= max_rank:
            raise MatrixError(
                f"{matrix.id} has no component {named.last}; its components are 0 to {max_rank - 1}, by falling singular "
                f"value: leave the others out of {short_form(str(reduction))!r}"
            )
        return cls(matrix, rank_of(reduction.size, max_rank), max_rank, reduction)

    @property
    def is_identity(self) -> bool:
        """Whether the edit keeps every singular value as it is, so that the matrix does not change."""
        return self.rank == self.max_rank and self.reduction.size.scale is None

    @property
    def strengths(self) -> Mapping[int, float]:
        """Factors of the components that change in each block of rows, by number; 0 if the component is dropped."""
        if (named := self.reduction.size.strengths) is not None:
            return named
        bottom = self.reduction.keep == "bottom"
        return dict.fromkeys(range(self.max_rank - self.rank) if bottom else range(self.rank, self.max_rank), 0.0)

    @property
    def kept(self) -> dict[int, float]:
        """Factors of the components that each block of rows keeps, by number."""
        changed = self.strengths
        strengths = {i: changed.get(i, 1.0) for i in range(self.max_rank)}
        return {i: strength for i, strength in strengths.items() if strength}

    def changed_factors(self, decomposition: Decomposition) -> tuple[Tensor, Tensor]:
        """Return two factors, (m, r) and (r, n), of what a block of rows loses: their product is W - W'."""
        changed = self.strengths
        left = decomposition.left[:, list(changed)]
        return left * (1 - left.new_tensor(list(changed.values()))), decomposition.right[list(changed)]

    def kept_factors(self, decomposition: Decomposition) -> tuple[Tensor, Tensor]:
        """Return two factors, (m, r) and (r, n), of what a block of rows becomes: their product is W'."""
        kept = self.kept
        left = decomposition.left[:, list(kept)]
        return left * left.new_tensor(list(kept.values())), decomposition.right[list(kept)]

    def repeats(self, other: Edit) -> bool:
        """Whether the other edit does the same to the same weights, as ``all.mlp@0.1`` does in tied blocks."""
        same_weights = self.matrix.overlaps(other.matrix) and self.matrix.rows == other.matrix.rows
        return same_weights and self.reduction == other.reduction and self.matrix.path != other.matrix.path


def resolve(matrices: Sequence[Matrix], intervention: InterventionLike) -> tuple[Edit, ...]:
    """Return the edits of an intervention on these matrices; tied weights are edited once.

    Raises:
        MatrixError: if the intervention names an unknown matrix, a rank above that of every selected matrix, or the same
            weights twice (directly, as a fused matrix and its part, or as tied weights).
    """
    return _find_edits(tuple(matrices), Intervention.read(intervention))


@lru_cache(maxsize=8)
def _find_edits(matrices: tuple[Matrix, ...], intervention: Intervention) -> tuple[Edit, ...]:
    edits: list[Edit] = []
    for reduction in intervention.reductions:
        selected = select(matrices, reduction.layers, reduction.matrix, reduction.stack)
        new = [Edit.of(m, reduction) for m in selected]
        largest = max(edit.max_rank for edit in new)
        if reduction.size.rank is not None and reduction.size.rank > largest:
            raise MatrixError(f"{reduction} asks for rank {reduction.size.rank}; the selected matrices have {largest} at most")
        edits += new
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
    """Apply an intervention inside a ``with`` block, and put the original tensors back at its end.

    Matrices are decomposed in float32 (float64 for float64 weights) and written in the model's dtype. Biases do not
    change. Blocks can be nested: the inner intervention reduces the weights that the outer one wrote. A parameter that
    several modules share changes for all of them.

    Args:
        lm: the model.
        intervention: text such as ``27.fc_in@0.01``; empty changes nothing.
        cache: decomposition cache; None uses the one in ``lm.cache``.
        seed: seed of ``:reference`` decompositions.

    Raises:
        SpecError: if the text cannot be parsed.
        MatrixError: if it names a matrix that the model does not have.
        WeightError: if a matrix holds NaN or inf, is quantised or is not in memory.
        OutOfMemoryError: if a reduction does not fit into memory; it is a ``torch.OutOfMemoryError`` too.
    """
    intervention = Intervention.read(intervention)
    edits = resolve(lm.matrices, intervention) if intervention else ()  # a quantised model has no matrices, but scores
    if edits and lm.active and lm.update is not None:
        raise MatrixError(f"the update of an adapter is reduced once; leave the block of {lm.intervention} first")
    decompositions = cache or default_cache(lm.cache)
    with (
        replaced_weights(lm, edits, lambda edit: truncation(lm, edit, decompositions, seed)),
        label_as_edited(lm, intervention),
    ):
        yield lm


@contextmanager
def replaced_weights(lm: LanguageModel, edits: Sequence[Edit], make: Callable[[Edit], Tensor]) -> Iterator[None]:
    """Replace the matrix of each edit by the value that ``make`` returns for it, (out, in), inside a ``with`` block.

    A parameter gets new data. Of stacked experts only the edited ones are copied; they are written in place.
    """
    groups: dict[str, dict[int | None, list[Edit]]] = {}  # by path and expert
    for edit in edits:
        if not edit.is_identity:
            expert = None if _is_in_shared_memory(lm, edit.matrix) else edit.matrix.expert
            groups.setdefault(edit.matrix.path, {}).setdefault(expert, []).append(edit)
    with ExitStack() as stack:
        for path, by_expert in groups.items():
            for expert, group in by_expert.items():
                _replace(stack, lm, path, expert, partial(_new_value, group, make))
        yield


def _replace(stack: ExitStack, lm: LanguageModel, path: str, expert: int | None, new_value: Callable[[Tensor], Tensor]) -> None:
    """Replace a parameter, or overwrite one of its stacked experts; ``stack`` puts the original back."""
    parameter = lm.model.get_parameter(path)
    if expert is None:
        new = _with_room(lm, path, lambda: new_value(parameter.data))
        stack.callback(setattr, parameter, "data", parameter.data)
        parameter.data = new
    else:
        target = parameter.data[expert]
        new, original = _with_room(lm, path, lambda: (new_value(target), target.clone()))
        stack.callback(target.copy_, original)
        target.copy_(new)


def _new_value(edits: Sequence[Edit], make: Callable[[Edit], Tensor], old: Tensor) -> Tensor:
    """Return a copy of a parameter, or of one of its experts (out, in), with its edits."""
    new = old.clone()
    for edit in edits:
        _write(new, edit.matrix if old.ndim > 2 else replace(edit.matrix, expert=None), make(edit))
    return new


def _is_in_shared_memory(lm: LanguageModel, matrix: Matrix) -> bool:
    """Return whether another process may see what is written to a parameter in place."""
    data = lm.model.get_parameter(matrix.path).data
    return data.device.type == "cpu" and data.is_shared()


def _with_room(lm: LanguageModel, path: str, compute: Callable[[], T]) -> T:
    """Return what is computed for a parameter. If memory runs out, free the decompositions that are held, and try once more."""
    has_freed = False

    def make_room(error: torch.OutOfMemoryError) -> None:
        nonlocal has_freed
        if has_freed:
            weight = lm.model.get_parameter(path)
            raise OutOfMemoryError(
                f"the reduction of {path} {tuple(weight.shape)} does not fit into the memory of {weight.device}: {error}. Use "
                "--device cpu, or make room with a smaller --dtype or --device-map auto."
            )
        default_cache(lm.cache).clear()
        has_freed = True

    return retry_with_room(compute, make_room)


@contextmanager
def replaced_parameters(lm: LanguageModel, paths: Iterable[str], make: Callable[[str], Tensor]) -> Iterator[None]:
    """Replace the data of each parameter by the tensor that ``make`` returns for its path, inside a ``with`` block."""
    with ExitStack() as stack:
        for path in paths:
            parameter, new = lm.model.get_parameter(path), make(path)
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = new
        yield


@contextmanager
def label_as_edited(lm: LanguageModel, intervention: Intervention | str) -> Iterator[None]:
    """List the intervention in ``lm.active`` inside a ``with`` block, unless it is empty."""
    if not intervention:
        yield
        return
    lm.active.append(str(intervention))
    try:
        yield
    finally:
        lm.active.pop()


@torch.no_grad()
def truncation(lm: LanguageModel, edit: Edit, cache: DecompositionCache, seed: int = 0) -> Tensor:
    """Return the reduced matrix of an edit, (out, in), in float32 or float64."""
    if edit.matrix.update_rank is not None:
        return _with_reduced_update(lm, edit)
    weight = read_matrix(lm.model, edit.matrix)
    try:
        if edit.reduction.method == "reference":
            row = ARCHITECTURES.get(lm.family)
            niter = row.reference_niter if row else 2
            return cache.get_reference(weight, edit.rank, niter=niter, seed=seed).truncate(edit.rank)
        blocks = weight.chunk(edit.reduction.split)
        truncated = [_reduced(block, edit, cache) for block in blocks]
        return truncated[0] if len(truncated) == 1 else torch.cat(truncated)
    except WeightError as error:
        raise WeightError(f"cannot reduce {edit.matrix.id} ({edit.matrix.path}): {error}") from None


@full_precision()
def _reduced(block: Tensor, edit: Edit, cache: DecompositionCache) -> Tensor:
    """Return a block of rows with the changed components of the edit, in float32 or float64."""
    decomposition = cache.get(block)
    if edit.reduction.size.strengths is None:
        return decomposition.truncate(edit.rank, edit.reduction.keep)
    # Subtracting the few components that change rounds less than adding up the many others.
    left, right = edit.changed_factors(decomposition)
    return block.detach().to(left.dtype) - left @ right


@full_precision()
def _with_reduced_update(lm: LanguageModel, edit: Edit) -> Tensor:
    """Return the base weight (out, in) plus what the edit keeps of the update of an adapter."""
    left, right = edit.kept_factors(decomposition_of(lm, edit.matrix, default_cache(lm.cache)))
    base = as_float_matrix(matrix_in(_weight_update(lm, edit.matrix).base, edit.matrix))
    return base + left.to(base) @ right.to(base)


def decomposition_of(lm: LanguageModel, matrix: Matrix, cache: DecompositionCache) -> Decomposition:
    """Return the decomposition of a matrix, or of the update of an adapter that is reduced in its place.

    Raises:
        WeightError: as ``read_matrix``, or if the matrix holds NaN or inf.
    """
    if matrix.update_rank is None:
        return cache.get(read_matrix(lm.model, matrix))
    return _weight_update(lm, matrix).decomposition(matrix)


def _weight_update(lm: LanguageModel, matrix: Matrix) -> WeightUpdate:
    """Return the update of the weight that holds a matrix."""
    if lm.update is None:
        raise AssertionError(f"{matrix.id} has an update, and its model has none")
    return lm.update.weights[matrix.path]


def removed_part(matrices: Sequence[Matrix], intervention: InterventionLike) -> Intervention:
    """Return the intervention that keeps exactly what this one takes away.

    A reduction to the largest r singular values becomes a reduction to the smallest k - r. A matrix that keeps all its
    singular values becomes zero. A strength s becomes 1 - s, and that of every other component 0.
    """
    return Intervention(tuple(_complement(edit) for edit in resolve(matrices, intervention)))


def _complement(edit: Edit) -> Reduction:
    """Return the reduction that keeps what the edit drops, and drops what it keeps."""
    size, keep = Size(rank=edit.max_rank - edit.rank), edit.reduction.keep
    if edit.reduction.size.scale is not None:
        strengths = dict.fromkeys(range(edit.max_rank), 0.0) | {i: 1 - s for i, s in edit.strengths.items()}
        size = Size(scale=Strengths.of(strengths, STRENGTH_STEP))
    elif edit.reduction.size.drop is None:
        keep = "bottom" if edit.reduction.keep == "top" else "top"
    elif edit.rank:
        size = Size(drop=Components.of(edit.kept))
    return Reduction(
        layers=Layers(first=edit.matrix.layer, last=edit.matrix.layer),
        matrix=edit.matrix.name,
        size=size,
        keep=keep,
        stack=edit.matrix.stack,
        split=edit.reduction.split,
    )


@lru_cache(maxsize=8)
def default_cache(folder: Path) -> DecompositionCache:
    """Return the decomposition cache in a model's cache folder."""
    return DecompositionCache(folder / "decompositions")


def _write(parameter: Tensor, matrix: Matrix, value: Tensor) -> None:
    target = view(parameter, matrix)
    target.copy_(value.unflatten(0, target.shape[:2]) if matrix.rows is not None else value)
