"""Run rows through a model in padded batches and read off what is scored."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.kernels import fast_cpu_kernels
from laserlm.scoring.tokenize import TokenSequence

__all__ = [
    "Batch",
    "BatchLogits",
    "Progress",
    "TokenScores",
    "batch_bounds",
    "batches",
    "forward_logits",
    "out_of_memory_error",
    "run_batch",
    "run_rows",
    "token_scores",
]

log = logging.getLogger(__name__)
PASS_TOKENS = 64
"""Tokens that a CPU could compute in the time in which a pass reads the weights and starts its operations; measured."""
PLACES = 2048
"""Places scored in one pass at most, unless a single row has more: each takes a vocabulary's worth of memory."""

Progress = Callable[[int, int], None]
"""Called with the number of items done and their total."""


@dataclass(frozen=True)
class TokenScores:
    """What the model says at the places of one row.

    Args:
        logprobs: of each target, in nats.
        argmax: most likely token at each place.
        best: its log-probability, in nats.
        options: log-probabilities of the options at the first place, in nats.
        ranks: how many tokens are more likely than the target, at each place; empty unless the row asks for it.
        top: the likeliest tokens at the first place, the likeliest first; as many as the row asks for.
    """

    logprobs: list[float]
    argmax: list[int]
    best: list[float]
    options: list[float]
    ranks: list[int]
    top: list[int]


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together, as tensors on its device; B rows, N scored places in all, O options.

    Args:
        rows: their indices.
        inputs: keyword arguments of the model.
        length: tokens of the longest row.
        at: (2, N) row and position of every scored place, row by row.
        targets: (N,) answer tokens.
        first: (B,) index in N of each row's first place.
        options: (B, O) choice tokens, 0 where a row has none.
        counts: numbers of targets and of options of each row.
        ranked: whether the ranks of the targets are wanted.
        top: number of likeliest tokens that are wanted, by row.
    """

    rows: tuple[int, ...]
    inputs: dict[str, Any]
    length: int
    at: Tensor
    targets: Tensor
    first: Tensor
    options: Tensor
    counts: tuple[tuple[int, int], ...]
    ranked: bool
    top: tuple[int, ...]


@dataclass(frozen=True)
class BatchLogits:
    """What is read off one batch, as tensors.

    Args:
        logprobs: (N,) of each target, in nats.
        argmax: (N,) most likely token at each place.
        best: (N,) its log-probability, in nats.
        options: (B, O) log-probabilities of the options at each row's first place, in nats.
        ranks: (N,) how many tokens are more likely than the target; None where no row asks for it.
        top: (B, K) likeliest tokens at each row's first place, K the most that a row asks for; None where none asks.
    """

    logprobs: Tensor
    argmax: Tensor
    best: Tensor
    options: Tensor
    ranks: Tensor | None
    top: Tensor | None


@torch.no_grad()
def run_rows(
    lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int, on_progress: Progress | None = None
) -> list[TokenScores]:
    """Return the outcome of every row, in their order; rows are batched by length, and a batch that does not fit is halved.

    Raises:
        ScoringError: if a single row does not fit into memory.
    """
    outcomes: dict[int, TokenScores] = {}
    pending = batches(lm, rows, batch_size)[::-1]
    while pending:
        batch = pending.pop()
        full: ScoringError | None = None
        try:
            outcomes.update(zip(batch.rows, run_batch(lm, batch), strict=True))
        except torch.OutOfMemoryError as error:
            full = out_of_memory_error(lm, error)
        if full is not None:  # outside the handler, whose traceback holds the failed pass's tensors
            if len(batch.rows) == 1:
                raise full
            torch.cuda.empty_cache()
            half = len(batch.rows) // 2
            pending += [_batch(lm, rows, batch.rows[half:]), _batch(lm, rows, batch.rows[:half])]
            continue
        if on_progress is not None:
            on_progress(len(outcomes), len(rows))
    return [outcomes[i] for i in range(len(rows))]


def out_of_memory_error(lm: LanguageModel, error: torch.OutOfMemoryError) -> ScoringError:
    """Return the error for a single row that does not fit into memory."""
    return ScoringError(
        f"a single row does not fit into the memory of {lm.device}: {error}; load the model with a smaller dtype, or spread "
        "it with a device_map"
    )


@torch.no_grad()
def batches(lm: LanguageModel, rows: Sequence[TokenSequence], batch_size: int) -> list[Batch]:
    """Return the rows in batches, the longest first, so that little is padding and memory runs out at once if ever."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    batch_size = max(1, min(batch_size, PLACES // max(len(r.places) for r in rows)))
    try:
        if lm.kind == "causal" and lm.pads_exactly is None:
            lm.pads_exactly = _pads_exactly(lm, rows[order[0]], rows[order[-1]])
        if lm.reads_places is None:
            lm.reads_places = _reads_places(lm, rows[order[-1]])
    except torch.OutOfMemoryError:
        log.warning("two rows do not fit into the memory of %s; scoring without padding", lm.device)
    if lm.kind == "causal" and not lm.pads_exactly:
        groups = [list(same) for _, same in groupby(order, key=lambda i: len(rows[i].ids))]
        return [_batch(lm, rows, same[i : i + batch_size]) for same in groups for i in range(0, len(same), batch_size)]
    cuts = batch_bounds([len(rows[i].ids) for i in order], batch_size, PASS_TOKENS if lm.device.type == "cpu" else math.inf)
    return [_batch(lm, rows, order[a:b]) for a, b in cuts]


