"""The groups ``attn`` and ``mlp`` hold all matrices of their kind, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import GROUPED
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from laserlm.errors import MatrixError
from laserlm.models import Matrix, select
from laserlm.models.groups import role_of
from laserlm.models.matrices import find_matrices
from laserlm.reductions import Layers

ALL = Layers.parse("all")
TWO = GROUPED | {"num_hidden_layers": 2}
HEADS = ["q_proj", "k_proj", "v_proj", "o_proj"]
SELF_ATTENTION = [f"self_attn.{name}" for name in HEADS]
GATED = [f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LATENT = [f"self_attn.{n}" for n in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")]
LINEAR = {f"linear_{a}_{b}": 2 if b == "num_heads" else 8 for a in ("key", "value") for b in ("num_heads", "head_dim")}
MIXTURE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
LATENT_SIZES = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}

COVERED: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "starcoder2": (TWO, SELF_ATTENTION, ["mlp.c_fc", "mlp.c_proj"]),
    "gpt_neo": (
        {"hidden_size": 32, "num_heads": 4, "num_layers": 2, "attention_types": [[["global"], 2]], "vocab_size": 40},
        [f"attn.attention.{name}" for name in ("k_proj", "v_proj", "q_proj", "out_proj")],
        ["mlp.c_fc", "mlp.c_proj"],
    ),
    "qwen3_next": (
        TWO | MIXTURE | LINEAR | {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        [*(f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")), *SELF_ATTENTION],
        [*EXPERTS, *(name.replace("mlp.", "mlp.shared_expert.") for name in GATED)],
    ),
    "deepseek_v3": (
        TWO | LATENT_SIZES | {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        LATENT,
        [*GATED, *EXPERTS, *(name.replace("mlp.", "mlp.shared_experts.") for name in GATED)],
    ),
    "rwkv": (
        {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 40, "attention_hidden_size": 32, "intermediate_size": 48},
        [f"attention.{name}" for name in ("key", "value", "receptance", "output")],
        [f"feed_forward.{name}" for name in ("key", "receptance", "value")],
    ),
}  # fmt: skip
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
HYBRID: dict[str, tuple[dict[str, Any], str]] = {
    "falcon_h1": (TWO | MAMBA, "mamba.in_proj, mamba.out_proj"),
    "jamba": (
        TWO | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1}
        | {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False},
        "mamba.in_proj, mamba.x_proj, mamba.dt_proj, mamba.out_proj",
    ),
}  # fmt: skip


def matrices(model_type: str, **settings: Any) -> tuple[Matrix, ...]:
    with torch.device("meta"):
        return find_matrices(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)))


def paths(selected: tuple[Matrix, ...]) -> set[str]:
    """Return the module paths below the blocks."""
    return {m.name.removeprefix(f"experts.{m.expert}.") for m in selected}


@pytest.mark.parametrize("model_type", list(COVERED))
def test_the_groups_of_a_model_without_a_row_are_complete(model_type: str) -> None:
    settings, attention, mlp = COVERED[model_type]
    result = matrices(model_type, **settings)
    assert paths(select(result, ALL, "attn")) == set(attention)
    assert paths(select(result, ALL, "mlp")) == set(mlp)
    left = paths(result) - set(attention) - set(mlp)
    assert left <= {"mlp.gate.weight"}  # the router


def test_every_expert_is_in_the_group() -> None:
    result = matrices("qwen3_next", **COVERED["qwen3_next"][0])
    assert {m.expert for m in select(result, ALL, "mlp")} == {None, 0, 1}


@pytest.mark.parametrize("model_type", list(HYBRID))
def test_a_mixer_that_is_no_attention_is_named_and_the_group_refused(model_type: str) -> None:
    settings, mixers = HYBRID[model_type]
    result = matrices(model_type, **settings)
    with pytest.raises(MatrixError, match=f"the group 'attn' is not defined.*{mixers}; name the matrices, or write 'all'"):
        select(result, ALL, "attn")
    assert {p.removeprefix("feed_forward.") for p in paths(select(result, ALL, "mlp"))} >= {"up_proj", "down_proj"}
    assert paths(select(result, ALL, "self_attn.q_proj")) == {"self_attn.q_proj"}
    assert set(select(result, ALL, "all")) == set(result)


def test_a_state_space_model_has_no_groups() -> None:
    result = matrices("mamba", hidden_size=16, num_hidden_layers=2, state_size=4, vocab_size=40, time_step_rank=4)
    for group in ("attn", "mlp"):
        with pytest.raises(MatrixError, match=f"'{group}' is not defined for this model.*mixer.in_proj"):
            select(result, ALL, group)


def test_cross_attention_belongs_to_the_attention() -> None:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 40}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    result = find_matrices(AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("bart", **sizes)))
    assert len(select(result, ALL, "attn", "model.decoder.layers")) == 8
    assert len(select(result, ALL, "mlp", "model.decoder.layers")) == 2
    assert len(select(result, ALL, "attn")) + len(select(result, ALL, "mlp")) == len(result)


@pytest.mark.parametrize(
    ("path", "has_experts", "role"),
    [
        ("attention.output.dense", False, "attn"),
        ("output.dense", False, "mlp"),
        ("layer.1.EncDecAttention.q", False, "attn"),
        ("mlp.gate", False, "mlp"),
        ("mlp.gate.weight", True, "other"),
        ("mlp.router.classifier", True, "other"),
        ("self_attn.gate_proj", True, "attn"),
        ("input_layernorm.mlp.fc1", True, "other"),
        ("per_layer_input_gate", False, "other"),
        ("conv.in_proj", False, "mixer"),
        ("linear", False, "unknown"),
    ],
)
def test_the_role_of_a_path(path: str, has_experts: bool, role: str) -> None:
    assert role_of(path, has_experts=has_experts) == role
