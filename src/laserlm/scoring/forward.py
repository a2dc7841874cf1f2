"""Run rows through a model in padded batches and read off what is scored."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
    """Return the outcome of every row, in their order; rows are batched by length, and a batch that does not fit is halved."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    outcomes: dict[int, Outcome] = {}
    pending = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][::-1]
    while pending:
        batch = pending.pop()
        try:
            found = _run_batch(lm, [rows[i] for i in batch])
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            torch.cuda.empty_cache()
            pending += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
            continue
        outcomes.update(zip(batch, found, strict=True))
        if on_progress is not None:
            on_progress(len(outcomes), len(rows))
    return [outcomes[i] for i in range(len(rows))]


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
    lists = [x.tolist() for x in (logprobs.double().cpu(), logits.argmax(-1).cpu(), chosen.double().cpu())]
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
        if "position_ids" in takes:
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
        return _call(lm, inputs), [0] * len(rows)
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
