"""Put token sequences into the tensors of a batch, and cut them into batches of least cost."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laserlm.errors import ScoringError
from laserlm.models.kinds import TEXT_KINDS
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.shared_prompts import JoinedRow, can_be_joined, groups_with_one_prompt, joined_inputs
from laserlm.scoring.texts import padding_token

PASS_OVERHEAD_TOKENS = 64
"""Overhead of a forward pass on a CPU, reading the weights and starting operations, as a number of tokens; measured."""
MAX_SCORED_POSITIONS = 2048
"""Largest number of positions scored in one pass of several rows. Each takes memory for one row of logits (V)."""


@dataclass(frozen=True)
class Batch:
    """Sequences that go through the model together, as tensors on its device: B sequences, N scored positions, C choice tokens.

    Each sequence is a row of the model's inputs, unless sequences with one prompt are joined to one row.

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


def groups_of(
    lm: LanguageModel, rows: Sequence[TokenSequence], indices: Sequence[int], *, joined: bool
) -> list[tuple[int, ...]]:
    """Return the indices in groups, each of which is one row of the model's inputs."""
    if not joined:
        return [(i,) for i in indices]
    groups: list[tuple[int, ...]] = []
    for group in groups_with_one_prompt(rows, indices):
        groups += [group] if can_be_joined(lm, rows, group) else [(i,) for i in group]
    return groups


def make_batch(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    indices: Sequence[int],
    *,
    padded: bool | None = None,
    joined: bool = False,
) -> Batch:
    """Put rows into tensors. ``padded`` says whether to pass positions because of padding; None asks the model."""
    chosen = [rows[i] for i in indices]
    groups = groups_of(lm, rows, indices, joined=joined)
    if any(len(group) > 1 for group in groups):
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
        parameters = inspect.signature(lm.model.forward).parameters
        n_logits = max(map(len, positions)) if "logits_to_keep" in parameters else ids.shape[1]
        positions = [tuple(range(n_logits - len(p), n_logits)) for p in positions]
        inputs |= _causal_inputs(parameters, mask, n_logits, has_positions=bool(lm.pads_exactly if padded is None else padded))
    elif lm.kind in TEXT_KINDS:
        inputs |= _text_inputs(inspect.signature(lm.model.forward).parameters, chosen, ids.shape[1])
    elif lm.kind == "encoder-decoder":
        inputs |= {"decoder_input_ids": _pad([r.decoder for r in chosen], pad, left=False)[0], "use_cache": False}
    return inputs, [(b, p) for b, of_row in enumerate(positions) for p in of_row]


def _joined_inputs(lm: LanguageModel, joined: Sequence[JoinedRow], pad: int) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Return the inputs of a causal model for joined rows, and row and position of every scored token.

    Raises:
        ScoringError: if the model takes no positions.
    """
    parameters = inspect.signature(lm.model.forward).parameters
    if "position_ids" not in parameters:
        raise ScoringError(f"{lm.name} takes no positions, so that each continuation of a prompt needs a row of its own")
    ids, _ = _pad([row.ids for row in joined], pad, left=True)
    T = ids.shape[1]
    n_logits = max(len(row.ids) - row.places[0][0] for row in joined) if "logits_to_keep" in parameters else T
    positions, mask = joined_inputs(joined, T, lm.dtype)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    inputs |= {n: v for n, v in {"logits_to_keep": n_logits, "use_cache": False}.items() if n in parameters}
    # All rows end at the right edge, where the logits end too.
    places = [(b, n_logits - len(row.ids) + p) for b, row in enumerate(joined) for of_one in row.places for p in of_one]
    return inputs, places


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
