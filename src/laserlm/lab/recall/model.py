"""A small transformer that learns noisy in-context recall: an ordinary OPT, which all of laserlm can read and save.

It has two blocks of one attention head and a ReLU MLP four times as wide, without biases. Embeddings, positions and the
output layer are random and are not trained.

Source: Chen, Bruna and Bietti, arXiv 2406.03068.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTForCausalLM
from transformers.trainer_callback import TrainerCallback

from laserlm.errors import TaskError
from laserlm.lab.recall.language import PAD, START, Language, RecallConfig
from laserlm.lab.training import check_new, fit
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import load
from laserlm.models.loading_errors import silence_transformers
from laserlm.paths import atomic_folder


class _TrainingSequences(Dataset[dict[str, Tensor]]):
    """Sequences with a start token; the labels are the words that the loss is over."""

    def __init__(self, config: RecallConfig) -> None:
        language = Language(config)
        tokens = language.draw(config.steps * config.batch_size, seed=config.seed + 1).tokens  # (n, T)
        start = torch.full((len(tokens), 1), language.vocabulary.index(START))
        self.ids = torch.cat([start, tokens], 1)  # (n, 1 + T)
        previous = torch.cat([start, self.ids[:, :-1]], 1)
        self.labels = self.ids if config.loss_on == "all" else self.ids.where(previous == config.words, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def initial_model(config: RecallConfig) -> LanguageModel:
    """Return the model before training; its embeddings, positions and output layer are frozen."""
    language = Language(config)
    start, pad = (language.vocabulary.index(word) for word in (START, PAD))
    opt_config = OPTConfig(
        vocab_size=len(language.vocabulary),
        hidden_size=config.width,
        word_embed_proj_dim=config.width,
        ffn_dim=4 * config.width,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=2 * (config.length + 1),  # twice the length, so that one window scores a full sequence
        init_std=config.width**-0.5,
        dropout=0.0,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        tie_word_embeddings=False,
        bos_token_id=start,
        eos_token_id=start,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = OPTForCausalLM(opt_config)
    decoder = model.model.decoder
    for frozen in (decoder.embed_tokens, decoder.embed_positions, model.lm_head):
        frozen.requires_grad_(False)
    return LanguageModel(model=model, tokenizer=language.tokenizer(), name="noisy-recall", kind="causal")


def load_or_train(
    config: RecallConfig,
    folder: Path,
    *,
    callbacks: Callable[[LanguageModel], Sequence[TrainerCallback]] = lambda _: (),
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Return the model of a configuration: loaded from ``folder`` if it is there, else trained and saved there.

    Args:
        config: the language and the training.
        folder: folder of the model.
        callbacks: returns the callbacks of the training for a model.
        cache: folder for decompositions.
        on_progress: called after each training step with the number of steps done and their total.

    Raises:
        TaskError: if the folder has a model of another configuration, or other files.
    """
    config_file = folder / "recipe.json"
    if config_file.is_file() and json.loads(config_file.read_text()) != config.as_dict():
        raise TaskError(
            f"{folder} holds a model of another configuration, {config_file.read_text().strip()}; give another folder"
        )
    if not config_file.is_file():
        check_new(folder)
        lm = initial_model(config)
        with atomic_folder(folder, existing="refuse") as part:
            fit(
                lm.model,
                _TrainingSequences(config),
                part / "checkpoints",
                steps=config.steps,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                seed=config.seed,
                callbacks=callbacks(lm),
                on_progress=on_progress,
                optim="sgd",
                optim_args=f"momentum={config.momentum}",
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=50,
            )
            with silence_transformers():
                lm.model.save_pretrained(part)
                lm.require_tokenizer().save_pretrained(part)
            (part / "recipe.json").write_text(json.dumps(config.as_dict()) + "\n", encoding="utf-8")
    return load(folder, cache=cache)
