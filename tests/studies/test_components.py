from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from laserlm.edit import applied
from laserlm.errors import AnalysisError, ScoringError
from laserlm.models import LanguageModel, read_matrix
from laserlm.scoring.evaluate import evaluate
from laserlm.store import Store
from laserlm.studies import cached_scorer
from laserlm.studies.components import bottom_components, chunk_map
from laserlm.studies.words import Words
from laserlm.tasks import Example, Split, Task

Make = Callable[..., LanguageModel]
NOTHING = Words(frozenset(), "nothing")


@pytest.fixture
def split() -> Split:
    pairs = zip("abcdefgh", ["Paris", "Rome"] * 4, strict=True)
    return Task.of("t", [Example(c, f"The capital of {c} is", a, group=a[0]) for c, a in pairs]).every


def winners(lm: LanguageModel, e: Example) -> tuple[int, float]:
    """Return the likeliest next token and the probability of the answer's first, by a plain pass."""
    tokenizer = lm.require_tokenizer()
    before = tokenizer(e.prompt).input_ids
    target = tokenizer(f"{e.prompt} {e.answer}").input_ids[len(before)]
    logits = lm.model(torch.tensor([before])).logits[0, -1].float()
    return int(logits.argmax()), float(logits.softmax(-1)[target])


def test_the_bottom_of_the_spectrum_answers_as_a_plain_pass_of_it_does(
    llama: LanguageModel, split: Split, tmp_path: Path
) -> None:
    chosen = split.examples[:6]
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as scorer:
        result = bottom_components(scorer, chosen, "1.fc_in@0.25", NOTHING, fractions=("1", "0.5", "0"))
        again = bottom_components(scorer, chosen, "1.fc_in@0.25", NOTHING, fractions=("0", "0.50", "1"))
    assert again == result
    assert [b.fraction for b in result] == ["0", "0.5", "1"]
    weight = llama.model.get_input_embeddings().weight.detach()
    for b, text in zip(result, ("1.fc_in@0:bottom", "1.fc_in@0.5:bottom", ""), strict=True):
        with torch.no_grad(), applied(llama, text):
            expected = [winners(llama, e) for e in chosen]
        assert b.probability.value == pytest.approx(sum(p for _, p in expected) / 6, rel=1e-4)
        assert b.probability.n == b.n == 6
        tokens = [llama.require_tokenizer().decode([w]) for w, _ in expected]
        assert sum(count for _, count in b.winners) == 6
        assert {token for token, _ in b.winners} == set(tokens)
        targets = [llama.require_tokenizer()(f" {e.answer}", add_special_tokens=False).input_ids[0] for e in chosen]
        cosines = [
            float(torch.cosine_similarity(weight[w], weight[t], dim=0)) for (w, _), t in zip(expected, targets, strict=True)
        ]
        assert b.cosine.value == pytest.approx(sum(cosines) / 6, abs=1e-5)
        assert sum(share.value for share in b.classes.values()) == pytest.approx(1)


def test_winners_fall_into_classes(llama: LanguageModel, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = llama.require_tokenizer()

    def token(text: str) -> int:
        (result,) = tokenizer(text, add_special_tokens=False).input_ids
        return int(result)

    says = {"a": " Paris", "b": " Paris", "c": " Rome", "d": " the", "e": " is", "f": " Rome"}
    examples = [replace(e, group="x" if e.id in "abd" else "y") for e in split.examples[:6]]
    inside = replace(split, examples=tuple(examples))
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, inside, store) as scorer:
        monkeypatch.setattr(scorer, "cached", lambda name, make: [(token(says[e.id]), math.log(0.5)) for e in examples])
        words = Words(frozenset({"the"}), "a list")
        (result,) = bottom_components(scorer, examples, "1.fc_in@0.25", words, fractions=("0.5",))
    # a: Paris is right; b: asks for Rome, and Paris is another answer of its group x; c, in y, asks for Paris, and Rome is
    # the answer of f there; d: a frequent word; e: neither; f: right.
    classes = {name: round(share.value * 6) for name, share in result.classes.items()}
    assert classes == {
        "right": 2,
        "right type": 2,
        "another answer": 0,
        "generic word": 1,
        "capitalised word": 0,
        "other word": 1,
    }
    assert result.probability.value == pytest.approx(0.5)


