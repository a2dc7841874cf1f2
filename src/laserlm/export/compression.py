"""Compress a whole model to a budget of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import label_as_edited, replaced_parameters
from laserlm.edit.factors import StoredMatrix, low_rank_layer, reason_not_factorable, replaced_modules
from laserlm.errors import ExportError
from laserlm.export.calibration_text import CalibrationText, read_calibration_text
from laserlm.export.checkpoint import Form, SavedModel, SaveOptions, check_request, command_of, write
from laserlm.export.gradient_moments import gradient_moments
from laserlm.export.moments import moments_by_block
from laserlm.export.tensor_file import DecompositionFile
from laserlm.linalg.allocation import Spectrum, allocate, uniform
from laserlm.linalg.decomposition import ALGORITHM, Decomposition, component_losses, decompose, whitened
from laserlm.linalg.pivots import parameters
from laserlm.low_rank import LowRankLinear
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, default_matrices, read_matrix
from laserlm.scoring.evaluate import text_perplexity
from laserlm.scoring.records import TokenSequence
from laserlm.searching.screen import sensitivities

__all__ = [
    "Allocation",
    "Compression",
    "CompressionResult",
    "Method",
    "compress",
    "fit_ranks",
]

Method = Literal["plain", "whitened", "two-sided"]
Allocation = Literal["uniform", "sensitivity", "curvature"]


@dataclass(frozen=True)
class Compression:
    """The decompositions of a model's matrices and the loss of each component, which give ranks for any budget.

    Args:
        method: ``plain``, ``whitened`` or ``two-sided``.
        allocation: ``uniform``, ``sensitivity`` or ``curvature``.
        matrices: the compressed matrices; fused matrices are compressed as a whole.
        left_out: the other matrices and the reason for each.
        decompositions: decomposition of each matrix, by the matrix's id, on the disk.
        losses: (k,) loss of dropping each component, by the matrix's id; empty for uniform ranks.
    """

    method: Method
    allocation: Allocation
    matrices: tuple[Matrix, ...]
    left_out: dict[Matrix, str]
    decompositions: Mapping[str, Decomposition] = field(repr=False)
    losses: dict[str, Tensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Number of parameters of the compressed matrices before compression."""
        return sum(m.shape[0] * m.shape[1] for m in self.matrices)

    def ranks(self, ratio: float) -> dict[str, int | None]:
        """Return the rank of each matrix, by its id, that keeps this share of the parameters; None keeps a matrix dense.

        Matrices that are left out count with all their parameters.

        Raises:
            ExportError: if the ratio is not above 0 and at most 1, or the matrices that are left out exceed it.
        """
        if not 0 < ratio <= 1:
            raise ExportError(f"a ratio of {ratio} is out of range; the kept share of the parameters is above 0 and at most 1")
        fixed = sum(m.shape[0] * m.shape[1] for m in self.left_out)
        budget = ratio * (self.parameters + fixed) - fixed
        if budget <= 0:
            raise ExportError(
                f"a ratio of {ratio} cannot be reached: matrices that stay dense take {fixed / (self.parameters + fixed):.0%} "
                f"of the parameters ({next(iter(self.left_out.values()))}); give a larger ratio"
            )
        if self.allocation == "uniform":
            ranks = uniform([m.shape for m in self.matrices], budget / self.parameters)
        else:
            spectra = [Spectrum(m.shape, self.losses[m.id].cpu()) for m in self.matrices]
            ranks = allocate(spectra, int(budget))
        return {m.id: rank for m, rank in zip(self.matrices, ranks, strict=True)}

    @contextmanager
    def applied(self, lm: LanguageModel, ratio: float, form: Form = "factored") -> Iterator[tuple[StoredMatrix, ...]]:
        """Compress the model inside a ``with`` block, with factors or with their products (``dense``)."""
        ranks = self.ranks(ratio)
        layers: dict[str, LowRankLinear] = {}
        for m in self.matrices:
            if (rank := ranks[m.id]) is not None:
                path = _module_path(m)
                layers[path] = low_rank_layer(lm.model.get_submodule(path), [(m, [self.decompositions[m.id].factors(rank)])])
        stored = [_stored_matrix(m, ranks[m.id], form) for m in self.matrices]
        stored += [
            StoredMatrix(m.id, m.path, m.shape, m.max_rank, m.shape[0] * m.shape[1], why) for m, why in self.left_out.items()
        ]
        with (
            replaced_modules(lm.model, layers) if form == "factored" else _replaced_by_products(lm, layers),
            label_as_edited(lm, f"{self.method}/{self.allocation}@{ratio:g}"),
        ):
            yield tuple(stored)


