"""What scores depend on, as plain values: equal values mean that recorded scores can be used again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from laserlm.linalg.decomposition import ALGORITHM
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.tokenize import TokenSequence
from laserlm.tasks import GENERATING, Scorer, Split

__all__ = ["digest", "identity"]

NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def digest(value: Any) -> str:
    """Return the sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def identity(
    lm: LanguageModel, scorer: Scorer, splits: Sequence[Split], rows: Sequence[TokenSequence], seed: int
) -> dict[str, Any]:
    """Return all that the scores of a model on some splits depend on.

    Args:
        lm: the unchanged model.
        scorer: as the rows were encoded for.
        splits: of one task; the first says how the model writes.
        rows: what ``encode`` made of all their examples.
        seed: of ``:reference`` decompositions.
    """
    found: dict[str, Any] = {
        "model": lm.name,
        "model_hash": lm.hash,
        "config": digest({k: v for k, v in lm.model.config.to_dict().items() if k not in NOT_OF_THE_MODEL}),
        "dtype": str(lm.dtype),
        "task": splits[0].task,
        **{split.name: split.hash for split in splits},
        "tokens": digest([(r.ids, r.decoder, r.targets, r.places, r.options) for r in rows]),
        "scorer": scorer,
        "algorithm": ALGORITHM,
        "seed": seed,
    }
    if scorer in GENERATING:
        found["decoding"] = asdict(splits[0].decoding)
    return found
