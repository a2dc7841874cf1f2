"""Compress a whole model to a budget of parameters."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import label_as_edited
from laserlm.edit.factors import StoredMatrix, low_rank_layer, reason_not_factorable, replaced
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
    "texts",
]

Method = Literal["plain", "whitened"]
Allocation = Literal["uniform", "sensitivity"]
WINDOW = 512
"""Tokens of a passage of the calibration text."""
HELD_OUT = 0.2
"""Share of the calibration text, at its end, that perplexity is measured on."""


@dataclass(frozen=True)
class CalibrationText:
    """Passages of a text as token sequences.

    Args:
        name: where it came from.
        sha256: of its bytes.
        calibration: passages that the decomposition and the ranks are fitted to.
        held_out: passages from the end of the text that have no part in that.
    """

    name: str
    sha256: str
    calibration: tuple[TokenSequence, ...] = field(repr=False)
    held_out: tuple[TokenSequence, ...] = field(repr=False)


def texts(lm: LanguageModel, file: str | Path, *, tokens: int = 32_768, held_out_tokens: int = 16_384) -> CalibrationText:
    """Cut a text file into passages of 512 tokens: for calibration from the start, for measuring from its last fifth.

    Args:
        lm: a causal model.
        file: plain text.
        tokens: of the passages for calibration, at most.
        held_out_tokens: of those for measuring, at most.

    Raises:
        ExportError: if the file cannot be read, is too short, or the model is not causal.
    """
    if lm.kind != "causal":
        raise ExportError(f"{lm.name} is {lm.kind}; calibration reads text from left to right, which needs a causal model")
    file = Path(file)
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the calibration text {file}: {error}; give a file of plain text in UTF-8") from None
    tokenizer = lm.need_tokenizer()
    window = min(WINDOW, max_length(lm) - 1)
    cut = int(len(text) * (1 - HELD_OUT))
    found = []
    for part, most in ((text[:cut], tokens), (text[cut:], held_out_tokens)):
        ids = tokenizer(part[: 16 * most], add_special_tokens=False).input_ids[:most]
        start = start_token(tokenizer)
        rows = []
        for i, at in enumerate(range(0, len(ids) - window + 1, window)):
            passage = (*start, *ids[at : at + window])
            rows.append(TokenSequence(i, passage[:-1], passage[1:], tuple(range(len(passage) - 1))))
        if not rows:
            raise ExportError(
                f"{file} has no passage of {window} tokens in its first four fifths, or none in its last; give more text"
            )
        found.append(tuple(rows))
    return CalibrationText(str(file), hashlib.sha256(content).hexdigest(), *found)


def perplexity(lm: LanguageModel, rows: Sequence[TokenSequence], *, batch_size: int = 4) -> float:
    """Return the perplexity of passages: the exponential of the mean over their tokens of the log-loss in nats."""
    logprobs = torch.tensor([x for outcome in run_rows(lm, rows, batch_size) for x in outcome.logprobs], dtype=torch.float64)
    return float((-logprobs.mean()).exp())


@dataclass(frozen=True)
class Compression:
    """A model's matrices decomposed, and what each component is worth: ranks for any budget follow.

    Args:
        method: ``plain`` or ``whitened``.
        allocation: ``uniform`` or ``sensitivity``.
        matrices: those that are compressed, fused ones whole.
        left_out: matrices that are not, and why.
        decompositions: by the matrix's id.
        losses: what dropping each component costs, (k,) by the matrix's id; empty for uniform ranks.
    """

    method: Method
    allocation: Allocation
    matrices: tuple[Matrix, ...]
    left_out: dict[Matrix, str]
    decompositions: dict[str, Decomposition] = field(repr=False)
    losses: dict[str, Tensor] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Of all matrices that are compressed."""
        return sum(m.shape[0] * m.shape[1] for m in self.matrices)

    def ranks(self, ratio: float) -> dict[str, int | None]:
        """Return the rank of each matrix, by its id, for a model that keeps this share of its blocks' matrices.

        Those that are left out count whole. None keeps a matrix whole too.

        Raises:
            ExportError: if the ratio is not above 0 and at most 1, or what is left out is more than that already.
        """
        if not 0 < ratio <= 1:
            raise ExportError(f"a ratio of {ratio} is out of range; it is the share of parameters kept, above 0 and at most 1")
        fixed = sum(m.shape[0] * m.shape[1] for m in self.left_out)
        budget = ratio * (self.parameters + fixed) - fixed
        if budget <= 0:
            raise ExportError(
                f"a ratio of {ratio} cannot be reached: matrices that stay whole take {fixed / (self.parameters + fixed):.0%} "
                f"of the parameters ({next(iter(self.left_out.values()))}); give a larger ratio"
            )
        if self.allocation == "uniform":
            found = uniform([m.shape for m in self.matrices], budget / self.parameters)
        else:
            spectra = [Spectrum(m.shape, self.losses[m.id].cpu()) for m in self.matrices]
            found = allocate(spectra, int(budget))
        return {m.id: rank for m, rank in zip(self.matrices, found, strict=True)}

    @contextmanager
    def applied(self, lm: LanguageModel, ratio: float, form: Form = "factored") -> Iterator[tuple[StoredMatrix, ...]]:
        """Let the model be compressed inside a ``with`` block: its matrices as two factors, or multiplied out."""
        ranks = self.ranks(ratio)
        reduced = {m.id: (m, rank) for m in self.matrices if (rank := ranks[m.id]) is not None}
        layers: dict[str, LowRankLinear] = {}
        for m, rank in reduced.values():
            path = m.path.rpartition(".")[0]
            layers[path] = low_rank_layer(lm.model.get_submodule(path), [(m, [self.decompositions[m.id].factors(rank)])])
        holdings = [_holding(m, ranks[m.id], form) for m in self.matrices]
        holdings += [
            StoredMatrix(m.id, m.path, m.shape, m.max_rank, m.shape[0] * m.shape[1], why) for m, why in self.left_out.items()
        ]
        change = replaced(lm.model, layers) if form == "factored" else _multiplied_out(lm, layers)
        with change, label_as_edited(lm, f"{self.method}/{self.allocation}@{ratio:g}"):
            yield tuple(holdings)


