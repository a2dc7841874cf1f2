from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import ATTENTION, CAUSAL, CROSS, FAMILIES, GPT2, GROUPED, OTHER, SEQ2SEQ, SIZES, T5, D
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from laserlm.edit import applied
from laserlm.errors import MatrixError, WeightError
from laserlm.models import LanguageModel, Matrix, read_matrix, select
from laserlm.models.left_out import line_of, weights_left_out
from laserlm.models.matrices import find_matrices
from laserlm.reductions import Layers

Make = Callable[..., LanguageModel]
UNCHANGED = "of the blocks are no matrices here, and no reduction changes them:"


def names(matrices: tuple[Matrix, ...], layer: int, stack: str = "") -> list[str]:
    return [m.name for m in matrices if (m.layer, m.stack) == (layer, stack)]


def named(lm: LanguageModel, id: str) -> Matrix:
    return next(m for m in lm.matrices if m.id == id)


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in SEQ2SEQ])
def test_every_block_has_the_matrices_of_its_family(family: str, make: Make) -> None:
    lm = make(family)
    expected = FAMILIES[family][2]
    assert all(sorted(names(lm.matrices, layer)) == sorted(expected) for layer in range(3))
    assert len(lm.matrices) == 3 * len(expected)


@pytest.mark.parametrize("family", list(SEQ2SEQ))
def test_t5_has_an_encoder_and_a_decoder_stack_with_cross_attention_in_the_second(family: str, make: Make) -> None:
    lm = make(family)
    expected = SEQ2SEQ[family][2]
    assert all(sorted(names(lm.matrices, layer, "encoder")) == sorted(expected) for layer in range(3))
    assert all(sorted(names(lm.matrices, layer, "decoder")) == sorted(expected + CROSS) for layer in range(2))


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_listed_matrices_hold_every_weight_of_the_blocks_once(family: str, make: Make) -> None:
    lm = make(family)
    unfused = sum(m.shape[0] * m.shape[1] for m in lm.matrices if m.part_of is None)
    parts = sum(m.shape[0] * m.shape[1] for m in lm.matrices if not m.parts)
    skipped = ("gate.weight", "relative_attention_bias", "norm", "ln_")  # routers, and what is no linear map
    blocks = {m.path.split(f".{m.layer}.")[0] + "." for m in lm.matrices}
    total = sum(
        p.numel()
        for name, p in lm.model.named_parameters()
        if p.ndim > 1 and any(name.startswith(b) for b in blocks) and not any(s in name for s in skipped)
    )
    assert unfused == parts == total


@pytest.mark.parametrize("family", list(FAMILIES))
def test_shapes_are_out_by_in_as_the_forward_pass_uses_them(family: str, make: Make) -> None:
    lm = make(family)
    for m in lm.matrices:
        assert read_matrix(lm.model, m).shape == m.shape
        if m.type == "fc_in":
            assert m.shape[1] == D
        if m.type == "fc_out":
            assert m.shape[0] == D


def captured(lm: LanguageModel, module: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return what a module is given in a forward pass."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    try:
        with torch.no_grad():
            lm.model(**inputs)
    finally:
        handle.remove()
    return seen[0]


def text() -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[5, 9, 200, 31, 77, 120]])}


def states() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "states": torch.randn(1, 4, 5),
        "actions": torch.randn(1, 4, 3),
        "rewards": torch.randn(1, 4, 1),
        "returns_to_go": torch.randn(1, 4, 1),
        "timesteps": torch.arange(4)[None],
        "attention_mask": torch.ones(1, 4),
    }


FUSED_QKV = {
    "gpt2": "transformer.h.1.attn.c_proj",
    "gpt_neox": "gpt_neox.layers.1.attention.dense",
    "bloom": "transformer.h.1.self_attention.dense",
    "phi3": "model.layers.1.self_attn.o_proj",
    "decision_transformer": "encoder.h.1.attn.c_proj",
}


def silence_biases(lm: LanguageModel) -> None:
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if name.endswith("bias") and ("attn" in name or "attention" in name):
                parameter.zero_()


