"""A table of model families: one row per family maps the modules of a block to matrix names.

A row lists the stacks of blocks (path below the base model) and pairs of matrix name and module path below a block.
Paths that a block lacks are skipped, so that one row covers gated and plain, dense and mixture-of-experts blocks. A model
type without a row uses the first ``SHARED`` row that covers all matrices of its blocks. If no row does, its matrices are
named by their module paths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Layout = Literal["halves", "qkv", "qkv per head"]


@dataclass(frozen=True)
class Fused:
    """A matrix whose rows hold several matrices.

    Args:
        parts: names of the parts, in order.
        layout: ``halves``: equal parts in sequence; ``qkv``: all query heads, then all key heads, then all value heads;
            ``qkv per head``: the query, key and value rows of each head in turn.
    """

    parts: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Architecture:
    """A family of models.

    Args:
        stacks: name of each stack (empty if there is only one) and path of its blocks below the base model.
        matrices: name and path below a block of each module with a 2-D weight or stacked 3-D parameter.
        fused: the layout of fused matrices, by name.
        reference_niter: power iterations of the published code for this family.
    """

    stacks: tuple[tuple[str, str], ...]
    matrices: tuple[tuple[str, str], ...]
    fused: dict[str, Fused] = field(default_factory=dict)
    reference_niter: int = 2


GATE_UP = Fused(("fc_in", "fc_up"), "halves")
QKV = Fused(("q_proj", "k_proj", "v_proj"), "qkv")
QKV_PER_HEAD = Fused(("q_proj", "k_proj", "v_proj"), "qkv per head")

SELF_ATTENTION = (
    ("q_proj", "self_attn.q_proj"),
    ("k_proj", "self_attn.k_proj"),
    ("v_proj", "self_attn.v_proj"),
    ("out_proj", "self_attn.o_proj"),
)
LLAMA = Architecture(
    stacks=(("", "layers"),),
    matrices=(
        *SELF_ATTENTION,
        ("fc_in", "mlp.gate_proj"),
        ("fc_up", "mlp.up_proj"),
        ("fc_out", "mlp.down_proj"),
        ("gate_up", "mlp.experts.gate_up_proj"),
        ("fc_out", "mlp.experts.down_proj"),
        ("shared_expert.fc_in", "mlp.shared_expert.gate_proj"),
        ("shared_expert.fc_up", "mlp.shared_expert.up_proj"),
        ("shared_expert.fc_out", "mlp.shared_expert.down_proj"),
    ),
    fused={"gate_up": GATE_UP},
)
GPT2 = Architecture(
    stacks=(("", "h"),),
    matrices=(
        ("qkv", "attn.c_attn"),
        ("out_proj", "attn.c_proj"),
        ("cross_q_proj", "crossattention.q_attn"),
        ("cross_kv", "crossattention.c_attn"),
        ("cross_out_proj", "crossattention.c_proj"),
        ("fc_in", "mlp.c_fc"),
        ("fc_out", "mlp.c_proj"),
    ),
    fused={"qkv": QKV, "cross_kv": Fused(("cross_k_proj", "cross_v_proj"), "halves")},
)
PHI = Architecture(
    stacks=(("", "layers"),),
    matrices=(*SELF_ATTENTION[:3], ("out_proj", "self_attn.dense"), ("fc_in", "mlp.fc1"), ("fc_out", "mlp.fc2")),
)
OPT = Architecture(
    stacks=(("", "decoder.layers"),),
    matrices=(*SELF_ATTENTION[:3], ("out_proj", "self_attn.out_proj"), ("fc_in", "fc1"), ("fc_out", "fc2")),
)
BERT = Architecture(
    stacks=(("", "encoder.layer"),),
    matrices=(
        ("q_proj", "attention.self.query"),
        ("k_proj", "attention.self.key"),
        ("v_proj", "attention.self.value"),
        ("out_proj", "attention.output.dense"),
        ("fc_in", "intermediate.dense"),
        ("fc_out", "output.dense"),
    ),
)
T5 = Architecture(
    stacks=(("encoder", "encoder.block"), ("decoder", "decoder.block")),
    matrices=(
        ("q_proj", "layer.0.SelfAttention.q"),
        ("k_proj", "layer.0.SelfAttention.k"),
        ("v_proj", "layer.0.SelfAttention.v"),
        ("out_proj", "layer.0.SelfAttention.o"),
        ("cross_q_proj", "layer.1.EncDecAttention.q"),
        ("cross_k_proj", "layer.1.EncDecAttention.k"),
        ("cross_v_proj", "layer.1.EncDecAttention.v"),
        ("cross_out_proj", "layer.1.EncDecAttention.o"),
        *(
            (name, f"layer.{index}.DenseReluDense.{module}")
            for index in (1, 2)
            for name, module in (("fc_in", "wi"), ("fc_in", "wi_0"), ("fc_up", "wi_1"), ("fc_out", "wo"))
        ),
    ),
)
SHARED = (LLAMA, PHI, OPT, BERT)
"""Rows that are safe to recognise by module paths alone, because no order of fused rows has to be guessed."""

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(
        ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
        LLAMA,
    ),
    "gpt2": GPT2,
    "decision_transformer": Architecture((("", "encoder.h"),), GPT2.matrices, GPT2.fused, reference_niter=20),
    "gptj": Architecture(
        stacks=(("", "h"),),
        matrices=(
            ("q_proj", "attn.q_proj"),
            ("k_proj", "attn.k_proj"),
            ("v_proj", "attn.v_proj"),
            ("out_proj", "attn.out_proj"),
            ("fc_in", "mlp.fc_in"),
            ("fc_out", "mlp.fc_out"),
        ),
    ),
    "gpt_neox": Architecture(
        stacks=(("", "layers"),),
        matrices=(
            ("qkv", "attention.query_key_value"),
            ("out_proj", "attention.dense"),
            ("fc_in", "mlp.dense_h_to_4h"),
            ("fc_out", "mlp.dense_4h_to_h"),
        ),
        fused={"qkv": QKV_PER_HEAD},
    ),
    "bloom": Architecture(
        stacks=(("", "h"),),
        matrices=(
            ("qkv", "self_attention.query_key_value"),
            ("out_proj", "self_attention.dense"),
            ("fc_in", "mlp.dense_h_to_4h"),
            ("fc_out", "mlp.dense_4h_to_h"),
        ),
        fused={"qkv": QKV_PER_HEAD},
    ),
    "phi": PHI,
    "phi3": Architecture(
        stacks=(("", "layers"),),
        matrices=(
            ("qkv", "self_attn.qkv_proj"),
            ("out_proj", "self_attn.o_proj"),
            ("gate_up", "mlp.gate_up_proj"),
            ("fc_out", "mlp.down_proj"),
        ),
        fused={"qkv": QKV, "gate_up": GATE_UP},
    ),
    "opt": OPT,
    "bert": BERT,
    "roberta": Architecture(BERT.stacks, BERT.matrices, reference_niter=20),
    **dict.fromkeys(("t5", "mt5", "umt5"), T5),
}
"""Families by ``config.model_type``."""
