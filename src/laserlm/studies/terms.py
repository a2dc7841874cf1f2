"""Words that mark a group of texts, by TF-IDF."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import special

from laserlm.errors import AnalysisError
from laserlm.scoring.statistics import Interval
from laserlm.studies.estimates import MIN_EXAMPLES, Estimate
from laserlm.studies.words import sklearn_text


@dataclass(frozen=True)
class Term:
    """A word that is more frequent in a group than in the other texts.

    Args:
        term: the word, in lower case.
        weight: its mean TF-IDF in the group.
        lift: its mean TF-IDF in the group minus that in the other texts, with Welch's 95 % interval; n is the group's.
        texts: texts of the group that hold the word.
    """

    term: str
    weight: float
    lift: Estimate = field(metadata={"json": "ahead"})
    texts: int


@dataclass(frozen=True)
class GroupTerms:
    """The words that mark one group.

    Args:
        group: its name.
        n: texts in it.
        others: texts outside it.
        is_small: whether the group or the rest has too few texts to say anything. It has no terms then.
        terms: the words with the highest statistic first.
    """

    group: str
    n: int
    others: int
    is_small: bool = field(metadata={"json": "few"})
    terms: tuple[Term, ...]


def terms(texts: Sequence[str], groups: Mapping[str, Sequence[int]], *, top: int = 8) -> list[GroupTerms]:
    """Return the words that mark each group: those with the highest mean TF-IDF relative to all other texts.

    Each text is a document. Stop words are kept, because generic answers consist of them. Words are ranked by Welch's
    statistic. Only words whose interval lies above 0 are returned. With many words, some of them are there by chance.

    Args:
        texts: the documents.
        groups: indices of the texts of each group.
        top: number of words of each group.

    Raises:
        AnalysisError: if no text holds a word.
        MissingExtraError: if scikit-learn is not installed.
    """
    vectorizer = sklearn_text().TfidfVectorizer(token_pattern=r"(?u)\b\w+\b")
    try:
        X = vectorizer.fit_transform(texts)  # (texts, words), sparse
    except ValueError:
        raise AnalysisError(f"none of the {len(texts)} texts holds a word; there are no terms to weigh") from None
    names = vectorizer.get_feature_names_out()
    rows = []
    for group, inside in groups.items():
        mask = np.zeros(len(texts), dtype=bool)
        mask[list(inside)] = True
        n, others = int(mask.sum()), int((~mask).sum())
        is_small = n < MIN_EXAMPLES or others < MIN_EXAMPLES
        best = () if is_small else tuple(_ahead(X[mask], X[~mask], names, top))
        rows.append(GroupTerms(group, n, others, is_small, best))
    return rows


def _ahead(own: Any, rest: Any, names: Any, top: int) -> list[Term]:
    """Return the words with more weight in the first of two sparse matrices (texts, words)."""
    (mean, variance), (mean_rest, variance_rest) = _moments(own), _moments(rest)
    n, m = own.shape[0], rest.shape[0]
    a, b = variance / n, variance_rest / m
    error = np.sqrt(a + b)
    difference = mean - mean_rest
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (a + b) ** 2 / (a**2 / (n - 1) + b**2 / (m - 1))  # Welch and Satterthwaite
        statistic = np.where(error > 0, difference / error, np.where(difference > 0, np.inf, 0.0))
    order = np.argsort(-statistic, kind="stable")
    holds = np.asarray((own > 0).sum(axis=0)).ravel()
    rows = []
    for i in order[:top]:
        # A word of one weight in all texts of the group and in none of the others has no error.
        half = float(special.stdtrit(freedom[i], 0.975) * error[i]) if error[i] > 0 else 0.0
        low, high = float(difference[i]) - half, float(difference[i]) + half
        if not low > 0:
            break
        rows.append(Term(str(names[i]), float(mean[i]), Estimate(float(difference[i]), Interval(low, high), n), int(holds[i])))
    return rows


def _moments(X: Any) -> tuple[Any, Any]:
    """Return mean and unbiased variance of each column of a sparse matrix, zeros counted."""
    n = X.shape[0]
    mean = np.asarray(X.mean(axis=0)).ravel()
    square = np.asarray(X.multiply(X).mean(axis=0)).ravel()
    return mean, np.maximum(square - mean**2, 0) * n / (n - 1)
