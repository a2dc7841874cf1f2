"""The figures over the scores of an evaluation."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from laserlm.errors import ScoringError
from laserlm.scoring.records import Evaluation, ExampleScore, TokenSequence


def score(id_: str, correct: bool, answer: str, *, logprob: float = -1.0, tokens: int = 1) -> ExampleScore:
    """Return a score whose prediction is right or wrong."""
    return ExampleScore(
        id=id_, correct=correct, logprob=logprob, tokens=tokens, predicted=answer if correct else "-", answer=answer
    )


def evaluation(*scores: ExampleScore, **fields: Any) -> Evaluation:
    """Return an evaluation of these scores."""
    settings: dict[str, Any] = {
        "model": "tiny",
        "task": "claims",
        "split": "test",
        "scorer": "choice",
        "intervention": "",
        "seconds": 1.5,
    }
    return Evaluation(scores=scores, **(settings | fields))


@pytest.fixture
def lopsided() -> Evaluation:
    """Eight true claims of which six are found, two false ones of which one is found."""
    rows = [score(f"t{i}", i < 6, "true") for i in range(8)] + [score(f"f{i}", i < 1, "false") for i in range(2)]
    return evaluation(*rows, classes=("true", "false"))


def test_the_loss_of_a_score_is_per_answer_token() -> None:
    assert score("a", True, "x", logprob=-6.0, tokens=4).loss == 1.5
    assert score("a", True, "x", logprob=0.0).loss == 0


def test_the_loss_of_an_evaluation_is_the_mean_over_examples_and_not_over_tokens() -> None:
    rows = (score("a", True, "x", logprob=-6.0, tokens=4), score("b", False, "y", logprob=-0.5, tokens=1))
    assert evaluation(*rows).loss == pytest.approx((1.5 + 0.5) / 2)


def test_accuracy_is_the_share_of_correct_examples_with_its_wilson_interval(lopsided: Evaluation) -> None:
    # Wilson for 7 of 10 with z = 1.96: centre (7 + z^2 / 2) / (10 + z^2), half width z sqrt(2.1 + z^2 / 4) / (10 + z^2).
    z = 1.959963984540054
    centre, half = (7 + z**2 / 2) / (10 + z**2), z * math.sqrt(2.1 + z**2 / 4) / (10 + z**2)
    assert lopsided.n == 10
    assert lopsided.accuracy == pytest.approx(0.7)
    assert lopsided.accuracy_interval == pytest.approx((centre - half, centre + half))


def test_balanced_accuracy_weighs_classes_equally(lopsided: Evaluation) -> None:
    assert lopsided.balanced_accuracy == pytest.approx((6 / 8 + 1 / 2) / 2)


def test_giving_one_answer_every_time_has_the_majority_rate_and_a_balanced_accuracy_of_one_half() -> None:
    rows = [score(f"t{i}", True, "true") for i in range(8)] + [score(f"f{i}", False, "false") for i in range(2)]
    constant = evaluation(*rows, classes=("true", "false"))
    assert constant.accuracy == constant.majority_rate == pytest.approx(0.8)
    assert constant.balanced_accuracy == pytest.approx(0.5)


def test_balanced_accuracy_is_over_the_classes_that_occur() -> None:
    rows = (score("a", True, "true"), score("b", False, "true"))
    assert evaluation(*rows, classes=("true", "false")).balanced_accuracy == pytest.approx(0.5)


def test_without_classes_there_is_no_balanced_accuracy(lopsided: Evaluation) -> None:
    assert evaluation(*lopsided.scores).balanced_accuracy is None


def test_the_majority_rate_takes_no_account_of_case() -> None:
    rows = [score(str(i), False, answer) for i, answer in enumerate(["Paris", "paris", "PARIS", "Rome", "Oslo"])]
    assert evaluation(*rows).majority_rate == pytest.approx(3 / 5)


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ScoringError, match="empty"):
        evaluation()


def test_the_figures_are_plain_json_values(lopsided: Evaluation) -> None:
    figures = lopsided.as_dict()
    assert json.loads(json.dumps(figures)) == figures
    assert figures == {
        "model": "tiny",
        "task": "claims",
        "split": "test",
        "scorer": "choice",
        "intervention": "",
        "n": 10,
        "accuracy": pytest.approx(0.7),
        "accuracy_interval": list(lopsided.accuracy_interval),
        "loss": pytest.approx(1.0),
        "ties": None,
        "majority_rate": pytest.approx(0.8),
        "balanced_accuracy": pytest.approx(0.625),
        "seconds": 1.5,
    }


def test_an_evaluation_prints_its_split_intervention_and_figures(lopsided: Evaluation) -> None:
    assert str(lopsided) == "claims/test base: accuracy 70.0% [39.7%, 89.2%], loss 1.000 nats/token, n 10"
    edited = evaluation(*lopsided.scores, intervention="3.fc_in@0.1")
    assert str(edited).startswith("claims/test 3.fc_in@0.1: accuracy 70.0%")


def test_the_end_of_a_sequence_keeps_what_is_predicted_there() -> None:
    sequence = TokenSequence(0, (5, 6, 7, 8, 9), targets=(7, 9, 4), positions=(1, 3, 4))
    end = sequence.end(3)
    assert (end.ids, end.targets, end.positions) == ((7, 8, 9), (9, 4), (1, 2))
    assert sequence.end(5) is sequence.end(9) is sequence
    early = TokenSequence(0, (5, 6, 7, 8, 9), targets=(7,), positions=(1,))
    assert early.end(3) is early  # nothing is predicted there
    assert early.end(4).positions == (0,)
