"""Run token sequences through a model in padded batches and read the scores of their targets."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from laserlm.edit.apply import default_cache
from laserlm.errors import ScoringError
from laserlm.models.kinds import TEXT_KINDS
from laserlm.models.language_model import LanguageModel
from laserlm.out_of_memory import uniform_out_of_memory
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.memory import halve_until_it_fits
from laserlm.scoring.model_errors import as_scoring_error
from laserlm.scoring.output_layer import HALF, float32_output_layer
from laserlm.scoring.records import TokenScores, TokenSequence
from laserlm.scoring.texts import padding_token, text_outputs

log = logging.getLogger(__name__)
PASS_OVERHEAD_TOKENS = 64
"""Overhead of a forward pass on a CPU, reading the weights and starting operations, as a number of tokens; measured."""
PADDED_KINDS = ("causal", *TEXT_KINDS)
"""Kinds of models whose scores padding may change, so that it is tested."""
MAX_SCORED_POSITIONS = 2048
"""Largest number of positions scored in one pass of several rows. Each takes memory for one row of logits (V)."""

Progress = Callable[[int, int], None]
"""Called with the number of items done and their total."""


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together, as tensors on its device: B rows, N scored positions, C choice tokens.

    Args:
        rows: indices of the rows.
        inputs: keyword arguments of the model.
        length: tokens of the longest row.
        positions: (2, N) row and position of every scored token, row by row.
        targets: (N,) tokens to score.
        first: (B,) index in N of each row's first position.
        choice_tokens: (B, C) choice tokens, 0 where a row has none.
        counts: numbers of targets and of choice tokens of each row.
        ranked: whether the ranks of the targets are read.
        top: number of most likely tokens to read, by row.
        pad: token that the rows are padded with.
    """

    rows: tuple[int, ...]
    inputs: dict[str, Any]
    length: int
    positions: Tensor
    targets: Tensor
    first: Tensor
    choice_tokens: Tensor
    counts: tuple[tuple[int, int], ...]
    ranked: bool
    top: tuple[int, ...]
    pad: int


@dataclass(frozen=True)
class BatchLogits:
    """The scores of one batch, as tensors.

    Args:
        logprobs: (N,) log-probability of each target, in nats.
        argmax: (N,) most likely token at each position.
        tied: (N,) whether another token is exactly as likely as the most likely one.
        best: (N,) log-probability of the most likely token, in nats.
        choice_logprobs: (B, C) log-probabilities of the choice tokens at each row's first position, in nats.
        ranks: (N,) number of tokens that are more likely than the target; None if no row is ranked.
        last_ranks: (N,) number of other tokens that are at least as likely as the target; None if no row is ranked.
        top: (B, K) most likely tokens at each row's first position, K the largest number of a row; None if that is 0.
    """

    logprobs: Tensor
    argmax: Tensor
    tied: Tensor
    best: Tensor
    choice_logprobs: Tensor
    ranks: Tensor | None
    last_ranks: Tensor | None
    top: Tensor | None


@torch.no_grad()
def run_rows(
    lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int, on_progress: Progress | None = None
) -> list[TokenScores]:
    """Return the token scores of every row, in their order. Rows are batched by length.

    Raises:
        ScoringError: if a single row does not fit into memory.
    """
    outcomes: dict[int, TokenScores] = {}

    def run(indices: Sequence[int]) -> None:
        outcomes.update(zip(indices, run_batch(lm, _batch(lm, rows, indices)), strict=True))
        if on_progress is not None:
            on_progress(len(outcomes), len(rows))

    try:
        halve_until_it_fits(_batch_indices(lm, rows, batch_size), run, default_cache(lm.cache).clear)
    except torch.OutOfMemoryError as error:
        raise out_of_memory_error(lm, error) from None
    return [outcomes[i] for i in range(len(rows))]


