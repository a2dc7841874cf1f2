"""Store the matrices of an intervention as two factors: some of their rows, and the coefficients of the others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass
from functools import cache as cached
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import Edit, InterventionLike, default_cache, label_as_edited, replaced_weights, resolve, truncation
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import WeightError
from laserlm.linalg.decomposition import Decomposition, as_float_matrix, decompose
from laserlm.linalg.pivots import Pivoted, parameters
from laserlm.low_rank import LowRankLinear, Part
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix, rows_of
from laserlm.reductions import Intervention

FACTS = r"dtype|device|shape"
"""What a low-rank layer's weight shares with the weight that it replaces, or what tells nothing of its values."""


@dataclass(frozen=True)
class StoredMatrix:
    """The storage of a reduced matrix: two factors or one dense matrix.

    Args:
        matrix: id of the matrix, such as ``27.fc_in``.
        path: path of its parameter.
        shape: (out, in).
        rank: number of singular values kept in each block of rows.
        parameters: number of parameters stored for the matrix.
        reason_kept_dense: why it is one matrix; empty if it is two factors.
    """

    matrix: str
    path: str
    shape: tuple[int, int]
    rank: int
    parameters: int
    reason_kept_dense: str = ""

    @classmethod
    def of(cls, edit: Edit, reason_kept_dense: str = "") -> StoredMatrix:
        """Return the storage of the matrix of an edit."""
        matrix = edit.matrix
        m, n = matrix.shape
        size = m * n if reason_kept_dense else _size(edit)
        return cls(matrix.id, matrix.path, matrix.shape, edit.rank, size, reason_kept_dense)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        values = asdict(self) | {"shape": list(self.shape)}
        values["dense"] = values.pop("reason_kept_dense")
        return values


@contextmanager
def factored(
    lm: LanguageModel, intervention: InterventionLike, *, cache: DecompositionCache | None = None, seed: int = 0
) -> Iterator[tuple[StoredMatrix, ...]]:
    """Apply an intervention inside a ``with`` block, with its matrices stored as two factors.

    A matrix (m, n) of rank r becomes r of its rows and the coefficients of the others: r (m + n - r) parameters, which is
    less than m n below full rank. It stays dense if it is not the weight of a linear layer, if the layer computes something
    else, if the model reads the weight itself, or if several blocks share it.
    At the end of the ``with`` block the original modules and tensors are back in place.

    Args:
        lm: the model.
        intervention: as for ``applied``.
        cache: decomposition cache; None uses the one in ``lm.cache``.
        seed: seed of ``:reference`` decompositions.

    Yields:
        The storage of each reduced matrix.

    Raises:
        LaserError: as ``applied``.
    """
    intervention = Intervention.read(intervention)
    cache = cache or default_cache(lm.cache)
    edits = [e for e in resolve(lm.matrices, intervention) if not e.is_identity]
    reasons = {e.matrix.id: reason_not_factorable(lm, e.matrix) for e in edits}
    stored = tuple(StoredMatrix.of(e, reasons[e.matrix.id]) for e in edits)
    by_module: dict[str, list[Edit]] = {}
    for edit in edits:
        if not reasons[edit.matrix.id]:
            by_module.setdefault(edit.matrix.path.rpartition(".")[0], []).append(edit)
    dense = [e for e in edits if reasons[e.matrix.id]]
    with replaced_weights(lm, dense, lambda edit: truncation(lm, edit, cache, seed)), label_as_edited(lm, intervention):
        layers = {  # the factors of one matrix after the other, in float32 or wider, are in memory
            path: low_rank_layer(
                lm.model.get_submodule(path),
                [(e.matrix, pivoted_factors(lm, e.matrix, _factors(lm, e, cache, seed))) for e in group],
            )
            for path, group in by_module.items()
        }
        with replaced_modules(lm.model, layers):
            yield stored


