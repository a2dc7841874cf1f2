"""Tiny models of every family and tiny tokenizers, built in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.tokenization_utils_tokenizers import PreTrainedTokenizerFast

from laserlm.models import LanguageModel

SENTENCES = [
    "The capital of France is Paris and the capital of Spain is Madrid",
    "The capital of Italy is Rome and Rome is a city in Italy",
    "Oslo is the capital of Norway and Lisbon is the capital of Portugal",
    "The claim is true or false and this statement is false or true",
]
D, HEADS, VOCAB = 32, 4, 512

SIZES = {"hidden_size": D, "num_attention_heads": HEADS, "num_hidden_layers": 3, "intermediate_size": 48, "vocab_size": VOCAB}
GROUPED = SIZES | {"num_key_value_heads": 2}
GPT2 = {"n_embd": D, "n_head": HEADS, "n_layer": 3, "vocab_size": VOCAB, "n_positions": 128}
T5 = {"d_model": D, "d_kv": 8, "d_ff": 48, "num_heads": HEADS, "num_layers": 3, "num_decoder_layers": 2, "vocab_size": VOCAB}
STATES = {"state_dim": 5, "act_dim": 3, "hidden_size": D, "n_layer": 3, "n_head": HEADS, "n_inner": 48}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
GATED = [*ATTENTION, "fc_in", "fc_up", "fc_out"]
PLAIN = [*ATTENTION, "fc_in", "fc_out"]
FUSED = ["qkv", *PLAIN]
CROSS = ["cross_q_proj", "cross_k_proj", "cross_v_proj", "cross_out_proj"]

CAUSAL: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama": ("llama", GROUPED | {"tie_word_embeddings": True}, GATED),
    "mistral": ("mistral", GROUPED, GATED),
    "qwen2": ("qwen2", GROUPED, GATED),
    "gemma": ("gemma", GROUPED | {"head_dim": 8}, GATED),
    "gemma2": ("gemma2", GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8}, GATED),
    "gptj": ("gptj", GPT2 | {"rotary_dim": 4}, PLAIN),
    "gpt2": ("gpt2", GPT2, FUSED),
    "gpt_neox": ("gpt_neox", SIZES, FUSED),
    "phi": ("phi", SIZES, PLAIN),
    "phi3": ("phi3", GROUPED | {"pad_token_id": 0}, ["qkv", "gate_up", *GATED]),
    "opt": ("opt", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": D, "max_position_embeddings": 128}, PLAIN),
    "bloom": ("bloom", {"hidden_size": D, "n_head": HEADS, "n_layer": 3, "vocab_size": VOCAB}, FUSED),
    "mixtral": (
        "mixtral",
        GROUPED | EXPERTS,
        [*ATTENTION, *(f"experts.{e}.{m}" for e in range(3) for m in ("gate_up", "fc_in", "fc_up", "fc_out"))],
    ),
}
MASKED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "roberta": ("roberta", SIZES | {"max_position_embeddings": 130, "pad_token_id": 1}, PLAIN),
    "bert": ("bert", SIZES | {"max_position_embeddings": 128}, PLAIN),
}
SEQ2SEQ: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "t5": ("t5", T5 | {"decoder_start_token_id": 0}, PLAIN),
    "t5-gated": ("t5", T5 | {"decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"}, GATED),
}
OTHER: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "decision_transformer": ("decision_transformer", STATES, FUSED),
}
FAMILIES = CAUSAL | MASKED | SEQ2SEQ | OTHER
SCORED = [*CAUSAL, *MASKED, *SEQ2SEQ]

SMALL_HEADS = GROUPED | {"head_dim": 8, "pad_token_id": 0}
KEYS_SHARED = SMALL_HEADS | {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
UNUSUAL: dict[str, tuple[str, dict[str, Any]]] = {
    # Blocks that use the keys and values of an earlier one, and inputs of their own.
    "gemma3n": ("gemma3n_text", KEYS_SHARED | {"laurel_rank": 4, "altup_num_inputs": 2}),
    "gemma4": ("gemma4_text", KEYS_SHARED | {"global_head_dim": 8}),
    # A linear layer that returns a tuple, and experts that take every token.
    "llama4": ("llama4_text", SMALL_HEADS | EXPERTS | {"intermediate_size_mlp": 48, "moe_layers": [1]}),
    # Transposed experts with biases, and a router that is no linear layer.
    "gpt_oss": ("gpt_oss", SMALL_HEADS | EXPERTS),
    # Experts one below the other in parameters of two axes.
    "dbrx": (
        "dbrx",
        {
            "d_model": D,
            "n_heads": HEADS,
            "n_layers": 3,
            "vocab_size": VOCAB,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 3, "moe_top_k": 2, "hidden_size": D},
        },
    ),
    "olmoe": ("olmoe", GROUPED | {"num_experts": 3, "num_experts_per_tok": 2, "pad_token_id": 0}),
    # A head whose ``forward`` does not name ``use_cache``, and hands it on.
    "granitemoe": ("granitemoe", GROUPED | EXPERTS | {"pad_token_id": 0}),
}
"""Causal families without a row in the table, whose matrices are named by their modules' paths."""


