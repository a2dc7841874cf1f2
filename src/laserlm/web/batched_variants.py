"""Run several variants of a model in one batch: each row of the batch has its own weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laserlm.edit import applied, resolve
from laserlm.models.language_model import LanguageModel

MAX_VARIANT_BYTES = 2**30
"""Maximum bytes of the changed weights; all variants share the other weights."""


class CannotBatchError(Exception):
    """The variants must run one after another."""


@contextmanager
def run_variants(lm: LanguageModel, interventions: Sequence[str]) -> Iterator[None]:
    """Compute row i of every batch with intervention i applied, until the end of the context.

    A pass over a short text takes about as long as reading the weights. Three variants that share nearly all weights
    therefore take about as long as one.

    Args:
        lm: the unchanged model; its weights do not change.
        interventions: texts, one for each row of the batches.

    Raises:
        CannotBatchError: if the changed weights are too large, or do not belong to modules that see the batch row by row.
            It is also raised at the end of the context.
        MatrixError: if the model has no such matrix.
    """
    matrices = [{e.matrix.path: e.matrix for e in resolve(lm.matrices, text) if not e.is_identity} for text in interventions]
    parameters = {path: lm.model.get_parameter(path) for row in matrices for path in row}
    holders = _holders(lm.model, parameters)
    if sum(parameters[path].nbytes for row in matrices for path in row) > MAX_VARIANT_BYTES:
        raise CannotBatchError
    changed: dict[str, dict[int, Tensor]] = {path: {} for path in parameters}  # by path and row, (out, in)
    for row, text in enumerate(interventions):
        with applied(lm, text):
            for path, matrix in matrices[row].items():
                weight = parameters[path].data
                changed[path][row] = weight.T if matrix.transposed else weight
    used: set[str] = set()
    handles = [
        module.register_forward_hook(_replaced(path, changed[path], len(interventions), used)) for path, module in holders
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if used != changed.keys():  # the model reads the weight directly, or skipped the module
        raise CannotBatchError


def _holders(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[tuple[str, nn.Module]]:
    """Return the modules that hold one of the parameters, each with the path of its parameter; modules may share one."""
    paths = {id(parameter): path for path, parameter in parameters.items()}
    holders = [
        (paths[id(parameter)], module)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if id(parameter) in paths
    ]
    if not all(isinstance(module, nn.Linear | Conv1D) for _, module in holders):
        raise CannotBatchError
    return holders


def _replaced(path: str, weights: dict[int, Tensor], rows: int, used: set[str]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that recomputes a module's output for the rows that have their own weights."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x: Tensor = args[0]  # (rows, T, in)
        if x.ndim != 3 or x.shape[0] != rows:
            raise CannotBatchError
        used.add(path)
        bias: Any = module.bias
        outputs = [nn.functional.linear(x[i], weights[i], bias) if i in weights else output[i] for i in range(rows)]
        return torch.stack(outputs)  # (rows, T, out)

    return hook
