"""Train the Decision Transformer on solved levels; its task has other levels."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from laserlm.errors import TaskError
from laserlm.lab.sokoban.episodes import Episodes, SolvedLevel, canonical_board, task
from laserlm.lab.sokoban.levels import generate
from laserlm.lab.sokoban.model import SokobanConfig, SokobanForCausalLM, tokenizer
from laserlm.lab.training import check_new, fit
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import load
from laserlm.models.loading_errors import silence_transformers
from laserlm.paths import atomic_folder
from laserlm.tasks import Task

SHIPPED_MODEL = Path(__file__).with_name("trained")
"""Folder with a model that was trained with the default configuration."""
N_HELD_OUT = 2500
"""Number of levels that are never trained on."""
HELD_OUT_SEED = 2**31
"""Seed of the held-out levels; seeds of training are smaller."""


@dataclass(frozen=True)
class TrainingConfig:
    """The levels, the shape and the training of a model.

    Args:
        boxes: boxes per level.
        room: side of the room in cells.
        levels: number of training levels.
        steps: training steps.
        batch_size: episodes per step.
        learning_rate: highest learning rate of AdamW; it follows a cosine to zero.
        hidden_size: hidden size of the transformer.
        layers: layers of the transformer.
        heads: attention heads.
        channels: channels of the convolutions.
        depth: number of convolutions after the first.
        seed: seed of the levels and of the weights.
    """

    boxes: int = 2
    room: int = 6
    levels: int = 40_000
    steps: int = 1200
    batch_size: int = 64
    learning_rate: float = 1e-3
    hidden_size: int = 128
    layers: int = 3
    heads: int = 4
    channels: int = 32
    depth: int = 8
    seed: int = 0


def held_out_task(*, boxes: int = 2, room: int = 6, max_steps: int = 60) -> Task:
    """Return the task of 2,500 levels that are never trained on, a fifth of them for validation."""
    return task(generate(N_HELD_OUT, seed=HELD_OUT_SEED, boxes=boxes, room=room), max_steps=max_steps)


def training_levels(config: TrainingConfig) -> Iterator[SolvedLevel]:
    """Yield the training levels of a configuration, without symmetric copies of held-out levels."""
    boxes, room = config.boxes, config.room
    held_out = {canonical_board(level) for level, _ in generate(N_HELD_OUT, seed=HELD_OUT_SEED, boxes=boxes, room=room)}
    solved = generate(2 * config.levels, seed=config.seed, boxes=boxes, room=room)
    allowed = ((level, moves) for level, moves in solved if canonical_board(level) not in held_out)
    yield from islice(allowed, config.levels)


def train(
    config: TrainingConfig,
    folder: Path,
    *,
    save_every: int | None = 250,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Return the model of a configuration: loaded from ``folder`` if it is there, else trained and saved there.

    An interrupted training resumes from its last checkpoint.

    Args:
        config: the levels, the shape and the training.
        folder: folder of the model. During training the checkpoints are in ``FOLDER.checkpoints`` next to it.
        save_every: steps between two checkpoints; None writes none.
        cache: folder for decompositions.
        on_progress: called after each step with the number of steps done and their total.

    Raises:
        TaskError: if a folder has files of another configuration, or there are too few levels.
    """
    folder = folder.absolute()
    work = folder.with_name(f"{folder.name}.checkpoints")
    for file in (folder / "recipe.json", work / "recipe.json"):
        if file.is_file() and json.loads(file.read_text()) != asdict(config):
            raise TaskError(f"{file.parent} is of another configuration, {file.read_text().strip()}; give another folder")
    if not (folder / "recipe.json").is_file():
        check_new(folder)
        solved = list(training_levels(config))
        if len(solved) < config.levels:
            raise TaskError(
                f"a room of side {config.room} with {config.boxes} boxes has {len(solved)} of {config.levels} levels that are "
                "not held out; ask for fewer levels or a larger room"
            )
        model = _initial_model(config)
        work.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder, existing="refuse") as part:
            (work / "recipe.json").write_text(json.dumps(asdict(config)) + "\n", encoding="utf-8")
            fit(
                model,
                Episodes(solved),
                work,
                steps=config.steps,
                batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                seed=config.seed,
                save_every=save_every,
                on_progress=on_progress,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, config.steps // 10),
                weight_decay=0.01,
            )
            with silence_transformers():
                tokenizer().save_pretrained(part)
                model.save_pretrained(part)
            shutil.copy(work / "recipe.json", part)
        shutil.rmtree(work)
    return load(folder, cache=cache)


def _initial_model(config: TrainingConfig) -> SokobanForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return SokobanForCausalLM(
            SokobanConfig(
                hidden_size=config.hidden_size,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                channels=config.channels,
                depth=config.depth,
            )
        )
