"""Put token sequences into the tensors of a batch, and cut them into batches of least cost."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from laserlm.errors import ScoringError
from laserlm.models.kinds import TEXT_KINDS
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import language_config
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.shared_prompts import Group, JoinedRow, joined_inputs
from laserlm.scoring.texts import padding_token

PASS_OVERHEAD_TOKENS = 64
"""Overhead of a forward pass on a CPU, reading the weights and starting operations, as a number of tokens; measured."""
MAX_SCORED_POSITIONS = 2048
"""Largest number of positions scored in one pass of several rows. Each takes memory for one row of logits (V)."""


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together, as tensors on its device: B sequences, N scored positions, C choice tokens.

    Each sequence is a row of the model's inputs, unless sequences that begin alike are joined to one row.

    Args:
        rows: indices of the sequences.
        inputs: keyword arguments of the model.
        length: tokens of the longest row.
        positions: (2, N) row and position of every scored token, sequence by sequence.
        targets: (N,) tokens to score.
        first: (B,) index in N of each sequence's first position.
        choice_tokens: (B, C) choice tokens, 0 where a sequence has none.
        counts: numbers of targets and of choice tokens of each sequence.
        ranked: whether the ranks of the targets are read.
        top: number of most likely tokens to read, by sequence.
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


def batch_bounds(
    lengths: Sequence[int], batch_size: int, overhead: float, sizes: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Cut rows, the longest first, into the batches of least total cost.

    The cost of a batch is its padded tokens plus ``overhead``. With infinite overhead, the batches are as few as possible.

    Args:
        lengths: tokens of each row.
        batch_size: sequences of a batch.
        overhead: tokens that take as long as the overhead of a pass.
        sizes: sequences in each row; None counts each row as one.
    """
    n = len(lengths)
    before = [0, *accumulate(sizes or [1] * n)]  # sequences in the rows before each
    if math.isinf(overhead):
        starts = [0]
        for i in range(1, n):
            if before[i + 1] - before[starts[-1]] > batch_size:
                starts.append(i)
        return list(pairwise([*starts, n]))
    # best[i]: the least cost of the first i rows, and the start of their last batch.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i in range(1, n + 1):
        first = min(i - 1, bisect_left(before, before[i] - batch_size))
        best.append(min((best[a][0] + overhead + (i - a) * lengths[a], a) for a in range(first, i)))
    cuts: list[tuple[int, int]] = []
    while n:
        cuts.append((best[n][1], n))
        n = best[n][1]
    return cuts[::-1]


def make_batch(
    lm: LanguageModel, rows: Sequence[TokenSequence], groups: Sequence[Group], *, padded: bool | None = None
) -> Batch:
    """Put groups of sequences into tensors, a row for each group.

    Args:
        lm: the model.
        rows: all sequences.
        groups: of the batch.
        padded: whether to pass positions because of padding; None asks the model.
    """
    indices = [i for group in groups for i in group]
    chosen = [rows[i] for i in indices]
    if len(indices) > len(groups):
        inputs, places = _joined_inputs(lm, [JoinedRow.of(rows, group) for group in groups], padding_token(lm, chosen))
    else:
        inputs, places = _inputs(lm, chosen, padded=padded)
    choice_tokens = torch.zeros(len(chosen), max(1, max(len(r.choice_tokens) for r in chosen)), dtype=torch.long)
    for b, r in enumerate(chosen):
        choice_tokens[b, : len(r.choice_tokens)] = torch.tensor(r.choice_tokens, dtype=torch.long)
    counts = torch.tensor([len(r.positions) for r in chosen])
    return Batch(
        rows=tuple(indices),
        inputs={name: value.to(lm.device) if isinstance(value, Tensor) else value for name, value in inputs.items()},
        length=inputs["input_ids"].shape[1],
        positions=torch.tensor(places, device=lm.device).T,
        targets=torch.tensor([t for r in chosen for t in r.targets], device=lm.device),
        first=(counts.cumsum(0) - counts).to(lm.device),
        choice_tokens=choice_tokens.to(lm.device),
        counts=tuple((len(r.targets), len(r.choice_tokens)) for r in chosen),
        ranked=any(r.ranked for r in chosen),
        top=tuple(r.top for r in chosen),
        pad=padding_token(lm, chosen),
    )


