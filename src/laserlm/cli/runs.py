"""Commands on the results database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, Listing, Store, print_json, with_options

app = typer.Typer(no_args_is_help=True, help="List, show, export and delete runs of the results database.")
RunId = Annotated[str, typer.Argument(help="The run's id, the start of it, or 'last'.")]


@app.command("list")
@with_options(listing=Listing)
def list_(listing: Listing, store: Store = STORE_DEFAULT) -> None:
    """List all runs, newest first.

    Example: laser runs list --csv
    """
    from laserlm.results import Store as Results

    with Results.open(store) as results:
        rows = [
            {
                "run": r.id,
                "kind": r.kind,
                "status": r.status,
                "model": r.model,
                "task": r.task,
                "trials": r.trials,
                "best": (r.outcome or {}).get("best", ""),
                "test_gain": (r.outcome or {}).get("test", {}).get("gain"),
                "created": r.created.isoformat(timespec="seconds"),
            }
            for r in results.runs()
        ]
    listing.print(rows, "runs")


@app.command()
@with_options(listing=Listing)
def show(
    run: RunId,
    listing: Listing,
    store: Store = STORE_DEFAULT,
    top: Annotated[int, typer.Option(min=1, help="Best trials shown.")] = 10,
) -> None:
    """Show what a run was asked, what it found, and its best trials.

    Example: laser runs show last
    """
    from laserlm.results import Store as Results
    from laserlm.scoring.statistics import wilson

    with Results.open(store) as results:
        info = results.find(run)
        trials = results.trials(info.id)
    if listing.json:
        shown: dict[str, Any] = asdict(info) | {
            "created": info.created.isoformat(),
            "updated": info.updated.isoformat(),
        }
        print_json(shown | {"trials": [asdict(t) for t in trials]})
        return
    if not listing.csv:
        print(f"run {info.id} ({info.kind}, {info.status}) of {info.model} on {info.task}, {info.trials} trials")
        for key in ("grid", "metric", "scorer", "strategy"):
            if key in info.settings:
                print(f"  {key}: {info.settings[key]}")
        if info.outcome:
            print(f"  best: {info.outcome['best'] or 'the unchanged model'}")
        if info.reason:
            print(f"  failed: {info.reason}")
    by_loss = info.settings.get("metric") == "loss"
    done = sorted(
        (t for t in trials if t.status == "done"),
        # A race leaves some with few examples, whose figures say little.
        key=lambda t: (t.split != "validation", -(t.n or 0), (t.loss or 0) if by_loss else -(t.accuracy or 0), t.loss or 0),
    )
    rows = []
    for t in done[:top] if not listing.csv else done:
        low, high = wilson(round((t.accuracy or 0) * (t.n or 1)), t.n or 1)
        rows.append(
            {"split": t.split, "intervention": t.intervention or "base", "n": t.n, "accuracy": t.accuracy}
            | {"low": low, "high": high, "loss": t.loss, "seconds": t.seconds}
        )
    listing.print(rows, "trials")


@app.command()
def export(
    run: RunId,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of stdout.")] = None,
    store: Store = STORE_DEFAULT,
) -> None:
    """Write everything of a run as JSON, per-example scores included.

    Example: laser runs export last --out run.json
    """
    import json

    from laserlm.results import Store as Results

    with Results.open(store) as results:
        content = results.export(results.find(run).id)
    if out is None:
        print_json(content)
    else:
        out.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


@app.command()
def delete(
    run: RunId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Delete a run with all its trials and scores.

    Example: laser runs delete 3f2a90b1c4d7 --yes
    """
    from laserlm.results import Store as Results

    with Results.open(store) as results:
        info = results.find(run)
        if not yes:
            typer.confirm(f"Delete run {info.id} of {info.model} on {info.task} with its {info.trials} trials?", abort=True)
        results.delete(info.id)
    if json:
        print_json({"deleted": info.id})
    else:
        print(f"deleted {info.id}")
