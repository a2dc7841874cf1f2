from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from laserlm.edit import applied
from laserlm.errors import AnalysisError, ScoringError
from laserlm.jsonable import to_json
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.statistics import paired_mean, wilson
from laserlm.studies import calibration as module
from laserlm.studies.calibration import Confidence, calibration, confidences
from laserlm.tasks import Example, Scorer, Split

Make = Callable[..., LanguageModel]

PROMPTS = [
    ("The capital of France is", "Paris"),
    ("The capital of Spain, which is a country, is", "Madrid"),
    ("Rome is", "a city in Italy"),
    ("Oslo", "is"),
    ("The capital of Norway is a city and the capital of Portugal is", "Lisbon"),
    ("This statement is", "false"),
]
SHORT = ("Paris", "Rome", "true")
"""One token each."""
LONG = ("true", "false", "a city in Italy")


def split(scorer: Scorer, choices: tuple[str, ...] = ()) -> Split:
    rows = [Example(str(i), p, choices[i % 3] if choices else a, choices) for i, (p, a) in enumerate(PROMPTS)]
    return Split("example", "all", tuple(rows), scorer)


def by_hand(lm: LanguageModel, prompt: str, answer: str, *, first: bool) -> tuple[list[torch.Tensor], list[int]]:
    """Return the probabilities of all tokens at each of the answer's places, one plain pass each, and its tokens."""
    tok = lm.require_tokenizer()
    before = tok(prompt, add_special_tokens=False).input_ids
    targets = tok(f"{prompt} {answer}", add_special_tokens=False).input_ids[len(before) :]
    if lm.kind == "encoder-decoder":
        targets = tok(answer, add_special_tokens=False).input_ids
    targets = targets[:1] if first else targets
    results = []
    for i in range(len(targets)):
        with torch.no_grad():
            if lm.kind == "causal":
                logits = lm.model(torch.tensor([before + targets[:i]])).logits[0, -1]
            elif lm.kind == "masked":
                masks = [tok.mask_token_id] * len(targets)
                end = [*tok(".", add_special_tokens=False).input_ids, tok.eos_token_id]
                logits = lm.model(torch.tensor([[tok.bos_token_id, *before, *masks, *end]])).logits[0, 1 + len(before) + i]
            else:
                source = torch.tensor([tok(prompt).input_ids])
                logits = lm.model(input_ids=source, decoder_input_ids=torch.tensor([[0, *targets[:i]]])).logits[0, -1]
        results.append(logits.double().softmax(-1))
    return results, targets


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta", "t5"])
def test_confidence_in_a_token_is_the_largest_of_the_softmax(family: str, make: Make) -> None:
    lm = make(family)
    expected = [by_hand(lm, *pair, first=True) for pair in PROMPTS]
    cases: list[tuple[Scorer, int]] = [("answer", 1), ("answer", 4), ("next_token", 32), ("top5", 32), ("contains", 32)]
    for scorer, batch_size in cases:
        result = confidences(lm, split(scorer), batch_size)
        for (confidence, right), ([probabilities], [target]) in zip(result, expected, strict=True):
            assert confidence == pytest.approx(float(probabilities.max()), rel=1e-4)
            assert right == (int(probabilities.argmax()) == target)
    assert [right for _, right in result] == [s.correct for s in evaluate(lm, split("first_token")).scores]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5"])
@pytest.mark.parametrize("choices", [SHORT, LONG])
def test_confidence_in_a_choice_is_the_largest_share_among_the_choices(
    family: str, choices: tuple[str, ...], make: Make
) -> None:
    lm = make(family)
    result = confidences(lm, split("choice", choices), 4)
    for i, ((confidence, right), (prompt, _)) in enumerate(zip(result, PROMPTS, strict=True)):
        calls = []
        for choice in choices:
            probabilities, targets = by_hand(lm, prompt, choice, first=False)
            calls.append(math.prod(float(p[t]) for p, t in zip(probabilities, targets, strict=True)))
        assert confidence == pytest.approx(max(calls) / sum(calls), rel=1e-4)
        assert right == (calls.index(max(calls)) == i % 3)
    assert [right for _, right in result] == [s.correct for s in evaluate(lm, split("choice", choices)).scores]