def _inputs(
    lm: LanguageModel, chosen: Sequence[TokenSequence], *, padded: bool | None
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Return the inputs of the model for rows, and row and position of every scored token."""
    pad = padding_token(lm, chosen)
    ids, mask = _pad([r.ids for r in chosen], pad, left=lm.kind == "causal")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    positions = [r.positions for r in chosen]
    if lm.kind == "causal":
        # Padded on the left, all answers end at the right edge, and only the last positions need logits.
        n_logits = max(map(len, positions)) if _has_parameter(lm, "logits_to_keep") else ids.shape[1]
        positions = [tuple(range(n_logits - len(p), n_logits)) for p in positions]
        inputs |= _causal_inputs(lm, mask, n_logits, has_positions=bool(lm.pads_exactly if padded is None else padded))
    elif lm.kind in TEXT_KINDS:
        inputs |= _text_inputs(lm, chosen, ids.shape[1])
    elif lm.kind == "encoder-decoder":
        inputs |= {"decoder_input_ids": _pad([r.decoder for r in chosen], pad, left=False)[0], "use_cache": False}
    return inputs, [(b, p) for b, of_row in enumerate(positions) for p in of_row]


def _joined_inputs(lm: LanguageModel, joined: Sequence[JoinedRow], pad: int) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Return the inputs of a causal model for joined rows, and row and position of every scored token.

    Raises:
        ScoringError: if the model takes no positions.
    """
    if not _has_parameter(lm, "position_ids"):
        raise ScoringError(f"{lm.name} takes no positions of tokens, so that each sequence needs a row of its own")
    ids, _ = _pad([row.ids for row in joined], pad, left=True)
    T = ids.shape[1]
    n_logits = max(len(row.ids) - min(map(min, row.places)) for row in joined) if _has_parameter(lm, "logits_to_keep") else T
    positions, mask = joined_inputs(joined, T, lm.dtype)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs |= _filter_inputs(lm, {"logits_to_keep": n_logits, "use_cache": False})
    # All rows end at the right edge, where the logits end too.
    places = [(b, n_logits - len(row.ids) + p) for b, row in enumerate(joined) for of_one in row.places for p in of_one]
    return inputs, places


def _text_inputs(lm: LanguageModel, rows: Sequence[TokenSequence], length: int) -> dict[str, Any]:
    """Return the inputs of a model of texts next to ids and mask, as far as its ``forward`` takes them."""
    inputs: dict[str, Any] = {"use_cache": False}
    if any(row.type_ids for row in rows):
        inputs["token_type_ids"] = torch.tensor([[*row.type_ids, *[0] * (length - len(row.type_ids))] for row in rows])
    return _filter_inputs(lm, inputs)


def _causal_inputs(lm: LanguageModel, mask: Tensor, n_logits: int, *, has_positions: bool) -> dict[str, Any]:
    """Return the inputs of a causal model next to ids and mask, as far as its ``forward`` takes them."""
    inputs: dict[str, Any] = {"logits_to_keep": n_logits, "use_cache": False}
    if has_positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return _filter_inputs(lm, inputs)


def _has_parameter(lm: LanguageModel, name: str) -> bool:
    return name in inspect.signature(lm.model.forward).parameters


def _filter_inputs(lm: LanguageModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs that a model's ``forward`` names, and ``use_cache`` also where it hands on what it does not name.

    A model that keeps keys and values needs more memory, and a block that is run twice finds those of its first run.
    """
    parameters = inspect.signature(lm.model.forward).parameters
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    keeps = hands_on and getattr(language_config(lm.model.config), "use_cache", None) is not None
    return {name: value for name, value in inputs.items() if name in parameters or (name == "use_cache" and keeps)}


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