def test_runs_of_the_spectrum_are_taken_out_one_by_one(make: Make, split: Split, tmp_path: Path) -> None:
    lm = make("llama")
    matrix = next(m for m in lm.matrices if m.id == "1.k_proj")
    W = read_matrix(lm.model, matrix).clone()
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    base = evaluate(lm, split)
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(lm, split, store) as score:
        result = chunk_map("1.k_proj@0.25", score, chunk=6)
    assert [(c.first, c.last) for c in result] == [(0, 5), (6, 11), (12, 15)]
    assert sum(c.energy for c in result) == pytest.approx(1)
    assert torch.equal(read_matrix(lm.model, matrix), W)
    for c in result:
        keep = [i for i in range(16) if not c.first <= i <= c.last]
        parameter = lm.model.get_parameter(matrix.path)
        with torch.no_grad():
            parameter.copy_((U[:, keep] * S[keep] @ Vh[keep]).to(W))
        without = evaluate(lm, split)
        with torch.no_grad():
            parameter.copy_(W)
        assert c.loss_change.value == pytest.approx(without.loss - base.loss, abs=1e-5)
        assert c.energy == pytest.approx(float(S[c.first : c.last + 1].square().sum() / S.square().sum()), rel=1e-4)
        low, high = c.loss_change.interval
        assert (c.verdict == "noise") == (high < 0)
        assert (c.verdict == "signal") == (low > 0)


def test_a_fused_matrix_and_a_split_one_are_cut_too(make: Make, split: Split, tmp_path: Path) -> None:
    lm = make("gpt2")
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(lm, split, store) as score:
        full = chunk_map("1.q_proj@0.25", score, chunk=1000)
        parts = chunk_map("1.fc_in@0.25:split2", score, chunk=1000)
        with applied(lm, "1.q_proj@0"):
            zero = evaluate(lm, split)
        with applied(lm, "1.fc_in@0"):
            none = evaluate(lm, split)
        base = score("")
    assert full[0].loss_change.value == pytest.approx(zero.loss - base.loss, abs=1e-5)
    assert parts[0].loss_change.value == pytest.approx(none.loss - base.loss, abs=1e-5)
    assert parts[0].energy == pytest.approx(1)


def test_other_examples_are_other_tokens_and_a_reference_reduction_has_a_bottom(
    llama: LanguageModel, split: Split, tmp_path: Path
) -> None:
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as scorer:
        options: dict[str, Any] = {"intervention": "1.fc_in@0.25:reference", "words": NOTHING, "fractions": ("0.5",)}
        first = bottom_components(scorer, split.examples[:5], **options)
        other = bottom_components(scorer, split.examples[3:8], **options)
        fresh = bottom_components(scorer, split.examples[:5], "1.fc_in@0.25", NOTHING, fractions=("0.5",))
    assert other[0].probability != first[0].probability
    assert fresh == first  # the bottom is of the exact decomposition


def test_scores_that_overflow_are_an_error(make: Make, split: Split, tmp_path: Path) -> None:
    lm = make("llama")
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(lm, split, store) as scorer:
        with torch.no_grad():
            lm.model.get_parameter("model.norm.weight").fill_(torch.inf)
        with pytest.raises(ScoringError, match=r"the weights are not finite: model\.norm\.weight \(32 infinite of 32 values\)"):
            bottom_components(scorer, split.examples, "1.fc_in@0.25", NOTHING, fractions=("0.5",))


def test_what_cannot_be_studied_is_an_error(llama: LanguageModel, split: Split, tmp_path: Path) -> None:
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as scorer:
        with pytest.raises(AnalysisError, match="no example"):
            bottom_components(scorer, [], "1.fc_in@0.25", NOTHING)
        with pytest.raises(AnalysisError, match="rank"):
            bottom_components(scorer, split.examples, "1.fc_in@0.25", NOTHING, fractions=("r5",))
        with pytest.raises(AnalysisError, match="1 or more"):
            chunk_map("1.fc_in@0.25", scorer, chunk=0)


def test_words_that_make_half_of_a_text() -> None:
    words = Words.of_text("the cat and the dog and the rest", "a text")  # the 3, and 2 of 8
    assert words.frequent == {"the", "and"}
    assert words.generic(" The")
    assert words.generic(" ,")
    assert words.generic("\n")
    assert not words.generic(" cat")
    assert not words.generic("7")
    assert Words.english().generic("of")
    assert not Words.english().generic("Paris")
    with pytest.raises(AnalysisError, match="no words"):
        Words.of_text("1 2 3", "numbers")