def out_of_memory_error(lm: LanguageModel, error: torch.OutOfMemoryError) -> ScoringError:
    """Return the error for a single row that does not fit into memory."""
    return ScoringError(
        f"a single row does not fit into the memory of {lm.device}: {error}. Load the model with a smaller dtype, or spread "
        "it with a device_map."
    )


@torch.no_grad()
def batches(lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
    """Return the rows in batches, the longest first: this saves padding, and memory runs out at once if it ever does."""
    return [_batch(lm, rows, indices) for indices in _batch_indices(lm, rows, batch_size)]


@torch.no_grad()
def _batch_indices(lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int) -> list[list[int]]:
    lm.require_evaluation_mode()
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    batch_size = max(1, min(batch_size, MAX_SCORED_POSITIONS // max(len(r.positions) for r in rows)))
    try:
        if lm.kind in PADDED_KINDS and lm.pads_exactly is None:
            lm.pads_exactly = _pads_exactly(lm, rows[order[0]], rows[order[-1]])
        if lm.reads_positions is None:
            lm.reads_positions = _reads_positions(lm, rows[order[-1]])
    except torch.OutOfMemoryError:
        log.warning("two rows do not fit into the memory of %s; scoring without padding", lm.device)
    if lm.kind in PADDED_KINDS and not lm.pads_exactly:
        groups = [list(same) for _, same in groupby(order, key=lambda i: len(rows[i].ids))]
        return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]
    overhead = PASS_OVERHEAD_TOKENS if lm.device.type == "cpu" else math.inf
    return [order[a:b] for a, b in batch_bounds([len(rows[i].ids) for i in order], batch_size, overhead)]


def batch_bounds(lengths: Sequence[int], batch_size: int, overhead: float) -> list[tuple[int, int]]:
    """Cut rows, the longest first, into the batches of least total cost.

    The cost of a batch is its padded tokens plus ``overhead``. With infinite overhead, the batches are as few as possible.
    """
    n = len(lengths)
    if math.isinf(overhead):
        return [(i, min(n, i + batch_size)) for i in range(0, n, batch_size)]
    # best[i]: the least cost of the first i rows, and the start of their last batch.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i in range(1, n + 1):
        starts = range(max(0, i - batch_size), i)
        best.append(min((best[a][0] + overhead + (i - a) * lengths[a], a) for a in starts))
    cuts: list[tuple[int, int]] = []
    while n:
        cuts.append((best[n][1], n))
        n = best[n][1]
    return cuts[::-1]


def _pads_exactly(lm: LanguageModel, long: TokenSequence, short: TokenSequence) -> bool | None:
    """Return whether a short row, padded next to a long one, scores as it does alone in a plain pass.

    Return None if these rows cannot show it: they have one length, or log-probabilities that are not finite.

    Padding changes the scores if a model carries a state through the padding, or counts positions in its own way.
    """
    if len(short.ids) == len(long.ids) and long.positions[0] > 0:
        short = replace(long, ids=long.ids[1:], positions=tuple(p - 1 for p in long.positions))
    if len(short.ids) == len(long.ids):
        return None
    together = run_batch(lm, _batch(lm, [long, short], (0, 1), padded=True))[1]
    alone = run_batch(lm, _batch(lm, [short], (0,), padded=False))[0]
    outputs = ([*scores.logprobs, *scores.choice_logprobs] for scores in (together, alone))
    return _is_close(lm, *outputs)


def _reads_positions(lm: LanguageModel, row: TokenSequence) -> bool | None:
    """Return whether the output layer gives the same logits if it gets the scored positions only; None if unknown."""
    if lm.kind in TEXT_KINDS:
        return False
    batch = _batch(lm, [row, row], (0, 1))
    all_positions = [x for outcome in run_batch(lm, batch) for x in outcome.logprobs]
    try:
        scored_only = forward_logits(lm, batch, scored_only=True).logprobs.tolist()
    # A model may use the output of its output layer in any way, and fail on another shape in any way.
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, ScoringError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return _is_close(lm, all_positions, scored_only)


def _is_close(lm: LanguageModel, a: Sequence[float], b: Sequence[float]) -> bool | None:
    if not all(map(math.isfinite, [*a, *b])):
        return None
    tolerance = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.2
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


@torch.no_grad()
def run_batch(lm: LanguageModel, batch: Batch) -> list[TokenScores]:
    """Return the token scores of every row of a batch."""
    return token_scores(batch, forward_logits(lm, batch, scored_only=bool(lm.reads_positions)))


def token_scores(batch: Batch, logits: BatchLogits) -> list[TokenScores]:
    """Return the scores of a batch row by row, as plain numbers."""
    logprobs, argmax, tied, best, choices, ranks, last_ranks = (
        [] if x is None else x.cpu().tolist()
        for x in (
            logits.logprobs,
            logits.argmax,
            logits.tied,
            logits.best,
            logits.choice_logprobs,
            logits.ranks,
            logits.last_ranks,
        )
    )
    top = [[]] * len(batch.rows) if logits.top is None else logits.top.cpu().tolist()
    return [
        TokenScores(
            logprobs[start : start + n_targets],
            argmax[start : start + n_targets],
            tied[start : start + n_targets],
            best[start : start + n_targets],
            choices[b][:n_choices],
            ranks[start : start + n_targets],
            last_ranks[start : start + n_targets],
            top[b][: batch.top[b]],
        )
        for b, (start, (n_targets, n_choices)) in enumerate(zip(batch.first.tolist(), batch.counts, strict=True))
    ]


@uniform_out_of_memory()
def forward_logits(lm: LanguageModel, batch: Batch, *, scored_only: bool) -> BatchLogits:
    """Run a batch through the model and read its scores; gradients flow unless the caller turned them off.

    The output layer is computed in float32, whatever the dtype of the model is. Of a reward model and an embedding model,
    the outputs themselves are in the place of log-probabilities.

    Args:
        lm: the model.
        batch: the rows.
        scored_only: whether the output layer gets the scored positions only.

    Raises:
        torch.OutOfMemoryError: if the batch does not fit into memory.
    """
    row, position = batch.positions
    with ExitStack() as stack:
        stack.enter_context(fast_cpu_kernels(lm.device, batch.length))
        if scored_only:
            head = lm.model.get_output_embeddings()
            # A spread model's output layer may be on another device; plain indexing moves a CPU's indices, not a GPU's.
            handle = head.register_forward_pre_hook(
                lambda _module, args: (args[0][row.to(args[0].device), position.to(args[0].device)][None], *args[1:])
            )
            stack.callback(handle.remove)
        stack.enter_context(float32_output_layer(lm.model, is_module=scored_only))
        stack.enter_context(as_scoring_error(lm))
        if lm.kind in TEXT_KINDS:
            logits: Tensor = text_outputs(lm, batch.inputs, batch.pad)[:, None]
        else:
            logits = lm.model(**batch.inputs).logits
    if logits.dtype in HALF:
        _warn_of_rounded_logits(lm.name, logits.dtype)
    logits = (logits[0] if scored_only else logits[row, position]).float()  # (N, V)
    total = logits.new_zeros(len(logits)) if lm.kind in ("reward", "embedding") else logits.logsumexp(-1)  # (N,)
    wanted = logits.gather(-1, batch.targets[:, None])  # (N, 1)
    best, argmax = logits.max(-1)  # (N,) both
    at_first = logits[batch.first]  # (B, V)
    k = min(max(batch.top), logits.shape[-1])
    return BatchLogits(
        logprobs=wanted[:, 0] - total,
        argmax=argmax,
        tied=(logits == best[:, None]).sum(-1) > 1,
        best=best - total,
        choice_logprobs=at_first.gather(-1, batch.choice_tokens) - total[batch.first][:, None],
        ranks=(logits > wanted).sum(-1) if batch.ranked else None,
        last_ranks=(logits >= wanted).sum(-1) - 1 if batch.ranked else None,
        top=at_first.topk(k).indices if k else None,
    )


@cache
def _warn_of_rounded_logits(name: str, dtype: torch.dtype) -> None:
    log.warning("%s rounds its logits to %s, so that some may be equal; load it with dtype float32 for exact ones", name, dtype)


def _batch(lm: LanguageModel, rows: Sequence[TokenSequence], indices: Sequence[int], *, padded: bool | None = None) -> Batch:
    """Put rows into tensors. ``padded`` says whether to pass positions because of padding; None asks the model."""
    chosen = [rows[i] for i in indices]
    pad = padding_token(lm, chosen)
    ids, mask = _pad([r.ids for r in chosen], pad, left=lm.kind == "causal")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    positions = [r.positions for r in chosen]
    if lm.kind == "causal":
        # Padded on the left, all answers end at the right edge, and only the last positions need logits.
        parameters = inspect.signature(lm.model.forward).parameters
        n_logits = max(map(len, positions)) if "logits_to_keep" in parameters else ids.shape[1]
        positions = [tuple(range(n_logits - len(p), n_logits)) for p in positions]
        inputs |= _causal_inputs(parameters, mask, n_logits, has_positions=bool(lm.pads_exactly if padded is None else padded))
    elif lm.kind in TEXT_KINDS:
        inputs |= _text_inputs(inspect.signature(lm.model.forward).parameters, chosen, ids.shape[1])
    elif lm.kind == "encoder-decoder":
        inputs |= {"decoder_input_ids": _pad([r.decoder for r in chosen], pad, left=False)[0], "use_cache": False}
    choice_tokens = torch.zeros(len(chosen), max(1, max(len(r.choice_tokens) for r in chosen)), dtype=torch.long)
    for b, r in enumerate(chosen):
        choice_tokens[b, : len(r.choice_tokens)] = torch.tensor(r.choice_tokens, dtype=torch.long)
    counts = torch.tensor([len(p) for p in positions])
    return Batch(
        rows=tuple(indices),
        inputs={name: value.to(lm.device) if isinstance(value, Tensor) else value for name, value in inputs.items()},
        length=ids.shape[1],
        positions=torch.tensor([[b, p] for b, of_row in enumerate(positions) for p in of_row], device=lm.device).T,
        targets=torch.tensor([t for r in chosen for t in r.targets], device=lm.device),
        first=(counts.cumsum(0) - counts).to(lm.device),
        choice_tokens=choice_tokens.to(lm.device),
        counts=tuple((len(r.targets), len(r.choice_tokens)) for r in chosen),
        ranked=any(r.ranked for r in chosen),
        top=tuple(r.top for r in chosen),
        pad=pad,
    )


def _text_inputs(parameters: Mapping[str, Any], rows: Sequence[TokenSequence], length: int) -> dict[str, Any]:
    """Return the inputs of a model of texts next to ids and mask, as far as its ``forward`` takes them."""
    inputs: dict[str, Any] = {"use_cache": False}
    if any(row.type_ids for row in rows):
        inputs["token_type_ids"] = torch.tensor([[*row.type_ids, *[0] * (length - len(row.type_ids))] for row in rows])
    return {name: value for name, value in inputs.items() if name in parameters}


def _causal_inputs(parameters: Mapping[str, Any], mask: Tensor, n_logits: int, *, has_positions: bool) -> dict[str, Any]:
    """Return the inputs of a causal model next to ids and mask, as far as its ``forward`` takes them."""
    inputs: dict[str, Any] = {"logits_to_keep": n_logits, "use_cache": False}
    if has_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {name: value for name, value in inputs.items() if name in parameters}


def _pad(sequences: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, (B, T) both."""
    T = max(map(len, sequences))
    ids = torch.full((len(sequences), T), pad)
    mask = torch.zeros(len(sequences), T, dtype=torch.long)
    for b, s in enumerate(sequences):
        columns = slice(T - len(s), T) if left else slice(0, len(s))
        ids[b, columns] = torch.tensor(s)
        mask[b, columns] = 1
    return ids, mask
