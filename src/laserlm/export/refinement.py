"""Train the factors of a compressed model, so that it predicts what the unchanged model predicts on a text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from laserlm.edit.factors import replaced_modules
from laserlm.errors import ExportError, WeightError
from laserlm.export.tensor_folder import storage_error
from laserlm.low_rank import LowRankLinear
from laserlm.models.language_model import LanguageModel
from laserlm.paths import atomic_file
from laserlm.scoring.batch import Batch
from laserlm.scoring.forward import batches
from laserlm.scoring.records import TokenSequence

log = logging.getLogger(__name__)

ProductsIn = Callable[[], AbstractContextManager[object]]
"""Makes the context of a forward pass, which sets the dtype of its products."""
LEARNING_RATE = 1e-5
"""Largest step of a number in the factors. On the bundled model the divergence rose with 2e-4."""
WARM_UP_STEPS = 5
"""Steps in which the learning rate rises from 0. It falls to 0 until the last step."""
BETAS = (0.9, 0.98)
"""Decay of Adam's averages: the second spans 50 steps, because there are few."""
BFLOAT16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16")
"""PyTorch's names of the instructions of x86 and ARM processors for products in bfloat16."""
BFLOAT16 = "bfloat16"
STEPS_BETWEEN_FILES = 25
"""Number of steps that are lost at most if the process is killed."""


def check_steps(lm: LanguageModel, steps: int) -> None:
    """Raise an ExportError if a number of steps is negative, or the model's dtype is one that is not trained."""
    if steps < 0:
        raise ExportError(f"refine is {steps}; the number of steps that train the factors is 0 or more")
    if steps and lm.dtype == torch.float16:
        raise ExportError(
            "gradients in float16 overflow, so that factors are not trained in it; load the model in bfloat16 or float32 "
            "(--dtype), or train none (--refine 0)"
        )


def refine(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    layers: Mapping[str, LowRankLinear],
    file: Path,
    *,
    steps: int,
    products: str | None = None,
    on_step: Callable[[int, int], object] = lambda done, total: None,
) -> None:
    """Train low-rank layers in place, so that the model with them predicts what it predicts without them.

    A step lowers the Kullback-Leibler divergence of the next tokens' probabilities on one row, from the unchanged model to the
    one with these layers. It needs no labels. Nothing else of the model changes. Adam's steps are in float32, also where the
    layers have another dtype. A factor that no gradient reaches, such as that of an expert that a row does not use, takes the
    step of a gradient of 0.

    Args:
        lm: the unchanged model.
        rows: token sequences, which are taken in turn, and again from the first after the last.
        layers: the low-rank layers by path; they take the places of the model's layers.
        file: where the factors are kept, with Adam's averages and the dtype of the products. What an interrupted call left
            there is continued, in the dtype in which it began.
        steps: number of steps.
        products: dtype of the products, ``bfloat16`` or the model's own. None takes bfloat16 where the processor has
            instructions for it and the model can be run so, and else the model's own.
        on_step: called with the number of steps that are done, and with that of all.

    Raises:
        ExportError: if the model is in float16, or the disk is full.
        WeightError: if a gradient is not finite.
    """
    check_steps(lm, steps)
    check_products(lm, products)
    factors = _factors(layers)
    masters = {name: factor.detach().float().clone() for name, factor in factors.items()}
    optimiser = torch.optim.Adam(masters.values(), betas=BETAS)
    start, begun_in = _read_progress(file, masters, optimiser)
    by_row = {batch.rows[0]: batch for batch in batches(lm, rows, 1)}
    products = products or begun_in or _fastest_products(lm, by_row[0])
    products_in = _products_in(lm, products)
    with _only_trainable(lm.model, factors.values()):
        for step in range(start, steps):
            _descend(lm, by_row[step % len(rows)], layers, factors, masters, products_in)
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP_STEPS, (steps - step) / max(1, steps - WARM_UP_STEPS), 1)
            optimiser.step()
            on_step(step + 1, steps)
            if (step + 1) % STEPS_BETWEEN_FILES == 0 or step + 1 == steps:
                _keep(file, masters, optimiser, step + 1, products)
    _copy(masters, factors)


