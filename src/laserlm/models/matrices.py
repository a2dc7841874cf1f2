"""Find, read and write the weight matrices of a model.

Code outside this folder uses matrices as (out, in) tensors by name. Only this module knows that Conv1D stores the
transpose, that some weights are fused (several matrices in the rows of one) and that some are stacked (one per expert).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from laserlm.errors import MatrixError, WeightError
from laserlm.low_rank import LowRankLinear
from laserlm.models.architectures import ARCHITECTURES, SHARED, Architecture
from laserlm.models.groups import Role, role_of, unclear
from laserlm.reductions import GROUPS, Layers

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes whose values are the weights. Eight-bit floats are excluded because they need separate scales."""
MAX_NAMED = 4
"""Number of matrices that an error names."""


@dataclass(frozen=True)
class Rows:
    """Rows of a fused matrix: rows ``start`` to ``start + length`` of each group in a view (groups, stride, in)."""

    groups: int
    stride: int
    start: int
    length: int


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a model.

    Args:
        stack: name of its stack of blocks; empty if the model has one stack.
        layer: 0-based block.
        name: its name within the block, such as ``fc_in`` or ``experts.3.fc_in``.
        path: path of the parameter in the model.
        shape: (out, in).
        transposed: whether the parameter stores the transpose.
        expert: index on the first axis of a stacked parameter, or None.
        rows: its rows in a fused parameter, or in one that holds all experts one below the other; None for the whole one.
        part_of: name of the fused matrix that contains it, or None.
        parts: names of its parts if it is fused, else empty.
        tied_to: path of the same tensor in an earlier block, or None.
        role: what it is part of, such as ``attn``, if it is named by its module path; None if its family names it.
        in_tower: whether it belongs to a part of a language model that reads images or sound.
        update_rank: rank of the update of an adapter that is reduced in place of the matrix; None if there is none.
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
    role: Role | None = None
    in_tower: bool = False
    update_rank: int | None = None

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
        """Number of components: min(out, in), or the rank of the update of an adapter."""
        return min(self.shape) if self.update_rank is None else min(*self.shape, self.update_rank)

    def overlaps(self, other: Matrix) -> bool:
        """Whether the two share weights: the same matrix, a fused matrix and its part, or tied matrices."""
        same = (self.tied_to or self.path, self.expert) == (other.tied_to or other.path, other.expert)
        return same and (self.rows is None or other.rows is None or self.rows == other.rows)


def view(parameter: Tensor, matrix: Matrix) -> Tensor:
    """Return the view of ``matrix`` in a parameter tensor: (out, in), or (groups, length, in) for fused rows."""
    if matrix.expert is not None:
        parameter = parameter[matrix.expert]
    if matrix.transposed:
        parameter = parameter.T
    if matrix.rows is not None:
        r = matrix.rows
        parameter = parameter.unflatten(0, (r.groups, r.stride))[:, r.start : r.start + r.length]
    return parameter


def read_matrix(model: nn.Module, matrix: Matrix) -> Tensor:
    """Return a matrix of the model as an (out, in) tensor that may share memory with the model.

    Raises:
        WeightError: if the weight is quantised, held as two factors, or offloaded by accelerate, or if the update of an adapter
            is reduced in its place.
    """
    if matrix.update_rank is not None:
        raise WeightError(
            f"of {matrix.id} only the update of an adapter can be changed here, by a search, an evaluation or a save; for "
            "anything else, load the adapter's folder as the model, which merges it"
        )
    if isinstance(model.get_submodule(matrix.path.rpartition(".")[0]), LowRankLinear):
        raise WeightError(f"{matrix.id} is held as two factors; load the base model, which the folder's laser.json names")
    parameter = model.get_parameter(matrix.path).detach()
    if parameter.device.type == "meta":
        raise WeightError(f"{matrix.id} is offloaded and not in memory; load the model with a device_map that holds it")
    if parameter.dtype not in FLOATS:
        raise WeightError(
            f"{matrix.id} is quantised ({parameter.dtype}); load the model without quantisation, reduce it, then quantise"
        )
    return matrix_in(parameter, matrix)


def matrix_in(parameter: Tensor, matrix: Matrix) -> Tensor:
    """Return a matrix (out, in) of a parameter tensor; it may share memory with the parameter."""
    value = view(parameter, matrix)
    return value.flatten(0, 1) if matrix.rows is not None else value


