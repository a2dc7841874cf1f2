"""A stand-in for the bundled model: as many blocks and the same matrices, but so small that a command takes no time."""

from __future__ import annotations

from pathlib import Path

import torch
from families import HEADS, D, bpe
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig

from laserlm.models import bundled
from laserlm.tasks import task

BLOCKS = 30
"""As many as the bundled model has, so that every matrix that the documentation names is there."""
VOCAB = 2048
PLACES = 256
"""Tokens of a text at most."""


def save_stand_in(cache: Path) -> Path:
    """Put the stand-in where laserlm looks for the converted bundled model in this cache folder, and return its place.

    Every process that is told of the cache folder loads it as ``bundled``, whether the real model is installed or not.
    """
    folder = bundled.converted(cache)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=48,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        max_position_embeddings=PLACES,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(1)  # of a model that some reductions help
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    texts = [f"{e.prompt} {e.answer}" for name in ("worldfacts", "web-of-lies") for e in task(name).validation]
    tokenizer = bpe({"pad_token": "<pad>", "bos_token": "<pad>", "eos_token": "</s>"}).train_new_from_iterator(texts, VOCAB)
    tokenizer.model_max_length = PLACES
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
