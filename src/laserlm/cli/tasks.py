"""Commands on tasks: list them, show some of their examples, verify published results."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import DataOptions, Json, Listing, LoadOptions, print_json, with_options
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.tasks import Example, Scorer

app = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="List all tasks; show examples of one.")
COLUMNS = ("task", "about", "rows", "source", "licence", "scorer")
OTHERS = {
    "jsonl:FILE": ("your own questions", "", "yours", "yours", "answer or choice"),
    "perplexity:FILE": ("your own text", "", "yours", "yours", "perplexity"),
    "lm-eval:NAME": (
        "a task of lm-evaluation-harness, or one defined in --data FOLDER",
        "",
        "its own",
        "its own",
        "its own",
    ),
}
Shown = Annotated[str, typer.Argument(help="A task's name.")]


@app.callback()
@with_options(listing=Listing)
def tasks(context: typer.Context, listing: Listing) -> None:
    """List all tasks, with their size when all of their data is read, source, licence and scorer.

    Example: laser tasks --csv
    """
    from laserlm.tasks.definitions import DEFINITIONS

    if context.invoked_subcommand is not None:
        return
    rows: list[dict[str, Any]] = []
    for name, d in DEFINITIONS.items():
        source = d.hub.path if d.hub is not None else d.url or "comes with laserlm"
        rows.append(dict(zip(COLUMNS, (name, d.about, d.rows, source, d.licence, d.scorer), strict=True)))
    rows += [dict(zip(COLUMNS, (name, *values), strict=True)) for name, values in OTHERS.items()]
    listing.print(rows, "tasks")


@app.command()
@with_options(data=DataOptions, loading=LoadOptions)
def show(
    name: Shown,
    data: DataOptions,
    loading: LoadOptions,
    model: Annotated[str, typer.Option(help="The model whose tokens are shown.")] = "bundled",
    n: Annotated[int, typer.Option("-n", min=1, help="Number of examples.")] = 3,
    json: Json = False,
) -> None:
    """Print examples as a model gets them, each token of the answer in square brackets.

    Example: laser tasks show worldfacts
    """
    made = data.read(name)
    lm = loading.load_named(model)
    split = made.every.limit(n)
    rows = [{"id": e.id, "prompt": e.prompt, "answer": e.answer, "text": _marked(lm, e, split.scorer)} for e in split]
    if json:
        print_json({"task": name, "model": lm.name, "scorer": split.scorer, "source": made.source, "examples": rows})
        return
    print(f"{name}: {len(made.validation)} validation and {len(made.test)} test examples; {made.source}")
    print(f"scored by {split.scorer}, with the tokens of {lm.name}")
    for row in rows:
        print(f"\n{row['id']}\n{row['text']}")


def _marked(lm: LanguageModel, e: Example, scorer: Scorer) -> str:
    """Return the text that the model reads, with each token that is scored in brackets."""
    from laserlm.scoring.tokenize import encode

    tokenizer = lm.need_tokenizer()
    lines: list[str] = []
    for row in encode(lm, [e], scorer):
        scored = "".join(f"[{tokenizer.decode([t])}]" for t in row.targets)
        wrong = [tokenizer.decode([t]) for t in row.options if t not in row.targets]
        ids = row.decoder or row.ids
        before = tokenizer.decode(ids[: row.places[0] + (lm.kind != "masked")])
        after = tokenizer.decode(ids[row.places[-1] + 1 :]) if lm.kind == "masked" else ""
        read = f"{tokenizer.decode(row.ids)} => " if row.decoder else ""
        lines.append(read + before + scored + after + (f"   not {', '.join(f'[{w}]' for w in wrong)}" if wrong else ""))
    return "\n".join(lines)


@with_options(data=DataOptions, loading=LoadOptions)
def verify(
    model: Annotated[str, typer.Argument(help="A model with published results, such as gpt-j-6b.")],
    name: Annotated[str, typer.Argument(metavar="TASK", help="A task with published results, such as counterfact.")],
    data: DataOptions,
    loading: LoadOptions,
    weights: Annotated[str | None, typer.Option(help="Hub id or folder to load in place of the published model's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the test split.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the decompositions, which are random as published.")] = 0,
    json: Json = False,
) -> None:
    """Run what was published for a model on a task, and print ours beside it.

    Example: laser verify gpt-j-6b counterfact --data counterfact.json
    """
    from rich.console import Console
    from rich.table import Table

    from laserlm.errors import TaskError
    from laserlm.studies.published import CHECKPOINTS, published
    from laserlm.studies.published import compare_with_published as verify_

    rows = published(model, name)
    if not rows:
        known = ", ".join(dict.fromkeys(f"{r.model} {r.task}" for r in published()))
        raise TaskError(f"no published result of {model!r} on {name!r} can be run; there are {known}")
    made = replace(data, split_by=data.split_by or "paper").read(name)
    hub, dtype = CHECKPOINTS[model]
    lm = replace(loading, dtype=loading.dtype or dtype).load_named(weights or hub)
    with bar(f"verifying {len(rows)} of {model} on {name}") as advance:
        found = verify_(
            lm,
            made,
            rows,
            limit=limit,
            batch_size=data.batch_size,
            seed=seed,
            on_progress=lambda done, total: advance(done, total, ""),
        )
    if json:
        print_json(
            [
                {"published": asdict(v.row), "base": v.base.as_dict(), "edited": v.edited.as_dict()}
                | {"accuracies": v.accuracies, "losses": v.losses, "settings": v.settings}
                for v in found
            ]
        )
        return
    for v in found:
        table = Table("", "published", "ours", "difference", title=f"{name}, {v.row.intervention}", title_justify="left")
        theirs = (v.row.base, v.row.edited, v.row.base_loss, v.row.edited_loss)
        labels = (f"base {v.row.metric}", f"LASER {v.row.metric}", "base loss", "LASER loss")
        for label, a, b in zip(labels, theirs, (*v.accuracies, *v.losses), strict=True):
            table.add_row(label, "" if a is None else f"{a:g}", f"{b:.3f}", "" if a is None else f"{b - a:+.3f}")
        Console().print(table)
        print(f"Published in: {v.row.source} ({v.row.method})")
    print("What is known to move these figures:")
    for setting in found[-1].settings:
        print(f"  - {setting}")
