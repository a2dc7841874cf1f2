from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laserlm.export.gguf_rounding import rounded_to
from laserlm.models import LanguageModel

Make = Callable[..., LanguageModel]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_block_of_32_inputs_has_a_scale_of_its_own(family: str, make: Make) -> None:
    """q8_0 by hand: 127 steps to the largest number of a block. The float16 of the scale may move it by 127 / 2^11 steps."""
    lm = make(family)
    name = {"llama": "model.layers.0.mlp.gate_proj.weight", "gpt2": "transformer.h.0.mlp.c_fc.weight"}[family]
    weight = lm.model.get_parameter(name)
    rows = weight.detach().T if family == "gpt2" else weight.detach()  # (m, n)
    blocks = rows.unflatten(1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().float()
    with rounded_to(lm, "q8_0"):
        seen = lm.model.get_parameter(name).detach().clone()
    seen_rows = (seen.T if family == "gpt2" else seen).unflatten(1, (-1, 32))
    assert bool(((seen_rows - blocks).abs() <= scale * 0.57 + 1e-7).all())
    steps = seen_rows / scale
    torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
    assert lm.model.get_parameter(name) is weight
    assert lm.active == []


def test_the_bytes_are_those_of_the_blocks(make: Make) -> None:
    lm = make("llama")
    ends = {lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight}
    parameters = set(lm.model.parameters())
    matrices = [p for p in parameters - ends if p.ndim == 2 and p.shape[1] % 32 == 0]
    others = [p for p in parameters - ends if p.ndim < 2 or p.shape[1] % 32]
    for kind, block_bytes in (("q8_0", 34), ("q4_0", 18)):
        with rounded_to(lm, kind) as size:
            expected = sum(p.numel() // 32 * block_bytes for p in matrices) + 4 * sum(p.numel() for p in others)
            assert size == expected + sum(p.numel() // 32 * 34 for p in ends)


def test_four_bits_change_the_weights_more_than_eight(llama: LanguageModel, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in llama.model.named_parameters()}
    distances = []
    for kind in ("q8_0", "q4_0"):
        with rounded_to(llama, kind):
            after = {name: p.detach() for name, p in llama.model.named_parameters()}
            distances.append(sum(float((after[name] - before[name]).square().sum()) for name in before))
    assert distances[1] > 100 * distances[0] > 0
    assert all(torch.equal(p, before[name]) for name, p in llama.model.named_parameters())
