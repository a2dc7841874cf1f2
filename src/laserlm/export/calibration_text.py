"""Cut a text for calibration and for measuring perplexity."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from laserlm.errors import ExportError
from laserlm.models.language_model import LanguageModel
from laserlm.scoring.tokenize import TokenSequence, max_length, start_token

__all__ = ["CalibrationText", "read_calibration_text"]

PASSAGE_TOKENS = 512
"""Length of a passage of the calibration text."""
HELD_OUT_SHARE = 0.2
"""Share of the calibration text, at its end, that is held out to measure perplexity."""
HELD_OUT_CHARACTERS = 65_536
"""Maximum length of the held-out text; about 16,000 tokens of English."""


@dataclass(frozen=True)
class CalibrationText:
    """A text file, cut for calibration and for measuring perplexity.

    Args:
        name: path of the file.
        sha256: sha256 of its bytes.
        calibration: passages from the start of the text, to which the decompositions and ranks are fitted.
        held_out: text from its end, for measuring perplexity.
    """

    name: str
    sha256: str
    calibration: tuple[TokenSequence, ...] = field(repr=False)
    held_out: str = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return the file's name and hash, and the number of tokens for calibration."""
        calibrated_on = sum(len(row.targets) for row in self.calibration)
        return {"name": self.name, "sha256": self.sha256, "calibrated_on": calibrated_on}


def read_calibration_text(lm: LanguageModel, file: str | Path, *, tokens: int = 32_768) -> CalibrationText:
    """Cut a text file: the first four fifths into passages of 512 tokens, the rest for measuring perplexity.

    Args:
        lm: a causal model.
        file: plain text in UTF-8.
        tokens: maximum number of tokens for calibration.

    Raises:
        ExportError: if the file cannot be read or is too short, or the model is not causal.
    """
    if lm.kind != "causal":
        raise ExportError(f"{lm.name} is {lm.kind}; calibration needs a causal model")
    file = Path(file)
    try:
        content = file.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ExportError(f"cannot read the calibration text {file}: {error}; give a file of plain text in UTF-8") from None
    cut = int(len(text) * (1 - HELD_OUT_SHARE))
    length = min(PASSAGE_TOKENS, max_length(lm) - 1)
    calibration = _passages(lm, text[:cut], length, tokens)
    held_out = text[cut : cut + HELD_OUT_CHARACTERS]
    if not calibration or not held_out.strip():
        raise ExportError(f"{file} has no passage of {length} tokens in its first four fifths; give a longer text")
    return CalibrationText(str(file), hashlib.sha256(content).hexdigest(), calibration, held_out)


def _passages(lm: LanguageModel, text: str, length: int, max_tokens: int) -> tuple[TokenSequence, ...]:
    tokenizer = lm.require_tokenizer()
    # Tokenising all of a long text would be slow; 16 characters per token are more than enough.
    ids = tokenizer(text[: 16 * max_tokens], add_special_tokens=False).input_ids[:max_tokens]
    rows = []
    for i, start in enumerate(range(0, len(ids) - length + 1, length)):
        passage = (*start_token(tokenizer), *ids[start : start + length])
        rows.append(TokenSequence(i, passage[:-1], passage[1:], tuple(range(len(passage) - 1))))
    return tuple(rows)