def test_the_reduced_model_has_confidences_of_its_own(llama: LanguageModel) -> None:
    with applied(llama, "1.mlp@0.1"):
        [probabilities], _ = by_hand(llama, *PROMPTS[0], first=True)
        result = confidences(llama, split("answer"))
    assert result[0][0] == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert result != confidences(llama, split("answer"))


def test_a_tie_between_choices_is_wrong(llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.model.get_output_embeddings().weight.zero_()  # tied to the embeddings: all logits are equal
    assert confidences(llama, split("choice", SHORT)) == [(pytest.approx(1 / 3), False)] * 6
    assert [c for c, _ in confidences(llama, split("answer"))] == pytest.approx([1 / 512] * 6)


@pytest.mark.parametrize("scorer", ["perplexity", "lm_eval", "lm_eval_text", "program", "rollout"])
def test_what_has_no_answer_to_be_confident_of_is_reported(scorer: Scorer, llama: LanguageModel) -> None:
    with pytest.raises(AnalysisError, match=f"and scorer {scorer} reads neither. Give a model, --reduce SPEC and --scorer"):
        confidences(llama, split(scorer))


@pytest.mark.parametrize(("scorer", "choices"), [("answer", ()), ("choice", SHORT), ("choice", LONG)])
def test_a_probability_that_is_no_number_is_reported(scorer: Scorer, choices: tuple[str, ...], llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.model.model.norm.weight.fill_(float("nan"))
    with applied(llama, "1.fc_in@0.5"), pytest.raises(ScoringError, match=r"1\.fc_in@0\.5 gives a probability of nan on"):
        confidences(llama, split(scorer, choices))


LOW = [(0.2, False)] * 4 + [(0.2, True)]
HIGH = [(0.8, True)] * 2 + [(0.8, False)] * 3


def test_calibration_worked_out_by_hand() -> None:
    mixed = [pair for both in zip(LOW, HIGH, strict=True) for pair in both]
    result = calibration(mixed, [(0.5, right) for _, right in mixed], bins=2)
    # Lower bin: 0.2 against 0.2; upper bin: 0.8 against 0.4; each is half of the examples.
    assert result.base.ece.value == pytest.approx(0.2)
    assert result.base.brier.value == pytest.approx((4 * 0.04 + 0.64 + 2 * 0.04 + 3 * 0.64) / 10)
    assert (result.base.confidence.value, result.base.accuracy.value) == (pytest.approx(0.5), 0.3)
    assert result.base.accuracy.interval == wilson(3, 10)
    assert [(b.confidence, b.accuracy.value, b.accuracy.n) for b in result.curve_base] == [
        (pytest.approx(0.2), 0.2, 5),
        (pytest.approx(0.8), 0.4, 5),
    ]
    # Afterwards all are equal and keep their order: the first five hold one "low" and two "high" that are right.
    assert [b.accuracy.value for b in result.curve_edited] == [0.4, 0.2]
    assert result.edited.ece.value == pytest.approx((0.1 + 0.3) / 2)
    assert result.edited.brier.value == pytest.approx(0.25)
    assert (result.change.ece.value, result.change.brier.value) == (pytest.approx(0), pytest.approx(0.25 - 0.28))
    changes = [0.25 - (c - right) ** 2 for c, right in mixed]
    assert result.change.brier.interval == pytest.approx(paired_mean(changes))
    assert (result.change.accuracy.value, result.change.confidence.value) == (0, pytest.approx(0))
    plain = json.loads(json.dumps(to_json(result)))
    assert plain["before"]["ece"]["value"] == result.base.ece.value
    assert plain["change"]["ece"]["interval"] == list(result.change.ece.interval)
    assert plain["curve_after"][0]["accuracy"]["n"] == 5


@pytest.mark.parametrize(("n", "bins", "sizes"), [(3, 10, [3]), (14, 10, [7, 7]), (23, 4, [6, 6, 6, 5]), (50, 10, [5] * 10)])
def test_bins_hold_as_many_examples_and_not_too_few(n: int, bins: int, sizes: list[int]) -> None:
    pairs = [(i / n, i % 2 == 0) for i in range(n)]
    result = calibration(pairs, pairs[::-1], bins=bins)
    assert [b.accuracy.n for b in result.curve_base] == sizes
    assert [b.accuracy.n for b in result.curve_edited] == sizes


def draw(n: int, generator: np.random.Generator, factor: float = 1.0, low: float = 0.0) -> list[Confidence]:
    """Draw confidences of a model that is right as often as it is confident, or that often times a factor."""
    confidence = generator.uniform(low, 1, n)
    return list(zip(confidence.tolist(), (generator.random(n) < confidence * factor).tolist(), strict=True))


@pytest.mark.parametrize("bins", [5, 10])
def test_brier_score_and_curve_are_those_of_scikit_learn(bins: int) -> None:
    metrics, curves = pytest.importorskip("sklearn.metrics"), pytest.importorskip("sklearn.calibration")
    pairs = draw(200, np.random.default_rng(0), 0.7)
    result = calibration(pairs, pairs, bins=bins)
    right, confidence = [r for _, r in pairs], [c for c, _ in pairs]
    assert result.base.brier.value == pytest.approx(metrics.brier_score_loss(right, confidence))
    share, mean = curves.calibration_curve(right, confidence, n_bins=bins, strategy="quantile")
    assert [b.accuracy.value for b in result.curve_base] == pytest.approx(share.tolist())
    assert [b.confidence for b in result.curve_base] == pytest.approx(mean.tolist())
    assert result.base.ece.value == pytest.approx(float(np.abs(share - mean).mean()))
    assert (result.change.ece.value, *result.change.brier.interval) == (0, 0, 0)


def test_intervals_hold_their_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RESAMPLES", 300)
    generator = np.random.default_rng(0)
    # The expected calibration error of a confidence uniform above a and right as often times f is (1 - f) (1 + a) / 2.
    cases = [((1.0, 0.0), (1.0, 0.0)), ((0.5, 0.0), (1.0, 0.0)), ((1.0, 0.5), (0.8, 0.5)), ((0.9, 0.0), (0.9, 0.0))]
    for sides in cases:
        true = [(1 - factor) * (1 + low) / 2 for factor, low in sides]
        covered = np.zeros(3)
        for i in range(100):
            result = calibration(*(draw(200, generator, *side) for side in sides), seed=i)
            three = zip((result.base, result.edited, result.change), (*true, true[1] - true[0]), strict=True)
            covered += [m.ece.interval.low <= value <= m.ece.interval.high for m, value in three]
        assert covered.min() >= 0.92 * 100, sides


def test_a_change_that_is_certain_is_seen_and_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(1)
    before, after = draw(1000, generator), draw(1000, generator, 0.5)
    result = calibration(before, after)
    assert 0.1 < result.change.ece.interval.low < 0.25 < result.change.ece.interval.high < 0.35
    assert result == calibration(before, after)
    monkeypatch.setattr(module, "EXAMPLES_AT_ONCE", 10_000)  # in parts, which are other draws
    parts = calibration(before, after).change.ece.interval
    assert parts == pytest.approx(result.change.ece.interval, abs=0.01)


def test_a_single_example_tells_nothing() -> None:
    result = calibration([(0.7, True)], [(0.4, False)])
    assert result.base.ece.value == pytest.approx(0.3)
    assert result.base.ece.interval == (0, 1)
    assert to_json(result.change)["ece"] == {"value": pytest.approx(0.1), "interval": None, "n": 1}


def test_what_makes_no_pairs_is_reported(llama: LanguageModel) -> None:
    with pytest.raises(AnalysisError, match="0 examples before and 0 after are no pairs"):
        calibration([], [])
    assert confidences(llama, replace(split("answer"), examples=())) == []
    with pytest.raises(AnalysisError, match="10 examples before and 5 after"):
        calibration([*LOW, *HIGH], LOW)
    with pytest.raises(AnalysisError, match="into 0 bins; write 1 or more"):
        calibration(LOW, HIGH, bins=0)
