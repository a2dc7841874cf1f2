"""Where a pass of a search begins."""

from __future__ import annotations

from collections.abc import Callable

from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.searching.scorer import first_changed_block

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
