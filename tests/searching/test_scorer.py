"""Where a pass of a search begins."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation
from laserlm.scoring.tokenize import encode
from laserlm.searching import expand
from laserlm.searching.scorer import EncodedSplit, PrefixScorer, first_changed_block
from laserlm.tasks import Task

ORDER = [("", 0), ("", 1), ("", 2)]


def test_a_pass_begins_at_the_first_of_the_changed_blocks(llama: LanguageModel) -> None:
    for text, expected in (("", 0), ("2.fc_in@0.5", 2), ("2.fc_in@0.5+1.fc_up@0.5", 1), ("1-2.mlp@0.5", 1)):
        assert first_changed_block(Intervention.parse(text), llama.matrices, ORDER) == expected


def test_a_weight_that_blocks_share_changes_the_first_of_them(make: Callable[..., LanguageModel]) -> None:
    lm = make("llama")
    layers = lm.model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    lm = LanguageModel(lm.model, lm.tokenizer, "tied", "causal")
    assert first_changed_block(Intervention.parse("2.fc_up@0.5"), lm.matrices, ORDER) == 0
    assert first_changed_block(Intervention.parse("2.fc_in@0.5"), lm.matrices, ORDER) == 2


def test_the_unchanged_model_runs_from_the_activations_of_what_was_scored_before(llama: LanguageModel, task: Task) -> None:
    n = len(task.test)
    encoded = EncodedSplit(task.test, encode(llama, task.test.examples, "answer"), "answer")
    scorer = PrefixScorer(llama, {"test": encoded})
    complete = scorer.score("test", Intervention(), 0, n)
    scorer.score("test", Intervention.parse("2.fc_in@0.5"), 0, n)
    passes: list[int] = []
    for number, layer in enumerate(llama.model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: passes.append(number))
    again = scorer.score("test", Intervention(), 0, n)
    assert isinstance(complete, Evaluation)
    assert isinstance(again, Evaluation)
    assert set(passes) == {2}
    assert [s.logprob for s in again.scores] == pytest.approx([s.logprob for s in complete.scores], abs=1e-6)


def test_splits_of_one_scorer_are_tried_for_boundaries_once(llama: LanguageModel, task: Task) -> None:
    splits = {
        f"{part.name} {kind}": EncodedSplit(part, encode(llama, part.examples, kind), kind)
        for part in (task.validation, task.test)
        for kind in ("answer", "first_token")
    }
    scorer = PrefixScorer(llama, splits)
    rows: list[int] = []
    llama.model.model.layers[0].mlp.register_forward_hook(lambda _module, args, _output: rows.append(len(args[0])))
    assert all(scorer.block_order(name) == ORDER for name in splits if name.startswith(task.validation.name))
    assert rows
    rows.clear()
    assert all(scorer.block_order(name) == ORDER for name in splits)
    assert not rows
    for name, encoded in splits.items():
        scores = scorer.score(name, Intervention.parse("2.fc_in@0.5"), 0, len(encoded.split))
        assert isinstance(scores, Evaluation)
        rows.clear()
        scorer.score(name, Intervention.parse("2.fc_in@0.1"), 0, len(encoded.split))
        assert not rows  # from the boundary


def test_a_screen_takes_no_more_time_than_it_has(llama: LanguageModel, task: Task) -> None:
    encoded = EncodedSplit(task.validation, encode(llama, task.validation.examples, "answer"), "answer")
    scorer = PrefixScorer(llama, {"validation": encoded})
    candidates = expand("0-2.mlp@0.5", llama.matrices)
    assert len(scorer.screen("validation", 0, candidates).predictions) == 9
    late = scorer.screen("validation", 0, candidates, seconds=-1)
    assert late.predictions == {}
    assert len(late.unranked) == 9
