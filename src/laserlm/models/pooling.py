"""How an embedding model makes one vector of a text, as sentence-transformers saves it next to the weights."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils.hub import cached_file

from laserlm.errors import ModelError

log = logging.getLogger(__name__)

Mode = Literal["mean", "cls", "max", "lasttoken"]
MODES: dict[str, Mode] = {
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean",  # the same direction, and vectors are normalised
    "cls_token": "cls",
    "max_tokens": "max",
    "lasttoken": "lasttoken",
}
"""Modes of sentence-transformers."""
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": torch.nn.functional.gelu,
    "Sigmoid": torch.sigmoid,
}
"""Activations of dense modules, by the names of their classes in PyTorch."""


@dataclass(frozen=True, eq=False)
class DenseModule:
    """A linear layer of sentence-transformers that follows the pooling.

    Args:
        weight: (out, in).
        bias: (out,), or None.
        activation: a name in ``ACTIVATIONS``.
    """

    weight: Tensor
    bias: Tensor | None
    activation: str

    def __call__(self, x: Tensor) -> Tensor:
        """Return vectors (B, out) of vectors (B, in)."""
        bias = None if self.bias is None else self.bias.to(x)
        return ACTIVATIONS[self.activation](torch.nn.functional.linear(x, self.weight.to(x), bias))


@dataclass(frozen=True)
class Pooling:
    """How the vectors of tokens become the vector of a text.

    Args:
        mode: ``mean`` of all tokens, the first one (``cls``), the largest values (``max``) or the last one (``lasttoken``).
        max_length: largest number of tokens of a text; None takes the model's.
        dense: layers that follow, in their order.
        truncate_dim: number of values at the start of the vector that are kept; None keeps all.
        problem: why laserlm does not compute the vectors of this model; empty if it does.
    """

    mode: Mode = "mean"
    max_length: int | None = None
    dense: tuple[DenseModule, ...] = ()
    truncate_dim: int | None = None
    problem: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what vectors depend on as plain values, with the sha256 of the weights of each dense module."""
        dense = [[d.activation, *(_sha256(t) for t in (d.weight, d.bias) if t is not None)] for d in self.dense]
        return {"mode": self.mode, "dense": dense, "truncate_dim": self.truncate_dim}


def read_pooling(source: str | Path, revision: str | None = None) -> Pooling | None:
    """Return the pooling of a sentence-transformers folder or hub id; None for any other checkpoint.

    Raises:
        ModelError: if a file of it cannot be read.
    """
    modules = _read(source, revision, "modules.json")
    listed = [module for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    types = {_type_of(module): str(module.get("path", "")) for module in listed}
    if "Pooling" not in types:
        return None
    settings = _read(source, revision, f"{types['Pooling']}/config.json") or {}
    limit = (_read(source, revision, "sentence_bert_config.json") or {}).get("max_seq_length")
    whole = _read(source, revision, "config_sentence_transformers.json") or {}
    _warn_of_unused(str(source), whole, is_normalised="Normalize" in types)
    own = settings.get("pooling_mode")  # one name, as sentence-transformers 5 writes it
    names = [own] if isinstance(own, str) else [n.removeprefix("pooling_mode_") for n, on in settings.items() if on is True]
    modes = [MODES.get(n, n) for n in names if n in (*MODES, *MODES.values()) or n.startswith("weightedmean")]
    others = sorted(types.keys() - {"Transformer", "Pooling", "Dense", "Normalize"})
    problem = f"its modules.json has the module {others[0]}" if others else _order_problem(listed)
    dense: list[DenseModule] = []
    for module in listed if not problem else ():
        if _type_of(module) == "Dense":
            read = _read_dense(source, revision, str(module.get("path", "")))
            if isinstance(read, str):
                problem = read
            else:
                dense.append(read)
    if not problem and (len(modes) != 1 or modes[0] not in MODES.values()):
        problem = f"its pooling is {' and '.join(modes) or 'not known'}"
    mode: Any = modes[0] if not problem else "mean"
    return Pooling(mode, limit, tuple(dense), whole.get("truncate_dim"), problem)


def _warn_of_unused(name: str, settings: dict[str, Any], *, is_normalised: bool) -> None:
    """Log which settings of sentence-transformers would change the vectors or their comparison, and are not used."""
    prompt = (settings.get("prompts") or {}).get(settings.get("default_prompt_name"))
    if prompt:
        log.warning("%s puts %r in front of every text by default; laserlm does not: write it into the texts", name, prompt)
    similarity = settings.get("similarity_fn_name")
    if similarity not in (None, "cosine", *(["dot"] if is_normalised else [])):
        log.warning("%s compares its vectors by %r; laserlm compares them by cosine", name, similarity)


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


def _type_of(module: dict[str, Any]) -> str:
    return str(module.get("type")).rpartition(".")[2]


def _order_problem(modules: list[dict[str, Any]]) -> str:
    """Return why modules in this order are not computed; a vector is normalised at the end in any case."""
    order = [name for module in modules if (name := _type_of(module)) in ("Pooling", "Dense", "Normalize")]
    expected = sorted(order, key=["Pooling", "Dense", "Normalize"].index)
    return "" if order == expected else f"its modules follow each other as {', '.join(order)}"


def _read_dense(source: str | Path, revision: str | None, path: str) -> DenseModule | str:
    """Return a dense module, or why it is not computed."""
    settings = _read(source, revision, f"{path}/config.json") or {}
    activation = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in ACTIVATIONS:
        return f"the activation of its module {path} is {activation}"
    if settings.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        return f"its module {path} is applied to {settings['module_input_name']}"
    file = _file(source, revision, f"{path}/model.safetensors")
    if file is None:
        return f"its module {path} has no model.safetensors"
    try:
        tensors = load_file(file)
        return DenseModule(tensors["linear.weight"], tensors.get("linear.bias"), activation)
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"cannot read {path}/model.safetensors of {str(source)!r}: {error!r}; download it again") from error


def _file(source: str | Path, revision: str | None, name: str) -> Path | None:
    """Return the path of a file of a checkpoint; None if it has no such file."""
    options: dict[str, Any] = {
        f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")
    }
    try:
        file = cached_file(str(source), name, revision=revision, **options)
    except (OSError, ValueError):  # no name of a folder or of a hub's model, which loading it reports
        return None
    return None if file is None else Path(file)


def _read(source: str | Path, revision: str | None, name: str) -> Any:
    """Return the JSON of a file of a checkpoint; None if it has no such file."""
    file = _file(source, revision, name)
    try:
        return None if file is None else json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {name} of {str(source)!r}: {error}; copy or download it again") from error
