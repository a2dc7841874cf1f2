from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as T
from families import CAUSAL, FAMILIES, MASKED, SEQ2SEQ, TOKENIZERS
from torch import Tensor

from laserlm.edit import applied, factored
from laserlm.low_rank import LowRankLinear
from laserlm.models import LanguageModel

Make = Callable[..., LanguageModel]


@torch.no_grad()
def outputs(lm: LanguageModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if lm.family == "decision_transformer":
        state, action = (torch.randn(1, 4, n, generator=generator) for n in (5, 3))
        zero = torch.zeros(1, 4, 1)
        times, mask = torch.arange(4)[None], torch.ones(1, 4)
        out = lm.model(states=state, actions=action, rewards=zero, returns_to_go=zero + 1, timesteps=times, attention_mask=mask)
        return out.action_preds
    ids = torch.randint(5, 400, (2, 9), generator=generator)
    return lm.model(input_ids=ids, **({"decoder_input_ids": ids[:, :4]} if lm.kind == "encoder-decoder" else {})).logits


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize(
    "text",
    [
        "all.all@0.2",
        "all.all@r0",
        "all.mlp@0.2:bottom",
        "all.fc_in@0.25:split4",
        "1.attn@0.2:reference",
        "1.q_proj@drop0,3-30",
        "1.q_proj@scale0=0.5,1=-2,3-30=0",
    ],
)
def test_two_factors_compute_what_one_matrix_does_and_leave_no_trace(family: str, text: str, make: Make) -> None:
    lm = make(family)
    if family.startswith("t5"):
        text = "+".join(f"{stack}.{text}" for stack in ("encoder", "decoder"))
    modules = dict(lm.model.named_modules())
    base = outputs(lm)
    with applied(lm, text):
        expected = outputs(lm)
    with factored(lm, text) as stored:
        actual = outputs(lm)
        parameters = sum(p.numel() for p in lm.model.parameters())
    assert not torch.allclose(expected, base)
    torch.testing.assert_close(actual, expected, atol=3e-5 * float(expected.abs().max()), rtol=0)
    assert all(lm.model.get_submodule(path) is module for path, module in modules.items())
    assert torch.equal(outputs(lm), base)
    saved = sum(m.shape[0] * m.shape[1] - m.parameters for m in stored)
    assert parameters == sum(p.numel() for p in lm.model.parameters()) - saved
    assert (saved > 0) == any(not m.reason_kept_dense for m in stored)


def test_factors_are_smaller_than_the_matrix_at_every_rank(llama: LanguageModel) -> None:
    with factored(llama, "0.fc_in@r31+1.fc_in@0.3:split2") as (first, second):  # 31 x (80 - 31) = 1519 < 48 x 32 = 1536
        assert isinstance(llama.model.get_submodule("model.layers.0.mlp.gate_proj"), LowRankLinear)
        layer = llama.model.get_submodule("model.layers.1.mlp.gate_proj")
        assert sum(p.numel() for p in layer.parameters()) == second.parameters
    assert (first.parameters, first.reason_kept_dense) == (1519, "")
    assert (second.rank, second.parameters) == (7, 2 * 7 * (24 + 32 - 7))


def test_experts_in_one_tensor_stay_dense(make: Make) -> None:
    with factored(make("mixtral"), "1.fc_in@0.1+1.q_proj@0.1") as stored:
        reasons = {m.matrix: m.reason_kept_dense for m in stored}
    assert reasons["1.q_proj"] == ""
    assert {reasons[f"1.experts.{e}.fc_in"] for e in range(3)} == {"not the weight of a linear layer"}


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "phi3"])
@pytest.mark.parametrize("text", ["1.qkv@0.2", "1.k_proj@0.2", "1.q_proj@0.2+1.v_proj@0.1"])
def test_fused_matrices_are_factored_whole_or_in_part_with_their_bias(family: str, text: str, make: Make) -> None:
    lm = make(family)
    with applied(lm, text):
        expected = outputs(lm)
    with factored(lm, text) as stored:
        assert all(not m.reason_kept_dense for m in stored)
        torch.testing.assert_close(outputs(lm), expected, atol=1e-5, rtol=1e-4)


def test_blocks_of_rows_across_heads_are_factored(make: Make) -> None:
    lm = make("bloom")
    with applied(lm, "1.q_proj@0.2:split2"):
        expected = outputs(lm)
    with factored(lm, "1.q_proj@0.2:split2") as (projection,):
        assert not projection.reason_kept_dense
        torch.testing.assert_close(outputs(lm), expected, atol=1e-5, rtol=1e-4)


