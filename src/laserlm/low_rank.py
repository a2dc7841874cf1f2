"""Linear layers held as two factors, and how transformers loads a model that has them.

A checkpoint names them in the ``quantization_config`` of its ``config.json``. Importing laserlm registers this module
with transformers, so that plain ``from_pretrained`` puts the layers in place before it reads the weights. Without laserlm
that fails: the weight of such a layer has another shape than that of the linear layer it stands for.
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

__all__ = ["METHOD", "LowRankConfig", "LowRankLinear", "LowRankQuantizer", "Part"]

METHOD = "laserlm"
"""Name of the ``quant_method`` in a checkpoint's config."""
FORMAT = 1
"""Goes up when a checkpoint changes so that an older laserlm would misread it."""


@dataclass(frozen=True)
class Part:
    """Rows of a weight that are held alike.

    Args:
        rows: number of output features.
        rank: number of columns of their second factor, or None where they are held as they are.
    """

    rows: int
    rank: int | None = None

    @property
    def width(self) -> int:
        """Rows that the part takes in the first product."""
        return self.rows if self.rank is None else self.rank


class LowRankLinear(nn.Linear):
    """A linear layer whose weight (m, n) is two factors, or several such pairs and dense rows in turn.

    One product with ``weight`` (R, n) holds, part by part, the first factor (r, n) of its rows, or its rows themselves;
    ``up0``, ``up1`` and so on (rows, r) are the second factors of the parts that have one. A pair costs r (m + n)
    parameters instead of m n, and the two are never multiplied out.

    Args:
        in_features: n.
        out_features: m, the sum of the parts' rows.
        parts: how the rows are held.
        groups: a fused weight is seen as (groups, m / groups, n): a part holds, group by group, rows of each of them.
        bias: whether there is a bias (m,).
        device: of the parameters, which are not initialised.
        dtype: likewise.

    Raises:
        ValueError: if no part has a rank, or the parts' rows are not all the rows, or not equally many of each group.
    """

    up0: Tensor

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
            raise ValueError(f"parts of {[p.rows for p in parts]} rows do not make {out_features} rows in {groups} groups")
        if all(p.rank is None for p in parts):
            raise ValueError("no part is held as two factors; a plain linear layer holds dense rows")
        self.in_features = in_features
        self.out_features = out_features
        self.parts = tuple(parts)
        self.groups = groups

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))

        self.weight = empty(sum(p.width for p in parts), in_features)
        for i, p in enumerate(self.parts):
            if p.rank is not None:
                self.register_parameter(f"up{i}", empty(p.rows, p.rank))
        self.register_parameter("bias", empty(out_features) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., n) to (..., m)."""
        inner = F.linear(x, self.weight)  # (..., R)
        if len(self.parts) == 1:
            return F.linear(inner, self.up0, self.bias)
        pieces = inner.split([p.width for p in self.parts], -1)
        outs = [
            piece if p.rank is None else F.linear(piece, getattr(self, f"up{i}"))  # (..., rows)
            for i, (p, piece) in enumerate(zip(self.parts, pieces, strict=True))
        ]
        out = torch.cat([y.unflatten(-1, (self.groups, -1)) for y in outs], -1).flatten(-2)  # (..., m)
        return out if self.bias is None else out + self.bias

    @torch.no_grad()
    def dense(self) -> Tensor:
        """Return the weight (m, n) multiplied out, in float32 or wider."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        pieces = self.weight.to(wide).split([p.width for p in self.parts])
        rows = [
            piece if p.rank is None else getattr(self, f"up{i}").to(wide) @ piece  # (rows, n)
            for i, (p, piece) in enumerate(zip(self.parts, pieces, strict=True))
        ]
        return torch.cat([r.unflatten(0, (self.groups, -1)) for r in rows], 1).flatten(0, 1)

    def extra_repr(self) -> str:
        """Describe the shape and the ranks."""
        ranks = ", ".join(str(p.rank) for p in self.parts)
        return f"in_features={self.in_features}, out_features={self.out_features}, ranks={ranks}, bias={self.bias is not None}"

    def as_dict(self) -> dict[str, Any]:
        """Return what a checkpoint's config says of the layer."""
        return {"parts": [[p.rows, p.rank] for p in self.parts], "groups": self.groups}


@register_quantization_config(METHOD)
class LowRankConfig(QuantizationConfigMixin):
    """The entry of a checkpoint's config that names its low-rank layers.

    Args:
        modules: by path in the model that was saved, what ``LowRankLinear.as_dict`` gives.
        format: version of the checkpoint's form.

    Raises:
        ModelError: if the checkpoint was written by a newer laserlm.
    """

    def __init__(self, modules: Mapping[str, Any], format: int = FORMAT, **_: Any) -> None:
        if format > FORMAT:
            raise ModelError(
                f"the checkpoint's low-rank layers are of format {format}; this laserlm reads up to {FORMAT}: install a newer"
            )
        self.quant_method: Any = METHOD
        self.format = format
        self.modules = dict(modules)


@register_quantizer(METHOD)
class LowRankQuantizer(HfQuantizer):
    """Puts the low-rank layers of a checkpoint in place before its weights are loaded."""

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        prefix = f"{model.base_model_prefix}."
        modules = dict(model.named_modules())
        for path, held in self.quantization_config.modules.items():
            # A checkpoint loads with another head, or none, than it was saved with.
            at = next((p for p in (path, path.removeprefix(prefix), prefix + path) if p in modules), None)
            if at is None:
                raise ModelError(
                    f"the checkpoint holds {path} as two factors; {type(model).__name__} has no such layer: load it as "
                    f"{' or '.join(model.config.architectures or ['the class it was saved as'])}"
                )
            parts = [Part(*part) for part in held["parts"]]
            old = modules[at]
            n = old.in_features if isinstance(old, nn.Linear) else old.nx  # Conv1D
            m = sum(p.rows for p in parts)
            new = LowRankLinear(
                int(n), m, parts, groups=held["groups"], bias=old.bias is not None, device="meta", dtype=old.weight.dtype
            )
            model.set_submodule(at, new)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        model.is_quantized = False  # the factors are ordinary floats: they can be cast and trained
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Tell that ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Tell that the factors can be trained."""
        return True
