"""The questions that want a component gone, against derivatives by finite differences of its strength."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.store import Store
from laserlm.studies import cached_scorer
from laserlm.studies.component_tokens import component_tokens
from laserlm.studies.removed_components import removed_components, stored_components, with_questions
from laserlm.tasks import Example, Split, Task

REMOVED = "1.fc_out@drop0,4+2.v_proj@drop1"
PLACES = ["France", "Italy", "Spain", "Norway", "Japan", "Chile"]


def questions() -> Split:
    return Task.of("t", [Example(p, f"The capital of {p} is", "Rome") for p in PLACES]).every


def losses(lm: LanguageModel, strength: float) -> list[float]:
    """Return the losses with component 0 of 1.fc_out at a strength; 1 is the unchanged model."""
    weight = lm.model.model.layers[1].mlp.down_proj.weight.data  # type: ignore[union-attr, index]
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    kept = weight.clone()
    weight += ((strength - 1) * S[0] * torch.outer(U[:, 0], Vh[0])).to(weight)
    try:
        return [s.loss for s in evaluate(lm, questions()).scores]
    finally:
        weight.copy_(kept)


def test_questions_are_those_whose_loss_the_removal_lowers_most(make: Callable[..., LanguageModel]) -> None:
    lm = make("llama")
    rows = with_questions(lm, component_tokens(lm, REMOVED), questions(), most=len(PLACES))
    row = next(r for r in rows if (r.matrix, r.component) == ("1.fc_out", 0))
    step = 0.02
    falls = [(high - low) / (2 * step) for high, low in zip(losses(lm, 1 + step), losses(lm, 1 - step), strict=True)]
    expected = sorted(((f"The capital of {p} is", fall) for p, fall in zip(PLACES, falls, strict=True)), key=lambda x: -x[1])
    expected = [(prompt, pytest.approx(fall, rel=0.05, abs=2e-4)) for prompt, fall in expected if fall > 0]
    assert list(row.questions) == expected
    assert 0 < len(expected) < len(PLACES)
    assert all(len(r.questions) <= 3 for r in with_questions(lm, rows, questions()))


def test_they_are_kept_with_the_scores_and_found_again(llama: LanguageModel, tmp_path: Path) -> None:
    split = questions()
    with Store.open(tmp_path / "runs.db") as store:
        with cached_scorer(llama, split, store) as scorer:
            rows = removed_components(scorer, REMOVED, split.examples[:3])
        assert len(rows) == 3
        assert stored_components(store, llama.hash, REMOVED) == rows
        assert stored_components(store, llama.hash, "1.fc_out@drop0") == []
        assert stored_components(store, "0" * 64, REMOVED) == []
        with cached_scorer(llama, split, store) as scorer:
            assert removed_components(scorer, REMOVED, ()) == rows  # from the store
    written = {prompt for row in rows for prompt, _ in row.questions}
    assert written <= {f"The capital of {p} is" for p in PLACES[:3]}
    assert written
