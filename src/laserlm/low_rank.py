"""Linear layers with weights stored as rows and coefficients, and the hook with which transformers loads them.

A checkpoint lists these layers in the ``quantization_config`` of its ``config.json``. Importing laserlm registers this
module with transformers, so that ``from_pretrained`` creates the layers before it reads the weights. Without laserlm,
loading fails because the weights have other shapes than those of the linear layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from laserlm.errors import ModelError

METHOD = "laserlm"
"""The ``quant_method`` in a checkpoint's config."""
FORMAT = 2
"""Version of the checkpoint format. It rises when an older laserlm would misread a new checkpoint."""


@dataclass(frozen=True)
class Part:
    """Rows of a weight that are stored in the same form.

    Args:
        rows: number of output features.
        rank: number of columns of the second factor, or None if the rows are dense.
        pivoted: whether the first factor is ``rank`` of the rows themselves, the pivots, so that the second factor is that of
            the other rows. laserlm 0.1.0 wrote no pivots.
    """

    rows: int
    rank: int | None = None
    pivoted: bool = False

    @property
    def width(self) -> int:
        """Number of rows in the stored weight."""
        return self.rows if self.rank is None else self.rank

    @property
    def combined(self) -> int:
        """Number of rows of the second factor."""
        return self.rows - self.rank if self.pivoted and self.rank is not None else self.rows


class LowRankLinear(nn.Linear):
    """A linear layer whose weight (m, n) is stored as pairs of factors and dense rows, part by part.

    ``weight`` (R, n) stacks the parts: the first factor (r, n) of a part with a rank, else the rows themselves. ``up0``,
    ``up1`` and so on are the second factors of the parts with a rank: (rows - r, r) for a pivoted part, else (rows, r). A
    pivoted pair has r (m + n - r) parameters, less than m n at every rank below min(m, n). ``order`` (m,) is a buffer of
    layers with a pivoted part: the row of the weight is row ``order[i]`` of all rows, part by part, the pivots of a part
    before its other rows. The forward pass never multiplies its factors out.

    Args:
        in_features: n.
        out_features: m, the sum of the parts' rows.
        parts: the form of the rows, in order.
        groups: number of groups in a fused weight (groups, m / groups, n); every part has equally many rows in each group.
            1 for a layer with a pivoted part, whose order says where each row is.
        bias: whether the layer has a bias (m,).
        device: device of the uninitialised parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: if no part has a rank, the parts' rows do not sum to m, or they do not divide into the groups.
    """

    up0: Tensor
    order: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        parts: Sequence[Part],
        *,
        groups: int = 1,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if sum(p.rows for p in parts) != out_features or any(p.rows % groups for p in parts):
            raise ValueError(f"parts of {[p.rows for p in parts]} rows do not sum to {out_features} rows in {groups} groups")
        if all(p.rank is None for p in parts):
            raise ValueError("no part has a rank; use a plain linear layer for dense rows")
        self.in_features = in_features
        self.out_features = out_features
        self.parts = tuple(parts)
        self.groups = groups

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight = empty(sum(p.width for p in parts), in_features)
        for i, p in enumerate(self.parts):
            if p.rank is not None:
                self.register_parameter(f"up{i}", empty(p.combined, p.rank))
        is_pivoted = any(p.pivoted for p in parts)
        self.register_buffer("order", torch.empty(out_features, dtype=torch.int32, device=device) if is_pivoted else None)
        self.register_parameter("bias", empty(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        out = self._expanded(F.linear(x, self.weight))
        return out if self.bias is None else out + self.bias.to(out.dtype)  # autocast leaves the bias as it is

    def _expanded(self, inner: Tensor) -> Tensor:
        """Map what the stored rows give (..., R) to what the rows of the weight give (..., m)."""
        outs: list[Tensor] = []
        pieces = inner.split([p.width for p in self.parts], -1) if len(self.parts) > 1 else (inner,)
        for i, (p, y) in enumerate(zip(self.parts, pieces, strict=True)):
            if p.rank is None or p.pivoted:
                outs.append(y)
            if p.rank is not None:
                up = getattr(self, f"up{i}")
                outs.append(F.linear(y, up if up.dtype == y.dtype else up.to(y.dtype)))  # torchao's 8 bits cannot be cast
        if self.order is not None:
            rows = torch.cat(outs, -1)
            outs.clear()  # before they are copied into the order of the weight
            return _in_order(rows, self.order)
        if len(outs) == 1:
            return outs[0]
        return torch.cat([y.unflatten(-1, (self.groups, -1)) for y in outs], -1).flatten(-2)

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight (m, n), multiplied out in float32 or wider."""
        return self._expanded(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).T).T

    def extra_repr(self) -> str:
        """Return the shape and the ranks as text."""
        ranks = ", ".join(str(p.rank) for p in self.parts)
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks={ranks}, bias={self.bias is not None}"

    def as_dict(self) -> dict[str, Any]:
        """Return the layer's entry in a checkpoint's config."""
        return {"parts": [[p.rows, p.rank, p.pivoted] for p in self.parts], "groups": self.groups}


def _in_order(rows: Tensor, order: Tensor) -> Tensor:
    """Return the last dimension (m,) in an order (m,)."""
    if rows.numel() == len(order):  # one token, for which an order in 64 bits is not worth its time
        return rows.index_select(-1, order)
    return rows.gather(-1, order.long().expand(rows.shape))  # up to five times as fast as index_select, also backwards


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """The entry of a checkpoint's config that lists its low-rank layers.

    Args:
        modules: the value of ``LowRankLinear.as_dict`` of each layer, by path in the saved model.
        format: version of the checkpoint format.

    Raises:
        ModelError: if the checkpoint was written by a newer laserlm.
    """

    def __init__(self, modules: Mapping[str, Any], format: int = FORMAT, **_: Any) -> None:
        if format > FORMAT:
            raise ModelError(
                f"the checkpoint's low-rank layers are of format {format}; this laserlm reads up to {FORMAT}: upgrade laserlm"
            )
        self.quant_method: Any = METHOD
        self.format = format
        self.modules = dict(modules)


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Creates the low-rank layers of a checkpoint before transformers loads its weights."""

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        prefix = f"{model.base_model_prefix}."
        modules = dict(model.named_modules())
        for saved_path, layer in self.quantization_config.modules.items():
            # A checkpoint may load with another head than it was saved with, or without one.
            candidates = (saved_path, saved_path.removeprefix(prefix), prefix + saved_path)
            path = next((p for p in candidates if p in modules), None)
            if path is None:
                raise ModelError(
                    f"the checkpoint stores {saved_path} as factors, but {type(model).__name__} has no such layer; load it as "
                    f"{' or '.join(model.config.architectures or ['the class it was saved as'])}"
                )
            parts = [Part(*part) for part in layer["parts"]]
            old = modules[path]
            n = old.in_features if isinstance(old, nn.Linear) else old.nx  # Conv1D
            m = sum(p.rows for p in parts)
            new = LowRankLinear(
                int(n), m, parts, groups=layer["groups"], bias=old.bias is not None, device="meta", dtype=old.weight.dtype
            )
            model.set_submodule(path, new)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.is_quantized = False  # the factors are ordinary floats that can be cast and trained
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Return True: ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether the factors can be trained."""
        return True
