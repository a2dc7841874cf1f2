"""Compress a whole model to a budget of parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import label_as_edited, replaced_parameters
from laserlm.edit.factors import StoredMatrix, low_rank_layer, reason_not_factorable, replaced_modules
from laserlm.errors import ExportError
from laserlm.export.checkpoint import Form, SavedModel, SaveOptions, check_request, command_of, write
from laserlm.linalg.allocation import Spectrum, allocate, uniform
from laserlm.linalg.decomposition import ALGORITHM, Decomposition, decompose, whitened
from laserlm.low_rank import LowRankLinear
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix
from laserlm.scoring.forward import run_rows
from laserlm.scoring.tokenize import TokenSequence, max_length, start_token
from laserlm.searching.moments import input_moments
from laserlm.searching.screen import sensitivities

__all__ = [
    "Allocation",
    "CalibrationText",
    "Compression",
    "CompressionResult",
    "Method",
    "compress",
    "fit_ranks",
    "perplexity",
    "read_calibration_text",
]

Method = Literal["plain", "whitened"]
Allocation = Literal["uniform", "sensitivity"]
PASSAGE_TOKENS = 512
"""Length of a passage of the calibration text."""
HELD_OUT_SHARE = 0.2
"""Share of the calibration text, at its end, that is held out to measure perplexity."""


@dataclass(frozen=True)
class CalibrationText:
    """Passages of a text file as token sequences.

    Args:
        name: path of the file.
        sha256: sha256 of its bytes.
        calibration: passages that the decompositions and ranks are fitted to.
        held_out: passages from the end of the text, for measuring perplexity.
    """

    name: str
    sha256: str
    calibration: tuple[TokenSequence, ...] = field(repr=False)
    held_out: tuple[TokenSequence, ...] = field(repr=False)


def read_calibration_text(
    lm: LanguageModel, file: str | Path, *, tokens: int = 32_768, held_out_tokens: int = 16_384
) -> CalibrationText:
    """Cut a text file into passages of 512 tokens: from the start for calibration, from the last fifth to be held out.

    Args:
        lm: a causal model.
        file: plain text in UTF-8.
        tokens: maximum number of tokens for calibration.
        held_out_tokens: maximum number of held-out tokens.

    Raises:
        ExportError: if the file cannot be read or is too short, or the model is not causal.
    """
    if lm.kind != "causal":
        raise ExportError(f"{lm.name} is {lm.kind}; calibration needs a causal model")
    file = Path(file)
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the calibration text {file}: {error}; give a file of plain text in UTF-8") from None
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    length = min(PASSAGE_TOKENS, max_length(lm) - 1)
    calibration = _passages(lm, text[:cut], length, tokens)
    held_out = _passages(lm, text[cut:], length, held_out_tokens)
    if not calibration or not held_out:
        where = "last fifth" if calibration else "first four fifths"
        raise ExportError(f"{file} has no passage of {length} tokens in its {where}; give a longer text")
    return CalibrationText(str(file), hashlib.sha256(content).hexdigest(), calibration, held_out)


def _passages(lm: LanguageModel, text: str, length: int, max_tokens: int) -> tuple[TokenSequence, ...]:
    tokenizer = lm.require_tokenizer()
    # Tokenising all of a long text would be slow; 16 characters per token are more than enough.
    ids = tokenizer(text[: 16 * max_tokens], add_special_tokens=False).input_ids[:max_tokens]
    rows = []
    for i, start in enumerate(range(0, len(ids) - length + 1, length)):
        passage = (*start_token(tokenizer), *ids[start : start + length])
        rows.append(TokenSequence(i, passage[:-1], passage[1:], tuple(range(len(passage) - 1))))
    return tuple(rows)


def perplexity(lm: LanguageModel, rows: Sequence[TokenSequence], *, batch_size: int = 4) -> float:
    """Return the perplexity of passages: exp(mean log-loss per token in nats)."""
    logprobs = torch.tensor([x for outcome in run_rows(lm, rows, batch_size) for x in outcome.logprobs], dtype=torch.float64)
    return float((-logprobs.mean()).exp())


@dataclass(frozen=True)
class Compression:
    """The decompositions of a model's matrices and the loss of each component, which give ranks for any budget.

    Args:
        method: ``plain`` or ``whitened``.
        allocation: ``uniform`` or ``sensitivity``.
        matrices: the compressed matrices; fused matrices are compressed as a whole.
        left_out: the other matrices and the reason for each.
        decompositions: decomposition of each matrix, by the matrix's id.
        losses: (k,) loss of dropping each component, by the matrix's id; empty for uniform ranks.
    """

    method: Method
    allocation: Allocation
    matrices: tuple[Matrix, ...]
    left_out: dict[Matrix, str]
    decompositions: dict[str, Decomposition] = field(repr=False)
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
    lm: LanguageModel, rows: Sequence[TokenSequence], *, method: Method = "whitened", allocation: Allocation = "sensitivity"
) -> Compression:
    """Decompose all matrices of a model's linear layers, and estimate the loss of dropping each component.

    ``plain`` decomposes the weights. ``whitened`` minimises the change of the layers' outputs on the text (SVD-LLM).
    ``uniform`` keeps the same share of every matrix. ``sensitivity`` chooses the ranks by a first-order estimate of the loss.

    Args:
        lm: the unchanged model.
        rows: passages; may be empty for the plain method with uniform ranks.
        method: ``plain`` or ``whitened``.
        allocation: ``uniform`` or ``sensitivity``.

    Raises:
        ExportError: if the method or allocation is unknown, or no matrix can be compressed.
        WeightError: if a weight cannot be decomposed.
    """
    for name, value, known in (("method", method, Method), ("allocation", allocation, Allocation)):
        if value not in get_args(known):
            raise ExportError(f"no {name} {value!r}; there are {', '.join(get_args(known))}")
    matrices, left_out = _compressible(lm)
    paths = {m.id: _module_path(m) for m in matrices}
    moments = input_moments(lm, rows, list(paths.values())) if method == "whitened" else {}
    if moments:
        left_out |= {m: "no token of the text reaches it" for m in matrices if paths[m.id] not in moments}
        matrices = tuple(m for m in matrices if m not in left_out)
    decompositions = {}
    for m in matrices:
        weight = read_matrix(lm.model, m)
        decompositions[m.id] = whitened(weight, moments[paths[m.id]]) if moments else decompose(weight)
    losses = {}
    if allocation == "sensitivity":
        losses = sensitivities(lm, rows, matrices, lambda m: decompositions[m.id])
    return Compression(method, allocation, matrices, left_out, decompositions, losses)


@dataclass(frozen=True)
class CompressionResult:
    """A compressed model that was saved, and its perplexity.

    Args:
        saved: the saved model.
        base_perplexity: perplexity of the unchanged model on the held-out passages; None without a text.
        perplexity: perplexity of the compressed model on the same passages.
        tokens: number of tokens in these passages.
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
    method: Method = "whitened",
    allocation: Allocation = "sensitivity",
    tokens: int = 32_768,
    form: Form = "factored",
    dtype: str | torch.dtype | None = None,
    overwrite: bool = False,
    shard_size: str = "5GB",
) -> CompressionResult:
    """Compress a model to a share of the parameters of its blocks' matrices, save it, and measure its perplexity.

    Args:
        lm: the unchanged model.
        out: the folder.
        ratio: share of the parameters of the blocks' matrices to keep; embeddings and biases do not change.
        calibration: a text file; required except for the plain method with uniform ranks.
        method: ``plain`` or ``whitened``; see ``fit_ranks``.
        allocation: ``uniform`` or ``sensitivity``; see ``fit_ranks``.
        tokens: maximum number of tokens for calibration.
        form: ``factored``, or ``dense`` for the products of the factors, which does not make the model smaller.
        dtype: dtype of the saved weights; None keeps the model's dtypes.
        overwrite: whether to replace a folder that laserlm wrote before.
        shard_size: maximum size of a weight file, such as ``5GB``.

    Raises:
        ExportError: if an argument is invalid, the ratio cannot be reached, or the folder cannot be written.
    """
    out = Path(out).absolute()
    options = SaveOptions(form, dtype, overwrite, shard_size)
    check_request(lm, out, options)
    is_fitted = (method, allocation) != ("plain", "uniform")
    if calibration is None and is_fitted:
        raise ExportError(
            f"{method} decomposition with {allocation} ranks needs a text: give --calibration FILE, or --method plain "
            "--allocation uniform"
        )
    text = None if calibration is None else read_calibration_text(lm, calibration, tokens=tokens)
    compression = fit_ranks(lm, () if text is None else text.calibration, method=method, allocation=allocation)
    compression.ranks(ratio)  # raises if the ratio cannot be reached
    settings: dict[str, Any] = {"ratio": ratio, "method": method, "allocation": allocation}
    arguments = ["--ratio", f"{ratio:g}", "--method", method, "--allocation", allocation]
    base = compressed = None
    n_tokens = 0
    if text is not None:
        arguments += ["--calibration", text.name, "--tokens", str(tokens)]
        n_tokens = _count_targets(text.held_out)
        n_calibration = _count_targets(text.calibration) if is_fitted else 0
        settings["text"] = {"name": text.name, "sha256": text.sha256, "tokens": tokens, "calibrated_on": n_calibration}
        base = perplexity(lm, text.held_out)
        with compression.applied(lm, ratio, form):
            compressed = perplexity(lm, text.held_out)
        settings["perplexity"] = {"base": base, "compressed": compressed, "held_out_tokens": n_tokens}
    entries = {
        "compression": settings,
        "decomposition": {"algorithm": ALGORITHM, "seed": 0},
        "command": command_of(lm, "compress", arguments, out, options),
    }
    saved = write(lm, out, compression.applied(lm, ratio, form), options, entries)
    return CompressionResult(saved, base, compressed, n_tokens)


