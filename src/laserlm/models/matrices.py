"""Find, read and write the weight matrices of a model.

Everything outside this folder sees matrices as (out, in) tensors by name. This module alone knows that Conv1D stores
the transpose and that some weights are fused (several matrices in the rows of one) or stacked (one for each expert).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from laserlm.errors import MatrixError, WeightError
from laserlm.low_rank import LowRankLinear
from laserlm.models.architectures import ARCHITECTURES, SHARED, Architecture
from laserlm.reductions import GROUPS, Layers

__all__ = ["Matrix", "Rows", "find_matrices", "find_stacks", "read_matrix", "select", "view"]

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values are the weights; eight-bit floats are not, they come with scales of their own."""


@dataclass(frozen=True)
class Rows:
    """Rows of a fused matrix: seen as (groups, stride, in), the rows ``start`` to ``start + length`` of each group."""

    groups: int
    stride: int
    start: int
    length: int


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a model.

    Args:
        stack: name of its stack of blocks, empty where the model has one.
        layer: 0-based block.
        name: its name within the block, such as ``fc_in`` or ``experts.3.fc_in``.
        path: path of the parameter in the model.
        shape: (out, in).
        transposed: whether the parameter stores the transpose.
        expert: index on the first axis of a stacked parameter, or None.
        rows: where it lies in a fused parameter, or None for a whole one.
        part_of: name of the fused matrix it is a part of, or None.
        parts: names of the matrices it holds where it is fused, else empty.
        tied_to: path of an earlier block's parameter that is the same tensor, or None.
    """

    stack: str
    layer: int
    name: str
    path: str
    shape: tuple[int, int]
    transposed: bool = False
    expert: int | None = None
    rows: Rows | None = None
    part_of: str | None = None
    parts: tuple[str, ...] = ()
    tied_to: str | None = None

    @property
    def id(self) -> str:
        """``[STACK.]LAYER.NAME``, as in a reduction."""
        return f"{self.stack}.{self.layer}.{self.name}" if self.stack else f"{self.layer}.{self.name}"

    @property
    def type(self) -> str:
        """The matrix type tau: the name without the prefixes of experts and of cross-attention."""
        return self.name.rpartition(".")[2].removeprefix("cross_")

    @property
    def max_rank(self) -> int:
        """min(out, in)."""
        return min(self.shape)

    def overlaps(self, other: Matrix) -> bool:
        """Whether the two share weights: the same matrix, a fused one and its part, or tied ones."""
        same = (self.tied_to or self.path, self.expert) == (other.tied_to or other.path, other.expert)
        return same and (self.rows is None or other.rows is None or self.rows == other.rows)


def view(parameter: Tensor, matrix: Matrix) -> Tensor:
    """Return the view of a parameter tensor that is ``matrix``: (out, in), or (groups, length, in) for fused rows."""
    if matrix.expert is not None:
        parameter = parameter[matrix.expert]
    if matrix.transposed:
        parameter = parameter.T
    if matrix.rows is not None:
        r = matrix.rows
        parameter = parameter.unflatten(0, (r.groups, r.stride))[:, r.start : r.start + r.length]
    return parameter


def read_matrix(model: nn.Module, matrix: Matrix) -> Tensor:
    """Return a matrix of the model as an (out, in) tensor, which may share memory with it.

    Raises:
        WeightError: if the weight is quantised, held as two factors, or offloaded by accelerate and so not in memory.
    """
    if isinstance(model.get_submodule(matrix.path.rpartition(".")[0]), LowRankLinear):
        raise WeightError(f"{matrix.id} is held as two factors; load the base model, which the folder's laser.json names")
    parameter = model.get_parameter(matrix.path).detach()
    if parameter.device.type == "meta":
        raise WeightError(f"{matrix.id} is offloaded and not in memory; load the model with a device_map that holds it")
    if parameter.dtype not in FLOATS:
        raise WeightError(
            f"{matrix.id} is quantised ({parameter.dtype}); load the model without quantisation, reduce it, then quantise"
        )
    seen = view(parameter, matrix)
    return seen.flatten(0, 1) if matrix.rows is not None else seen


def find_stacks(model: PreTrainedModel) -> list[tuple[str, str, nn.ModuleList]]:
    """Return name, path and blocks of every stack of the model, in order.

    Raises:
        MatrixError: if the model has no repeated blocks.
    """
    row = ARCHITECTURES.get(model.config.model_type)
    if row is not None:
        base = model.base_model
        prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
        known = [(name, prefix + path, _submodule(base, path)) for name, path in row.stacks]
        found = [(name, path, blocks) for name, path, blocks in known if isinstance(blocks, nn.ModuleList) and len(blocks)]
        if found:
            return found
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and all(map(_has_matrix, module)):
            lists.append((path, module))
    if not lists:
        raise MatrixError(
            f"{type(model).__name__} has no list of repeated blocks with weight matrices; laserlm edits transformer blocks"
        )
    return [("" if len(lists) == 1 else path, path, blocks) for path, blocks in lists]


def find_matrices(model: PreTrainedModel) -> tuple[Matrix, ...]:
    """Return every matrix of every block: by the names of its family, or by module path where it has none.

    Raises:
        MatrixError: if the model has no repeated blocks.
        WeightError: if the model is quantised: packed weights have other shapes than the matrices they stand for.
    """
    packed = next((f"{name} is {p.dtype}" for name, p in model.named_parameters() if p.dtype not in FLOATS), None)
    if packed:
        raise WeightError(f"the model is quantised ({packed}); load it without quantisation, reduce it, then quantise")
    matrices: list[Matrix] = []
    stacks = find_stacks(model)
    row = ARCHITECTURES.get(model.config.model_type) or _recognise([b for _, _, blocks in stacks for b in blocks])
    for stack, path, blocks in stacks:
        for layer, block in enumerate(blocks):
            for name, tensor_path, parameter in _named_weights(block, row):
                matrices += _expand(model, row, stack, layer, name, f"{path}.{layer}.{tensor_path}", parameter)
    first: dict[int, str] = {}
    for i, m in enumerate(matrices):
        earlier = first.setdefault(id(model.get_parameter(m.path)), m.path)
        if earlier != m.path:
            matrices[i] = replace(m, tied_to=earlier)
    return tuple(matrices)


def select(matrices: Sequence[Matrix], layers: Layers, matrix: str, stack: str = "") -> tuple[Matrix, ...]:
    """Return the matrices that a selector means; a group takes the parts of fused matrices, never the whole too.

    Args:
        matrices: all of the model.
        layers: the blocks.
        matrix: a name, a type that every expert has, or a group (``attn``, ``mlp``, ``all``).
        stack: a stack's name; may be empty with ``all`` layers, or where there is only one stack.

    Raises:
        MatrixError: if nothing is meant.
    """
    stacks = list(dict.fromkeys(m.stack for m in matrices))
    if stack and stack not in stacks:
        named = ", ".join(filter(None, stacks)) or "only one, without a name"
        raise MatrixError(f"no stack {stack!r}; this model has {named}; see 'laser matrices MODEL'")
    if not stack and len(stacks) > 1 and (layers.first is not None or layers.top is not None):
        raise MatrixError(
            f"{layers}.{matrix}: this model has several stacks; write {' or '.join(f'{s}.{layers}.{matrix}' for s in stacks)}"
        )
    chosen: list[Matrix] = []
    for name in [stack] if stack else stacks:
        here = [m for m in matrices if m.stack == name]
        wanted = layers.within(1 + max(m.layer for m in here))
        chosen += [m for m in here if m.layer in wanted and _is_meant(m, matrix)]
    if not chosen:
        place = f"layer {layers}" if layers.first is not None else f"the layers {layers}"
        here = [m for m in matrices if not stack or m.stack == stack]
        names = ", ".join(dict.fromkeys(m.name if m.expert is None else f"experts.N.{m.type}" for m in here))
        raise MatrixError(f"no matrix {matrix!r} in {place} of this model; it has {names}; see 'laser matrices MODEL'")
    return tuple(chosen)


def _is_meant(m: Matrix, wanted: str) -> bool:
    if wanted == m.name:
        return True
    if wanted == "all":
        return not m.parts
    return m.type in GROUPS[wanted] if wanted in GROUPS else m.type == wanted and m.expert is not None


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _weights(block: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield module path, module, parameter name and parameter of all that could be a matrix of a block.

    That is the weight of any module but an embedding or a convolution, and a stack of matrices, such as that of experts.
    """
    for path, module in block.named_modules():
        if isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            stacked = parameter.ndim == 3 and "bias" not in name
            matrix = parameter.ndim == 2 and name == "weight" and not isinstance(module, LowRankLinear)
            if ((stacked or matrix) and min(parameter.shape[-2:]) > 1) or parameter is _first_factor(module):
                yield path, module, name, parameter