def fit_ranks(
    lm: LanguageModel, rows: Sequence[TokenSequence], *, method: Method = "whitened", allocation: Allocation = "sensitivity"
) -> Compression:
    """Decompose all matrices of a model's linear layers, and measure what each component is worth.

    ``plain`` decomposes the weights themselves, ``whitened`` with regard to the inputs that they meet (SVD-LLM).
    ``uniform`` keeps the same share of every matrix; ``sensitivity`` spends the budget where a first-order screen of the
    loss expects most of it.

    Args:
        lm: the unchanged model.
        rows: passages; the plain method with uniform ranks needs none.
        method: ``plain`` or ``whitened``.
        allocation: ``uniform`` or ``sensitivity``.

    Raises:
        ExportError: if there is no such method or allocation, or nothing to compress.
        WeightError: if a weight cannot be decomposed.
    """
    for value, known in ((method, Method), (allocation, Allocation)):
        if value not in get_args(known):
            raise ExportError(f"no {value!r}; there are {', '.join(get_args(known))}")
    matrices, left_out = _compressible(lm)
    paths = {m.id: m.path.rpartition(".")[0] for m in matrices}
    moments = input_moments(lm, rows, list(paths.values())) if method == "whitened" else {}
    if moments:
        left_out |= {m: "the text never reaches it" for m in matrices if paths[m.id] not in moments}
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
    """A compressed model that was saved, and what it costs.

    Args:
        saved: the folder.
        base_perplexity: of the unchanged model on passages that nothing was fitted to; None without a text.
        perplexity: of the compressed model on the same passages.
        tokens: of these passages.
    """

    saved: SavedModel
    base_perplexity: float | None
    perplexity: float | None
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the record as plain JSON values."""
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
        out: the folder to write.
        ratio: share of the parameters of all the blocks' matrices that is kept; embeddings and biases stay as they are.
        calibration: a text file; only the plain method with uniform ranks can do without one.
        method: ``plain`` or ``whitened``; see ``calibrate``.
        allocation: ``uniform`` or ``sensitivity``; see ``calibrate``.
        tokens: of the calibration text, at most.
        form: ``factored``, or ``dense`` for the same weights multiplied out, which is not smaller.
        dtype: of the saved weights; None keeps the model's.
        overwrite: replace a folder that laserlm wrote before.
        shard_size: bytes of a weight file at most.

    Raises:
        ExportError: if something cannot be as asked, or the folder cannot be written.
    """
    out = Path(out).absolute()
    writing = SaveOptions(form, dtype, overwrite, shard_size)
    check_request(lm, out, writing)
    fitted = (method, allocation) != ("plain", "uniform")
    if calibration is None and fitted:
        raise ExportError(
            f"{method} decomposition with {allocation} ranks needs a text: give --calibration FILE, or --method plain "
            "--allocation uniform"
        )
    text = None if calibration is None else texts(lm, calibration, tokens=tokens)
    found = fit_ranks(lm, () if text is None else text.calibration, method=method, allocation=allocation)
    found.ranks(ratio)  # before anything is written
    how: dict[str, Any] = {"ratio": ratio, "method": method, "allocation": allocation}
    options = ["--ratio", f"{ratio:g}", "--method", method, "--allocation", allocation]
    options += [] if text is None else ["--calibration", text.name, "--tokens", str(tokens)]
    base = None if text is None else perplexity(lm, text.held_out)
    held = 0 if text is None else sum(len(row.targets) for row in text.held_out)
    after: list[float] = []

    @contextmanager
    def change() -> Iterator[tuple[StoredMatrix, ...]]:
        with found.applied(lm, ratio, form) as holdings:
            if text is not None:
                after.append(perplexity(lm, text.held_out))
                used = sum(len(row.targets) for row in text.calibration) if fitted else 0
                how["text"] = {"name": text.name, "sha256": text.sha256, "tokens": tokens, "calibrated_on": used}
                how["perplexity"] = {"base": base, "compressed": after[0], "held_out_tokens": held}
            yield holdings

    record = {
        "compression": how,
        "decomposition": {"algorithm": ALGORITHM, "seed": 0},
        "command": command_of(lm, "compress", options, out, writing),
    }
    saved = write(lm, out, change(), writing, record)
    return CompressionResult(saved, base, after[0] if after else None, held)


