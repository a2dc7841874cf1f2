from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer

from laserlm.errors import AnalysisError
from laserlm.jsonable import to_json
from laserlm.studies.terms import terms

TEXTS = ["the red house", "a red car", "red wine and bread", "red ink", "the red sea", "a red sky"]
TEXTS += [
    "the blue house",
    "a blue car",
    "blue ink",
    "the sea is blue",
    "a blue sky",
    "bread and cheese",
]


def test_the_word_that_marks_a_group_comes_first_with_welch_s_interval() -> None:
    red, rest = terms(TEXTS, {"red": range(6), "rest": range(6, 12)}, top=3)
    assert (red.n, red.others, red.is_small) == (6, 6, False)
    assert [t.term for t in red.terms] == ["red"]
    assert [t.term for t in rest.terms] == ["blue"]
    X = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b").fit(TEXTS)
    column = X.transform(TEXTS).toarray()[:, X.vocabulary_["red"]]
    expected = stats.ttest_ind(column[:6], column[6:], equal_var=False)
    low, high = expected.confidence_interval(0.95)
    result = red.terms[0]
    assert result.weight == pytest.approx(column[:6].mean())
    assert result.lift.value == pytest.approx(column[:6].mean() - column[6:].mean())
    assert result.lift.interval == pytest.approx((low, high))
    assert (result.texts, result.lift.n) == (6, 6)


def test_a_word_in_all_texts_of_a_group_and_no_other_has_no_error() -> None:
    (result,) = terms(["red"] * 5 + ["blue"] * 6, {"red": range(5)})
    assert [(t.term, t.lift.value, t.lift.interval) for t in result.terms] == [("red", 1.0, (1.0, 1.0))]


def test_groups_too_small_to_say_anything_have_no_words() -> None:
    small, large = terms(TEXTS, {"small": range(4), "all but four": range(8)})
    assert (small.is_small, small.terms) == (True, ())
    assert large.is_small  # what is outside it is too small
    (empty,) = terms(TEXTS, {"empty": []})
    assert (empty.n, empty.is_small) == (0, True)
    assert to_json(empty) == {"group": "empty", "n": 0, "others": 12, "few": True, "terms": []}


def test_of_random_groups_few_words_are_ahead() -> None:
    generator = np.random.default_rng(0)
    words = [f"w{i}" for i in range(40)]
    texts = [" ".join(generator.choice(words, 6)) for _ in range(200)]
    (result,) = terms(texts, {"half": range(100)}, top=40)
    assert len(result.terms) <= 4  # one in forty by chance


def test_texts_without_words_are_an_error() -> None:
    with pytest.raises(AnalysisError, match="holds a word"):
        terms(["...", ""], {"all": [0]})