@pytest.mark.parametrize("family", list(FUSED_QKV))
def test_without_values_attention_gives_nothing(family: str, make: Make) -> None:
    lm = make(family)
    silence_biases(lm)
    output = lm.model.get_submodule(FUSED_QKV[family])
    inputs = states() if family in OTHER else text()
    assert captured(lm, output, inputs).abs().max() > 0.01
    with applied(lm, "1.v_proj@r0"):
        assert captured(lm, output, inputs).abs().max() == 0
    for other in ("q_proj", "k_proj"):
        with applied(lm, f"1.{other}@r0"):
            assert captured(lm, output, inputs).abs().max() > 0.01


@pytest.mark.parametrize("family", [f for f in FUSED_QKV if f != "bloom"])  # ALiBi adds to the scores
@pytest.mark.parametrize("matrix", ["q_proj", "k_proj"])
def test_without_queries_or_keys_attention_is_the_mean_of_the_past_values(family: str, matrix: str, make: Make) -> None:
    lm = make(family)
    silence_biases(lm)
    fused = lm.model.get_submodule(named(lm, "1.qkv").path.removesuffix(".weight"))
    output = lm.model.get_submodule(FUSED_QKV[family])
    inputs = states() if family in OTHER else text()
    with applied(lm, f"1.{matrix}@r0"):
        into = captured(lm, fused, inputs)
        outputs = captured(lm, output, inputs)
    v = into[0] @ read_matrix(lm.model, named(lm, "1.v_proj")).T  # (T, keys * head)
    heads = D // 8
    repeated = v.reshape(len(v), -1, 8).repeat_interleave(heads // (v.shape[1] // 8), dim=1).flatten(1)  # grouped queries
    mean = repeated.cumsum(0) / torch.arange(1, len(v) + 1)[:, None]
    torch.testing.assert_close(outputs[0], mean, atol=1e-5, rtol=1e-4)


def test_the_halves_of_a_fused_gate_are_gate_and_up(make: Make) -> None:
    lm = make("phi3")
    mlp = lm.model.model.layers[2].mlp
    x = captured(lm, mlp.gate_up_proj, text())
    gate, up = (x @ read_matrix(lm.model, named(lm, f"2.{name}")).T for name in ("fc_in", "fc_up"))
    torch.testing.assert_close(captured(lm, mlp.down_proj, text()), nn.functional.silu(gate) * up)


def test_the_matrices_of_each_expert_make_the_mixture(make: Make) -> None:
    lm = make("mixtral")
    moe = lm.model.model.layers[0].mlp
    x = captured(lm, moe, text())[0]  # (T, D)
    with torch.no_grad():
        weights = (x @ moe.gate.weight.T).softmax(-1)
        top, chosen = weights.topk(2)
        top = top / top.sum(-1, keepdim=True)
        expected = torch.zeros_like(x)
        for t in range(len(x)):
            for share, e in zip(top[t], chosen[t].tolist(), strict=True):
                gate, up, down = (read_matrix(lm.model, named(lm, f"0.experts.{e}.{n}")) for n in ("fc_in", "fc_up", "fc_out"))
                expected[t] += share * (down @ (nn.functional.silu(gate @ x[t]) * (up @ x[t])))
        actual = moe(x[None])
    torch.testing.assert_close((actual[0] if isinstance(actual, tuple) else actual)[0], expected, atol=1e-5, rtol=1e-4)


def causal(model_type: str, **settings: Any) -> LanguageModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
    return LanguageModel(model=model, tokenizer=None, name=model_type, kind="causal")


def test_an_unknown_type_with_llama_shaped_blocks_gets_llama_names() -> None:
    lm = causal("olmo2", hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, vocab_size=50)
    assert names(lm.matrices, 1) == CAUSAL["llama"][2]


def test_an_unknown_architecture_goes_by_module_path() -> None:
    lm = causal("codegen", n_embd=32, n_head=4, n_layer=2, rotary_dim=4, vocab_size=50)
    assert names(lm.matrices, 0) == ["attn.qkv_proj", "attn.out_proj", "mlp.fc_in", "mlp.fc_out"]
    before = read_matrix(lm.model, named(lm, "1.mlp.fc_in")).clone()
    with applied(lm, "1.mlp.fc_in@r3"):
        assert torch.linalg.matrix_rank(read_matrix(lm.model, named(lm, "1.mlp.fc_in"))) == 3
    assert torch.equal(read_matrix(lm.model, named(lm, "1.mlp.fc_in")), before)


@pytest.mark.parametrize("model_type", ["mt5", "umt5"])
def test_the_kin_of_t5_have_its_names(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **T5)
    lm = LanguageModel(model=AutoModelForSeq2SeqLM.from_config(config), tokenizer=None, name="", kind="encoder-decoder")
    assert names(lm.matrices, 1, "decoder")[:8] == [*ATTENTION, *CROSS]


def test_bart_goes_by_module_path_in_both_stacks() -> None:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 40}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes))
    lm = LanguageModel(model=model, tokenizer=None, name="bart", kind="encoder-decoder")
    assert {m.stack for m in lm.matrices} == {"model.encoder.layers", "model.decoder.layers"}
    assert {m.name for m in lm.matrices if "decoder" in m.stack} >= {"encoder_attn.q_proj", "self_attn.q_proj", "fc1"}
    assert {m.name for m in lm.matrices if "encoder." in m.stack} >= {"self_attn.q_proj", "fc1"}


