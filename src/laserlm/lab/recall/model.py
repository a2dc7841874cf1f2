"""A small transformer that learns noisy in-context recall: an ordinary OPT, so that everything reads and saves it.

Two blocks of one head each, attention and then a ReLU MLP four times as wide; no biases; embeddings, positions and output
layer are random and stay so.

Source: Chen, Bruna and Bietti, arXiv 2406.03068.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers.models.opt.configuration_opt import OPTConfig
from transformers.models.opt.modeling_opt import OPTForCausalLM
from transformers.trainer_callback import TrainerCallback

from laserlm.errors import TaskError
from laserlm.lab.recall.language import PAD, START, Language, Recipe
from laserlm.lab.training import check_new, fit
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import load, silence_transformers
from laserlm.paths import atomic_folder

__all__ = ["trained", "untrained"]


class _Lessons(Dataset[dict[str, Tensor]]):
    """Sequences with a start token, and the words that are learnt."""

    def __init__(self, language: Language) -> None:
        r = language.recipe
        tokens = language.draw(r.steps * r.batch_size, seed=r.seed + 1).tokens  # (n, T)
        start = torch.full((len(tokens), 1), language.vocabulary.index(START))
        self.ids = torch.cat([start, tokens], 1)  # (n, 1 + T)
        before = torch.cat([start, self.ids[:, :-1]], 1)
        self.labels = self.ids if r.learnt == "all" else self.ids.where(before == r.words, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def untrained(recipe: Recipe) -> LanguageModel:
    """Return the model before training, with embeddings, positions and output layer frozen."""
    language = Language(recipe)
    start, pad = (language.vocabulary.index(word) for word in (START, PAD))
    config = OPTConfig(
        vocab_size=len(language.vocabulary),
        hidden_size=recipe.width,
        word_embed_proj_dim=recipe.width,
        ffn_dim=4 * recipe.width,
        num_hidden_layers=2,
        num_attention_heads=1,
        max_position_embeddings=2 * (recipe.length + 1),  # twice, so that a whole sequence is scored in one window
        init_std=recipe.width**-0.5,
        dropout=0.0,
        enable_bias=False,
        layer_norm_elementwise_affine=False,
        tie_word_embeddings=False,
        bos_token_id=start,
        eos_token_id=start,
        pad_token_id=pad,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = OPTForCausalLM(config)
    decoder = model.model.decoder
    for frozen in (decoder.embed_tokens, decoder.embed_positions, model.lm_head):
        frozen.requires_grad_(False)
    return LanguageModel(model=model, tokenizer=language.tokenizer(), name="noisy-recall", kind="causal")


def trained(
    recipe: Recipe,
    folder: Path,
    *,
    callbacks: Callable[[LanguageModel], Sequence[TrainerCallback]] = lambda _: (),
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Return the model that a recipe makes: from ``folder``, where it was trained before, or else trained and saved there.

    Args:
        recipe: how it is trained.
        folder: of the model.
        callbacks: made of the model, and called in its training.
        cache: folder for decompositions.
        on_progress: called after each step of training with the number of steps done and their total.

    Raises:
        TaskError: if the folder holds a model of another recipe, or something else.
    """
    noted = folder / "recipe.json"
    if noted.is_file() and json.loads(noted.read_text()) != asdict(recipe):
        raise TaskError(f"{folder} holds a model of another recipe, {noted.read_text().strip()}; give another folder")
    if not noted.is_file():
        check_new(folder)
        lm = untrained(recipe)
        with atomic_folder(folder, existing="refuse") as part:
            fit(
                lm.model,
                _Lessons(Language(recipe)),
                part / "checkpoints",
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                seed=recipe.seed,
                callbacks=callbacks(lm),
                on_progress=on_progress,
                optim="sgd",
                optim_args=f"momentum={recipe.momentum}",
                lr_scheduler_type="constant_with_warmup",
                warmup_steps=50,
            )
            with silence_transformers():
                lm.model.save_pretrained(part)
                lm.need_tokenizer().save_pretrained(part)
            (part / "recipe.json").write_text(json.dumps(asdict(recipe)) + "\n", encoding="utf-8")
    return load(folder, cache=cache)
