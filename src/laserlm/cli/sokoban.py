"""The commands of the lab's Sokoban: train, evaluate, search and play."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, LoadOptions, Store, print_json, with_options
from laserlm.cli.print_search import print_result
from laserlm.cli.progress import print_stderr, progress_bar, search_progress_bar
from laserlm.paths import lab_folder
from laserlm.provenance import mask_credentials

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.records import Evaluation
    from laserlm.tasks import Task

app = typer.Typer(no_args_is_help=True, help="A Decision Transformer that plays Sokoban.")

LEVEL_PANEL = "Level options"
Reduce = Annotated[list[str] | None, typer.Option(help="Reduction such as 2.fc_in@0.1; may be repeated.")]


@dataclass(frozen=True, kw_only=True)
class PlayerOptions(LoadOptions):
    """A trained model, and how to load it."""

    model: Annotated[
        str | None,
        typer.Argument(help="Folder of a trained model.", show_default="the one that comes with laserlm"),
    ] = None

    def load(self) -> LanguageModel:
        """Load the model.

        Raises:
            ModelError: if it is not a Sokoban model.
        """
        from laserlm.errors import ModelError
        from laserlm.lab.sokoban.model import SokobanConfig
        from laserlm.lab.sokoban.training import SHIPPED_MODEL

        lm = self.load_named(self.model or str(SHIPPED_MODEL))
        if lm.family != SokobanConfig.model_type:
            raise ModelError(f"{lm.name} is a {lm.family} model, not a Sokoban model; train one: laser lab sokoban train")
        return lm


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    """The levels, and the maximum number of moves."""

    levels: Annotated[
        Path | None, typer.Option(help="Boxoban file.", show_default="2,500 random small levels", rich_help_panel=LEVEL_PANEL)
    ] = None
    boxes: Annotated[int, typer.Option(min=1, help="Boxes per random level.", rich_help_panel=LEVEL_PANEL)] = 2
    room: Annotated[
        int, typer.Option(min=3, max=8, help="Side of the room of a random level.", rich_help_panel=LEVEL_PANEL)
    ] = 6
    max_steps: Annotated[
        int, typer.Option(min=1, max=119, help="Maximum number of moves per level.", rich_help_panel=LEVEL_PANEL)
    ] = 60
    limit: Annotated[
        int | None, typer.Option(min=1, help="Number of levels from the start of each split.", rich_help_panel=LEVEL_PANEL)
    ] = None
    batch_size: Annotated[int, typer.Option(min=1, help="Levels played in parallel.", rich_help_panel=LEVEL_PANEL)] = 100

    def task(self) -> Task:
        """Return the task: a fifth of the levels for validation, the rest for test."""
        from laserlm.lab.sokoban.episodes import solve_levels, task
        from laserlm.lab.sokoban.levels import read_boxoban
        from laserlm.lab.sokoban.training import held_out_task

        if self.levels is None:
            full_task = held_out_task(boxes=self.boxes, room=self.room, max_steps=self.max_steps)
        else:
            levels = read_boxoban(self.levels)
            levels = levels if self.limit is None else levels[: 5 * self.limit]
            with progress_bar("solving levels", unit="levels") as advance:
                solved = solve_levels(levels, advance)
            if len(solved) < len(levels):
                print_stderr(
                    f"left out {len(levels) - len(solved)} of {len(levels)} levels: solved at the start, or not in 120 moves"
                )
            full_task = task(solved, max_steps=self.max_steps)
        return replace(
            full_task,
            validation=full_task.validation.limit(self.limit),
            test=full_task.test.limit(self.limit),
            every=full_task.every.limit(self.limit),
        )


@app.command()
def train(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the model.", show_default="in the user's data folder"),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the levels and the weights.")] = 0,
    boxes: Annotated[int, typer.Option(min=1, help="Boxes per level.")] = 2,
    room: Annotated[int, typer.Option(min=3, max=8, help="Side of the room.")] = 6,
    levels: Annotated[int, typer.Option(min=1, help="Number of training levels.")] = 40_000,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1200,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 250,
) -> None:
    """Train a Decision Transformer on optimal solutions of random levels. An interrupted training resumes.

    Example: laser lab sokoban train --out sokoban/seed-0
    """
    from laserlm.lab.sokoban.training import TrainingConfig
    from laserlm.lab.sokoban.training import train as train_

    start = time.monotonic()
    out = out or lab_folder("sokoban")
    config = TrainingConfig(seed=seed, boxes=boxes, room=room, levels=levels, steps=steps)
    with progress_bar("training", unit="steps") as advance:
        lm = train_(config, out, save_every=save_every, on_progress=advance)
    parameters = sum(p.numel() for p in lm.model.parameters())
    print(f"{out}: {parameters:,} parameters, {time.monotonic() - start:.0f} s")
    print(f"Go on with:\n  laser lab sokoban evaluate {out}\n  laser lab sokoban search {out}")


@app.command()
@with_options(player=PlayerOptions, levels=LevelOptions)
def evaluate(
    player: PlayerOptions,
    levels: LevelOptions,
    reduce: Reduce = None,
    split: Annotated[str, typer.Option(help="Split to play: validation, test or all.")] = "test",
    json: Json = False,
) -> None:
    """Let a model play held-out levels: share solved, return and steps, with and without a reduction.

    Example: laser lab sokoban evaluate --limit 100 --reduce 2.fc_in@0.1
    """
    from laserlm.edit import applied
    from laserlm.jsonable import to_json
    from laserlm.reductions import Intervention
    from laserlm.scoring.evaluate import compare
    from laserlm.scoring.evaluate import evaluate as evaluate_
    from laserlm.studies.estimates import Estimate

    intervention = Intervention.read(reduce or [])  # before the model is loaded
    lm, examples = player.load(), levels.task().split(split)
    evaluations: list[Evaluation] = []
    for current in [Intervention(), intervention] if intervention else [intervention]:
        with progress_bar(f"playing {current or 'the unchanged model'}", unit="levels") as advance, applied(lm, current):
            evaluations.append(evaluate_(lm, examples, batch_size=levels.batch_size, on_progress=advance))
    comparison = compare(*evaluations) if intervention else None
    returns = [[score.figures["return"] for score in e.scores] for e in evaluations]
    change = Estimate.mean([b - a for a, b in zip(*returns, strict=True)]) if intervention else None
    if json:
        print_json(
            {
                "evaluations": [e.as_dict() for e in evaluations],
                "return": to_json([Estimate.mean(r) for r in returns]),
                "comparison": comparison.as_dict() if comparison else None,
                "return_change": to_json(change),
            }
        )
        return
    for evaluation in evaluations:
        _print_evaluation(evaluation, levels.max_steps)
    if comparison is not None and change is not None:
        print(comparison)
        print(f"return {change.value:+.3f} [{change.interval.low:+.3f}, {change.interval.high:+.3f}], paired by level")


def _print_evaluation(e: Evaluation, max_steps: int) -> None:
    from laserlm.studies.estimates import Estimate

    low, high = e.accuracy_interval
    print(
        f"{e.intervention or 'unchanged'}: solved {e.accuracy:.1%} [{low:.1%}, {high:.1%}] of {e.n} levels within {max_steps} "
        f"moves, return {Estimate.mean([score.figures['return'] for score in e.scores])}, moves {e.figures['steps']:.1f}; "
        f"log-loss of the solutions' moves {e.loss:.4f} nats"
    )


@app.command()
@with_options(player=PlayerOptions, levels=LevelOptions)
def search(
    player: PlayerOptions,
    levels: LevelOptions,
    strategy: Annotated[str, typer.Option(help="Strategy: race, exhaustive or compose.")] = "race",
    grid: Annotated[str, typer.Option(help="Candidates: paper, mlp, fine, or such as 0-2.mlp@0.05,0.5.")] = "fine",
    seed: Annotated[int, typer.Option(help="Seed of the order of levels.")] = 0,
    store: Store = STORE_DEFAULT,
    restart: Annotated[bool, typer.Option("--restart", help="Search again, even if the database has this search.")] = False,
    json: Json = False,
) -> None:
    """Rank reductions by the log-loss of solutions, let the best ones play, and test one.

    Example: laser lab sokoban search --limit 100
    """
    from laserlm.searching import search as search_

    lm, task = player.load(), levels.task()
    print_stderr(f"results are in {mask_credentials(store)}")
    with search_progress_bar() as on_step:
        result = search_(
            lm,
            task,
            strategy=strategy,
            grid=grid,
            seed=seed,
            store=store,
            restart=restart,
            batch_size=levels.batch_size,
            on_step=on_step,
        )
    if json:
        print_json(result.as_dict())
    else:
        print_result(result)


@app.command()
@with_options(player=PlayerOptions, levels=LevelOptions)
def play(
    player: PlayerOptions,
    levels: LevelOptions,
    level: Annotated[int, typer.Option(min=0, help="Index of the level in the test split, from 0.")] = 0,
    reduce: Reduce = None,
    picture: Annotated[Path | None, typer.Option(help="File for an animated GIF of the episode.")] = None,
    delay: Annotated[float, typer.Option(min=0, help="Seconds between two moves on a terminal.")] = 0.15,
    json: Json = False,
) -> None:
    """Play one level move by move, on the terminal or as an animated picture.

    Example: laser lab sokoban play --level 3 --picture episode.gif
    """
    from laserlm.edit import applied
    from laserlm.errors import TaskError
    from laserlm.lab.sokoban.levels import Level
    from laserlm.lab.sokoban.play import animate, show
    from laserlm.lab.sokoban.play import play as play_
    from laserlm.reductions import Intervention

    intervention = Intervention.read(reduce or [])
    lm, examples = player.load(), levels.task().test.examples
    if level >= len(examples):
        raise TaskError(f"no level {level}; the test split has levels 0 to {len(examples) - 1}")
    example = examples[level]
    with applied(lm, intervention):
        episode = play_(lm, Level.parse(example.prompt, example.id), max_steps=levels.max_steps)
    if picture is not None:
        animate(episode, picture)
    if json:
        print_json(
            {
                "level": example.id,
                "intervention": str(intervention),
                "solved": episode.solved,
                "return": episode.total_reward,
                "moves": episode.moves,
                "solution": example.answer,
            }
        )
        return
    show(episode, delay=delay)
    print(
        f"{'solved' if episode.solved else 'not solved'} in {len(episode.moves)} moves, return {episode.total_reward:.1f}; "
        f"the shortest solution has {len(example.answer)}: {example.answer}"
    )
    if picture is not None:
        print(f"animated picture: {picture}")
