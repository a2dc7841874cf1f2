"""Commands on the results database."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, Overwrite, Store, TableOptions, print_json, with_options
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.store import RunInfo, TrialInfo
    from laserlm.studies.loss_map import LossAtRank, LossMap

app = typer.Typer(no_args_is_help=True, help="List, show, export and delete runs of the results database.")
RunId = Annotated[str, typer.Argument(help="The run's id, the start of it, or 'last'.")]


@app.command("list")
@with_options(listing=TableOptions)
def list_(listing: TableOptions, store: Store = STORE_DEFAULT) -> None:
    """List all runs, newest first.

    Example: laser runs list --csv
    """
    from laserlm.store import Store as Results

    raw = listing.json or listing.csv
    with Results.open(store, create=False) as results:
        rows = [
            {
                "run": r.id,
                "kind": r.kind,
                "status": r.status,
                "model": r.model,
                "task": r.task,
                "trials": r.trials,
                "best": (r.outcome or {}).get("best", ""),
                **_gain_and_harm(r, raw=raw),
                "created": r.created.isoformat(timespec="seconds") if raw else f"{r.created:%Y-%m-%d %H:%M}",
            }
            for r in results.runs()
        ]
    listing.print(rows, "runs")


def _gain_and_harm(run: RunInfo, *, raw: bool) -> dict[str, Any]:
    """Return gain and largest harm of a search's choice: numbers, or texts with intervals for a table."""
    outcome = run.outcome or {}
    test = outcome.get("test", {})
    harm: dict[str, Any] = max(outcome.get("harms", ()), key=lambda harm: harm["ratio"], default={})
    if raw:
        return {
            "test_gain": test.get("gain"),
            "test_interval": test.get("interval"),
            "harm": harm.get("ratio"),
            "harm_interval": harm.get("interval"),
        }
    gain = ""
    if "gain" in test and run.settings.get("scorer") != "perplexity":
        ends = [f"{100 * end:+.1f}" for end in test.get("interval", ())]  # of a run of an older version there may be none
        gain = f"{100 * test['gain']:+.1f}" + (f" [{', '.join(ends)}]" if ends else "")
    return {
        "gain, points": gain,
        "harm": "x{:.3f} [{:.3f}, {:.3f}]".format(harm["ratio"], *harm["interval"]) if harm else "",
    }


@app.command()
@with_options(listing=TableOptions)
def show(
    run: RunId,
    listing: TableOptions,
    store: Store = STORE_DEFAULT,
    top: Annotated[int, typer.Option(min=1, help="Best trials shown.")] = 10,
    config: Annotated[
        bool, typer.Option("--config", help="Print the configuration as YAML for 'laser search --config'.")
    ] = False,
) -> None:
    """Show the settings of a run, its result and its best trials.

    Example: laser runs show last
    """
    from laserlm.searching.hardware import describe
    from laserlm.store import Store as Results
    from laserlm.studies.loss_map import LossMap

    with Results.open(store, create=False) as results:
        info = results.find(run)
        notes = results.notes(info.id)
        if config:
            _print_configuration(info, notes)
            return
        trials = results.trials(info.id)
        computed_on = notes.get("computed_on", [])
        loss_map = LossMap() if listing.json or listing.csv else LossMap.read_or_empty(results, info)
    if listing.json:
        dates = {"created": info.created.isoformat(), "updated": info.updated.isoformat()}
        print_json(asdict(info) | dates | {"computed_on": computed_on, "trials": [asdict(t) for t in trials]})
        return
    if not listing.csv:
        _print_run(info)
        for hardware in computed_on:
            print(f"  computed on: {describe(hardware)}")
    if loss_map:
        _print_map(loss_map)
    done = _in_order([t for t in trials if t.status == "done"], info.settings)
    generates = _generates(info.settings)
    rows = [_trial_row(t, generates=generates) for t in (done if listing.csv else done[:top])]
    listing.print(rows if listing.csv else [_as_text(row, info.settings) for row in rows], "trials")


def _print_configuration(info: RunInfo, notes: dict[str, Any]) -> None:
    from laserlm.cli.config_file import configuration_yaml
    from laserlm.errors import StoreError

    if "options" not in notes:
        reason = "'laser search' did not start it" if info.kind == "search" else f"it is a run of kind {info.kind}"
        raise StoreError(f"run {info.id} keeps no configuration: {reason}; 'laser runs show {info.id} --json' has its settings")
    print(configuration_yaml(notes["options"]), end="")


def _generates(settings: dict[str, Any]) -> bool:
    """Return whether a run's scorer grades text that the model writes. Its candidates are then ranked without writing."""
    from laserlm.scoring.scorers import GENERATING

    return settings.get("scorer") in GENERATING


def _in_order(trials: list[TrialInfo], settings: dict[str, Any]) -> list[TrialInfo]:
    """Return trials with those first that decided the choice, the best of a split first."""
    splits = ("finalists", "test", "validation") if _generates(settings) else ("validation", "test")

    def rank(t: TrialInfo) -> tuple[float, ...]:
        split = splits.index(t.split) if t.split in splits else len(splits)
        by_loss = settings.get("metric") == "loss" or (split == 2 and len(splits) == 3)
        # A race scores the candidates that it drops on few examples; their scores say little.
        return split, -(t.n or 0), (t.loss or 0) if by_loss else -(t.accuracy or 0), t.loss or 0

    return sorted(trials, key=rank)


