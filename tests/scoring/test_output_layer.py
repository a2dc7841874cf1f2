"""Scores in half precision: exact to the rounding of the last hidden state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from families import GROUPED, SCORED, SIZES, TOKENIZERS, D
from searching.test_memory_plan import LiveBytes
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from laserlm.edit import applied
from laserlm.models import LanguageModel
from laserlm.models.kinds import Kind
from laserlm.scoring import output_layer
from laserlm.scoring.forward import batches, forward_logits, run_rows
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.tasks import Example

Make = Callable[..., LanguageModel]
HALF = (torch.float16, torch.bfloat16)
CHOICES = ("Paris", "Rome", "true", "false")
EXAMPLES = tuple(
    Example(str(i), "the capital of " * (i % 7) + f"{name} is", CHOICES[i % 4], CHOICES)
    for i, name in enumerate(["France", "Spain", "Italy", "Norway", "Oslo", "Rome", "a city", "this claim"] * 5)
)
OTHERS: dict[str, tuple[Kind, str, dict[str, Any]]] = {
    "scaled by cohere": ("causal", "cohere", GROUPED | {"logit_scale": 0.3}),
    "divided by granite": ("causal", "granite", GROUPED | {"logits_scaling": 3.0}),
    "capped": ("causal", "gemma2", GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}),
    "with a bias of the model": (
        "encoder-decoder",
        "bart",
        {"d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 512, "max_position_embeddings": 130}
        | {"decoder_start_token_id": 0, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "forced_eos_token_id": 2},
    ),
    "scaled before the head": (
        "encoder-decoder",
        "t5",
        {"d_model": 48, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2, "vocab_size": 512}
        | {"decoder_start_token_id": 0, "tie_word_embeddings": True},
    ),
    "no module of its own": (
        "masked",
        "mobilebert",
        SIZES | {"embedding_size": 16, "intra_bottleneck_size": 16, "max_position_embeddings": 130, "true_hidden_size": 16},
    ),
    "the embeddings": (
        "masked",
        "deberta-v2",
        SIZES | {"legacy": False, "max_position_embeddings": 130, "pad_token_id": 1, "type_vocab_size": 0},
    ),
}


def other(name: str) -> LanguageModel:
    """Make a tiny model whose logits are made in another way than in the families."""
    kind, model_type, settings = OTHERS[name]
    auto = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "encoder-decoder": AutoModelForSeq2SeqLM}[kind]
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(model_type, **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
        if model_type == "bart":
            model.final_logits_bias.copy_(torch.randn(model.final_logits_bias.shape))
    return LanguageModel(model=model, tokenizer=TOKENIZERS[kind](), name=name, kind=kind)


NOT_CALLED = {"no module of its own": "cls.predictions.transform", "the embeddings": "lm_predictions.lm_head.LayerNorm"}
"""Where the last hidden state comes from if the output layer is no module that is called."""


def hook_last_hidden_state(lm: LanguageModel, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Call a hook with the last hidden state, which it may replace."""
    if lm.name in NOT_CALLED:
        return lm.model.get_submodule(NOT_CALLED[lm.name]).register_forward_hook(lambda _m, _args, out: hook(out))
    head: Any = lm.model.get_output_embeddings()
    return head.register_forward_pre_hook(lambda _m, args: hook(args[0]))


