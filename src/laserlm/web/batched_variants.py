"""Versions of a model side by side: each row of a batch goes through weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laserlm.edit import applied, resolve
from laserlm.models.language_model import LanguageModel

__all__ = ["CannotBatchError", "run_variants"]

MEMORY = 2**30
"""Bytes that changed weights may take; all others are there once for all versions."""


class CannotBatchError(Exception):
    """Tell that the versions have to be run one by one."""


@contextmanager
def run_variants(lm: LanguageModel, interventions: Sequence[str]) -> Iterator[None]:
    """Send row i of a batch through the model as intervention i leaves it, until the end of the context.

    A pass over one short text takes about as long as its weights take to be read, so that three versions that share nearly
    all of them are as quick together as one.

    Args:
        lm: the unchanged model; its weights stay as they are.
        interventions: texts, one for each row of every batch that is run meanwhile.

    Raises:
        ApartError: if the changed weights take too much memory, or are not those of plain matrices that meet a batch row by
            row; at the end of the context too.
        MatrixError: if an intervention names a matrix that the model does not have.
    """
    meant = [{e.matrix.path: e.matrix for e in resolve(lm.matrices, text) if not e.is_identity} for text in interventions]
    parameters = {path: lm.model.get_parameter(path) for of in meant for path in of}
    holders = _holders(lm.model, parameters)
    if sum(parameters[path].nbytes for of in meant for path in of) > MEMORY:
        raise CannotBatchError
    changed: dict[str, dict[int, Tensor]] = {path: {} for path in parameters}  # by path and row, (out, in)
    for row, text in enumerate(interventions):
        with applied(lm, text):
            for path, matrix in meant[row].items():
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
    if used != changed.keys():  # the model reads the weight itself, or left the matrix out
        raise CannotBatchError


def _holders(model: nn.Module, parameters: dict[str, nn.Parameter]) -> list[tuple[str, nn.Module]]:
    """Return all modules that hold one of some parameters, which several may share, each with its path."""
    paths = {id(parameter): path for path, parameter in parameters.items()}
    found = [
        (paths[id(parameter)], module)
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if id(parameter) in paths
    ]
    if not all(isinstance(module, nn.Linear | Conv1D) for _, module in found):
        raise CannotBatchError
    return found


def _replaced(path: str, weights: dict[int, Tensor], rows: int, used: set[str]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that computes what a matrix gives out anew for the rows that have one of their own."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        x: Tensor = args[0]  # (rows, T, in)
        if x.ndim != 3 or x.shape[0] != rows:
            raise CannotBatchError
        used.add(path)
        bias: Any = module.bias
        made = [nn.functional.linear(x[i], weights[i], bias) if i in weights else output[i] for i in range(rows)]
        return torch.stack(made)  # (rows, T, out)

    return hook
