"""Tiny models of the family Llama as GGUF files, as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from laserlm.models import LanguageModel

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write_gguf(
    lm: LanguageModel,
    path: Path,
    stored: GGMLQuantizationType = GGMLQuantizationType.F32,
    *,
    most: int = 0,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a Llama model with tied embeddings as GGUF, and return the path of its first file.

    Args:
        lm: the model, with a byte-level tokenizer.
        path: the file, or its name without number if the model is split.
        stored: type of the matrices.
        most: tensors of a file at most; 0 writes one file.
        extra: tensors that are added.
    """
    config = lm.model.config
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=most)
    writer.add_name("tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    tokenizer = lm.require_tokenizer()
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens += [f"<unused{n}>" for n in range(len(tokens), config.vocab_size)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(vocabulary["</s>"])
    for name, tensor in lm.model.state_dict().items():
        if name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        if name not in OUTER:
            _, _, block, *inner, _ = name.split(".")
            short = NAMES[".".join(inner)]
            name = f"blk.{block}.{short}.weight"
            if short in ("attn_q", "attn_k"):  # llama.cpp pairs the halves of each head that are rotated together
                heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        values = np.ascontiguousarray(values)
        if values.ndim == 2 and stored != GGMLQuantizationType.F32 and values.shape[1] % 32 == 0:
            writer.add_tensor(OUTER.get(name, name), gguf.quants.quantize(values, stored), raw_dtype=stored)
        else:
            writer.add_tensor(OUTER.get(name, name), values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if not most else min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
