"""Load a model's tokenizer, and log what transformers warns of."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.tokenization_auto import AutoTokenizer

from laserlm.models.kinds import TEXT_KINDS, Kind, input_embeddings

log = logging.getLogger(__name__)

FIX_REGEX = ' Here, write "fix_mistral_regex": true in its tokenizer_config.json, and load it again.'


def load_tokenizer(source: str | Path, common: dict[str, Any], kind: Kind) -> Any:
    """Return the tokenizer of a folder or hub id; None for a headless model without one."""
    try:
        with _warnings_of_tokenizers():
            tokenizer = AutoTokenizer.from_pretrained(source, **common)
    except (OSError, ValueError):
        if kind in ("headless", *TEXT_KINDS):
            return None  # a model of other inputs than text has no tokenizer
        raise
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        return None  # for a folder without a tokenizer, transformers makes an empty one
    if tokenizer.pad_token is None:
        # Padding is always masked, so any token can be the padding token.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def pad_with_a_known_token(tokenizer: Any, model: Any) -> None:
    """Replace a padding token that was added to the tokenizer alone: the model has no embedding for it."""
    embeddings = None if tokenizer is None else input_embeddings(model)
    if isinstance(embeddings, torch.nn.Embedding) and tokenizer.pad_token_id >= embeddings.num_embeddings:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)


@contextmanager
def _warnings_of_tokenizers() -> Iterator[None]:
    """Log what transformers says of a tokenizer, such as that it splits text in a wrong way, once for each text."""
    library = logging.getLogger("transformers")
    collected = _Collector()
    handlers, propagates, level = library.handlers, library.propagate, library.level
    library.handlers, library.propagate = [collected], False
    library.setLevel(logging.WARNING)
    try:
        yield
    finally:
        library.handlers, library.propagate = handlers, propagates
        library.setLevel(level)
    for text in dict.fromkeys(collected.texts):
        fix = FIX_REGEX if "fix_mistral_regex" in text else ""
        log.warning("transformers says of the tokenizer: %s%s", text, fix)


class _Collector(logging.Handler):
    """A handler that keeps the texts of warnings on tokenizers."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "tokeniz" in record.name:
            self.texts.append(record.getMessage())
