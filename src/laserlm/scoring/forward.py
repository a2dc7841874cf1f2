"""Run rows through a model in padded batches and read off what is scored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.encoding import Row

__all__ = ["Outcome", "run_rows"]

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


@torch.no_grad()
def run_rows(lm: LanguageModel, rows: Sequence[Row], batch_size: int, on_progress: Progress | None = None) -> list[Outcome]:
    """Return the outcome of every row, in their order; rows are batched by length, and a batch that does not fit is halved.

    Raises:
        ScoringError: if a single row does not fit into memory.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    outcomes: dict[int, Outcome] = {}
    if lm.kind == "causal" and lm.pads_exactly is None:
        lm.pads_exactly = _pads_exactly(lm, rows[order[0]], rows[order[-1]])
    lengths = [order] if lm.kind != "causal" or lm.pads_exactly else _by_length(rows, order)
    pending = [same[i : i + batch_size] for same in lengths for i in range(0, len(same), batch_size)][::-1]
    while pending:
        batch = pending.pop()
        try:
            found = _run_batch(lm, [rows[i] for i in batch])
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise ScoringError(
                    f"a single row of {len(rows[batch[0]].ids)} tokens does not fit into the memory of {lm.device}: {error}; "
                    "load the model with a smaller dtype, or spread it with a device_map"
                ) from error
            torch.cuda.empty_cache()
            pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            continue
        outcomes.update(zip(batch, found, strict=True))
        if on_progress is not None:
            on_progress(len(outcomes), len(rows))
    return [outcomes[i] for i in range(len(rows))]


def _by_length(rows: Sequence[Row], order: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = {}
    for i in order:
        groups.setdefault(len(rows[i].ids), []).append(i)
    return list(groups.values())


def _pads_exactly(lm: LanguageModel, long: Row, short: Row) -> bool:
    """Find out whether a short row, padded on the left beside a long one, scores as it does alone in a plain pass.

    It does not where a model carries a state through the padding, or counts positions in a way of its own.
    """
    if len(short.ids) == len(long.ids) and long.places[0] > 0:
        short = replace(long, ids=long.ids[1:], places=tuple(p - 1 for p in long.places))
    lm.pads_exactly = True
    together = _run_batch(lm, [long, short])[1]
    lm.pads_exactly = False
    alone = _run_batch(lm, [short])[0]
    tolerance = 1e-3 if lm.dtype in (torch.float32, torch.float64) else 0.2
    return all(abs(a - b) <= tolerance for a, b in zip(together.logprobs, alone.logprobs, strict=True))


def _run_batch(lm: LanguageModel, rows: Sequence[Row]) -> list[Outcome]:
    logits, first = _logits_at_places(lm, rows)  # (B, K, V), and where each row's places start
    B, K, _ = logits.shape
    targets = torch.zeros(B, K, dtype=torch.long)
    options = torch.zeros(B, max(1, max(len(r.options) for r in rows)), dtype=torch.long)
    for b, row in enumerate(rows):
        targets[b, first[b] : first[b] + len(row.targets)] = torch.tensor(row.targets)
        options[b, : len(row.options)] = torch.tensor(row.options, dtype=torch.long)
    logits = logits.float()
    total = logits.logsumexp(-1)  # (B, K)
    logprobs = logits.gather(-1, targets.to(logits.device)[..., None])[..., 0] - total  # (B, K)
    starts = torch.tensor(first, device=logits.device)
    at_first = logits[torch.arange(B, device=logits.device), starts]  # (B, V)
    chosen = at_first.gather(-1, options.to(logits.device)) - total.gather(1, starts[:, None])  # (B, O)
    lists = [x.cpu().tolist() for x in (logprobs, logits.argmax(-1), chosen)]
    return [
        Outcome(
            logprobs=lists[0][b][first[b] : first[b] + len(row.targets)],
            argmax=lists[1][b][first[b] : first[b] + len(row.targets)],
            options=lists[2][b][: len(row.options)],
        )
        for b, row in enumerate(rows)
    ]


def _logits_at_places(lm: LanguageModel, rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
    """Return logits (B, K, V) that hold every row's places, and the index in K at which each row's places start."""
    takes = inspect.signature(lm.model.forward).parameters
    pad = int(lm.need_tokenizer().pad_token_id)
    if lm.kind == "causal":
        ids, mask = _padded([r.ids for r in rows], pad, left=True)
        K = max(len(r.places) for r in rows)
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in takes and lm.pads_exactly:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "logits_to_keep" in takes:
            inputs["logits_to_keep"] = K
        if "use_cache" in takes:
            inputs["use_cache"] = False
        return _call(lm, inputs)[:, -K:], [K - len(r.places) for r in rows]
    ids, mask = _padded([r.ids for r in rows], pad, left=False)
    if lm.kind == "encoder-decoder":
        decoder, _ = _padded([r.decoder for r in rows], pad, left=False)
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": decoder, "use_cache": False}
        return _call(lm, inputs), [r.places[0] for r in rows]
    logits = _call(lm, {"input_ids": ids, "attention_mask": mask})  # (B, T, V)
    K = max(len(r.places) for r in rows)
    places = torch.tensor([[*r.places, *[r.places[-1]] * (K - len(r.places))] for r in rows], device=logits.device)
    return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[-1])), [0] * len(rows)


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


def _call(lm: LanguageModel, inputs: dict[str, Any]) -> Tensor:
    moved = {k: v.to(lm.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
    logits: Tensor = lm.model(**moved).logits
    return logits