def rows_of(matrix: Matrix, m: int) -> Tensor:
    """Return the numbers of a matrix's rows among the m rows of its weight."""
    rows = torch.arange(m)
    if (r := matrix.rows) is None:
        return rows
    by_group: Tensor = rows.unflatten(0, (r.groups, r.stride))
    return by_group[:, r.start : r.start + r.length].flatten()


def language_config(config: Any) -> Any:
    """Return the config of the language model in a config of several inputs; otherwise the config itself."""
    inner = config if config.is_encoder_decoder else config.get_text_config(decoder=True)
    return inner if isinstance(inner, PreTrainedConfig) else config


def find_stacks(model: PreTrainedModel, *, towers: bool = False) -> list[tuple[str, str, nn.ModuleList]]:
    """Return the name, path and blocks of every stack of the model, in order.

    Args:
        model: the model.
        towers: whether to add the stacks beside a language model, such as the blocks of a vision tower. They are named by
            their paths.

    Raises:
        MatrixError: if the model has no repeated blocks.
    """
    part, text = _language_part(model)
    prefix = f"{part}." if part else ""
    lists = _lists_of_blocks(model)
    stacks = [(name, prefix + path, blocks) for name, path, blocks in _known_stacks(text)]
    if not stacks:
        inside = [(path, blocks) for path, blocks in lists if path.startswith(prefix)]
        stacks = [("" if len(inside) == 1 else path, path, blocks) for path, blocks in inside]
    if not stacks:
        raise MatrixError(
            f"{type(model).__name__} has no list of repeated blocks with weight matrices; laserlm edits transformer blocks"
        )
    return stacks + [(path, path, blocks) for path, blocks in lists if towers and not path.startswith(prefix)]


def _language_part(model: PreTrainedModel) -> tuple[str, PreTrainedModel]:
    """Return the path and module of the language model in a model of several inputs; otherwise "" and the model."""
    config = language_config(model.config)
    if config is model.config:
        return "", model
    parts = ((path, part) for path, part in model.named_modules() if path and isinstance(part, PreTrainedModel))
    return next(((path, part) for path, part in parts if part.config.model_type == config.model_type), ("", model))


def _lists_of_blocks(model: PreTrainedModel) -> list[tuple[str, nn.ModuleList]]:
    """Return the path and blocks of every outermost list of modules that all have matrices."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for path, module in model.named_modules():
        is_nested = any(path.startswith(f"{outer}.") for outer, _ in lists)
        if isinstance(module, nn.ModuleList) and not is_nested and len(module) and all(map(_has_matrix, module)):
            lists.append((path, module))
    return lists


def _known_stacks(model: PreTrainedModel) -> list[tuple[str, str, nn.ModuleList]]:
    """Return the stacks at the paths of the model's family; empty for an unknown family or other paths."""
    row = ARCHITECTURES.get(model.config.model_type)
    if row is None:
        return []
    base = model.base_model
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    stacks = [(name, prefix + path, _submodule(base, path)) for name, path in row.stacks]
    return [(name, path, blocks) for name, path, blocks in stacks if isinstance(blocks, nn.ModuleList) and len(blocks)]


def find_matrices(model: PreTrainedModel) -> tuple[Matrix, ...]:
    """Return every matrix of every block, named as its family names it, or by module path for an unknown family.

    Raises:
        MatrixError: if the model has no repeated blocks.
        WeightError: if the model is quantised, because packed weights have other shapes than their matrices.
    """
    packed = next((f"{name} is {tensor.dtype}" for name, tensor in _tensors(model) if _is_packed(name, tensor)), None)
    if packed:
        raise WeightError(
            f"the model is quantised ({packed}); load it without quantisation, or load the unquantised checkpoint that it was "
            "made from, or a dequantised copy; reduce it, then quantise"
        )
    matrices: list[Matrix] = []
    stacks = find_stacks(model, towers=True)
    has_experts = any("expert" in name for _, _, blocks in stacks for name, _ in blocks.named_modules())
    part, text = _language_part(model)
    inside = [blocks for _, path, blocks in stacks if path.startswith(part)]
    row = ARCHITECTURES.get(text.config.model_type) or _recognise([b for blocks in inside for b in blocks])
    towers = _towers(model)
    for stack, path, blocks in stacks:
        of_stack = row if path.startswith(part) else None
        in_tower = path.startswith(towers)
        for layer, block in enumerate(blocks):
            for name, tensor_path, parameter in _named_weights(block, of_stack):
                role = role_of(name, has_experts=has_experts) if of_stack is None else None
                of_parameter = _expand(model, of_stack, stack, layer, name, f"{path}.{layer}.{tensor_path}", parameter)
                matrices += [replace(m, role=role, in_tower=in_tower) for m in of_parameter]
    first: dict[int, str] = {}
    for i, m in enumerate(matrices):
        earlier = first.setdefault(id(model.get_parameter(m.path)), m.path)
        if earlier != m.path:
            matrices[i] = replace(m, tied_to=earlier)
    return tuple(matrices)


