"""Choose the dtype of a model's matrix products where a rounding does no harm: for moments of gradients, and in training."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext

import torch

from laserlm.errors import ExportError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.forward import batches
from laserlm.scoring.records import TokenSequence

log = logging.getLogger(__name__)

BFLOAT16 = "bfloat16"
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""PyTorch's names of the instructions of x86 and ARM processors for products in bfloat16."""


def own_products(lm: LanguageModel) -> str:
    """Return the dtype of a model's products as it was loaded."""
    return str(lm.dtype).removeprefix("torch.")


def check_products(lm: LanguageModel, products: str | None) -> None:
    """Raise an ExportError if products of a compression cannot be computed in this dtype."""
    allowed = dict.fromkeys([own_products(lm), BFLOAT16])
    if products is not None and products not in allowed:
        raise ExportError(
            f"a compression of {lm.name} computes products in {' or '.join(allowed)}, not in {products}; give --products "
            f"{next(iter(allowed))}, or leave it out"
        )


def products_in(lm: LanguageModel, products: str) -> AbstractContextManager[object]:
    """Return a context with products in this dtype. On a processor without instructions for it, they are slow."""
    return nullcontext() if products == own_products(lm) else torch.autocast(lm.device.type, torch.bfloat16)


def fastest_products(lm: LanguageModel, row: TokenSequence) -> str:
    """Return bfloat16 where products in it are faster and the model can be run in it on a row, else the model's dtype."""
    own = own_products(lm)
    if lm.dtype != torch.float32 or not _has_instructions(lm.device):
        return own
    try:
        with torch.no_grad(), products_in(lm, BFLOAT16):
            lm.model(**next(iter(batches(lm, [row], 1))).inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        log.warning(
            "%s cannot compute its products in bfloat16 (%s); they are computed in %s, which is slower",
            lm.name,
            str(error).partition("\n")[0],
            own,
        )
        return own
    return BFLOAT16


def _has_instructions(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16, with which they are faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)