def test_experts_of_an_unknown_layout_are_not_taken_for_gate_and_up() -> None:
    sizes = GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "num_hidden_layers": 2}
    lm = causal("gpt_oss", **sizes, layer_types=["full_attention"] * 2)
    actual = names(lm.matrices, 0)
    assert "experts.1.mlp.experts.gate_up_proj" in actual
    assert not any(name.endswith(("fc_in", "fc_up", "bias")) for name in actual)


def test_experts_in_the_rows_of_one_parameter_are_a_matrix_each(make: Make) -> None:
    lm = make("dbrx")
    names = ["ffn.experts.mlp.w1", "ffn.experts.mlp.v1", "ffn.experts.mlp.w2"]
    experts = [m for m in lm.matrices if m.layer == 1 and m.name.startswith("experts.")]
    assert [m.name for m in experts] == [f"experts.{e}.{name}" for name in names for e in range(3)]
    assert {m.shape for m in experts} == {(24, 32)}
    for m in experts:
        e = int(m.name.split(".")[1])
        assert torch.equal(read_matrix(lm.model, m), lm.model.get_parameter(m.path)[24 * e : 24 * (e + 1)])
    assert len(select(lm.matrices, Layers.parse("1"), "w1")) == 3
    assert len(select(lm.matrices, Layers.parse("all"), "mlp")) == 27
    before = {m.id: read_matrix(lm.model, m).clone() for m in lm.matrices}
    with applied(lm, "1.experts.2.ffn.experts.mlp.w2@r3+1.experts.0.ffn.experts.mlp.w2@r2"):
        changed = {m.id: m for m in lm.matrices if not torch.equal(read_matrix(lm.model, m), before[m.id])}
        ranks = {m: int(torch.linalg.matrix_rank(read_matrix(lm.model, value))) for m, value in changed.items()}
    assert ranks == {"1.experts.0.ffn.experts.mlp.w2": 2, "1.experts.2.ffn.experts.mlp.w2": 3}


@pytest.mark.parametrize(
    ("family", "line"),
    [
        ("mixtral", f"3 weights {UNCHANGED} mlp.gate.weight (3 x 32)"),
        ("t5", f"2 weights {UNCHANGED} layer.N.SelfAttention.relative_attention_bias.weight (32 x 4)"),
        ("llama", ""),
        ("dbrx", ""),
        ("gpt_oss", ""),
    ],
)
def test_weights_of_blocks_that_are_not_listed_are_named_in_one_line(family: str, line: str, make: Make) -> None:
    lm = make(family)
    assert line_of(weights_left_out(lm.model, lm.matrices)) == line


def test_linear_layers_with_a_class_of_their_own_have_the_names_of_a_known_shape() -> None:
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model("ibert", **SIZES, max_position_embeddings=130))
    matrices = find_matrices(model)
    assert [m.name for m in matrices if m.layer == 0] == ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
    assert not weights_left_out(model, matrices)


def test_what_is_no_matrix_is_not_listed() -> None:
    lm = causal("mamba", hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=40, time_step_rank=4)
    assert names(lm.matrices, 0) == ["mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"]


def test_cross_attention_of_gpt2_is_listed(make: Make) -> None:
    lm = causal("gpt2", **GPT2, add_cross_attention=True)
    expected = ["cross_q_proj", "cross_kv", "cross_k_proj", "cross_v_proj", "cross_out_proj"]
    assert [n for n in names(lm.matrices, 2) if n.startswith("cross")] == expected