def _compressible(lm: LanguageModel) -> tuple[tuple[Matrix, ...], dict[Matrix, str]]:
    """Return the matrices that can be held as factors, and why others cannot."""
    left_out = {m: why for m in lm.matrices if m.part_of is None and (why := reason_not_factorable(lm, m))}
    matrices = tuple(m for m in lm.matrices if m.part_of is None and m not in left_out)
    if not matrices:
        why = next(iter(left_out.values()), "it has none at all")
        raise ExportError(f"{lm.name} has no matrix that can be held as two factors: {why}")
    return matrices, left_out


def _holding(m: Matrix, rank: int | None, form: Form) -> StoredMatrix:
    whole = m.shape[0] * m.shape[1]
    if rank is None:
        return StoredMatrix(m.id, m.path, m.shape, m.max_rank, whole, "kept whole, where the budget is worth most")
    if form == "dense":
        return StoredMatrix(m.id, m.path, m.shape, rank, whole, "saved in the dense form")
    return StoredMatrix(m.id, m.path, m.shape, rank, rank * sum(m.shape))


@contextmanager
def _multiplied_out(lm: LanguageModel, layers: Mapping[str, LowRankLinear]) -> Iterator[None]:
    """Put the products of the factors in place of weights until the end of the block."""
    before: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for path, layer in layers.items():
            module = lm.model.get_submodule(path)
            weight = module.get_parameter("weight")
            product = layer.dense().to(weight)
            before.append((weight, weight.data))
            weight.data = product.T.contiguous() if isinstance(module, Conv1D) else product
        yield
    finally:
        for weight, data in before:
            weight.data = data