def _count_targets(rows: Sequence[TokenSequence]) -> int:
    return sum(len(row.targets) for row in rows)


def _module_path(m: Matrix) -> str:
    return m.path.rpartition(".")[0]


def _compressible(lm: LanguageModel) -> tuple[tuple[Matrix, ...], dict[Matrix, str]]:
    """Return the matrices that can be stored as factors, and the reason for each of the others."""
    left_out = {m: why for m in lm.matrices if m.part_of is None and (why := reason_not_factorable(lm, m))}
    matrices = tuple(m for m in lm.matrices if m.part_of is None and m not in left_out)
    if not matrices:
        why = next(iter(left_out.values()), "it has no matrices")
        raise ExportError(f"{lm.name} has no matrix that can be stored as two factors: {why}")
    return matrices, left_out


def _stored_matrix(m: Matrix, rank: int | None, form: Form) -> StoredMatrix:
    parameters = m.shape[0] * m.shape[1]
    if rank is None:
        return StoredMatrix(m.id, m.path, m.shape, m.max_rank, parameters, "kept dense by the allocation of ranks")
    if form == "dense":
        return StoredMatrix(m.id, m.path, m.shape, rank, parameters, "saved in the dense form")
    return StoredMatrix(m.id, m.path, m.shape, rank, rank * sum(m.shape))


def _replaced_by_products(lm: LanguageModel, layers: Mapping[str, LowRankLinear]) -> AbstractContextManager[None]:
    """Return a context in which weights are replaced by the products of their factors."""

    def product(path: str) -> Tensor:
        module = path.rpartition(".")[0]
        dense = layers[module].dense().to(lm.model.get_parameter(path))
        return dense.T.contiguous() if isinstance(lm.model.get_submodule(module), Conv1D) else dense

    return replaced_parameters(lm, [f"{module}.weight" for module in layers], product)