def _first_factor(module: nn.Module) -> nn.Parameter | None:
    """Return the parameter that stands for the matrix of a layer held as two factors."""
    return module.get_parameter("weight") if isinstance(module, LowRankLinear) else None


def _has_matrix(block: nn.Module) -> bool:
    return next(_weights(block), None) is not None


def _recognise(blocks: Sequence[nn.Module]) -> Architecture | None:
    """Return the shared row whose paths cover every matrix of all these blocks, or None.

    How stacked experts are laid out cannot be seen, so blocks that have them are not recognised.
    """
    weights = [weight for block in blocks for weight in _weights(block)]
    paths = {path for path, _, _, parameter in weights if parameter.ndim == 2}
    if any(parameter.ndim == 3 for *_, parameter in weights):
        return None
    return next((row for row in SHARED if paths <= {path for _, path in row.matrices}), None)


def _named_weights(block: nn.Module, row: Architecture | None) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield name, parameter path below the block and parameter."""
    weights = {}
    for path, module, name, parameter in _weights(block):
        whole = f"{path}.{name}" if path else name
        weights[path if name == "weight" and isinstance(module, nn.Linear | Conv1D) else whole] = (whole, parameter)
    if row is None:
        yield from ((path, *weight) for path, weight in weights.items())
        return
    for name, path in row.matrices:
        if path in weights:
            yield (name, *weights[path])


def _expand(
    model: PreTrainedModel,
    row: Architecture | None,
    stack: str,
    layer: int,
    name: str,
    path: str,
    parameter: nn.Parameter,
) -> Iterator[Matrix]:
    """Yield the matrices of one parameter: each expert's, and each fused one whole and by its parts."""
    module = model.get_submodule(path.rpartition(".")[0])
    transposed = isinstance(module, Conv1D)
    a, b = parameter.shape[-2:] if not isinstance(module, LowRankLinear) else (module.out_features, module.in_features)
    shape = (b, a) if transposed else (a, b)
    fused = row.fused.get(name) if row else None
    for expert in range(parameter.shape[0]) if parameter.ndim == 3 else [None]:
        prefix = f"experts.{expert}." if expert is not None else ""
        names = tuple(prefix + part for part in fused.parts) if fused else ()
        yield Matrix(stack, layer, prefix + name, path, shape, transposed, expert, parts=names)
        for part, rows in zip(names, _rows(model, fused.layout, shape[0], len(names)) if fused else (), strict=True):
            size = (rows.groups * rows.length, shape[1])
            yield Matrix(stack, layer, part, path, size, transposed, expert, rows, part_of=prefix + name)


def _rows(model: PreTrainedModel, layout: str, out: int, parts: int) -> list[Rows]:
    if layout == "halves":
        size = out // parts
        return [Rows(1, out, i * size, size) for i in range(parts)]
    config = model.config
    heads = int(config.num_attention_heads)
    if layout == "qkv per head":
        size = out // heads // parts
        return [Rows(heads, parts * size, i * size, size) for i in range(parts)]
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    head_size = out // (heads + 2 * keys)
    starts = (0, heads * head_size, (heads + keys) * head_size, out)
    return [Rows(1, out, start, stop - start) for start, stop in pairwise(starts)]
