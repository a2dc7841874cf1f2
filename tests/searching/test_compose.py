from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.searching import SearchConfig, expand, search
from laserlm.searching.compose import in_order
from laserlm.searching.screen import Prediction
from laserlm.tasks import Example, Task

Make = Callable[..., LanguageModel]


@pytest.fixture
def task() -> Task:
    cities = ["Paris", "Rome", "Oslo", "Lisbon", "Madrid"]
    rows = [
        Example(f"{a}{b}", f"The capital of {a} and {b} is", cities[(i * 7) % 5])
        for i, (a, b) in enumerate((x, y) for x in "abcdefgh" for y in "uvwxyz")
    ]
    return Task.of("made", rows, scorer="answer")


def test_greedy_goes_from_the_last_block_and_the_smallest_size(llama: LanguageModel) -> None:
    candidates = expand("1-2.mlp@0.5,0.1", llama.matrices)
    names = [f"{layer}.{m}@{size}" for layer in (2, 1) for m in ("fc_in", "fc_up", "fc_out") for size in ("0.1", "0.5")]
    assert [str(c.intervention) for c in in_order(candidates, {}, SearchConfig(mode="greedy"))] == names


def test_joint_takes_what_the_screen_expects_most_of(llama: LanguageModel) -> None:
    candidates = expand("1-2.fc_in@0.5,0.1", llama.matrices)
    predictions = {
        "1.fc_in@0.5": Prediction(-1, 0, 9),
        "2.fc_in@0.1": Prediction(-3, 0, 9),
        "1.fc_in@0.1": Prediction(-2, 0, 9),
    }
    order = in_order(candidates, predictions, SearchConfig(candidates=2))
    assert [str(c.intervention) for c in order] == ["2.fc_in@0.1", "1.fc_in@0.1"]
    order = in_order(candidates, predictions, SearchConfig(sizes_per_matrix=1))
    assert [str(c.intervention) for c in order] == ["2.fc_in@0.1", "1.fc_in@0.1"]


@pytest.mark.parametrize("mode", ["greedy", "joint"])
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_steps_are_accepted_where_validation_improves_and_the_rest_is_undone(
    mode: Any, metric: Any, llama: LanguageModel, task: Task
) -> None:
    before = {name: p.detach().clone() for name, p in llama.model.named_parameters()}
    pointers = {name: p.data_ptr() for name, p in llama.model.named_parameters()}
    options = SearchConfig(first_rung=4)
    found = search(llama, task, strategy="compose", mode=mode, grid="all.all@0.5,0.2", metric=metric, config=options)
    for name, p in llama.model.named_parameters():
        assert p.data_ptr() == pointers[name]
        assert bool((p == before[name]).all())
    if metric == "loss":
        assert found.steps
    assert str(found.best) == (found.steps[-1].intervention if found.steps else "")
    reached = ""
    for step in found.steps:
        assert set(step.intervention.split("+")) - set(reached.split("+")) == {step.added}
        scored = []
        for text in (reached, step.intervention):
            with applied(llama, text):
                scored.append(evaluate(llama, task.validation))
        expected = compare(*scored)
        assert step.comparison.gain == pytest.approx(expected.gain)
        assert step.comparison.edited_loss == pytest.approx(expected.edited_loss, abs=1e-5)
        assert step.comparison.loss_interval.high < 0 if metric == "loss" else step.comparison.interval.low > 0
        reached = step.intervention
    matrices = [text.partition("@")[0] for text in reached.split("+") if text]
    assert len(matrices) == len(set(matrices))
    if found.steps:
        assert found.validation.edited_loss == pytest.approx(found.steps[-1].comparison.edited_loss)
        if mode == "greedy":
            blocks = [int(s.added.partition(".")[0]) for s in found.steps]
            assert blocks == sorted(blocks, reverse=True)


def test_a_fused_matrix_and_its_part_are_not_reduced_both(make: Make, task: Task) -> None:
    found = search(
        make("gpt2"), task, strategy="compose", mode="greedy", grid="all.qkv@0.5+all.attn@0.5", metric="loss",
        first_rung=4,
    )  # fmt: skip
    assert found.failed == {}
