"""Several continuations of one prompt in one row, so that the model reads the prompt once.

The continuations follow the prompt one after the other. Each has the positions that it has alone, and the attention mask lets
it see the prompt and itself. So a causal model that uses both gives the scores of separate rows, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from laserlm.models.language_model import LanguageModel
from laserlm.scoring.records import TokenSequence

WINDOWS = ("sliding_window", "attention_chunk_size")
"""Settings that bound how far a token sees. A mask for each pair of tokens takes the place of this bound."""


@dataclass(frozen=True)
class JoinedRow:
    """Sequences with one prompt of P tokens, as one row of T tokens.

    Args:
        members: indices of the sequences.
        ids: (T,) tokens of the prompt, and then those of each continuation.
        places: position in the row of each scored token, by sequence.
        parts: (T,) 0 for tokens of the prompt, and the number of the continuation, from 1, for others.
        positions: (T,) position of each token in its own sequence.
    """

    members: tuple[int, ...]
    ids: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]
    parts: tuple[int, ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, rows: Sequence[TokenSequence], members: Sequence[int]) -> JoinedRow:
        """Join sequences whose prompts are equal; a single one stays as it is."""
        P = prompt_length(rows[members[0]])
        ids, parts, positions = list(rows[members[0]].ids[:P]), [0] * P, list(range(P))
        places: list[tuple[int, ...]] = []
        for number, member in enumerate(members, start=1):
            own = rows[member].ids[P:]
            places.append((P - 1, *range(len(ids), len(ids) + len(own))))
            ids += own
            parts += [number] * len(own)
            positions += range(P, P + len(own))
        return cls(tuple(members), tuple(ids), tuple(places), tuple(parts), tuple(positions))


def prompt_length(row: TokenSequence) -> int:
    """Return the number of tokens up to the first scored position."""
    return row.positions[0] + 1


def groups_with_one_prompt(rows: Sequence[TokenSequence], indices: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the indices in groups: neighbours that belong to one example, and whose tokens up to the scored ones are equal."""

    def prompt(i: int) -> tuple[int, tuple[int, ...]]:
        return rows[i].example, rows[i].ids[: prompt_length(rows[i])]

    return [tuple(group) for _, group in groupby(indices, key=prompt)]


def joined_length(rows: Sequence[TokenSequence], members: Sequence[int]) -> int:
    """Return the number of tokens of sequences with one prompt in one row."""
    if len(members) == 1:
        return len(rows[members[0]].ids)
    return sum(len(rows[i].ids) for i in members) - (len(members) - 1) * prompt_length(rows[members[0]])


def can_be_joined(lm: LanguageModel, rows: Sequence[TokenSequence], members: Sequence[int]) -> bool:
    """Return whether sequences with one prompt are within what every token of the model sees."""
    config: Any = lm.model.config.get_text_config(decoder=True)
    windows = [getattr(config, name, None) for name in WINDOWS]
    return joined_length(rows, members) <= min((w for w in windows if isinstance(w, int) and w > 0), default=math.inf)


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
