from __future__ import annotations

from dataclasses import replace

import pytest

from laserlm.edit import applied
from laserlm.errors import AnalysisError
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.studies.loss_map import LossMap
from laserlm.tasks import Example, Task


def test_the_map_is_of_single_matrices_each_on_its_own_examples(llama: LanguageModel) -> None:
    pairs = zip("abcdefgh", ["Paris", "Rome"] * 4, strict=True)
    split = Task.of("t", [Example(c, f"The capital of {c} is", a) for c, a in pairs]).every
    base = evaluate(llama, split)
    trials = {}
    for text in ("1.fc_in@0.5", "1.fc_in@0.1", "2.k_proj@0.5", "1-2.fc_up@0.5", "1.fc_in@0.5+2.k_proj@0.5"):
        with applied(llama, text):
            trials[text] = evaluate(llama, split)
    trials["2.k_proj@0.5"] = replace(trials["2.k_proj@0.5"], scores=trials["2.k_proj@0.5"].scores[:3])
    result = LossMap.of(base, trials).cells
    assert [(m.matrix, m.layer, m.name, m.size) for m in result] == [
        ("1.fc_in", 1, "fc_in", "0.1"),
        ("1.fc_in", 1, "fc_in", "0.5"),
        ("2.k_proj", 2, "k_proj", "0.5"),
    ]
    assert [m.loss_change.n for m in result] == [8, 8, 3]
    assert result[1].loss_change.value == pytest.approx(trials["1.fc_in@0.5"].loss - base.loss)
    three = [a.loss - b.loss for b, a in zip(base.scores, trials["2.k_proj@0.5"].scores, strict=False)]
    assert result[2].loss_change.value == pytest.approx(sum(three) / 3)
    assert result[2].loss_change.is_small
    with pytest.raises(AnalysisError, match=r"single matrix.*--strategy race or exhaustive"):
        LossMap.of(base, {"1-2.fc_up@0.5": trials["1-2.fc_up@0.5"]})
