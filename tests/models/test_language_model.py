"""The hash of a model is that of its weights as they are, and a model is scored and saved in evaluation mode only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from searching.support import build_task
from torch import nn

import laserlm as laser
from laserlm.edit import applied
from laserlm.errors import ModelError
from laserlm.export import save
from laserlm.models import LanguageModel
from laserlm.scoring.generation import generate

Make = Callable[..., LanguageModel]


def under_no_grad(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight[3, 4] += 0.5


def by_data(weight: nn.Parameter) -> None:
    weight.data[3, 4] += 0.5


def by_new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone()
    by_data(weight)


def by_optimizer(weight: nn.Parameter) -> None:
    weight.grad = torch.zeros_like(weight)
    weight.grad[3, 4] = -0.5
    torch.optim.SGD([weight], lr=1).step()


CHANGES = [under_no_grad, by_data, by_new_data, by_optimizer]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_have_another_hash_and_the_same_weights_the_same(
    change: Callable[[nn.Parameter], None], make: Make
) -> None:
    lm = make("llama")
    weight = lm.model.model.layers[1].mlp.up_proj.weight
    before, value = lm.hash, weight[3, 4].item()
    assert lm.hash == before
    change(weight)
    assert weight[3, 4].item() == pytest.approx(value + 0.5)
    assert lm.hash == replace(lm).hash != before
    with torch.no_grad():
        weight[3, 4] = value
    assert lm.hash == before


def test_a_new_parameter_a_buffer_and_another_dtype_have_another_hash(make: Make) -> None:
    lm = make("gpt_neox")
    hashes = [lm.hash]
    lm.model.gpt_neox.layers[0].mlp.dense_h_to_4h.weight = nn.Parameter(torch.zeros(48, 32))
    hashes.append(lm.hash)
    lm.model.register_buffer("extra", torch.ones(3))
    hashes.append(lm.hash)
    lm.model.extra.zero_()
    hashes.append(lm.hash)
    lm.model.bfloat16()
    hashes.append(lm.hash)
    assert len(set(hashes)) == 5


def test_an_applied_intervention_leaves_the_hash_as_it_was(llama: LanguageModel) -> None:
    before = llama.hash
    with applied(llama, "all.all@0.2"):
        pass
    assert llama.hash == before


@pytest.mark.parametrize("change", CHANGES)
def test_a_search_after_a_change_is_a_new_run_and_its_model_is_saved_with_its_hash(
    change: Callable[[nn.Parameter], None], make: Make, tmp_path: Path
) -> None:
    lm, task, weight = make("llama"), build_task(), None

    def search() -> Any:
        return laser.search(lm, task, strategy="exhaustive", grid="1.fc_in@0.5", store=tmp_path / "runs.db", metric="loss")

    first = search()
    assert search().run == first.run
    weight = lm.model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad():
        weight.mul_(3)
    change(weight)
    second = search()
    assert second.run != first.run
    assert second.validation.base_loss == pytest.approx(laser.evaluate(replace(lm), task.validation).loss)
    assert second.validation.base_loss != first.validation.base_loss
    saved = save(lm, "1.fc_in@0.5", tmp_path / "out")
    assert saved.record["base"]["hash"] == replace(lm).hash


@pytest.mark.parametrize("path", ["", "model.layers.1.mlp"])
def test_in_training_mode_a_model_is_neither_scored_nor_searched_nor_saved(path: str, make: Make, tmp_path: Path) -> None:
    lm, task = make("llama"), build_task()
    lm.model.get_submodule(path).train()
    uses: list[Callable[[], object]] = [
        lambda: lm.hash,
        lambda: laser.evaluate(lm, task.validation),
        lambda: laser.search(lm, task, grid="1.fc_in@0.5", store=tmp_path / "runs.db"),
        lambda: save(lm, "1.fc_in@0.5", tmp_path / "out"),
        lambda: generate(lm, ["The capital of France is"]),
    ]
    for use in uses:
        with pytest.raises(
            ModelError, match=rf"^{path or 'LlamaForCausalLM'} of llama is in training mode.*lm\.model\.eval\(\)"
        ):
            use()
    assert not (tmp_path / "out").exists()
    lm.model.eval()
    for use in uses:
        use()
