"""The commands of the lab's Sokoban: train, evaluate, search and play."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, LoadOptions, Store, print_json, with_options
from laserlm.cli.progress import bar, say, searching_bar
from laserlm.cli.search import print_found
from laserlm.paths import lab_folder
from laserlm.provenance import masked

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.records import Evaluation
    from laserlm.tasks import Task

app = typer.Typer(no_args_is_help=True, help="A Decision Transformer that plays Sokoban.")

LEVEL_PANEL = "Level options"
Reduce = Annotated[list[str] | None, typer.Option(help="A reduction such as 2.fc_in@0.1; may be repeated.")]


@dataclass(frozen=True, kw_only=True)
class PlayerOptions(LoadOptions):
    """Which trained model."""

    model: Annotated[
        str | None,
        typer.Argument(help="Folder that 'train' wrote, or a reduced copy; default: the one that comes with laserlm."),
    ] = None

    def load(self) -> LanguageModel:
        """Load the model.

        Raises:
            ModelError: if it plays no Sokoban.
        """
        from laserlm.errors import ModelError
        from laserlm.lab.sokoban.model import SokobanConfig
        from laserlm.lab.sokoban.training import SHIPPED

        lm = self.load_named(self.model or str(SHIPPED))
        if lm.family != SokobanConfig.model_type:
            raise ModelError(f"{lm.name} is a {lm.family} model and plays no Sokoban; make one: laser lab sokoban train")
        return lm


@dataclass(frozen=True, kw_only=True)
class LevelOptions:
    """Which levels, and how long they are played."""

    levels: Annotated[
        Path | None, typer.Option(help="Boxoban file; default: 2,500 random small levels.", rich_help_panel=LEVEL_PANEL)
    ] = None
    boxes: Annotated[int, typer.Option(min=1, help="Boxes of a random level.", rich_help_panel=LEVEL_PANEL)] = 2
    room: Annotated[int, typer.Option(min=3, max=8, help="Side of its room.", rich_help_panel=LEVEL_PANEL)] = 6
    max_steps: Annotated[
        int, typer.Option(min=1, max=119, help="Moves after which a level counts as not solved.", rich_help_panel=LEVEL_PANEL)
    ] = 60
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N of each split.", rich_help_panel=LEVEL_PANEL)] = (
        None
    )
    batch_size: Annotated[int, typer.Option(min=1, help="Levels played at once.", rich_help_panel=LEVEL_PANEL)] = 100

    def task(self) -> Task:
        """Make the task: a fifth of the levels for validation, the others for test."""
        from laserlm.lab.sokoban.episodes import solved, task
        from laserlm.lab.sokoban.levels import read_boxoban
        from laserlm.lab.sokoban.training import held_out

        if self.levels is None:
            made = held_out(boxes=self.boxes, room=self.room, max_steps=self.max_steps)
        else:
            read = read_boxoban(self.levels)
            read = read if self.limit is None else read[: 5 * self.limit]
            with bar("solving levels", unit="levels") as advance:
                known = solved(read, advance)
            if len(known) < len(read):
                say(f"{len(read) - len(known)} of {len(read)} levels are left out: solved as they are, or not within 120 moves")
            made = task(known, max_steps=self.max_steps)
        return replace(
            made,
            validation=made.validation.limit(self.limit),
            test=made.test.limit(self.limit),
            every=made.every.limit(self.limit),
        )


@app.command()
def train(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the model; an interrupted training goes on; default: in the user's data folder."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the levels and the weights.")] = 0,
    boxes: Annotated[int, typer.Option(min=1, help="Boxes of each level.")] = 2,
    room: Annotated[int, typer.Option(min=3, max=8, help="Side of the room.")] = 6,
    levels: Annotated[int, typer.Option(min=1, help="Levels to learn from.")] = 40_000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1200,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 250,
) -> None:
    """Train a Decision Transformer on optimal solutions of random levels.

    Example: laser lab sokoban train --out sokoban/seed-0
    """
    from laserlm.lab.sokoban.training import Recipe
    from laserlm.lab.sokoban.training import train as train_

    start = time.monotonic()
    out = out or lab_folder("sokoban")
    recipe = Recipe(seed=seed, boxes=boxes, room=room, levels=levels, steps=steps)
    with bar("training", unit="steps") as advance:
        lm = train_(recipe, out, save_every=save_every, on_progress=advance)
    parameters = sum(p.numel() for p in lm.model.parameters())
    print(f"{out}: {parameters:,} parameters, {time.monotonic() - start:.0f} s")
    print(f"Go on with:\n  laser lab sokoban evaluate {out}\n  laser lab sokoban search {out}")


@app.command()
@with_options(player=PlayerOptions, levels=LevelOptions)
def evaluate(
    player: PlayerOptions,
    levels: LevelOptions,
    reduce: Reduce = None,
    split: Annotated[str, typer.Option(help="validation, test or all.")] = "test",
    json: Json = False,
) -> None:
    """Let a model play levels that it has not seen: share solved, return, steps; with a reduction before and after.

    Example: laser lab sokoban evaluate --limit 100 --reduce 2.fc_in@0.1
    """
    from laserlm.edit import applied
    from laserlm.reductions import Intervention
    from laserlm.scoring.evaluate import compare
    from laserlm.scoring.evaluate import evaluate as evaluate_
    from laserlm.studies.estimates import Estimate

    intervention = Intervention.parse(reduce or [])  # before the model is loaded
    lm, examples = player.load(), levels.task().split(split)
    found: list[Evaluation] = []
    for applied_now in [Intervention(), intervention] if intervention else [intervention]:
        with bar(f"playing {applied_now or 'the unchanged model'}", unit="levels") as advance, applied(lm, applied_now):
            found.append(evaluate_(lm, examples, batch_size=levels.batch_size, on_progress=lambda d, n: advance(d, n)))
    both = compare(found[0], found[-1]) if intervention else None
    returns = [[s.figures["return"] for s in e.scores] for e in found]
    change = Estimate.mean([b - a for a, b in zip(*returns, strict=True)]) if intervention else None
    if json:
        print_json(
            {
                "evaluations": [e.as_dict() for e in found],
                "return": [Estimate.mean(r).as_dict() for r in returns],
                "comparison": both.as_dict() if both else None,
                "return_change": change.as_dict() if change else None,
            }
        )
        return
    for e, r in zip(found, returns, strict=True):
        low, high = e.accuracy_interval
        print(
            f"{e.intervention or 'unchanged'}: solved {e.accuracy:.1%} [{low:.1%}, {high:.1%}] of {e.n} levels within "
            f"{levels.max_steps} moves, return {Estimate.mean(r)}, moves {e.figures['steps']:.1f}; log-loss of the "
            f"solutions' moves {e.loss:.4f} nats"
        )
    if both is not None and change is not None:
        print(both)
        print(f"return {change.value:+.3f} [{change.interval.low:+.3f}, {change.interval.high:+.3f}], paired by level")


@app.command()
@with_options(player=PlayerOptions, levels=LevelOptions)
def search(
    player: PlayerOptions,
    levels: LevelOptions,
    strategy: Annotated[str, typer.Option(help="race, exhaustive or compose.")] = "race",
    grid: Annotated[str, typer.Option(help="paper, mlp, fine, or text such as 0-2.mlp@0.05,0.5.")] = "fine",
    seed: Annotated[int, typer.Option(help="Seed of the order of levels.")] = 0,
    store: Store = STORE_DEFAULT,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew even where the database has this search.")] = False,
    json: Json = False,
) -> None:
    """Rank reductions by the log-loss of solutions on validation levels, let the best play, measure one on test levels.

    Example: laser lab sokoban search --limit 100
    """
    from laserlm.searching import search as search_

    lm, made = player.load(), levels.task()
    say(f"results are kept in {masked(store)}")
    with searching_bar() as on_step:
        found = search_(
            lm,
            made,
            strategy=strategy,  # type: ignore[arg-type]
            grid=grid,
            seed=seed,
            store=store,
            restart=restart,
            batch_size=levels.batch_size,
            on_step=on_step,
        )
    if json:
        print_json(found.as_dict())
    else:
        print_found(found)


@app.command()
@with_options(player=PlayerOptions, levels=LevelOptions)
def play(
    player: PlayerOptions,
    levels: LevelOptions,
    level: Annotated[int, typer.Option(min=0, help="Which level of the test split, counted from 0.")] = 0,
    reduce: Reduce = None,
    picture: Annotated[Path | None, typer.Option(help="Write the episode as an animated GIF to this file.")] = None,
    delay: Annotated[float, typer.Option(min=0, help="Seconds between two moves on a terminal.")] = 0.15,
    json: Json = False,
) -> None:
    """Play one level in the environment, move by move, in the terminal and as an animated picture.

    Example: laser lab sokoban play --level 3 --picture episode.gif
    """
    from laserlm.edit import applied
    from laserlm.errors import TaskError
    from laserlm.lab.sokoban.levels import Level
    from laserlm.lab.sokoban.play import animate, show
    from laserlm.lab.sokoban.play import play as play_
    from laserlm.reductions import Intervention

    intervention = Intervention.parse(reduce or [])
    lm, examples = player.load(), levels.task().test.examples
    if level >= len(examples):
        raise TaskError(f"no level {level}; the test split has {len(examples)}, counted from 0")
    with applied(lm, intervention):
        played = play_(lm, Level.parse(examples[level].prompt, examples[level].id), max_steps=levels.max_steps)
    if picture is not None:
        animate(played, picture)
    if json:
        print_json(
            {
                "level": examples[level].id,
                "intervention": str(intervention),
                "solved": played.solved,
                "return": played.earned,
                "moves": played.moves,
                "solution": examples[level].answer,
            }
        )
        return
    show(played, delay=delay)
    print(
        f"{'solved' if played.solved else 'not solved'} in {len(played.moves)} moves, return {played.earned:.1f}; the shortest "
        f"solution has {len(examples[level].answer)}: {examples[level].answer}"
    )
    if picture is not None:
        print(f"animated picture: {picture}")
