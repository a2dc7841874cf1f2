"""Train the factors of a compressed model, so that it predicts what the unchanged model predicts on a text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from laserlm.edit.factors import replaced_modules
from laserlm.errors import ExportError, WeightError
from laserlm.export.products import products_in
from laserlm.export.tensor_folder import storage_error
from laserlm.low_rank import LowRankLinear
from laserlm.models.language_model import LanguageModel
from laserlm.paths import atomic_file
from laserlm.scoring.batch import Batch
from laserlm.scoring.forward import batches
from laserlm.scoring.records import TokenSequence

LEARNING_RATE = 1e-5
"""Largest step of a number in the factors. On the bundled model the divergence rose with 2e-4."""
WARM_UP_STEPS = 5
"""Steps in which the learning rate rises from 0. It falls to 0 until the last step."""
BETAS = (0.9, 0.98)
"""Decay of Adam's averages: the second spans 50 steps, because there are few."""
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
    products: str,
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
        file: where the factors are kept, with Adam's averages. What an interrupted call left there is continued.
        steps: number of steps.
        products: dtype of the products, ``bfloat16`` or the model's own.
        on_step: called with the number of steps that are done, and with that of all.

    Raises:
        ExportError: if the model is in float16, or the disk is full.
        WeightError: if a gradient is not finite.
    """
    check_steps(lm, steps)
    factors = _factors(layers)
    masters = {name: factor.detach().float().clone() for name, factor in factors.items()}
    optimiser = torch.optim.Adam(masters.values(), betas=BETAS)
    start = _read_progress(file, masters, optimiser)
    by_row = {batch.rows[0]: batch for batch in batches(lm, rows, 1)}
    with _only_trainable(lm.model, factors.values()):
        for step in range(start, steps):
            _descend(lm, by_row[step % len(rows)], layers, factors, masters, products)
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP_STEPS, (steps - step) / max(1, steps - WARM_UP_STEPS), 1)
            optimiser.step()
            on_step(step + 1, steps)
            if (step + 1) % STEPS_BETWEEN_FILES == 0 or step + 1 == steps:
                _keep(file, masters, optimiser, step + 1)
    _copy(masters, factors)


def read_factors(layers: Mapping[str, LowRankLinear], file: Path) -> None:
    """Read trained factors from a file of ``refine`` into low-rank layers of the same shapes.

    Raises:
        ExportError: if the file cannot be read.
    """
    factors = _factors(layers)
    try:
        for name, factor in factors.items():
            with safe_open(file, "pt") as opened:  # anew for each: what was read stays in memory as long as the file is open
                _copy({name: opened.get_tensor(name)}, {name: factor})
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
    products: str,
) -> None:
    """Set the gradients of the float32 factors on one row."""
    with torch.no_grad():
        with products_in(lm, products):
            expected = lm.model(**batch.inputs).logits[0].float().softmax(-1)  # (T, V)
        _copy(masters, factors)
    with replaced_modules(lm.model, layers):
        with products_in(lm, products):
            logits = lm.model(**batch.inputs).logits[0].float()  # (T, V)
        F.cross_entropy(logits, expected).backward()  # its gradient is that of the divergence
    for name, factor in factors.items():
        gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
        if not bool(gradient.isfinite().all()):
            raise WeightError(f"the gradient of the factor {name} is not finite; load the model in float32, or give --refine 0")
        masters[name].grad, factor.grad = gradient.float(), None


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


def _keep(file: Path, masters: Mapping[str, Tensor], optimiser: torch.optim.Adam, step: int) -> None:
    """Write factors and averages into one file, which is complete or absent."""
    tensors = dict(masters)
    for name, master in masters.items():
        tensors |= {f"{name}.{average}": optimiser.state[master][average] for average in ADAM_AVERAGES}
    try:
        with atomic_file(file) as part:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, part, metadata={"step": str(step)})
    except (OSError, SafetensorError) as error:
        raise storage_error(file.parent, error) from error


def _read_progress(file: Path, masters: Mapping[str, Tensor], optimiser: torch.optim.Adam) -> int:
    """Read factors and averages from a file, if there is one. Return how many steps they have taken."""
    if not file.is_file():
        return 0
    try:
        with safe_open(file, "pt") as opened:
            step = int(opened.metadata()["step"])
            for name, master in masters.items():
                master.copy_(opened.get_tensor(name))
                averages = {average: opened.get_tensor(f"{name}.{average}").to(master.device) for average in ADAM_AVERAGES}
                optimiser.state[master] = {"step": torch.tensor(float(step)), **averages}
    except (OSError, SafetensorError) as error:
        raise storage_error(file.parent, error) from error
    return step
