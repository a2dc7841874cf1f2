"""The commands of the lab: experiments that train their own small models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli import sokoban
from laserlm.cli.options import STORE_DEFAULT, Cache, Json, Listing, Store, print_json
from laserlm.cli.progress import bar, say, searching_bar
from laserlm.paths import lab_folder
from laserlm.provenance import masked

if TYPE_CHECKING:
    from laserlm.lab.recall.study import RecallResult

app = typer.Typer(no_args_is_help=True, help="Experiments that train a small model of their own, on two CPU cores.")

app.add_typer(sokoban.app, name="sokoban")

Folder = Annotated[
    Path | None, typer.Option(help="Folder for the trained models, which are used again; default: in the user's data folder.")
]


@app.command()
def noisy_recall(
    seeds: Annotated[int, typer.Option(min=1, help="Number of models, each with its own language.")] = 3,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Probability of the noise word in training.")] = 0.65,
    learnt: Annotated[str, typer.Option(help="outputs (loss on what follows a trigger) or all (on every word).")] = "outputs",
    steps: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 1500,
    out: Folder = None,
    store: Store = STORE_DEFAULT,
    restart: Annotated[bool, typer.Option("--restart", help="Search anew; trained models are kept.")] = False,
    json: Json = False,
) -> None:
    """Train models on sequences with noise, and find the reduction that takes the noise out (arXiv 2406.03068).

    Example: laser lab noisy-recall --seeds 1
    """
    from laserlm.lab.recall.language import Recipe, write_questions
    from laserlm.lab.recall.model import trained
    from laserlm.lab.recall.study import study, task_of

    out = out or lab_folder("noisy-recall")
    say(f"models are kept in {out}, results in {masked(store)}")
    found = []
    for seed in range(seeds):
        recipe = Recipe(alpha=alpha, learnt=learnt, steps=steps, seed=seed)  # type: ignore[arg-type]
        folder = out / f"seed-{seed}"
        with bar(f"training seed {seed}", unit="steps") as advance:
            lm = trained(recipe, folder, on_progress=advance)
        if recipe.learnt == "outputs":
            write_questions(task_of(recipe).every.examples, folder / "questions.jsonl")
        with searching_bar() as on_step:
            found.append(study(lm, recipe, store, restart=restart, on_step=on_step))
    if json:
        print_json([one.as_dict() for one in found])
    else:
        _print(found)


def _print(found: list[RecallResult]) -> None:
    n = found[0].clean.n
    rows: list[dict[str, Any]] = [
        {
            "seed": one.recipe.seed,
            "best": str(one.found.best) or "unchanged",
            "clean": f"{one.clean.base:.1%}",
            "after": f"{one.clean.edited:.1%}",
            "95 % interval of the gain": f"{one.clean.interval.low:+.1%} to {one.clean.interval.high:+.1%}",
            "race": str(one.race.best) or "unchanged",
            "screen's first": f"{one.first} {one.first_clean.edited:.1%}",
            "best of attention": f"{one.attention} {one.attention_clean.edited:.1%}",
            "noisy loss": f"{one.noisy.base_loss:.3f} -> {one.noisy.edited_loss:.3f}",
            "all words": f"{one.text.base_loss:.3f} -> {one.text.edited_loss:.3f}",
        }
        for one in found
    ]
    Listing().print(rows, title=f"Noisy recall: share of {n} clean questions that is right, losses in nats per word")
    first = found[0]
    print(
        f"Each is the best of {first.found.candidates} reductions on {first.found.validation.n} validation sequences. Where "
        "the noisy loss rises, the model has lost the noise that it had learnt to expect."
    )
    print(f"Go on with: laser runs show {first.found.run}")


@app.command()
def rank_constraint(
    on: Annotated[str, typer.Argument(help="recall (noisy recall) or worldfacts (a fine-tune of the bundled model).")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings of each kind.")] = 3,
    out: Folder = None,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Train with a matrix held at a rank, or drawn towards it, and plainly with LASER after it: same data, same seeds.

    Example: laser lab rank-constraint recall --seeds 1
    """
    from laserlm.errors import TaskError
    from laserlm.lab.constrained import on_recall, on_worldfacts
    from laserlm.lab.recall.language import Recipe

    if on not in ("recall", "worldfacts"):
        raise TaskError(f"no training on {on!r}; write recall or worldfacts")
    out = out or lab_folder("rank-constraint")
    found = []
    for seed in range(seeds):
        with bar(f"seed {seed}", unit="steps") as advance:

            def told(name: str, done: int, total: int, advance: Any = advance) -> None:
                advance(done, total, name)

            found += list(
                on_recall(Recipe(seed=seed), out / f"seed-{seed}", on_progress=told)
                if on == "recall"
                else on_worldfacts(seed, cache=cache, on_progress=told)
            )
    if json:
        print_json([arm.as_dict() for arm in found])
        return
    rows: list[dict[str, Any]] = []
    for arm in found:
        rows.append({"seed": arm.seed, "training": arm.name, "matrix": arm.intervention})
        for name, c in arm.sides.items():
            rows[-1] |= {
                f"{name}": f"{c.edited:.1%}",
                f"{name} against plain": f"{c.gain:+.1%} [{c.interval.low:+.1%}, {c.interval.high:+.1%}]",
                f"{name} loss": f"{c.edited_loss:.3f}",
            }
        rows[-1]["beyond the rank"] = ", ".join(f"{share:.2%}" for share in arm.tails.values())
    Listing().print(rows, title="Rank constraint: in training, or LASER after it")