def fit_ranks(
    lm: LanguageModel, rows: Sequence[TokenSequence], *, method: Method = "two-sided", allocation: Allocation = "curvature"
) -> Compression:
    """Decompose all matrices of a model's linear layers, and estimate the loss of dropping each component.

    ``plain`` decomposes the weights. ``whitened`` minimises the change of the layers' outputs on the text (SVD-LLM).
    ``two-sided`` minimises the expected change of the loss: it weighs the outputs by the loss's gradients on the text.
    ``uniform`` keeps the same share of every matrix. The other two choose the ranks by an estimate of the loss: ``curvature``
    by the second moments of each layer's inputs and gradients, ``sensitivity`` by the gradient along each component.

    Args:
        lm: the unchanged model.
        rows: passages; may be empty for the plain method with uniform ranks.
        method: ``plain``, ``whitened`` or ``two-sided``.
        allocation: ``uniform``, ``sensitivity`` or ``curvature``.

    Raises:
        ExportError: if the method or allocation is unknown, or no matrix can be compressed.
        WeightError: if a weight cannot be decomposed.
    """
    for name, value, known in (("method", method, Method), ("allocation", allocation, Allocation)):
        if value not in get_args(known):
            raise ExportError(f"no {name} {value!r}; there are {', '.join(get_args(known))}")
    matrices, left_out = _compressible(lm)
    needs_gradients = method == "two-sided" or allocation == "curvature"
    gradients = gradient_moments(lm, rows, matrices) if needs_gradients else None
    decompositions, losses = _decomposed(lm, rows, matrices, method, allocation, gradients)
    reason = f"no {'token' if gradients is None else 'gradient of the loss'} of the text reaches it"
    left_out |= {m: reason for m in matrices if m.id not in decompositions}
    matrices = tuple(m for m in matrices if m not in left_out)
    if allocation == "sensitivity":
        losses = sensitivities(lm, rows, matrices, lambda m: decompositions[m.id])
    return Compression(method, allocation, matrices, left_out, decompositions, losses)


def _decomposed(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    matrices: Sequence[Matrix],
    method: Method,
    allocation: Allocation,
    gradients: Mapping[str, Tensor] | None,
) -> tuple[DecompositionFile, dict[str, Tensor]]:
    """Return the decomposition of every matrix and its components' losses, but for matrices that the text does not reach."""
    decompositions, losses = DecompositionFile(lm.cache), dict[str, Tensor]()
    if method == "plain" and allocation != "curvature":
        for m in matrices:
            decompositions.add(m.id, decompose(read_matrix(lm.model, m)))
        return decompositions, losses
    for of_block, moments in moments_by_block(lm, rows, matrices):
        for m in of_block:
            M, weight = moments.get(_module_path(m)), read_matrix(lm.model, m)
            G = None if gradients is None else gradients.get(m.id)
            if M is None or (gradients is not None and G is None):
                continue  # the caller names it
            if method == "plain":
                decomposition = decompose(weight)
            else:
                decomposition = whitened(weight, M, G if method == "two-sided" else None)
            decompositions.add(m.id, decomposition)
            if allocation == "curvature" and G is not None:
                losses[m.id] = component_losses(decomposition, M, G).cpu()
        moments.clear()  # before the next block has its own
    return decompositions, losses


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model that was saved, and its perplexity.

    Args:
        saved: the saved model.
        base_perplexity: perplexity of the unchanged model on the held-out text; None without a text.
        perplexity: perplexity of the compressed model on the same text.
        tokens: number of tokens of this text.
    """

    saved: SavedModel
    base_perplexity: float | None
    perplexity: float | None
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return all fields except the record as plain JSON values."""
        measured = {"base_perplexity": self.base_perplexity, "perplexity": self.perplexity, "held_out_tokens": self.tokens}
        return self.saved.as_dict() | measured


