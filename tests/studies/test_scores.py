"""Scores of a study are those of whole passes, with a prefix cache and where there is no room for one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.prefix_cache import PrefixCache
from laserlm.store import Store
from laserlm.studies import cached_scorer, scores
from laserlm.tasks import Example, Task

CAPITALS = [("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"), ("Norway", "Oslo"), ("Japan", "Tokyo")]
TEXTS = ("", "2.fc_in@0.1", "1.v_proj@0.2")


def logprobs(lm: LanguageModel, store: Path) -> dict[str, list[float]]:
    """Return the scores of each intervention by a cached scorer, and compare them with those of whole passes."""
    questions = Task.of("t", [Example(c, f"The capital of {c} is", a) for c, a in CAPITALS]).every
    with Store.open(store) as results, cached_scorer(lm, questions, results, batch_size=2) as scorer:
        values = {text: [s.logprob for s in scorer(text).scores] for text in TEXTS}
    for text in TEXTS:
        with applied(lm, text):
            assert values[text] == pytest.approx([s.logprob for s in evaluate(lm, questions).scores], abs=1e-4)
    return values


@pytest.mark.parametrize("method", ["move_to", "run"])
def test_passes_are_full_ones_where_the_prefix_cache_runs_out_of_memory(
    method: str, llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logprobs(llama, tmp_path / "cached.db")
    calls = []

    def fail(*_: object) -> None:
        calls.append(method)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(PrefixCache, method, fail)
    values = logprobs(llama, tmp_path / "whole.db")
    assert calls
    for text in TEXTS:
        assert values[text] == pytest.approx(expected[text], abs=1e-4)
    assert len({tuple(v) for v in values.values()}) == len(TEXTS)


def test_there_is_no_prefix_cache_where_the_activations_of_all_examples_do_not_fit(
    llama: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scores, "PREFIX_CACHE_BYTES", 0)
    monkeypatch.setattr(scores, "PrefixCache", None)  # would fail if it was called
    assert set(logprobs(llama, tmp_path / "whole.db")) == set(TEXTS)
