"""Train the Decision Transformer on solved levels, and measure it on levels that it has not seen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch

from laserlm.errors import TaskError
from laserlm.lab.sokoban.episodes import Episodes, Solved, outline, task
from laserlm.lab.sokoban.levels import generate
from laserlm.lab.sokoban.model import SokobanConfig, SokobanForCausalLM, tokenizer
from laserlm.lab.training import check_new, fit
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import load, silence_transformers
from laserlm.paths import atomic_folder
from laserlm.tasks import Task

__all__ = ["SHIPPED", "Recipe", "held_out", "lessons", "train"]

SHIPPED = Path(__file__).with_name("trained")
"""Folder with a model that was trained by the plain recipe."""
HELD_OUT = 2500
"""Levels that nothing is trained on."""
HELD_OUT_SEED = 2**31
"""Their seed; those of training are below it."""


@dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    Args:
        boxes: of each level.
        room: side of the room, in cells.
        levels: number of levels to learn from.
        steps: of training.
        batch_size: episodes in a step.
        learning_rate: of AdamW at its highest; it falls to zero as a cosine.
        hidden_size: of the transformer.
        layers: of the transformer.
        heads: of attention.
        channels: of the convolutions.
        depth: convolutions after the first.
        seed: of the levels and of the weights.
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


def held_out(*, boxes: int = 2, room: int = 6, max_steps: int = 60) -> Task:
    """Return the task of 2,500 levels that nothing is trained on, a fifth of them for validation."""
    return task(generate(HELD_OUT, seed=HELD_OUT_SEED, boxes=boxes, room=room), max_steps=max_steps)


def lessons(recipe: Recipe) -> Iterator[Solved]:
    """Yield the levels that a recipe trains on; copies of held-out ones, shifted, turned or mirrored, are left out."""
    boxes, room = recipe.boxes, recipe.room
    out = {outline(level) for level, _ in generate(HELD_OUT, seed=HELD_OUT_SEED, boxes=boxes, room=room)}
    every = generate(2 * recipe.levels, seed=recipe.seed, boxes=boxes, room=room)
    yield from islice(((level, moves) for level, moves in every if outline(level) not in out), recipe.levels)


def train(
    recipe: Recipe,
    folder: Path,
    *,
    save_every: int | None = 250,
    cache: Path | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LanguageModel:
    """Return the model that a recipe makes; where its training was interrupted, it goes on from the last checkpoint.

    Args:
        recipe: how it is trained.
        folder: of the model, which is loaded where it is finished; checkpoints are beside it until then, in
            ``FOLDER.checkpoints``.
        save_every: steps between two checkpoints; None writes none.
        cache: folder for decompositions.
        on_progress: called after each step with the number of steps done and their total.

    Raises:
        TaskError: if the folder, or that of its checkpoints, is of another recipe, or there are too few levels.
    """
    folder = folder.absolute()
    work = folder.with_name(f"{folder.name}.checkpoints")
    for noted in (folder / "recipe.json", work / "recipe.json"):
        if noted.is_file() and json.loads(noted.read_text()) != asdict(recipe):
            raise TaskError(f"{noted.parent} is of another recipe, {noted.read_text().strip()}; give another folder")
    if not (folder / "recipe.json").is_file():
        check_new(folder)
        learnt = list(lessons(recipe))
        if len(learnt) < recipe.levels:
            raise TaskError(
                f"a room of side {recipe.room} with {recipe.boxes} boxes has {len(learnt)} of {recipe.levels} levels that are "
                "not held out; ask for fewer, or for a larger room"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            model = SokobanForCausalLM(
                SokobanConfig(
                    hidden_size=recipe.hidden_size,
                    num_hidden_layers=recipe.layers,
                    num_attention_heads=recipe.heads,
                    channels=recipe.channels,
                    depth=recipe.depth,
                )
            )
        work.mkdir(parents=True, exist_ok=True)
        with atomic_folder(folder, existing="refuse") as part:
            (work / "recipe.json").write_text(json.dumps(asdict(recipe)) + "\n", encoding="utf-8")
            fit(
                model,
                Episodes(learnt),
                work,
                steps=recipe.steps,
                batch_size=recipe.batch_size,
                learning_rate=recipe.learning_rate,
                seed=recipe.seed,
                save_every=save_every,
                on_progress=on_progress,
                lr_scheduler_type="cosine",
                warmup_steps=min(100, recipe.steps // 10),
                weight_decay=0.01,
            )
            with silence_transformers():
                tokenizer().save_pretrained(part)
                model.save_pretrained(part)
            shutil.copy(work / "recipe.json", part)
        shutil.rmtree(work)
    return load(folder, cache=cache)
