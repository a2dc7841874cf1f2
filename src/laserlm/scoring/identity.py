"""The identity of scores: plain values that are equal if recorded scores can be reused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from laserlm.linalg.decomposition import ALGORITHM
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.scorers import SCORERS
from laserlm.tasks import Scorer, Split

IGNORED_CONFIG_KEYS = ("_name_or_path", "transformers_version")


def digest(value: Any) -> str:
    """Return the sha256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def identity(
    lm: LanguageModel, scorer: Scorer, splits: Sequence[Split], rows: Sequence[TokenSequence], seed: int
) -> dict[str, Any]:
    """Return everything that the scores of a model on some splits depend on.

    Args:
        lm: the unchanged model.
        scorer: the scorer that the rows were tokenised for.
        splits: splits of one task. The first says how the model generates text.
        rows: the token sequences of all their examples.
        seed: seed of ``:reference`` decompositions.
    """
    values: dict[str, Any] = {
        "model": lm.name,
        "model_hash": lm.hash,
        "config": digest({k: v for k, v in lm.model.config.to_dict().items() if k not in IGNORED_CONFIG_KEYS}),
        "dtype": str(lm.dtype),
        "task": splits[0].task,
        **{split.name: split.hash for split in splits},
        "tokens": digest([(r.ids, r.decoder, r.targets, r.positions, r.choice_tokens) for r in rows]),
        "scorer": scorer,
        "algorithm": ALGORITHM,
        "seed": seed,
    }
    if lm.pooling is not None:
        values["pooling"] = lm.pooling.as_dict()
    if lm.update is not None:
        values["adapter"] = str(lm.update.folder)
    asked = [e for split in splits for e in split.examples if e.messages]
    if asked:  # the tokens above show whether the model has a template, and what it makes of the messages
        values["chat"] = {"required": asked[0].needs_template, "system": dict(asked[0].messages).get("system")}
    if skipped := sum(split.skipped for split in splits):
        values["skipped"] = skipped
    if SCORERS[scorer].generates:
        values["decoding"] = asdict(splits[0].decoding)
    return values