def products_of(file: Path) -> str:
    """Return the dtype of the products with which the factors in a file of ``refine`` were trained.

    Raises:
        ExportError: if the file cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            return str(opened.metadata()["products"])
    except (OSError, SafetensorError) as error:
        raise storage_error(file.parent, error) from error


def read_factors(layers: Mapping[str, LowRankLinear], file: Path) -> None:
    """Read trained factors from a file of ``refine`` into low-rank layers of the same shapes.

    Raises:
        ExportError: if the file cannot be read.
    """
    factors = _factors(layers)
    try:
        with safe_open(file, "pt") as opened:
            _copy({name: opened.get_tensor(name) for name in factors}, factors)
    except (OSError, SafetensorError) as error:
        raise storage_error(file.parent, error) from error


def _factors(layers: Mapping[str, LowRankLinear]) -> dict[str, nn.Parameter]:
    return {f"{path}.{name}": p for path, layer in layers.items() for name, p in layer.named_parameters() if name != "bias"}


def _descend(
    lm: LanguageModel,
    batch: Batch,
    layers: Mapping[str, LowRankLinear],
    factors: Mapping[str, nn.Parameter],
    masters: Mapping[str, Tensor],
    products_in: ProductsIn,
) -> None:
    """Set the gradients of the float32 factors on one row."""
    with torch.no_grad():
        with products_in():
            expected = lm.model(**batch.inputs).logits[0].float().softmax(-1)  # (T, V)
        _copy(masters, factors)
    with replaced_modules(lm.model, layers):
        with products_in():
            logits = lm.model(**batch.inputs).logits[0].float()  # (T, V)
        F.cross_entropy(logits, expected).backward()  # its gradient is that of the divergence
    for name, factor in factors.items():
        gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
        if not bool(gradient.isfinite().all()):
            raise WeightError(f"the gradient of the factor {name} is not finite; load the model in float32, or give --refine 0")
        masters[name].grad, factor.grad = gradient.float(), None


def check_products(lm: LanguageModel, products: str | None) -> None:
    """Raise an ExportError if factors cannot be trained with products in this dtype."""
    if products not in (None, BFLOAT16, own := _own_products(lm)):
        raise ExportError(f"the factors of {lm.name} are trained with products in {own} or {BFLOAT16}, not in {products}")


def _own_products(lm: LanguageModel) -> str:
    return str(lm.dtype).removeprefix("torch.")


def _products_in(lm: LanguageModel, products: str) -> ProductsIn:
    """Return what makes a context with products in this dtype; on a processor without instructions for it, they are slow."""
    return nullcontext if products == _own_products(lm) else partial(torch.autocast, lm.device.type, torch.bfloat16)


def _fastest_products(lm: LanguageModel, batch: Batch) -> str:
    """Return bfloat16 where products in it are faster and the model can be run in it, else the model's dtype."""
    if not _has_instructions(lm.device):
        return _own_products(lm)
    try:
        with torch.no_grad(), torch.autocast(lm.device.type, torch.bfloat16):
            lm.model(**batch.inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError) as error:
        log.warning(
            "%s cannot compute its products in bfloat16 (%s); its factors are trained with products in %s, which is slower",
            lm.name,
            str(error).partition("\n")[0],
            _own_products(lm),
        )
        return _own_products(lm)
    return BFLOAT16


def _has_instructions(device: torch.device) -> bool:
    """Return whether a device has instructions for products in bfloat16, with which they are faster."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


@torch.no_grad()
def _copy(masters: Mapping[str, Tensor], factors: Mapping[str, nn.Parameter]) -> None:
    for name, factor in factors.items():
        factor.copy_(masters[name])


@contextmanager
def _only_trainable(model: nn.Module, factors: Iterable[nn.Parameter]) -> Iterator[None]:
    """Compute gradients of the factors alone inside a ``with`` block."""
    of_model = {p: p.requires_grad for p in model.parameters()}
    of_factors = {p: p.requires_grad for p in factors}
    try:
        for p in of_model:
            p.requires_grad_(False)
        for p in of_factors:
            p.requires_grad_(True)
        yield
    finally:
        for p, before in (of_model | of_factors).items():
            p.requires_grad_(before)


ADAM_AVERAGES = ("exp_avg", "exp_avg_sq")
"""Adam's averages of a parameter, by PyTorch's names."""


def _keep(file: Path, masters: Mapping[str, Tensor], optimiser: torch.optim.Adam, step: int, products: str) -> None:
    """Write factors and averages into one file, which is complete or absent."""
    tensors = dict(masters)
    for name, master in masters.items():
        tensors |= {f"{name}.{average}": optimiser.state[master][average] for average in ADAM_AVERAGES}
    try:
        with atomic_file(file) as part:
            save_file(
                {name: tensor.cpu() for name, tensor in tensors.items()},
                part,
                metadata={"step": str(step), "products": products},
            )
    except (OSError, SafetensorError) as error:
        raise storage_error(file.parent, error) from error


def _read_progress(file: Path, masters: Mapping[str, Tensor], optimiser: torch.optim.Adam) -> tuple[int, str | None]:
    """Read factors and averages from a file. Return how many steps they have taken, and the dtype of the products.

    Without a file these are 0 and None.
    """
    if not file.is_file():
        return 0, None
    try:
        with safe_open(file, "pt") as opened:
            step, products = int(opened.metadata()["step"]), opened.metadata()["products"]
            for name, master in masters.items():
                master.copy_(opened.get_tensor(name))
                averages = {average: opened.get_tensor(f"{name}.{average}").to(master.device) for average in ADAM_AVERAGES}
                optimiser.state[master] = {"step": torch.tensor(float(step)), **averages}
    except (OSError, SafetensorError) as error:
        raise storage_error(file.parent, error) from error
    return step, products
