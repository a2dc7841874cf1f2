"""Several sequences that begin alike in one row, so that the model reads their common tokens once.

What differs follows the common tokens, sequence by sequence. Each token has the position that it has in its own sequence, and
the attention mask lets it see the common tokens and its own sequence. So a causal model that uses both gives the scores of
separate rows, up to rounding. Choices have their prompt in common, and questions the words or instructions at their start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from laserlm.models.language_model import LanguageModel
from laserlm.scoring.records import TokenSequence

Group = tuple[int, ...]
"""Indices of sequences that are one row."""
WINDOWS = ("window", "chunk_size")
"""Parts of the names of settings that bound how far a token sees. A mask for each pair of tokens takes this bound away."""
MAX_SEQUENCES = 16
"""Most sequences in one row."""
ATTENTION_TOKENS = 1000
"""Tokens of a row whose attention takes about as long as the rest of a block; an estimate for blocks 576 wide."""


@dataclass(frozen=True)
class JoinedRow:
    """Sequences with P common tokens, as one row of T tokens.

    Args:
        ids: (T,) the common tokens, and then those that follow them in each sequence.
        places: position in the row of each scored token, by sequence.
        parts: (T,) 0 for common tokens, and the number of the sequence, from 1, for others.
        positions: (T,) position of each token in its own sequence.
    """

    ids: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    parts: tuple[int, ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[TokenSequence], group: Group) -> JoinedRow:
        """Join sequences; a single one stays as it is."""
        P = common_length(rows, group)
        ids, parts, positions = list(rows[group[0]].ids[:P]), [0] * P, list(range(P))
        places: list[tuple[int, ...]] = []
        for number, member in enumerate(group, start=1):
            row, start = rows[member], len(ids)
            places.append(tuple(p if p < P else start + p - P for p in row.positions))
            ids += row.ids[P:]
            parts += [number] * (len(row.ids) - P)
            positions += range(P, len(row.ids))
        return cls(tuple(ids), tuple(places), tuple(parts), tuple(positions))


def common_length(rows: Sequence[TokenSequence], group: Group) -> int:
    """Return the number of tokens that all sequences of a group begin with."""
    first, last = min(rows[i].ids for i in group), max(rows[i].ids for i in group)
    return _common(first, last)


def joined_length(rows: Sequence[TokenSequence], group: Group) -> int:
    """Return the number of tokens of a group in one row."""
    return sum(len(rows[i].ids) for i in group) - (len(group) - 1) * common_length(rows, group)


def cost_of_row(tokens: int) -> float:
    """Return the work of a row, in tokens, its attention included."""
    return tokens + tokens**2 / ATTENTION_TOKENS


def groups_that_begin_alike(lm: LanguageModel, rows: Sequence[TokenSequence], most: int) -> list[Group]:
    """Return all indices in groups of least cost: the tokens of each row, and what its attention takes in addition.

    Only a CPU takes sequences of several examples in one row: for a GPU it was not measured.

    Args:
        lm: the model.
        rows: the sequences.
        most: sequences in one row, at most.
    """
    several_examples = lm.device.type == "cpu"
    order = sorted(range(len(rows)), key=lambda i: (0 if several_examples else rows[i].example, rows[i].ids, i))
    # Of sequences in this order, a range begins alike as far as its neighbours do.
    common = [_common(rows[a].ids, rows[b].ids) for a, b in pairwise(order)]
    most, limit = min(most, MAX_SEQUENCES), most_tokens(lm)
    # best[i]: the least cost of the first i sequences, and where their last group starts.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for i in range(1, len(order) + 1):
        options: list[tuple[float, int]] = []
        total, shared = 0, math.inf
        for start in range(i - 1, max(-1, i - 1 - most), -1):
            row = rows[order[start]]
            if start < i - 1:
                shared = min(shared, common[start])
                if not shared or (not several_examples and row.example != rows[order[i - 1]].example):
                    break
            total += len(row.ids)
            T = total - (i - 1 - start) * (0 if start == i - 1 else int(shared))
            if start == i - 1 or limit >= T:
                options.append((best[start][0] + cost_of_row(T), start))
        best.append(min(options))
    groups: list[Group] = []
    n = len(order)
    while n:
        groups.append(tuple(sorted(order[best[n][1] : n])))
        n = best[n][1]
    return groups


def most_tokens(lm: LanguageModel) -> float:
    """Return the most tokens of a row in which every token of the model sees all before it, by the names of its settings."""
    config: Any = lm.model.config.get_text_config(decoder=True)
    # Qwen's max_window_layers is a number of layers.
    settings = {name: value for name, value in config.to_dict().items() if not name.endswith("_layers")}
    windows = [value for name, value in settings.items() if any(part in name for part in WINDOWS)]
    return min((w for w in windows if type(w) is int and w > 0), default=math.inf)


def joined_inputs(joined: Sequence[JoinedRow], T: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return positions (B, T) and the attention mask (B, 1, T, T), 0 where a token sees another, of rows padded on the left."""
    B = len(joined)
    positions = torch.zeros(B, T, dtype=torch.long)
    parts = torch.full((B, T), -1)
    for b, row in enumerate(joined):
        positions[b, T - len(row.ids) :] = torch.tensor(row.positions)
        parts[b, T - len(row.ids) :] = torch.tensor(row.parts)
    of_query, of_key = parts[:, :, None], parts[:, None, :]
    seen = torch.ones(T, T, dtype=torch.bool).tril() & (of_key >= 0) & ((of_key == 0) | (of_key == of_query))
    seen |= torch.eye(T, dtype=torch.bool)  # padding sees itself, for a token that sees nothing has no finite output
    mask = torch.zeros(B, 1, T, T, dtype=dtype).masked_fill(~seen[:, None], torch.finfo(dtype).min)
    return positions, mask


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of tokens that two sequences begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