def _towers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the paths, with a dot, of the parts of a language model that read no tokens, such as a vision tower."""
    if model.main_input_name != "input_ids" or model.get_output_embeddings() is None:
        return ()
    parts = ((path, part) for path, part in model.named_modules() if path and isinstance(part, PreTrainedModel))
    return tuple(f"{path}." for path, part in parts if not _reads_text(part))


def _reads_text(part: Any) -> bool:
    return part.main_input_name == "input_ids" and "text" in getattr(part, "input_modalities", "text")


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_packed(name: str, tensor: Tensor) -> bool:
    """Return whether a tensor holds quantised weights: in a dtype of their own, in a class of their own, or in a buffer."""
    if isinstance(tensor, nn.Parameter):
        return tensor.dtype not in FLOATS or is_traceable_wrapper_subclass(tensor)
    if tensor.is_complex():  # the table of a rotary position, as in Llama 4's vision tower
        return False
    in_few_bits = tensor.dtype not in (*FLOATS, torch.bool, torch.int64)
    return in_few_bits and ("weight" in name or tensor.ndim > 1)


def default_matrices(matrices: Sequence[Matrix]) -> tuple[Matrix, ...]:
    """Return the matrices that a selector without a stack means: all but those of towers beside a language model."""
    unnamed = tuple(m for m in matrices if not m.stack)
    return unnamed or tuple(m for m in matrices if not m.in_tower) or tuple(matrices)


def select(matrices: Sequence[Matrix], layers: Layers, matrix: str, stack: str = "") -> tuple[Matrix, ...]:
    """Return the matrices that a selector names. A group contains the parts of fused matrices, not the fused matrices.

    Args:
        matrices: all matrices of the model.
        layers: the blocks.
        matrix: a name, a module path below a block, a type that every expert has, or a group (``attn``, ``mlp``, ``all``).
        stack: name or path of a stack; may be empty with ``all`` layers, or if the model has one stack or a language model
            beside towers.

    Raises:
        MatrixError: if the selector names no matrix, or a group that might leave out matrices of these blocks.
    """
    _check_stack(matrices, layers, matrix, stack)
    in_stacks = [m for m in matrices if _is_in(m, stack)] if stack else list(default_matrices(matrices))
    _check_group(in_stacks, matrix)
    heights = {m.stack: m.layer + 1 for m in sorted(in_stacks, key=lambda m: m.layer)}
    indices = {name: layers.indices(n_blocks) for name, n_blocks in heights.items()}
    selected = tuple(m for m in in_stacks if m.layer in indices[m.stack] and _matches(m, matrix))
    if not selected:
        where = f"layer {layers}" if layers.first is not None else f"the layers {layers}"
        names = ", ".join(dict.fromkeys(f"experts.N.{m.type}" if m.name.startswith("experts.") else m.name for m in in_stacks))
        raise MatrixError(f"no matrix {matrix!r} in {where} of this model; it has {names}; see 'laser matrices MODEL'")
    return selected


def _check_stack(matrices: Sequence[Matrix], layers: Layers, matrix: str, stack: str) -> None:
    stacks = list(dict.fromkeys(m.stack for m in matrices))
    if stack and not any(_is_in(m, stack) for m in matrices):
        known = ", ".join(filter(None, stacks)) or "only one, without a name"
        raise MatrixError(f"no stack {stack!r}; this model has {known}; see 'laser matrices MODEL'")
    if not stack and "" not in stacks and (layers.first is not None or layers.top is not None):
        choices = " or ".join(f"{s}.{layers}.{matrix}" for s in stacks)
        raise MatrixError(f"{layers}.{matrix}: this model has several stacks; write {choices}")


def _check_group(matrices: Sequence[Matrix], group: str) -> None:
    """Raise a MatrixError for a group that would leave out matrices which may belong to it."""
    left_out = unclear(group, ((m.name, m.role) for m in matrices if m.role)) if group in GROUPS else []
    if left_out:
        more = f" and {len(left_out) - MAX_NAMED} more" if len(left_out) > MAX_NAMED else ""
        raise MatrixError(
            f"the group {group!r} is not defined for this model, because it may or may not mean "
            f"{', '.join(left_out[:MAX_NAMED])}{more}; name the matrices, or write 'all' for every matrix; see 'laser matrices "
            "MODEL'"
        )


def _is_in(m: Matrix, stack: str) -> bool:
    """Return whether the matrix is in the stack with a name or path."""
    return m.stack == stack or m.path.startswith(f"{stack}.{m.layer}.")


def _matches(m: Matrix, name: str) -> bool:
    """Return whether a name, module path, type or group means the matrix."""
    if name == m.name or (m.rows is None and m.expert is None and m.path.endswith(f".{m.layer}.{name}.weight")):
        return True
    if name == "all":
        return not m.parts
    if name in GROUPS:
        return m.type in GROUPS[name] if m.role is None else m.role == name
    return m.type == name and m.name.startswith("experts.")


def _submodule(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child
    return module


def _weights(block: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Yield module path, module, parameter name and parameter of every possible matrix of a block.

    These are the 2-D weights of all modules except embeddings and convolutions, and 3-D stacks of matrices (experts).
    """
    for path, module in block.named_modules():
        if isinstance(module, nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            is_stack = (parameter.ndim == 3 and "bias" not in name) or bool(_experts_in_rows(module, name, parameter))
            is_matrix = parameter.ndim == 2 and name == "weight" and not isinstance(module, LowRankLinear)
            if ((is_stack or is_matrix) and min(parameter.shape[-2:]) > 1) or parameter is _first_factor(module):
                yield path, module, name, parameter


def _experts_in_rows(module: nn.Module, name: str, parameter: nn.Parameter) -> int:
    """Return how many experts of equal size the rows of a parameter hold, as those of DBRX do; 0 for any other parameter."""
    experts = int(getattr(module, "moe_num_experts", 0))
    is_stack = parameter.ndim == 2 and "weight" not in name and "bias" not in name and experts > 1
    return experts if is_stack and len(parameter) % experts == 0 and len(parameter) > experts else 0


def _first_factor(module: nn.Module) -> nn.Parameter | None:
    """Return the parameter that represents the matrix of a low-rank layer, or None for another layer."""
    return module.get_parameter("weight") if isinstance(module, LowRankLinear) else None


def _has_matrix(block: nn.Module) -> bool:
    # A list of single layers, such as the projections of AltUp, is no stack of blocks.
    return not isinstance(block, nn.Linear | Conv1D) and next(_weights(block), None) is not None


def _recognise(blocks: Sequence[nn.Module]) -> Architecture | None:
    """Return the shared row whose paths cover every matrix of these blocks, or None.

    Blocks with stacked experts are not recognised, because the layout of the experts cannot be inferred.
    """
    weights = [weight for block in blocks for weight in _weights(block)]
    paths = {path for path, _, _, parameter in weights if parameter.ndim == 2}
    if any(parameter.ndim == 3 or _experts_in_rows(module, name, parameter) for _, module, name, parameter in weights):
        return None
    return next((row for row in SHARED if paths <= {path for _, path in row.matrices}), None)


def _named_weights(block: nn.Module, row: Architecture | None) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield the name of each matrix, its parameter's path below the block, and the parameter."""
    weights = {}
    for path, module, name, parameter in _weights(block):
        tensor_path = f"{path}.{name}" if path else name
        key = path if name == "weight" and isinstance(module, nn.Linear | Conv1D) else tensor_path
        weights[key] = (tensor_path, parameter)
    if row is None:
        yield from ((path, *weight) for path, weight in weights.items())
        return
    for name, path in row.matrices:
        key = path if path in weights else f"{path}.weight"  # the latter of linear layers with a class of their own
        if key in weights:
            yield (name, *weights[key])


def _expand(
    model: PreTrainedModel,
    row: Architecture | None,
    stack: str,
    layer: int,
    name: str,
    path: str,
    parameter: nn.Parameter,
) -> Iterator[Matrix]:
    """Yield the matrices of one parameter: one per expert, and each fused matrix followed by its parts."""
    module = model.get_submodule(path.rpartition(".")[0])
    transposed = isinstance(module, Conv1D)
    a, b = parameter.shape[-2:] if not isinstance(module, LowRankLinear) else (module.out_features, module.in_features)
    shape = (b, a) if transposed else (a, b)
    fused = row.fused.get(name) if row else None
    if experts := _experts_in_rows(module, path.rpartition(".")[2], parameter):
        for i in range(experts):
            rows = Rows(1, a, i * (a // experts), a // experts)
            yield Matrix(stack, layer, f"experts.{i}.{name}", path, (a // experts, b), rows=rows)
        return
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
