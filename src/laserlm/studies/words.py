"""Generic words, taken from a corpus or from a list of stop words."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from laserlm.errors import AnalysisError, MissingExtraError

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
HALF = 0.5


@dataclass(frozen=True)
class Words:
    """Words that count as generic.

    Args:
        frequent: in lower case.
        source: where they come from.
    """

    frequent: frozenset[str]
    source: str

    @classmethod
    def of_text(cls, text: str, source: str) -> Words:
        """Take the most frequent words of a text, as many as make half of all its running words.

        Raises:
            AnalysisError: if the text has no words.
        """
        counts = Counter(word.lower() for word in WORD.findall(text))
        if not counts:
            raise AnalysisError(f"{source} has no words; give a text")
        remaining, frequent = HALF * counts.total(), set()
        for word, count in counts.most_common():
            if remaining <= 0:
                break
            frequent.add(word)
            remaining -= count
        return cls(frozenset(frequent), f"the {len(frequent)} words that make half of {source}")

    @classmethod
    def english(cls) -> Words:
        """Take scikit-learn's list of English stop words.

        Raises:
            MissingExtraError: if scikit-learn is not installed.
        """
        words = frozenset(sklearn_text().ENGLISH_STOP_WORDS)
        return cls(words, f"scikit-learn's {len(words)} English stop words")

    def generic(self, text: str) -> bool:
        """Return whether a token is one of these words, or holds no letter or digit at all."""
        bare = text.strip().lower()
        return bare in self.frequent or not any(c.isalnum() for c in bare)


def sklearn_text() -> Any:
    """Return scikit-learn's module of text features.

    Raises:
        MissingExtraError: if it is not installed.
    """
    try:
        return importlib.import_module("sklearn.feature_extraction.text")
    except ImportError:
        raise MissingExtraError("this study needs scikit-learn; pip install 'laserlm[analysis]'") from None