@contextmanager
def replaced_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at these paths inside a ``with`` block."""
    originals = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            # With it accelerate moves the inputs to the module's device, where a device_map divides a block.
            hook = getattr(originals[path], "_hf_hook", None)
            model.set_submodule(path, module if hook is None else add_hook_to_module(module, copy(hook)))
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


Factors = list[tuple[Tensor, Tensor]]
"""The two factors of each block of rows: up (rows, r) and down (r, n)."""


@torch.no_grad()
def pivoted_factors(lm: LanguageModel, matrix: Matrix, factors: Factors) -> list[Pivoted]:
    """Return each block of rows of a matrix as pivots and coefficients in the dtype of its weight.

    Raises:
        WeightError: if this dtype cannot hold the product of the factors.
    """
    dtype = lm.model.get_parameter(matrix.path).dtype
    blocks = [Pivoted.of(up, down, dtype) for up, down in factors]
    if not all(bool(block.rows.isfinite().all()) for block in blocks):
        raise WeightError(
            f"the factors of {matrix.id} hold values that are too large for {dtype}; load the model in bfloat16 or float32"
        )
    return blocks


@torch.no_grad()
def low_rank_layer(old: nn.Module, reduced: Sequence[tuple[Matrix, Sequence[Pivoted]]]) -> LowRankLinear:
    """Return a low-rank layer with the given matrices as factors and the other rows and the bias of a linear layer.

    Args:
        old: a linear layer or Conv1D.
        reduced: matrices of the layer that do not overlap, and their blocks of rows.
    """
    weight = old.get_parameter("weight")
    bias = None if old.bias is None else old.get_parameter("bias")
    dense = weight.T if isinstance(old, Conv1D) else weight  # (m, n)
    m, n = dense.shape
    parts: list[Part] = []
    stored: list[Tensor] = []  # pivots of each part, then the rows of no reduced matrix
    coefficients: list[Tensor] = []
    places: list[Tensor] = []  # rows of the weight, in the order of the parts
    rest = torch.ones(m, dtype=torch.bool)
    for matrix, blocks in reduced:
        rows = rows_of(matrix, m)
        rest[rows] = False
        for of_block, block in zip(rows.split([len(block.order) for block in blocks]), blocks, strict=True):
            parts.append(Part(len(block.order), len(block.rows), pivoted=True))
            stored.append(block.rows)
            coefficients.append(block.coefficients)
            places.append(of_block[block.order])
    if bool(rest.any()):
        parts.append(Part(int(rest.sum())))
        stored.append(dense[rest.to(dense.device)])
        places.append(rest.nonzero().flatten())
    new = LowRankLinear(n, m, parts, bias=bias is not None, device="meta", dtype=weight.dtype)
    new.weight = nn.Parameter(torch.cat([rows.to(weight) for rows in stored]), weight.requires_grad)
    for i, coefficient in enumerate(coefficients):
        setattr(new, f"up{i}", nn.Parameter(coefficient.to(weight), weight.requires_grad))
    new.order = torch.cat(places).argsort().to(weight.device, torch.int32)
    new.bias = bias
    return new.train(old.training)


def reason_not_factorable(lm: LanguageModel, matrix: Matrix) -> str:
    """Return why a matrix cannot be stored as two factors, or empty text if it can."""
    if matrix.update_rank is not None:
        return "a base weight of full rank, to which the adapter adds its update"
    path = matrix.path.rpartition(".")[0]
    layer = lm.model.get_submodule(path)
    if not isinstance(layer, nn.Linear | Conv1D):
        return "not the weight of a linear layer"
    if not _is_plain(layer):
        return "the weight of a layer that computes something else than a linear layer"
    if _is_read_directly(lm.model, path):
        return "the model reads its weight itself, beside its layer"
    if any(m.tied_to == matrix.path or (m.path == matrix.path and m.tied_to) for m in lm.matrices):
        return "shared by several blocks"
    return ""


@torch.no_grad()
def _is_plain(layer: nn.Module) -> bool:
    """Return whether a layer gives out the weight times its input, plus the bias, and nothing else."""
    if type(layer) in (nn.Linear, Conv1D):
        return True
    bias = None if layer.bias is None else layer.get_parameter("bias")
    weight = layer.get_parameter("weight").T if isinstance(layer, Conv1D) else layer.get_parameter("weight")
    x = torch.linspace(-1, 1, 2 * 3 * weight.shape[1], dtype=torch.float64).sin().view(2, 3, -1).to(weight)
    try:
        actual = layer(x)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError):  # it takes another input
        return False
    expected = F.linear(x, weight, bias)
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    tolerance = 8 * torch.finfo(weight.dtype).eps * weight.shape[1] ** 0.5 * max(1.0, float(expected.abs().max()))
    return bool(torch.allclose(actual.to(expected), expected, rtol=0, atol=tolerance))


def _is_read_directly(model: nn.Module, path: str) -> bool:
    """Return whether the code of a module around a layer reads the values of the layer's weight, as Mamba does of dt_proj.

    Such code would compute with the rows that a low-rank layer stores.
    """
    parts = path.split(".")
    for i in range(len(parts)):
        module, name = model.get_submodule(".".join(parts[:i])), re.escape(".".join(parts[i:]))
        if getattr(module, "slow_but_exact", None) is False:  # Bloom reads parts of its weights where this is on
            continue
        kind: Any = type(module)
        if re.search(rf"self\.{name}\.weight\b(?!\.(?:{FACTS})\b|, torch\.Tensor\))", _code_of(kind)):
            return True
    return False


@cached
def _code_of(module: type[nn.Module]) -> str:
    """Return the code of a class of modules and of those that it inherits from; empty where there is no file of it."""
    code = []
    for own in module.__mro__[: module.__mro__.index(nn.Module)]:
        try:
            code.append(inspect.getsource(own))
        except (OSError, TypeError):  # such as a class that was typed into a session
            continue
    return "\n".join(code)


def _size(edit: Edit) -> int:
    """Return the number of parameters of an edited matrix as factors."""
    (m, n), blocks = edit.matrix.shape, edit.reduction.split
    return blocks * parameters((m // blocks, n), edit.rank)


@torch.no_grad()
def _factors(lm: LanguageModel, edit: Edit, cache: DecompositionCache, seed: int) -> Factors:
    if edit.reduction.method == "reference":
        return [decompose(truncation(lm, edit, cache, seed)).factors(edit.rank)]
    return [edit.kept_factors(d) for d in _decompositions(lm, edit, cache)]


@torch.no_grad()
def difference_factors(lm: LanguageModel, edit: Edit, cache: DecompositionCache, seed: int = 0) -> Factors:
    """Return W' - W as two factors for each block of rows: what the edit takes away, with its sign changed.

    The rank of a ``:reference`` edit's difference is that of the matrix, because its decomposition has other components.
    """
    if edit.reduction.method == "reference":
        weight = as_float_matrix(read_matrix(lm.model, edit.matrix))
        difference = decompose(truncation(lm, edit, cache, seed) - weight)
        return [(difference.left, difference.right)]
    lost = [edit.changed_factors(d) for d in _decompositions(lm, edit, cache)]
    return [(-left, right) for left, right in lost]


def _decompositions(lm: LanguageModel, edit: Edit, cache: DecompositionCache) -> list[Decomposition]:
    """Return the decomposition of each block of rows of the matrix of an edit."""
    return [cache.get(block) for block in read_matrix(lm.model, edit.matrix).chunk(edit.reduction.split)]
