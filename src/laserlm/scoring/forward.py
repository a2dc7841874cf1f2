"""Run rows through a model in padded batches and read off what is scored."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.encoding import Row

__all__ = ["Batch", "Outcome", "Progress", "batches", "run_batch", "run_rows", "too_large"]

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of items done and their total."""


@dataclass(frozen=True)
class Outcome:
    """What the model says at the places of one row.

    Args:
        logprobs: of each target, in nats.
        argmax: most likely token at each place.
        options: log-probabilities of the options at the first place, in nats.
    """

    logprobs: list[float]
    argmax: list[int]
    options: list[float]


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together, as tensors on its device; B rows, K places of each, O options.

    Args:
        rows: their indices.
        inputs: keyword arguments of the model.
        places: (B, K) positions in the logits; a row with fewer places repeats one of its own.
        first: (B,) index in K at which a row's own places start.
        targets: (B, K) answer tokens, 0 where a row has none.
        options: (B, O) choice tokens, 0 where a row has none.
        counts: numbers of targets and of options of each row.
    """

    rows: tuple[int, ...]
    inputs: dict[str, Any]
    places: Tensor
    first: Tensor
    targets: Tensor
    options: Tensor
    counts: tuple[tuple[int, int], ...]


@torch.no_grad()
def run_rows(lm: LanguageModel, rows: Sequence[Row], batch_size: int, on_progress: Progress | None = None) -> list[Outcome]:
    """Return the outcome of every row, in their order; rows are batched by length, and a batch that does not fit is halved.

    Raises:
        ScoringError: if a single row does not fit into memory.
    """
    outcomes: dict[int, Outcome] = {}
    pending = batches(lm, rows, batch_size)[::-1]
    while pending:
        batch = pending.pop()
        full: ScoringError | None = None
        try:
            outcomes.update(zip(batch.rows, run_batch(lm, batch), strict=True))
        except torch.OutOfMemoryError as error:
            full = too_large(lm, error)
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


def too_large(lm: LanguageModel, error: torch.OutOfMemoryError) -> ScoringError:
    """Return the error for a single row that does not fit into memory."""
    return ScoringError(
        f"a single row does not fit into the memory of {lm.device}: {error}; load the model with a smaller dtype, or spread "
        "it with a device_map"
    )


@torch.no_grad()
def batches(lm: LanguageModel, rows: Sequence[Row], batch_size: int) -> list[Batch]:
    """Return the rows in batches, the longest first, so that little is padding and memory runs out at once if ever."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    if lm.kind == "causal" and lm.pads_exactly is None:
        try:
            lm.pads_exactly = _pads_exactly(lm, rows[order[0]], rows[order[-1]])
        except torch.OutOfMemoryError:
            log.warning("two rows do not fit into the memory of %s; scoring without padding", lm.device)
    groups = [order]
    if lm.kind == "causal" and not lm.pads_exactly:
        groups = [list(same) for _, same in groupby(order, key=lambda i: len(rows[i].ids))]
    return [_batch(lm, rows, same[i : i + batch_size]) for same in groups for i in range(0, len(same), batch_size)]


def _pads_exactly(lm: LanguageModel, long: Row, short: Row) -> bool | None:
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
    tolerance = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.2
    if not all(map(math.isfinite, together.logprobs + alone.logprobs)):
        return None
    return all(abs(a - b) <= tolerance for a, b in zip(together.logprobs, alone.logprobs, strict=True))


@torch.no_grad()
def run_batch(lm: LanguageModel, batch: Batch) -> list[Outcome]:
    """Return the outcome of every row of a batch."""
    logits: Tensor = lm.model(**batch.inputs).logits
    if batch.places.shape[1] != logits.shape[1]:
        logits = logits.gather(1, batch.places[..., None].expand(-1, -1, logits.shape[-1]))
    logits = logits.float()  # (B, K, V)
    total = logits.logsumexp(-1)  # (B, K)
    logprobs = logits.gather(-1, batch.targets[..., None])[..., 0] - total  # (B, K)
    at_first = logits[torch.arange(len(batch.rows), device=logits.device), batch.first]  # (B, V)
    chosen = at_first.gather(-1, batch.options) - total.gather(1, batch.first[:, None])  # (B, O)
    lists = [x.cpu().tolist() for x in (logprobs, logits.argmax(-1), chosen)]
    return [
        Outcome(lists[0][b][start : start + targets], lists[1][b][start : start + targets], lists[2][b][:options])
        for b, (start, (targets, options)) in enumerate(zip(batch.first.tolist(), batch.counts, strict=True))
    ]


def _batch(lm: LanguageModel, rows: Sequence[Row], indices: Sequence[int], *, padded: bool | None = None) -> Batch:
    """Put rows into tensors; ``padded`` tells whether positions are given because of padding, None asks the model."""
    chosen = [rows[i] for i in indices]
    pad = int(lm.need_tokenizer().pad_token_id)
    takes = inspect.signature(lm.model.forward).parameters
    ids, mask = _padded([r.ids for r in chosen], pad, left=lm.kind == "causal")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    K = max(len(r.places) for r in chosen)
    first = [0] * len(chosen)
    places = [[*r.places, *[r.places[-1]] * (K - len(r.places))] for r in chosen]
    if lm.kind == "causal":
        # Padded on the left, all answers end at the right edge.
        kept = K if "logits_to_keep" in takes else ids.shape[1]
        first = [K - len(r.places) for r in chosen]
        places = [[kept - K + k for k in range(K)] for _ in chosen]
        if "position_ids" in takes and (lm.pads_exactly if padded is None else padded):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = K
        if "use_cache" in takes:
            inputs["use_cache"] = False
    elif lm.kind == "encoder-decoder":
        inputs |= {"decoder_input_ids": _padded([r.decoder for r in chosen], pad, left=False)[0], "use_cache": False}
    targets = torch.zeros(len(chosen), K, dtype=torch.long)
    options = torch.zeros(len(chosen), max(1, max(len(r.options) for r in chosen)), dtype=torch.long)
    for b, row in enumerate(chosen):
        targets[b, first[b] : first[b] + len(row.targets)] = torch.tensor(row.targets)
        options[b, : len(row.options)] = torch.tensor(row.options, dtype=torch.long)
    return Batch(
        rows=tuple(indices),
        inputs={name: value.to(lm.device) if isinstance(value, Tensor) else value for name, value in inputs.items()},
        places=torch.tensor(places, device=lm.device),
        first=torch.tensor(first, device=lm.device),
        targets=targets.to(lm.device),
        options=options.to(lm.device),
        counts=tuple((len(r.targets), len(r.options)) for r in chosen),
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
