from __future__ import annotations

from collections.abc import Callable

import pytest

from laserlm.edit import applied
from laserlm.errors import MatrixError, SpecError
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.studies.last_layers import sweep_layers
from laserlm.tasks import Example, Split, Task

Make = Callable[..., LanguageModel]


@pytest.fixture
def split() -> Split:
    pairs = zip("abcdefgh", ["Paris", "Rome"] * 4, strict=True)
    return Task.of("capitals", [Example(c, f"The capital of {c} is", a) for c, a in pairs]).every


def test_every_model_of_the_sweep_scores_as_under_its_intervention(llama: LanguageModel, split: Split) -> None:
    messages: list[tuple[int, int, str]] = []
    points = sweep_layers(llama, split, ratios=[".1", "0.5"], from_top=2, on_model=lambda *step: messages.append(step))
    texts = ["", "top1.all@0.1", "top1.all@0.5", "top2.all@0.1", "top2.all@0.5"]
    assert [s.evaluation.intervention for s in points] == texts
    assert [step[2] for step in messages] == texts
    assert [(s.top, s.rho) for s in points] == [(0, None), (1, "0.1"), (1, "0.5"), (2, "0.1"), (2, "0.5")]
    for row, text in zip(points, texts, strict=True):
        with applied(llama, text):
            expected = evaluate(llama, split)
        assert row.evaluation.loss == pytest.approx(expected.loss, abs=1e-4)
        assert row.comparison.edited == row.evaluation.accuracy
    # 32 x 32 twice, 16 x 32 twice and 48 x 32 three times in a block; at 0.1 ranks 3, 1 and 3.
    dense = 2 * 1024 + 2 * 512 + 3 * 1536
    factors = 2 * 3 * (64 - 3) + 2 * 1 * (48 - 1) + 3 * 3 * (80 - 3)
    total = sum(p.numel() for p in llama.model.parameters())
    assert points[1].parameters == pytest.approx(1 - (dense - factors) / total)
    assert points[3].parameters == pytest.approx(1 - 2 * (dense - factors) / total)
    assert points[0].parameters == 1


def test_a_stack_is_named_where_there_are_two(make: Make, split: Split) -> None:
    lm = make("t5")
    assert len(sweep_layers(lm, split, ratios=["0.1"], from_top=1, stack="decoder")) == 2
    with pytest.raises(MatrixError, match="several stacks"):
        sweep_layers(lm, split, ratios=["0.1"], from_top=1)


def test_what_cannot_be_done_is_reported(llama: LanguageModel, split: Split) -> None:
    with pytest.raises(SpecError):
        sweep_layers(llama, split, ratios=["much"], from_top=1)
    with pytest.raises(MatrixError, match="more blocks"):
        sweep_layers(llama, split, ratios=["0.1"], from_top=9)