@torch.no_grad()
def scores_and_expected(lm: LanguageModel, rows: list[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of all targets, and those of a float32 copy of the model from the same hidden states."""
    todo = batches(lm, rows, 8)
    hidden: list[Tensor] = []
    with hook_last_hidden_state(lm, hidden.append):
        scores = [forward_logits(lm, batch, scored_only=bool(lm.reads_positions)).logprobs for batch in todo]
    assert all(x.dtype == torch.float32 for x in scores)
    assert [x.dtype for x in hidden] == [lm.dtype] * len(todo)
    lm.model.float()
    expected = []
    with hook_last_hidden_state(lm, lambda _: hidden.pop(0).float()):
        for batch in todo:
            logits = lm.model(**batch.inputs).logits[batch.positions[0], batch.positions[1]]
            expected.append(logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0])
    return torch.cat(scores), torch.cat(expected)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("name", [*SCORED, *OTHERS])
def test_scores_are_those_of_a_float32_head_on_the_models_hidden_states(name: str, dtype: torch.dtype, make: Make) -> None:
    lm = make(name) if name in SCORED else other(name)
    lm.model.to(dtype)
    rows = encode(lm, EXAMPLES, "answer")
    if name in NOT_CALLED and dtype == torch.float32:
        lm.reads_positions = False  # the hook needs all positions
    scores, expected = scores_and_expected(lm, rows)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)


def conv1d(weight: Tensor) -> nn.Module:
    head = Conv1D(len(weight), weight.shape[1])
    head.weight.data, head.bias.data = weight.T.contiguous(), torch.linspace(-1, 1, len(weight))
    return head


def factors(weight: Tensor) -> nn.Module:
    head = nn.Sequential(nn.Linear(D, D, bias=False), nn.Linear(D, len(weight)))
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    head[0].weight.data, head[1].weight.data = Vh, U * S
    return head


def offloaded(weight: Tensor) -> nn.Module:
    head = nn.Linear(D, len(weight), bias=False)
    head.weight.data = weight
    cpu_offload(head, execution_device=torch.device("cpu"))
    return head


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("head", [conv1d, factors, offloaded])
def test_heads_of_other_kinds_are_multiplied_in_float32(
    head: Callable[[Tensor], nn.Module], dtype: torch.dtype, make: Make
) -> None:
    lm = make("mistral")
    lm.model.to(dtype)
    weight = lm.model.lm_head.weight.data
    lm.model.lm_head = (head(weight.float()).to(dtype) if head is not offloaded else head(weight)).eval()
    hidden: list[Tensor] = []
    rows = encode(lm, EXAMPLES, "answer")
    batch = batches(lm, rows, 64)[0]
    before = lm.model.lm_head.__dict__.get("forward")
    with hook_last_hidden_state(lm, hidden.append), torch.no_grad():
        scores = forward_logits(lm, batch, scored_only=bool(lm.reads_positions)).logprobs
    assert lm.reads_positions
    assert lm.model.lm_head.__dict__.get("forward") is before
    exact = lm.model.lm_head.double() if head is not offloaded else nn.Linear(D, len(weight), bias=False).double()
    if head is offloaded:
        exact.weight.data = weight.double()
    with torch.no_grad():
        logits = exact(hidden[0].double()[batch.positions[0], batch.positions[1]])
    expected = logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    torch.testing.assert_close(scores.double(), expected, rtol=0, atol=2e-5)


def test_a_reduced_output_layer_is_multiplied_in_float32(make: Make) -> None:
    lm = make("llama")  # its output layer is the embeddings, which another reduction could change as well
    lm.model.bfloat16()
    before = [o.logprobs for o in run_rows(lm, encode(lm, EXAMPLES, "answer"), 8)]
    with applied(lm, "2.fc_out@0.1"):
        scores, expected = scores_and_expected(lm, encode(lm, EXAMPLES, "answer"))
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    assert scores.tolist() != [x for of in before for x in of]


@pytest.mark.parametrize("dtype", HALF)
@torch.no_grad()
def test_choices_are_those_of_float32_wherever_the_hidden_state_decides(dtype: torch.dtype, make: Make) -> None:
    lm = make("llama")
    tokens = torch.arange(100, 164)
    rows = [replace(row, choice_tokens=tuple(tokens.tolist())) for row in encode(lm, EXAMPLES, "choice")]
    lm.model.to(dtype)
    hidden: dict[torch.dtype, Tensor] = {}
    scores: dict[torch.dtype, Tensor] = {}
    for precision in (dtype, torch.float32):
        lm.model.to(precision)
        inputs: list[Tensor] = []
        todo = batches(lm, rows, 8)
        with hook_last_hidden_state(lm, inputs.append):
            scores[precision] = torch.cat([forward_logits(lm, b, scored_only=True).choice_logprobs for b in todo])
        at_answers = [b.positions[:, b.first] for b in todo]
        hidden[precision] = torch.cat([x[row, pos].float() for x, (row, pos) in zip(inputs, at_answers, strict=True)])
    W = lm.model.lm_head.weight[tokens]
    directions = W[:, None] - W  # (C, C, D)
    gaps = {precision: x[:, :, None] - x[:, None] for precision, x in scores.items()}  # (B, C, C)
    rounding = (hidden[dtype] - hidden[torch.float32]).norm(dim=-1)[:, None, None] * directions.norm(dim=-1)
    decided = gaps[torch.float32].abs() > rounding + 1e-4
    assert decided.float().mean() > 0.5
    assert torch.equal(gaps[dtype].sign()[decided], gaps[torch.float32].sign()[decided])
    pairs = torch.triu_indices(len(tokens), len(tokens), 1)
    ties = (gaps[dtype][:, pairs[0], pairs[1]] == 0).sum()
    own = (hidden[dtype].to(dtype) @ W.to(dtype).T)[:, pairs]
    assert ties <= 2 < 5 < (own[:, 0] == own[:, 1]).sum()  # a deployed model's own logits are often equal


def test_the_gradient_flows_through_the_output_layer(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", 4 * D * 100)  # 100 rows at a time
    x = torch.randn(6, D, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(250, D, dtype=torch.bfloat16)
    slope = torch.randn(6, 250)
    ours = output_layer._float32_linear(x, weight, None)
    (by_x,) = torch.autograd.grad(ours, x, slope)
    torch.testing.assert_close(ours, x.float() @ weight.float().T)
    torch.testing.assert_close(by_x, (slope @ weight.float()).bfloat16())
    weight.requires_grad_()
    (by_weight,) = torch.autograd.grad(output_layer._float32_linear(x, weight, None), weight, slope)
    torch.testing.assert_close(by_weight, (slope.T @ x.float()).bfloat16())


@pytest.mark.parametrize(("is_half", "by_caller"), [(False, True), (False, False), (True, True)])
def test_a_warning_names_a_model_that_rounds_its_logits(
    is_half: bool, by_caller: bool, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A model in float32 does not round them where the caller's autocast does."""
    lm = make("llama")
    if is_half:
        lm.model.bfloat16()
    lm.name = f"a model whose logits are rounded, {is_half}, {by_caller}"
    lm.reads_positions = False
    row = TokenSequence(0, (5, 6, 7), (8,), (2,))
    forward = lm.model.forward

    def rounded(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits.bfloat16()
        return output

    (batch,) = batches(lm, [row], 1)
    lm.model.forward = forward if by_caller and not is_half else rounded
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=by_caller):
        forward_logits(lm, batch, scored_only=False)
    assert ("rounds its logits to torch.bfloat16" in caplog.text) == (is_half or not by_caller)


def test_the_logits_are_in_memory_once_and_exact_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    part = 4 * D * 1000
    monkeypatch.setattr(output_layer, "CHUNK_BYTES", part)
    x, weight = torch.randn(500, D, dtype=torch.bfloat16), torch.randn(3000, D, dtype=torch.bfloat16)
    with LiveBytes(x, weight) as live:
        before = live.now
        logits = output_layer._float32_linear(x, weight, None)
    assert live.most - before == pytest.approx(logits.nbytes + part + 2 * x.nbytes, rel=0.05)
    torch.testing.assert_close(logits, x.float() @ weight.float().T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output_layer._float32_linear(x, weight, None), logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", HALF)
def test_the_product_on_a_gpu_is_that_of_float32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(7, 64).to(dtype), torch.randn(999, 64).to(dtype)
    product = output_layer._float32_linear(x.cuda(), weight.cuda(), None).cpu()
    torch.testing.assert_close(product.double(), x.double() @ weight.double().T, rtol=0, atol=1e-4)