def compress(
    lm: LanguageModel,
    out: str | Path,
    *,
    ratio: float,
    calibration: str | Path | None = None,
    method: Method = "two-sided",
    allocation: Allocation = "curvature",
    tokens: int = 32_768,
    form: Form = "factored",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    shard_size: str = "5GB",
    hub_id: str | None = None,
) -> CompressionResult:
    """Compress a model to a share of the parameters of its blocks' matrices, save it, and measure its perplexity.

    Args:
        lm: the unchanged model.
        out: the folder.
        ratio: share of the parameters of the blocks' matrices to keep; embeddings and biases do not change.
        calibration: a text file; required except for the plain method with uniform ranks.
        method: ``plain``, ``whitened`` or ``two-sided``; see ``fit_ranks``.
        allocation: ``uniform``, ``sensitivity`` or ``curvature``; see ``fit_ranks``.
        tokens: maximum number of tokens for calibration.
        form: ``factored``, or ``dense`` for the products of the factors, which does not make the model smaller.
        dtype: dtype of the saved weights; None keeps the model's dtypes.
        overwrite: whether to replace a folder that laserlm wrote before.
        shard_size: maximum size of a weight file, such as ``5GB``.
        hub_id: repository that the folder will be uploaded to, which its card then names.

    Raises:
        ExportError: if an argument is invalid, the ratio cannot be reached, or the folder cannot be written.
    """
    out = Path(out).expanduser().absolute()
    if form == "adapter":
        raise ExportError("compress changes nearly all weights, which no small adapter can; use the form factored or dense")
    options = SaveOptions(form, dtype, overwrite, shard_size, hub_id)
    check_request(lm, out, options)
    text = _read_text(lm, calibration, tokens, method, allocation)
    compression = fit_ranks(lm, () if text is None else text.calibration, method=method, allocation=allocation)
    settings: dict[str, Any] = {"ratio": ratio, "method": method, "allocation": allocation}
    arguments = ["--ratio", f"{ratio:g}", "--method", method, "--allocation", allocation]
    if text is not None:
        settings["text"] = text.as_dict() | {"tokens": tokens}
        settings["perplexity"] = _perplexities(lm, compression, ratio, form, text.held_out)
        arguments += ["--calibration", text.name, "--tokens", str(tokens)]
    entries = {
        "compression": settings,
        "decomposition": {"algorithm": ALGORITHM, "seed": 0},
        "command": command_of(lm, "compress", arguments, out, options),
    }
    saved = write(lm, out, compression.applied(lm, ratio, form), options, entries)
    measured = settings.get("perplexity", {})
    return CompressionResult(saved, measured.get("base"), measured.get("compressed"), measured.get("held_out_tokens", 0))


def _read_text(
    lm: LanguageModel, file: str | Path | None, tokens: int, method: Method, allocation: Allocation
) -> CalibrationText | None:
    is_fitted = (method, allocation) != ("plain", "uniform")
    if file is not None:
        text = read_calibration_text(lm, file, tokens=tokens)
        return text if is_fitted else replace(text, calibration=())
    if is_fitted:
        raise ExportError(
            f"{method} decomposition with {allocation} ranks needs a text: give --calibration FILE, or --method plain "
            "--allocation uniform"
        )
    return None


def _perplexities(lm: LanguageModel, compression: Compression, ratio: float, form: Form, text: str) -> dict[str, float]:
    with compression.applied(lm, ratio, form):
        compressed = text_perplexity(lm, text)
    base = text_perplexity(lm, text)
    return {"base": base.perplexity, "compressed": compressed.perplexity, "held_out_tokens": base.tokens}


def _module_path(m: Matrix) -> str:
    return m.path.rpartition(".")[0]


def _compressible(lm: LanguageModel) -> tuple[tuple[Matrix, ...], dict[Matrix, str]]:
    """Return the matrices that can be stored as factors, and the reason for each of the others."""
    in_grid = default_matrices(lm.matrices)  # text gives no moments of the inputs of a vision tower
    left_out = {m: why for m in in_grid if m.part_of is None and (why := reason_not_factorable(lm, m))}
    matrices = tuple(m for m in in_grid if m.part_of is None and m not in left_out)
    if not matrices:
        why = next(iter(left_out.values()), "it has no matrices")
        raise ExportError(f"{lm.name} has no matrix that can be stored as two factors: {why}")
    return matrices, left_out


def _stored_matrix(m: Matrix, rank: int | None, form: Form) -> StoredMatrix:
    size = m.shape[0] * m.shape[1]
    if rank is None:
        return StoredMatrix(m.id, m.path, m.shape, m.max_rank, size, "kept dense by the allocation of ranks")
    if form == "dense":
        return StoredMatrix(m.id, m.path, m.shape, rank, size, "saved in the dense form")
    return StoredMatrix(m.id, m.path, m.shape, rank, parameters(m.shape, rank))


def _replaced_by_products(lm: LanguageModel, layers: Mapping[str, LowRankLinear]) -> AbstractContextManager[None]:
    """Return a context in which weights are replaced by the products of their factors."""

    def product(path: str) -> Tensor:
        module = path.rpartition(".")[0]
        dense = layers[module].dense().to(lm.model.get_parameter(path))
        return dense.T.contiguous() if isinstance(lm.model.get_submodule(module), Conv1D) else dense

    return replaced_parameters(lm, [f"{module}.weight" for module in layers], product)
