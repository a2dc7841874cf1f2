"""The commands of the lab: experiments that train their own small models."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli import sokoban
from laserlm.cli.options import STORE_DEFAULT, Cache, Json, Store, TableOptions, print_json
from laserlm.cli.progress import print_stderr, progress_bar, search_progress_bar
from laserlm.paths import lab_folder
from laserlm.provenance import mask_credentials

if TYPE_CHECKING:
    from laserlm.lab.recall.study import RecallResult

app = typer.Typer(no_args_is_help=True, help="Experiments that train small models on two CPU cores.")

app.add_typer(sokoban.app, name="sokoban")

Folder = Annotated[Path | None, typer.Option(help="Folder for the trained models.", show_default="in the user's data folder")]


@app.command()
def noisy_recall(
    seeds: Annotated[int, typer.Option(min=1, help="Number of models, each with another language.")] = 3,
    alpha: Annotated[float, typer.Option(min=0, max=1, help="Probability of the noise word in training.")] = 0.65,
    learnt: Annotated[str, typer.Option(help="Words in the loss: outputs (after a trigger) or all.")] = "outputs",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1500,
    out: Folder = None,
    store: Store = STORE_DEFAULT,
    restart: Annotated[bool, typer.Option("--restart", help="Search again; trained models are kept.")] = False,
    json: Json = False,
) -> None:
    """Train models on noisy sequences, and find the reduction that removes the noise (arXiv 2406.03068).

    Example: laser lab noisy-recall --seeds 1
    """
    from laserlm.lab.recall.language import RecallConfig, write_questions
    from laserlm.lab.recall.model import load_or_train
    from laserlm.lab.recall.study import recall_task, run_study

    if learnt not in ("outputs", "all"):
        raise typer.BadParameter(f"no loss on {learnt!r}; write outputs or all")
    out = out or lab_folder("noisy-recall")
    print_stderr(f"models are in {out}, results in {mask_credentials(store)}")
    results = []
    for seed in range(seeds):
        config = RecallConfig(alpha=alpha, loss_on=learnt, steps=steps, seed=seed)  # type: ignore[arg-type]
        folder = out / f"seed-{seed}"
        with progress_bar(f"training seed {seed}", unit="steps") as advance:
            lm = load_or_train(config, folder, on_progress=advance)
        if config.loss_on == "outputs":
            write_questions(recall_task(config).every.examples, folder / "questions.jsonl")
        with search_progress_bar() as on_step:
            results.append(run_study(lm, config, store, restart=restart, on_step=on_step))
    if json:
        print_json([result.as_dict() for result in results])
    else:
        _print(results)


def _print(results: list[RecallResult]) -> None:
    from laserlm.scoring.statistics import in_points

    n = results[0].clean.n
    rows: list[dict[str, Any]] = [
        {
            "seed": r.config.seed,
            "best": str(r.exhaustive.best) or "unchanged",
            "clean": f"{r.clean.base:.1%}",
            "after": f"{r.clean.edited:.1%}",
            "gain": in_points(r.clean.gain, r.clean.interval),
            "race": str(r.race.best) or "unchanged",
            "screen's first": f"{r.first} {r.first_clean.edited:.1%}",
            "best of attention": f"{r.attention} {r.attention_clean.edited:.1%}",
            "noisy loss": f"{r.noisy.base_loss:.3f} -> {r.noisy.edited_loss:.3f}",
            "all words": f"{r.text.base_loss:.3f} -> {r.text.edited_loss:.3f}",
        }
        for r in results
    ]
    TableOptions().print(rows, title=f"Noisy recall: share of {n} clean questions that is right, losses in nats per word")
    search = results[0].exhaustive
    print(
        f"Each row is the best of {search.candidates} reductions on {search.validation.n} validation sequences. If the noisy "
        "loss rises, the model no longer predicts the noise word."
    )
    print(f"Go on with: laser runs show {search.run}")


@app.command()
def rank_constraint(
    on: Annotated[str, typer.Argument(help="Training data: recall, or worldfacts to fine-tune the bundled model.")],
    seeds: Annotated[int, typer.Option(min=1, help="Number of trainings per method.")] = 3,
    out: Folder = None,
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Compare LASER after training with a rank constraint or penalty during training.

    Example: laser lab rank-constraint recall --seeds 1
    """
    from laserlm.lab.constrained import compare_on_recall, compare_on_worldfacts
    from laserlm.lab.recall.language import RecallConfig
    from laserlm.scoring.statistics import in_points

    if on not in ("recall", "worldfacts"):
        raise typer.BadParameter(f"no training on {on!r}; write recall or worldfacts")
    out = out or lab_folder("rank-constraint")
    results = []
    for seed in range(seeds):
        with progress_bar(f"seed {seed}", unit="steps") as advance:

            def on_progress(name: str, done: int, total: int, advance: Any = advance) -> None:
                advance(done, total, name)

            results += list(
                compare_on_recall(RecallConfig(seed=seed), out / f"seed-{seed}", on_progress=on_progress)
                if on == "recall"
                else compare_on_worldfacts(seed, cache=cache, on_progress=on_progress)
            )
    if json:
        print_json([result.as_dict() for result in results])
        return
    rows: list[dict[str, Any]] = []
    for result in results:
        rows.append({"seed": result.seed, "training": result.name, "matrix": result.intervention})
        for name, c in result.comparisons.items():
            rows[-1] |= {
                f"{name}": f"{c.edited:.1%}",
                f"{name} against plain": in_points(c.gain, c.interval),
                f"{name} loss": f"{c.edited_loss:.3f}",
            }
        rows[-1]["beyond the rank"] = ", ".join(f"{share:.2%}" for share in result.residual_energy.values())
    TableOptions().print(rows, title="Rank constraint: in training, or LASER after it")
