"""The update of a LoRA adapter: the product of low rank that it adds to each of its weights.

A model with an update is the base model with the adapter merged. The update of a weight is what a reduction changes, in place
of the weight: the base stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laserlm.errors import ModelError
from laserlm.linalg.decomposition import Decomposition, decompose_product
from laserlm.models.matrices import Matrix, rows_of

ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Largest difference, as a share of the largest weight, between a merged weight and base plus update; 1e-5 in float32."""


@dataclass(frozen=True, eq=False)
class WeightUpdate:
    """What an adapter adds to one weight, as the product of two factors.

    Args:
        base: the weight without the update, as its parameter stores it.
        up: (m, r), with the scale of the adapter.
        down: (r, n).
    """

    base: Tensor
    up: Tensor
    down: Tensor

    def decomposition(self, matrix: Matrix) -> Decomposition:
        """Return the decomposition of the update of a matrix; a part of a fused weight has some of its rows."""
        up = self.up if matrix.rows is None else self.up[rows_of(matrix, len(self.up)).to(self.up.device)]
        return decompose_product(up, self.down)


@dataclass(frozen=True, eq=False)
class AdapterUpdate:
    """The updates of an adapter.

    Args:
        folder: the adapter's folder.
        base_hash: of the base model, as it was loaded.
        weights: the update of each weight, by the path of its parameter.
        others: names of the adapter's other tensors, which are merged and cannot be reduced.
    """

    folder: Path
    base_hash: str
    weights: Mapping[str, WeightUpdate]
    others: tuple[str, ...] = ()

    def to(self, device: torch.device) -> AdapterUpdate:
        """Return the updates on a device."""
        weights = {p: WeightUpdate(w.base.to(device), w.up.to(device), w.down.to(device)) for p, w in self.weights.items()}
        return replace(self, weights=weights)

    def matrices(self, matrices: Iterable[Matrix]) -> tuple[Matrix, ...]:
        """Return the matrices that have an update, with its rank."""
        ranks = {path: weight.down.shape[0] for path, weight in self.weights.items()}
        return tuple(replace(m, update_rank=ranks[m.path]) for m in matrices if m.path in ranks and m.expert is None)


def factors_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both factors, up (m, r) with its scale and down (r, n), of each weight that a peft model with one LoRA adapts.

    Raises:
        ModelError: if the adapter is no LoRA, or adds something else than a product.
    """
    from peft.tuners.lora import LoraLayer

    config = model.active_peft_config
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA" or getattr(config, "use_dora", False):
        kind = "DoRA" if kind == "LORA" else kind
        raise ModelError(
            f"the adapter is of type {kind}, whose update is no product of two factors; load its folder as the model, which "
            "merges it, and reduce the merged weights"
        )
    name, factors = model.active_adapter, {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            adapted: Any = module  # its own types do not know the wrapped layer
            if not isinstance(adapted.get_base_layer(), nn.Linear | Conv1D):
                continue  # an embedding, a convolution or stacked experts
            up, down = adapted.lora_B[name].weight, adapted.lora_A[name].weight
            factors[f"{path}.weight"] = (up.detach() * adapted.scaling[name], down.detach())
    return factors


def update_of(
    folder: Path, base_hash: str, others: Iterable[str], merged: Any, bases: Mapping[str, Tensor], factors: Mapping[str, Any]
) -> AdapterUpdate:
    """Return the update that merging has added.

    Args:
        folder: the adapter's folder.
        base_hash: of the base model.
        others: names of the adapter's other tensors.
        merged: the model with the adapter merged.
        bases: the weights before, by path.
        factors: what ``factors_of`` returned.

    Raises:
        ModelError: if a weight is not its base plus its update.
    """
    weights = {path: WeightUpdate(bases[path], *factors[path]) for path in factors}
    for path, weight in weights.items():
        parameter = merged.get_parameter(path)
        delta = weight.up.float() @ weight.down.float()
        is_transposed = isinstance(merged.get_submodule(path.rpartition(".")[0]), Conv1D)
        expected = weight.base.float() + (delta.T if is_transposed else delta)
        limit = ROUNDING.get(parameter.dtype, 1e-5) * float(expected.abs().max())
        if float((parameter.float() - expected).abs().max()) > limit:
            raise ModelError(
                f"the adapter {str(folder)!r} does more to {path} than add a product of two factors; load its folder as the "
                "model, which merges it, and reduce the merged weights"
            )
    return AdapterUpdate(folder, base_hash, weights, tuple(others))
