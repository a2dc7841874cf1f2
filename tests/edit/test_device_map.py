"""Layers that replace others take over the hooks with which accelerate moves inputs between devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from torch import Tensor

from laserlm.edit import applied, factored
from laserlm.models import LanguageModel

Make = Callable[..., LanguageModel]
IDS = torch.tensor([[1, 50, 99, 7]])


class Elsewhere(ModelHook):  # type: ignore[misc]
    """Plays another device: what goes into its module has to be moved there, which is to add one here."""

    def __init__(self) -> None:
        self.moved = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.moved += 1
        return tuple(x + 1 if isinstance(x, Tensor) else x for x in args), kwargs


def logits(lm: LanguageModel) -> Tensor:
    with torch.no_grad():
        return lm.model(IDS).logits


@pytest.mark.parametrize(
    ("family", "path", "text"),
    [
        ("llama", "model.layers.1.mlp.gate_proj", "1.fc_in@0.2"),
        ("gpt2", "transformer.h.1.mlp.c_fc", "1.fc_in@0.2"),
        ("gpt2", "transformer.h.1.attn.c_attn", "1.q_proj@0.2+1.v_proj@0.1"),
    ],
)
def test_the_inputs_of_a_factored_layer_are_moved_as_those_of_the_layer_were(
    family: str, path: str, text: str, make: Make
) -> None:
    lm = make(family)
    old = lm.model.get_submodule(path)
    add_hook_to_module(old, Elsewhere())
    with applied(lm, text):
        expected = logits(lm)
    with factored(lm, text):
        torch.testing.assert_close(logits(lm), expected, atol=1e-5, rtol=1e-4)
        assert lm.model.get_submodule(path)._hf_hook.moved > 0
    assert lm.model.get_submodule(path) is old


def test_a_model_whose_blocks_are_divided_computes_the_same_and_keeps_its_hooks(make: Make) -> None:
    lm = make("llama")
    with applied(lm, "1.mlp@0.2"):
        expected = logits(lm)
    parts = ("self_attn", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn", "input_layernorm")
    places = {f"model.layers.{i}.{part}": "cpu" for i in range(3) for part in (*parts, "post_attention_layernorm")}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    lm.model = dispatch_model(lm.model, places | rest, force_hooks=True)
    before = {name: getattr(module, "_hf_hook", None) for name, module in lm.model.named_modules()}
    assert isinstance(before["model.layers.1.mlp.gate_proj"], AlignDevicesHook)
    with factored(lm, "1.mlp@0.2"):
        hook = lm.model.get_submodule("model.layers.1.mlp.gate_proj")._hf_hook
        assert hook is not before["model.layers.1.mlp.gate_proj"]
        assert hook.execution_device == before["model.layers.1.mlp.gate_proj"].execution_device
        torch.testing.assert_close(logits(lm), expected, atol=1e-5, rtol=1e-4)
    assert {name: getattr(module, "_hf_hook", None) for name, module in lm.model.named_modules()} == before
