"""Commands on tasks: list them, show examples, compare with published results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import DataOptions, Json, LoadOptions, TableOptions, print_json, with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.tasks import Example, Scorer

app = typer.Typer(no_args_is_help=False, invoke_without_command=True, help="List all tasks; show examples of one.")
COLUMNS = ("task", "about", "rows", "source", "licence", "scorer")
REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no character."""
FILE_TASKS = {
    "FILE": ("your own questions: CSV, TSV, JSON, JSON lines or Parquet", "", "yours", "yours", "answer or choice"),
    "hub:ORG/NAME": ("questions of a data set on the hub", "", "its own", "its own", "answer or choice"),
    "perplexity:FILE": ("your own text", "", "yours", "yours", "perplexity"),
    "lm-eval:NAME": (
        "a task of lm-evaluation-harness, or one defined in --data FOLDER",
        "",
        "its own",
        "its own",
        "its own",
    ),
}


@app.callback()
@with_options(listing=TableOptions)
def tasks(context: typer.Context, listing: TableOptions) -> None:
    """List all tasks with the size of their data, source, licence and scorer.

    Example: laser tasks --csv
    """
    from laserlm.tasks.definitions import DEFINITIONS

    if context.invoked_subcommand is not None:
        return
    rows: list[dict[str, Any]] = []
    for name, d in DEFINITIONS.items():
        source = d.hub.path if d.hub is not None else d.url or "comes with laserlm"
        rows.append(dict(zip(COLUMNS, (name, d.about, d.rows, source, d.licence, d.scorer), strict=True)))
    rows += [dict(zip(COLUMNS, (name, *values), strict=True)) for name, values in FILE_TASKS.items()]
    listing.print(rows, "tasks")


@app.command()
@with_options(data=DataOptions, loading=LoadOptions)
def show(
    name: Annotated[str, typer.Argument(help="Task to show.")],
    data: DataOptions,
    loading: LoadOptions,
    model: Annotated[str, typer.Option(help="Model whose tokens are shown.")] = "bundled",
    n: Annotated[int, typer.Option("-n", min=1, help="Number of examples.")] = 3,
    json: Json = False,
) -> None:
    """Print examples as a model reads them, each token of the answer in square brackets.

    Tokens that are parts of one character share one pair of brackets, which shows their number.

    Example: laser tasks show worldfacts
    """
    from laserlm.scoring.scorers import scorer_for

    task = data.load_task(name)
    lm = loading.load_named(model)
    split = replace(task.every.limit(n), scorer=scorer_for(lm.kind, task.every.scorer))
    data.announce(lm, split)
    rows = [{"id": e.id, "prompt": e.prompt, "answer": e.answer, "text": _marked(lm, e, split.scorer)} for e in split]
    if json:
        print_json({"task": name, "model": lm.name, "scorer": split.scorer, "source": task.source, "examples": rows})
        return
    print(f"{name}: {len(task.validation)} validation and {len(task.test)} test examples; {task.source}")
    print(f"scored by {split.scorer}, with the tokens of {lm.name}")
    for row in rows:
        print(f"\n{row['id']}\n{row['text']}")


def _marked(lm: LanguageModel, example: Example, scorer: Scorer) -> str:
    """Return the text that the model reads, with each token that is scored in brackets."""
    from laserlm.models.kinds import TEXT_KINDS
    from laserlm.scoring.tokenize import encode

    decode = lm.require_tokenizer().decode
    lines: list[str] = []
    rows = encode(lm, [example], scorer)
    if lm.kind in TEXT_KINDS:
        return "\n".join([*(str(decode(row.ids)) for row in rows), f"[{example.answer}]"])
    for row in rows:
        scored = "".join(_pieces(decode, row.targets))
        wrong = ", ".join(f"[{decode([t])}]" for t in row.choice_tokens if t not in row.targets)
        ids = row.decoder or row.ids
        before = decode(ids[: row.positions[0] + (lm.kind != "masked")])
        after = decode(ids[row.positions[-1] + 1 :]) if lm.kind == "masked" else ""
        encoded = f"{decode(row.ids)} => " if row.decoder else ""
        lines.append(encoded + before + scored + after + (f"   not {wrong}" if wrong else ""))
    return "\n".join(lines)


def _pieces(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> Iterator[str]:
    """Yield the text of each token in brackets. Tokens that are parts of one character share a pair, with their number."""
    part: list[int] = []
    for i, token in enumerate(tokens):
        part.append(token)
        text = decode(part)
        if REPLACEMENT not in text or i == len(tokens) - 1:
            yield f"[{text}]" if len(part) == 1 else f"[{text} ({len(part)} tokens)]"
            part = []


@with_options(data=DataOptions, loading=LoadOptions)
def verify(
    model: Annotated[str, typer.Argument(help="Model with published results, such as gpt-j-6b.")],
    name: Annotated[str, typer.Argument(metavar="TASK", help="Task with published results, such as counterfact.")],
    data: DataOptions,
    loading: LoadOptions,
    weights: Annotated[str | None, typer.Option(help="Hub id or folder to load instead.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of examples from the start of the test split.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the randomised decompositions.")] = 0,
    json: Json = False,
) -> None:
    """Check a published table: measure its model and task again, and print both figures. No saved folder is needed.

    Example: laser verify gpt-j-6b counterfact --data counterfact.json
    """
    from rich.console import Console
    from rich.table import Table

    from laserlm.errors import TaskError
    from laserlm.studies.published import CHECKPOINTS, compare_with_published, published

    rows = published(model, name)
    if not rows:
        known = ", ".join(dict.fromkeys(f"{r.model} {r.task}" for r in published()))
        raise TaskError(f"no published result of {model!r} on {name!r} can be run; there are {known}")
    task = replace(data, split_by=data.split_by or "paper").load_task(name)
    hub, dtype = CHECKPOINTS[model]
    lm = replace(loading, dtype=loading.dtype or dtype).load_named(weights or hub)
    with progress_bar(f"verifying {len(rows)} of {model} on {name}") as advance:
        checks = compare_with_published(lm, task, rows, limit=limit, batch_size=data.batch_size, seed=seed, on_progress=advance)
    if json:
        print_json(
            [
                {"published": asdict(check.row), "base": check.base.as_dict(), "edited": check.edited.as_dict()}
                | {"accuracies": check.accuracies, "losses": check.losses, "settings": check.settings}
                for check in checks
            ]
        )
        return
    for check in checks:
        row = check.row
        table = Table("", "published", "ours", "difference", title=f"{name}, {row.intervention}", title_justify="left")
        theirs = (row.base, row.edited, row.base_loss, row.edited_loss)
        labels = (f"base {row.metric}", f"LASER {row.metric}", "base loss", "LASER loss")
        for label, a, b in zip(labels, theirs, (*check.accuracies, *check.losses), strict=True):
            table.add_row(label, "" if a is None else f"{a:g}", f"{b:.3f}", "" if a is None else f"{b - a:+.3f}")
        Console().print(table)
        print(f"Published in: {row.source} ({row.method})")
    print("What is known to move these figures:")
    for setting in checks[-1].settings:
        print(f"  - {setting}")