def test_tied_blocks_are_reported(make: Make) -> None:
    lm = make("llama")
    layers = lm.model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    tied = [m for m in find_matrices(lm.model) if m.tied_to]
    assert [(m.id, m.tied_to) for m in tied] == [("2.fc_up", "model.layers.0.mlp.up_proj.weight")]


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(MatrixError, match="no list of repeated blocks"):
        find_matrices(causal("llama", hidden_size=8, num_attention_heads=2, num_hidden_layers=0, vocab_size=9).model)


@pytest.mark.parametrize(
    ("layers", "matrix", "count"),
    [("all", "all", 21), ("1", "mlp", 3), ("0-1", "attn", 8), ("top2", "fc_out", 2), ("2", "q_proj", 1)],
)
def test_selectors_count_matrices(layers: str, matrix: str, count: int, llama: LanguageModel) -> None:
    assert len(select(llama.matrices, Layers.parse(layers), matrix)) == count


def test_a_group_takes_the_parts_of_fused_matrices_and_never_the_whole(make: Make) -> None:
    lm = make("phi3")
    assert [m.name for m in select(lm.matrices, Layers.parse("0"), "all")] == CAUSAL["llama"][2]
    assert [m.name for m in select(lm.matrices, Layers.parse("0"), "qkv")] == ["qkv"]


def test_a_type_means_that_matrix_of_every_expert(make: Make) -> None:
    lm = make("mixtral")
    assert [m.name for m in select(lm.matrices, Layers.parse("1"), "fc_up")] == [f"experts.{e}.fc_up" for e in range(3)]
    assert [m.name for m in select(lm.matrices, Layers.parse("1"), "experts.2.fc_up")] == ["experts.2.fc_up"]
    assert len(select(lm.matrices, Layers.parse("1"), "mlp")) == 9


@pytest.mark.parametrize(
    ("layers", "matrix", "stack", "message"),
    [
        ("3", "fc_in", "", "no layer 3: this model's layers are 0 to 2"),
        ("top9", "fc_in", "", "more blocks than the 3"),
        ("1", "fc_up2", "", "it has q_proj, k_proj, v_proj, out_proj, fc_in, fc_up, fc_out; see 'laser matrices MODEL'"),
        ("1", "fc_in", "decoder", "no stack 'decoder'"),
    ],
)
def test_what_is_not_there_is_named(layers: str, matrix: str, stack: str, message: str, llama: LanguageModel) -> None:
    with pytest.raises(MatrixError, match=message):
        select(llama.matrices, Layers.parse(layers), matrix, stack)


def test_with_two_stacks_a_layer_needs_its_stack(make: Make) -> None:
    lm = make("t5")
    with pytest.raises(MatrixError, match=r"write encoder\.1\.fc_in or decoder\.1\.fc_in"):
        select(lm.matrices, Layers.parse("1"), "fc_in")
    assert [m.id for m in select(lm.matrices, Layers.parse("1"), "fc_in", "decoder")] == ["decoder.1.fc_in"]
    assert len(select(lm.matrices, Layers.parse("all"), "fc_in")) == 5


def test_a_quantised_model_says_so_when_its_matrices_are_asked_for(llama: LanguageModel) -> None:
    packed = torch.zeros(48 * D // 2, 1, dtype=torch.uint8)  # as four bits are kept
    llama.model.model.layers[0].mlp.gate_proj.weight = nn.Parameter(packed, requires_grad=False)
    with pytest.raises(
        WeightError, match=r"is quantised \(model.layers.0.mlp.gate_proj.weight is torch.uint8\); load it without"
    ):
        _ = llama.matrices
    with applied(llama, ""):
        assert llama.intervention == ""


def test_offloaded_and_quantised_weights_are_refused(llama: LanguageModel) -> None:
    assert llama.matrices
    block = llama.model.model.layers[0]
    block.mlp.up_proj.weight = nn.Parameter(torch.empty(48, D, device="meta"))
    block.mlp.gate_proj.weight = nn.Parameter(torch.zeros(48, D, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WeightError, match="offloaded"):
        read_matrix(llama.model, named(llama, "0.fc_up"))
    with pytest.raises(WeightError, match=r"quantised \(torch\.int8\)"):
        read_matrix(llama.model, named(llama, "0.fc_in"))