def batch_bounds(lengths: Sequence[int], batch_size: int, overhead: float) -> list[tuple[int, int]]:
    """Cut rows, the longest first, into batches that together take the least time.

    A batch takes its padded tokens and ``overhead`` tokens more. Where that is endless, batches are as few as can be.
    """
    n = len(lengths)
    if math.isinf(overhead):
        return [(i, min(n, i + batch_size)) for i in range(0, n, batch_size)]
    # best[i]: the least for the first i rows, and where their last batch starts.
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
    """Find out whether a short row, padded on the left beside a long one, scores as it does alone in a plain pass.

    None if these rows cannot tell: of one length, or with log-probabilities that are not finite.

    It does not where a model carries a state through the padding, or counts positions in a way of its own.
    """
    if len(short.ids) == len(long.ids) and long.places[0] > 0:
        short = replace(long, ids=long.ids[1:], places=tuple(p - 1 for p in long.places))
    if len(short.ids) == len(long.ids):
        return None
    together = run_batch(lm, _batch(lm, [long, short], (0, 1), padded=True))[1]
    alone = run_batch(lm, _batch(lm, [short], (0,), padded=False))[0]
    return _same(lm, together.logprobs, alone.logprobs)


def _reads_places(lm: LanguageModel, row: TokenSequence) -> bool | None:
    """Find out whether the output layer, given the scored places alone, gives their logits; None if the row cannot tell."""
    batch = _batch(lm, [row, row], (0, 1))
    whole = [x for outcome in run_batch(lm, batch) for x in outcome.logprobs]
    try:
        placed = forward_logits(lm, batch, placed=True).logprobs.tolist()
    # A model may do anything with what its output layer gives out, and stumble over another shape in any way.
    except (RuntimeError, LookupError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        return False
    return _same(lm, whole, placed)


def _same(lm: LanguageModel, a: Sequence[float], b: Sequence[float]) -> bool | None:
    if not all(map(math.isfinite, [*a, *b])):
        return None
    tolerance = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.2
    return all(abs(x - y) <= tolerance for x, y in zip(a, b, strict=True))


@torch.no_grad()
def run_batch(lm: LanguageModel, batch: Batch) -> list[TokenScores]:
    """Return the outcome of every row of a batch."""
    return token_scores(batch, forward_logits(lm, batch, placed=bool(lm.reads_places)))


def token_scores(batch: Batch, reading: BatchLogits) -> list[TokenScores]:
    """Return what was read off a batch row by row, as plain numbers."""
    logprobs, argmax, best, options = (
        x.cpu().tolist() for x in (reading.logprobs, reading.argmax, reading.best, reading.options)
    )
    ranks = [] if reading.ranks is None else reading.ranks.cpu().tolist()
    top = [[]] * len(batch.rows) if reading.top is None else reading.top.cpu().tolist()
    return [
        TokenScores(
            logprobs[start : start + targets],
            argmax[start : start + targets],
            best[start : start + targets],
            options[b][:chosen],
            ranks[start : start + targets],
            top[b][: batch.top[b]],
        )
        for b, (start, (targets, chosen)) in enumerate(zip(batch.first.tolist(), batch.counts, strict=True))
    ]


def forward_logits(lm: LanguageModel, batch: Batch, *, placed: bool) -> BatchLogits:
    """Run a batch through the model and read off what is scored; gradients flow unless the caller turned them off.

    Args:
        lm: the model.
        batch: the rows.
        placed: whether the output layer is given the scored places alone.
    """
    row, place = batch.at
    with ExitStack() as stack:
        stack.enter_context(fast_cpu_kernels(lm.device, batch.length))
        if placed:
            head = lm.model.get_output_embeddings()
            # A spread model's output layer may be on another device; plain indexing moves a CPU's indices, not a GPU's.
            handle = head.register_forward_pre_hook(
                lambda _module, args: (args[0][row.to(args[0].device), place.to(args[0].device)][None], *args[1:])
            )
            stack.callback(handle.remove)
        logits: Tensor = lm.model(**batch.inputs).logits
        logits = (logits[0] if placed else logits[row, place]).float()  # (N, V)
    total = logits.logsumexp(-1)  # (N,)
    wanted = logits.gather(-1, batch.targets[:, None])  # (N, 1)
    best, argmax = logits.max(-1)  # (N,) both
    at_first = logits[batch.first]  # (B, V)
    k = min(max(batch.top), logits.shape[-1])
    return BatchLogits(
        logprobs=wanted[:, 0] - total,
        argmax=argmax,
        best=best - total,
        options=at_first.gather(-1, batch.options) - total[batch.first][:, None],
        ranks=(logits > wanted).sum(-1) if batch.ranked else None,
        top=at_first.topk(k).indices if k else None,
    )


def _batch(lm: LanguageModel, rows: Sequence[TokenSequence], indices: Sequence[int], *, padded: bool | None = None) -> Batch:
    """Put rows into tensors; ``padded`` tells whether positions are given because of padding, None asks the model."""
    chosen = [rows[i] for i in indices]
    pad = int(lm.need_tokenizer().pad_token_id)
    takes = inspect.signature(lm.model.forward).parameters
    ids, mask = _padded([r.ids for r in chosen], pad, left=lm.kind == "causal")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    places = [r.places for r in chosen]
    if lm.kind == "causal":
        # Padded on the left, all answers end at the right edge, and only the last places need logits.
        kept = max(map(len, places)) if "logits_to_keep" in takes else ids.shape[1]
        places = [tuple(range(kept - len(p), kept)) for p in places]
        if "position_ids" in takes and (lm.pads_exactly if padded is None else padded):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = kept
        if "use_cache" in takes:
            inputs["use_cache"] = False
    elif lm.kind == "encoder-decoder":
        inputs |= {"decoder_input_ids": _padded([r.decoder for r in chosen], pad, left=False)[0], "use_cache": False}
    options = torch.zeros(len(chosen), max(1, max(len(r.options) for r in chosen)), dtype=torch.long)
    for b, r in enumerate(chosen):
        options[b, : len(r.options)] = torch.tensor(r.options, dtype=torch.long)
    counts = torch.tensor([len(p) for p in places])
    return Batch(
        rows=tuple(indices),
        inputs={name: value.to(lm.device) if isinstance(value, Tensor) else value for name, value in inputs.items()},
        length=ids.shape[1],
        at=torch.tensor([[b, p] for b, of_row in enumerate(places) for p in of_row], device=lm.device).T,
        targets=torch.tensor([t for r in chosen for t in r.targets], device=lm.device),
        first=(counts.cumsum(0) - counts).to(lm.device),
        options=options.to(lm.device),
        counts=tuple((len(r.targets), len(r.options)) for r in chosen),
        ranked=any(r.ranked for r in chosen),
        top=tuple(r.top for r in chosen),
    )


def _padded(sequences: Sequence[Sequence[int]], pad: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Return ids and attention mask, (B, T) both."""
    T = max(map(len, sequences))
    ids = torch.full((len(sequences), T), pad)
    mask = torch.zeros(len(sequences), T, dtype=torch.long)
    for b, s in enumerate(sequences):
        where = slice(T - len(s), T) if left else slice(0, len(s))
        ids[b, where] = torch.tensor(s)
        mask[b, where] = 1
    return ids, mask
