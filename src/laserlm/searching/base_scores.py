"""The scores of the unchanged model, kept in the cache for later searches on the same examples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from laserlm.linalg.precision import allowed_precision
from laserlm.models.language_model import LanguageModel
from laserlm.paths import atomic_file
from laserlm.provenance import versions
from laserlm.scoring.identity import digest, identity
from laserlm.scoring.output_layer import HALF
from laserlm.scoring.records import Evaluation, ExampleScore
from laserlm.scoring.scorers import GENERATING
from laserlm.searching.scorer import EncodedSplit

METHOD = 1
"""Goes up when a change of the code changes scores, so that no score of the old way is taken from the cache."""


def find_file(lm: LanguageModel, encoded: EncodedSplit, hardware: Mapping[str, Any]) -> Path | None:
    """Return the file for the scores of the unchanged model on a split; None where none are kept.

    None are kept of text that the model generates, and of tasks that another library grades. None are kept in half precision,
    where scores of other batches differ so much that the unchanged and the edited model must be scored in the same ones.

    Args:
        lm: the unchanged model.
        encoded: the split.
        hardware: what computes the scores, with its batch size, for scores of other hardware differ in the last digits.
    """
    if encoded.scorer in GENERATING or encoded.split.judge is not None or lm.dtype in HALF:
        return None
    of_scores = identity(lm, encoded.scorer, (replace(encoded.split, name="examples"),), encoded.sequences, 0)
    precision = [*allowed_precision(), torch.is_autocast_enabled(lm.device.type)]
    return lm.cache / "scores" / f"{digest([METHOD, versions(), precision, of_scores, dict(hardware)])}.json"


def read(file: Path, lm: LanguageModel, encoded: EncodedSplit) -> Evaluation | None:
    """Return the scores in a file; None where it cannot be read or has other examples."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        scores = tuple(ExampleScore(**score) for score in kept["scores"])
        if [score.id for score in scores] == [example.id for example in encoded.split.examples]:
            return Evaluation(
                model=lm.name,
                task=encoded.split.task,
                split=encoded.split.name,
                scorer=encoded.scorer,
                intervention="",
                scores=scores,
                seconds=kept["seconds"],
                classes=tuple(kept["classes"]),
                skipped=encoded.split.skipped,
            )
    return None


def write(file: Path, evaluation: Evaluation) -> None:
    """Write scores to a file. Where the cache cannot be written to, they are computed again next time."""
    content = {
        "scores": [asdict(score) for score in evaluation.scores],
        "seconds": evaluation.seconds,
        "classes": evaluation.classes,
    }
    with suppress(OSError), atomic_file(file) as part:
        part.write_text(json.dumps(content), encoding="utf-8")
