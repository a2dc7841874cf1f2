"""What single components read and write, against a plain computation on the weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from laserlm.models import LanguageModel
from laserlm.studies.component_tokens import component_tokens

Make = Callable[..., LanguageModel]


def nearest(lm: LanguageModel, embedding: Tensor, direction: Tensor) -> set[tuple[str, ...]]:
    """Return the three tokens on each side of a direction, whose sign is free."""
    scores = embedding.detach() @ direction
    decode = lm.require_tokenizer().decode
    return {tuple(decode([i]) for i in torch.topk(side, 3).indices.tolist()) for side in (scores, -scores)}


def test_tokens_of_the_feed_forward_part_are_those_of_the_weights(make: Make) -> None:
    lm = make("llama")
    block, inputs, outputs = lm.model.model.layers[1].mlp, lm.model.get_input_embeddings().weight, lm.model.lm_head.weight
    up = torch.linalg.svd(block.up_proj.weight.detach(), full_matrices=False)
    down = torch.linalg.svd(block.down_proj.weight.detach(), full_matrices=False)
    rows = component_tokens(lm, "1.fc_up@drop2,4+1.fc_out@drop3", components=3, tokens=3)
    assert [r.value for r in rows] == sorted((r.value for r in rows), reverse=True)
    by_name = {(r.matrix, r.component): r for r in rows}
    assert by_name.keys() == {("1.fc_up", 2), ("1.fc_up", 4), ("1.fc_out", 3)}
    for i in (2, 4):
        row = by_name["1.fc_up", i]
        assert row.value == pytest.approx(float(up.S[i]), rel=1e-4)
        assert row.reads in nearest(lm, inputs, up.Vh[i])
        assert row.writes in nearest(lm, outputs, block.down_proj.weight.detach() @ up.U[:, i])
    row = by_name["1.fc_out", 3]
    assert row.writes in nearest(lm, outputs, down.U[:, 3])
    assert row.reads in nearest(lm, inputs, block.up_proj.weight.detach().T @ down.Vh[3])


def test_the_strongest_tokens_come_with_a_positive_sign_and_heads_of_another_width_have_none(make: Make) -> None:
    lm = make("llama")  # fewer heads of keys and values than of queries
    rows = component_tokens(lm, "0.q_proj@drop0+0.v_proj@drop0+0.k_proj@drop0", tokens=2)
    assert {r.writes for r in rows} == {()}
    for r in rows:
        weight = getattr(lm.model.model.layers[0].self_attn, r.matrix.partition(".")[2]).weight.detach()
        v = torch.linalg.svd(weight, full_matrices=False).Vh[0]
        scores = lm.model.get_input_embeddings().weight.detach() @ v
        assert r.reads[0] == lm.require_tokenizer().decode([int(scores.abs().argmax())])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "mixtral", "bert", "t5"])
def test_every_kind_of_family_has_tokens(family: str, make: Make) -> None:
    lm = make(family)
    rows = component_tokens(lm, "all.mlp@0.5", components=30)
    assert len(rows) == 30
    assert all(len(r.reads) == len(r.writes) == 5 for r in rows)