def _print_run(info: RunInfo) -> None:
    print(f"run {info.id} ({info.kind}, {info.status}) of {info.full_model} on {info.task}, {info.trials} trials")
    for key in ("grid", "metric", "scorer", "strategy"):
        if key in info.settings:
            print(f"  {key}: {info.settings[key]}")
    if info.outcome:
        print(f"  best: {short_form(info.outcome.get('best') or 'the unchanged model')}")
    if phases := (info.outcome or {}).get("phases"):
        print(f"  seconds: {', '.join(f'{phase} {seconds:.1f}' for phase, seconds in phases.items())}")
    if info.reason:
        print(f"  failed: {info.reason}")
    if info.kind == "search" and info.outcome:
        _print_gain_and_harm(info.outcome, info.settings)


def _print_gain_and_harm(outcome: dict[str, Any], settings: dict[str, Any]) -> None:
    from laserlm.cli.print_search import print_pareto
    from laserlm.scoring.statistics import in_points
    from laserlm.searching import SearchResult

    try:
        result = SearchResult.from_dict(outcome | {"settings": settings})
    except (KeyError, TypeError):  # of an older version, which kept less
        return
    c, is_perplexity = result.test, settings.get("scorer") == "perplexity"
    if not is_perplexity:
        print(f"  accuracy on test{_by(settings)}: {c.base:.1%} to {c.edited:.1%}, {in_points(c.gain, c.interval)}")
    low, high = c.loss_interval
    print(f"  change of loss on test: {c.edited_loss - c.base_loss:+.3f} [{low:+.3f}, {high:+.3f}]")
    for sentence in result.harm_sentences():
        print(f"  {sentence}")
    print_pareto(result, is_perplexity=is_perplexity)


def _trial_row(t: TrialInfo, *, generates: bool) -> dict[str, Any]:
    """Return a trial as a row. Texts have no accuracy, nor has ``validation`` if the scorer grades what the model writes."""
    from laserlm.scoring.statistics import wilson

    row: dict[str, Any] = {"split": t.split, "intervention": t.intervention or "base", "n": t.n}
    if t.scorer == "perplexity" or (generates and t.split == "validation"):
        return row | {"accuracy": None, "low": None, "high": None, "loss": t.loss, "seconds": t.seconds}
    low, high = wilson(round((t.accuracy or 0) * (t.n or 1)), t.n or 1)
    return row | {"accuracy": t.accuracy, "low": low, "high": high, "loss": t.loss, "seconds": t.seconds}


def _as_text(row: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a row for a table: accuracy with its interval in percent, loss in nats per token."""
    interval = "" if row["low"] is None else f" [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    return {
        **{name: row[name] for name in ("split", "intervention", "n")},
        f"accuracy{_by(settings)}": "" if row["accuracy"] is None else f"{row['accuracy']:.1%}{interval}",
        "loss": "" if row["loss"] is None else f"{row['loss']:.3f}",
        "seconds": "" if row["seconds"] is None else f"{row['seconds']:.1f}",
    }


def _by(settings: dict[str, Any]) -> str:
    """Return what an accuracy is by, where text that the model writes is graded."""
    return f" by {settings['scorer']}" if _generates(settings) else ""


SHADES = "░▒▓█"


def _print_map(loss_map: LossMap) -> None:
    """Print the lowest change of loss of each matrix as a shade: one row for each name, one column for each block."""
    from rich.console import Console
    from rich.text import Text

    best = {(m.stack, m.name, m.layer): m for m in loss_map.lowest()}
    most = max(-m.loss_change.value for m in best.values())
    console = Console()
    for stack in dict.fromkeys(m.stack for m in loss_map):
        last = max(m.layer for m in loss_map if m.stack == stack)
        names = [name for of_stack, name in loss_map.matrices if of_stack == stack]
        width = max(map(len, names)) + 1
        console.print(f"change of loss by matrix and block{f' of {stack}' if stack else ''}, the lowest of the sizes")
        console.print(" " * width + "".join(f"{layer:<5}" for layer in range(0, last + 1, 5)), highlight=False)
        for name in names:
            line = Text(f"{name:<{width}}")
            for layer in range(last + 1):
                line.append(*_shade(best.get((stack, name, layer)), most))
            console.print(line)
    console.print(
        Text(f"{SHADES} lower by up to {max(most, 0):.3f} nats per token; + higher; . not scored; unsure ones are dim"),
        highlight=False,
    )


def _shade(m: LossAtRank | None, most: float) -> tuple[str, str]:
    """Return the character of a cell and its style. The cell is dim if its interval holds zero."""
    if m is None:
        return ".", "dim"
    low, high = m.loss_change.interval
    style = "dim" if low <= 0 <= high else "bold blue" if high < 0 else "yellow"
    if m.loss_change.value >= 0:
        return "+", style
    return SHADES[min(len(SHADES) - 1, int(len(SHADES) * -m.loss_change.value / most))], style


@app.command()
def export(
    run: RunId,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of stdout.")] = None,
    overwrite: Overwrite = False,
    store: Store = STORE_DEFAULT,
) -> None:
    """Write everything of a run as JSON, per-example scores included.

    Example: laser runs export last --out run.json
    """
    import json

    from laserlm.paths import atomic_file, check_new_file
    from laserlm.store import Store as Results

    if out is not None:
        start = b'{\n  "id": "'
        check_new_file(out, kind="an exported run", is_ours=lambda content: content.startswith(start), overwrite=overwrite)
    with Results.open(store, create=False) as results:
        content = results.export(results.find(run).id)
    if out is None:
        print_json(content)
        return
    with atomic_file(out) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


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
    from laserlm.store import Store as Results

    with Results.open(store, create=False) as results:
        info = results.find(run)
        if not yes:
            typer.confirm(f"Delete run {info.id} of {info.model} on {info.task} with its {info.trials} trials?", abort=True)
        results.delete(info.id)
    if json:
        print_json({"deleted": info.id})
    else:
        print(f"deleted {info.id}")