def test_a_matrix_of_lower_rank_than_is_kept_is_factored(llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.model.model.layers[1].mlp.up_proj.weight[:, 3:] = 0
        llama.model.model.layers[1].mlp.gate_proj.weight.zero_()
    base = outputs(llama)
    with factored(llama, "1.fc_up@0.5+1.fc_in@0.5"):
        torch.testing.assert_close(outputs(llama), base, atol=1e-5, rtol=1e-4)


def test_scoring_inside_gives_the_same_flags(make: Make) -> None:
    from laserlm.scoring.evaluate import evaluate
    from laserlm.tasks import Example, Task

    examples = [
        Example(str(i), f"The capital of {c} is", a) for i, (c, a) in enumerate([("France", "Paris"), ("Italy", "Rome")])
    ]
    split = Task.of("t", examples).every
    for family in [*CAUSAL, *MASKED, *SEQ2SEQ][::4]:
        lm = make(family)
        text = "decoder.1.mlp@0.2" if family.startswith("t5") else "1.mlp@0.2"
        with applied(lm, text):
            one = evaluate(lm, split)
        with factored(lm, text):
            other = evaluate(lm, split)
        assert other.intervention == text
        assert [s.correct for s in one.scores] == [s.correct for s in other.scores]
        assert [s.logprob for s in one.scores] == pytest.approx([s.logprob for s in other.scores], abs=1e-3)


def test_matrices_without_a_few_components_are_smaller(llama: LanguageModel) -> None:
    with factored(llama, "0.fc_in@drop3+1.fc_in@drop0,2-20") as (few, many):  # ranks 31 and 12 of 32
        assert isinstance(llama.model.get_submodule("model.layers.1.mlp.gate_proj"), LowRankLinear)
    assert (few.rank, few.parameters, few.reason_kept_dense) == (31, 31 * 49, "")
    assert (many.rank, many.parameters, many.reason_kept_dense) == (12, 12 * 68, "")


@pytest.mark.parametrize("reduction", ["0.mixer.dt_proj@r1", "0.mixer.dt_proj@r2", "0.mixer.in_proj@r4", "0.mixer.x_proj@r3"])
def test_a_layer_whose_weight_the_model_reads_itself_stays_dense(reduction: str) -> None:
    """Mamba multiplies by the weight of dt_proj itself, and its fused operations by the weights of x_proj and out_proj."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 512, "time_step_rank": 4}
    torch.manual_seed(0)
    lm = LanguageModel(T.MambaForCausalLM(T.MambaConfig(**sizes)), TOKENIZERS["causal"](), "mamba", "causal")
    with applied(lm, reduction):
        expected = outputs(lm)
    with factored(lm, reduction) as (stored,):
        torch.testing.assert_close(outputs(lm), expected, atol=1e-6, rtol=1e-4)
    assert stored.reason_kept_dense == ("" if "in_proj" in reduction else "the model reads its weight itself, beside its layer")


class Plain(torch.nn.Linear):
    """A layer as Falcon's, which multiplies by the weight in code of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Scaled(torch.nn.Linear):
    """A layer that does more than a linear one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.25


class Paired(torch.nn.Linear):
    """A layer that gives out two tensors, as the router of Llama 4."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Grouped(torch.nn.Linear):
    """A layer of another input, as that of DeepSeek V4."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(7, 11, -1))


@pytest.mark.parametrize("kind", [Plain, Scaled, Paired, Grouped])
def test_a_layer_is_two_factors_only_if_it_computes_what_a_linear_layer_does(kind: Any, llama: LanguageModel) -> None:
    layer = kind(32, 48, bias=False)
    layer.weight = llama.model.model.layers[1].mlp.up_proj.weight
    llama.model.model.layers[1].mlp.up_proj = layer
    with factored(llama, "1.fc_up@0.2") as (stored,):
        assert isinstance(llama.model.model.layers[1].mlp.up_proj, LowRankLinear) == (kind is Plain)
    other = "the weight of a layer that computes something else than a linear layer"
    assert stored.reason_kept_dense == ("" if kind is Plain else other)


def test_reading_the_type_of_a_weight_or_a_switched_off_branch_keeps_no_matrix_dense(make: Make) -> None:
    t5, bloom = make("t5"), make("bloom")
    with factored(t5, "encoder.1.fc_out@0.2") as (stored,):  # T5 compares the dtype of its weight
        assert not stored.reason_kept_dense
    for is_on in (False, True):
        for module in bloom.model.modules():
            if hasattr(module, "slow_but_exact"):
                module.slow_but_exact = is_on
        with factored(bloom, "1.fc_out@0.2") as (stored,):
            assert bool(stored.reason_kept_dense) == is_on
