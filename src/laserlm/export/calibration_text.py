"""Cut a text for calibration and for measuring perplexity."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laserlm.errors import ExportError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import max_length, start_token
from laserlm.searching.guard import can_write, own_text

OWN_TEXT_FILE = "calibration.txt"
"""Name of the file of a text that the model wrote, in the folder of the compressed model."""
OWN_TEXT_SEED = 2**20
"""Seed of this text, so that a guard of a search, whose seeds are small, has other text."""

PASSAGE_TOKENS = 512
"""Length of a passage of the calibration text."""
REFINEMENT_TOKENS = 1024
"""Length of a passage on which the factors are trained, one a step. After shorter ones, long texts were predicted worse."""
HELD_OUT_SHARE = 0.2
"""Share of the calibration text, at its end, that is held out to measure perplexity."""
HELD_OUT_CHARACTERS = 65_536
"""Maximum length of the held-out text; about 16,000 tokens of English."""


@dataclass(frozen=True)
class CalibrationText:
    """A text file, cut for calibration and for measuring perplexity.

    Args:
        name: path of the file.
        content: its bytes.
        is_own: whether the model wrote the text.
        calibration: passages from the start of the text, to which the decompositions and ranks are fitted.
        refinement: passages from the start of the text, on which the factors are trained.
        held_out: text from its end, for measuring perplexity.
    """

    name: str
    content: bytes = field(repr=False)
    is_own: bool
    calibration: tuple[TokenSequence, ...] = field(repr=False)
    refinement: tuple[TokenSequence, ...] = field(repr=False)
    held_out: str = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the file's name and hash, and the number of tokens for calibration."""
        calibrated_on = sum(len(row.targets) for row in self.calibration)
        sha256 = hashlib.sha256(self.content).hexdigest()
        return {"name": self.name, "sha256": sha256, "own": self.is_own, "calibrated_on": calibrated_on}


def read_calibration_text(lm: LanguageModel, file: str | Path, *, tokens: int = 16_384, refine: int = 0) -> CalibrationText:
    """Cut a text file: the first four fifths into passages of 512 tokens, the rest for measuring perplexity.

    Args:
        lm: a causal model.
        file: plain text in UTF-8.
        tokens: maximum number of tokens for calibration.
        refine: maximum number of passages to train the factors on.

    Raises:
        ExportError: if the file cannot be read or is too short, or the model is not causal.
    """
    _check_causal(lm)
    file = Path(file)
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the calibration text {file}: {error}; give a file of plain text in UTF-8") from None
    return _cut(lm, str(file), content, text, tokens, refine)


def own_calibration_text(
    lm: LanguageModel,
    *,
    tokens: int = 16_384,
    refine: int = 0,
    on_tokens: Callable[[int, int], object] = lambda done, total: None,
) -> CalibrationText:
    """Let the model write a text at temperature 1, and cut it like a file.

    Args:
        lm: a causal model whose tokenizer has a token that starts a text.
        tokens: as for ``read_calibration_text``. It sets the length of the text.
        refine: as for ``read_calibration_text``.
        on_tokens: called with the number of tokens that are written, and with that of all.

    Raises:
        ExportError: if the model is not causal, or has no token that starts a text.
    """
    _check_causal(lm)
    if not can_write(lm):
        raise ExportError(f"{lm.name} has no token that starts a text, so it writes none; give a text: --calibration FILE")
    length = min(PASSAGE_TOKENS, max_length(lm) - 1)
    n = math.ceil((tokens + length) / length / (1 - HELD_OUT_SHARE))
    tokenizer = lm.require_tokenizer()
    rows = own_text(lm, n, OWN_TEXT_SEED, tokens=length, on_tokens=on_tokens)
    text = "\n\n".join(str(tokenizer.decode(ids[len(start_token(tokenizer)) :])) for ids in rows)
    return _cut(lm, OWN_TEXT_FILE, text.encode(), text, tokens, refine, is_own=True)


def _check_causal(lm: LanguageModel) -> None:
    if lm.kind != "causal":
        raise ExportError(f"{lm.name} is {lm.kind}; calibration needs a causal model")


def _cut(
    lm: LanguageModel, name: str, content: bytes, text: str, tokens: int, refine: int, *, is_own: bool = False
) -> CalibrationText:
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    length = min(PASSAGE_TOKENS, max_length(lm) - 1)
    calibration = _passages(lm, text[:cut], length, tokens)
    trained = min(REFINEMENT_TOKENS, max_length(lm) - 1)
    # A text that is too short for one longer passage has those of the calibration.
    refinement = _passages(lm, text[:cut], trained, refine * trained) or calibration
    held_out = text[cut : cut + HELD_OUT_CHARACTERS]
    if not calibration or not held_out.strip():
        raise ExportError(f"{name} has no passage of {length} tokens in its first four fifths; give a longer text")
    return CalibrationText(name, content, is_own, calibration, refinement, held_out)


def _passages(lm: LanguageModel, text: str, length: int, max_tokens: int) -> tuple[TokenSequence, ...]:
    tokenizer = lm.require_tokenizer()
    # Tokenising all of a long text would be slow; 16 characters per token are more than enough.
    ids = tokenizer(text[: 16 * max_tokens], add_special_tokens=False).input_ids[:max_tokens]
    rows = []
    for i, start in enumerate(range(0, len(ids) - length + 1, length)):
        passage = (*start_token(tokenizer), *ids[start : start + length])
        rows.append(TokenSequence(i, passage[:-1], passage[1:], tuple(range(len(passage) - 1))))
    return tuple(rows)