def bpe(special: dict[str, str], *, metaspace: bool = False, prefix: str = "") -> PreTrainedTokenizerFast:
    """Make a small byte-level BPE tokenizer (or one with SentencePiece's word mark) that knows a few sentences."""
    tokenizer = Tokenizer.from_str(_trained(tuple(special.items()), metaspace, prefix))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **special)
    fast.model_max_length = 128
    if fast.mask_token is not None:
        fast.add_special_tokens({"mask_token": AddedToken(fast.mask_token, lstrip=True)})  # as RoBERTa's
    return fast


@cache
def _trained(special_items: tuple[tuple[str, str], ...], metaspace: bool, prefix: str) -> str:
    special = dict(special_items)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    alphabet = [] if metaspace else sorted(pre_tokenizers.ByteLevel.alphabet())[:200]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<unk>", *special.values()], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    if prefix:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", special_tokens=[(prefix, tokenizer.token_to_id(prefix))]
        )
    if "mask_token" in special:
        first, last = special["bos_token"], special["eos_token"]
        ids = [(t, tokenizer.token_to_id(t)) for t in (first, last)]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)
    return tokenizer.to_str()


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "causal": lambda: bpe({"pad_token": "<pad>", "eos_token": "</s>"}),
    "masked": lambda: bpe({"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "mask_token": "<mask>"}),
    "encoder-decoder": lambda: bpe({"pad_token": "<pad>", "eos_token": "</s>"}, metaspace=True),
}


def build(family: str, seed: int = 0) -> LanguageModel:
    """Make a tiny model of a family with random weights spread widely enough that its predictions differ."""
    kind: Any = "causal" if family in CAUSAL or family in UNUSUAL else "masked" if family in MASKED else "encoder-decoder"
    kind = "headless" if family in OTHER else kind
    torch.manual_seed(seed)
    model = copy.deepcopy(_template(family, kind, seed))
    tokenizer = TOKENIZERS[kind]() if kind in TOKENIZERS else None
    return LanguageModel(model=model, tokenizer=tokenizer, name=family, kind=kind)


@cache
def _template(family: str, kind: str, seed: int) -> Any:
    """The model that each test gets a copy of."""
    model_type, settings = UNUSUAL[family] if family in UNUSUAL else FAMILIES[family][:2]
    return random_model(kind, model_type, settings, seed)


def random_model(kind: str, model_type: str, settings: dict[str, Any], seed: int = 0) -> Any:
    """Make a model of a type with random weights."""
    torch.manual_seed(seed)
    auto = {
        "causal": AutoModelForCausalLM,
        "masked": AutoModelForMaskedLM,
        "encoder-decoder": AutoModelForSeq2SeqLM,
        "headless": AutoModel,
    }[kind]
    model = auto.from_config(AutoConfig.for_model(model_type, **settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model
