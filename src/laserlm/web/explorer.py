"""Read the searches of a results database for the app: the loss map, and the examples that a candidate changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from laserlm.errors import AnalysisError, ReportError
from laserlm.reductions import short_form
from laserlm.scoring.scorers import GENERATING
from laserlm.scoring.statistics import in_points
from laserlm.searching.driver import FINALISTS, VALIDATION
from laserlm.store import RunInfo, Store
from laserlm.studies.flipping import Flip, Flips, flips
from laserlm.studies.loss_map import LossMap, LossTable
from laserlm.web.pages import page


def searches(store: Store) -> list[RunInfo]:
    """Return the searches of a results database, the newest first."""
    return [run for run in store.runs() if run.kind == "search"]


def name_of(run: RunInfo) -> str:
    """Return the name of a search in a list."""
    best = (run.outcome or {}).get("best")
    result = run.status if best is None else short_form(best) or "the unchanged model"
    return f"{run.id}: {run.full_model} on {run.task}, {run.created:%Y-%m-%d}, {result}"


def last_change(store: Store, run: str) -> datetime:
    """Return when the scores of a search, or the harm that was measured after it, changed last.

    Raises:
        StoreError: if there is no such run.
    """
    return max([store.find(run).updated, *(r.updated for r in store.runs() if r.settings.get("harm_of") == run)])


def loss_map(store: Store, run: str) -> LossMap:
    """Return the loss map of a search.

    Raises:
        ReportError: if the unchanged model has no scores yet, or no reduction of a single matrix has.
        StoreError: if there is no such run.
    """
    try:
        return LossMap.read(store, run)
    except AnalysisError as error:
        raise ReportError(str(error)) from None


def table(loss_map: LossMap, size: str = "", *, by_harm: bool = False) -> LossTable:
    """Return a loss map as blocks by matrices.

    Args:
        loss_map: of one search.
        size: the size to show; empty takes, for every matrix, the size with the lowest loss.
        by_harm: whether to show only cells whose harm was measured; there may be none.

    Raises:
        ReportError: if the search scored nothing at this size.
    """
    if by_harm:
        measured = loss_map.with_harm()
        return loss_map.table(measured.at(size) if size else measured.lowest())
    shown = loss_map.at(size) if size else loss_map.lowest()
    if not shown:
        raise ReportError(f"the search measured nothing at size {size!r}; it has {', '.join(loss_map.sizes)}")
    return loss_map.table(shown)


def colour(change: float, limit: float) -> str:
    """Return the colour of a change of loss: blue where the loss falls, orange where it rises, white where it stays."""
    share = max(-1.0, min(1.0, change / limit))
    hue, light = (205, 62) if share < 0 else (28, 60)
    return f"hsl({hue} 80% {100 - (100 - light) * abs(share):.0f}%)"


def table_html(table: LossTable, *, by_harm: bool = False, measured: str = "") -> str:
    """Return a table of buttons, which hold the text of their reduction. All data is escaped.

    Args:
        table: the cells.
        by_harm: whether the harm is shown and not the change of loss.
        measured: of how many reductions the harm is measured, as ``3 of 40``.
    """
    shown = LossMap(tuple(table.cells))
    limit = shown.harm_limit if by_harm else shown.colour_limit
    most = max((m.loss_change.n for m in table.cells), default=0)
    return page(
        "app_map", map=table, most=most, colour=lambda change: colour(change, limit), by_harm=by_harm, measured=measured
    )


def measured(loss_map: LossMap) -> str:
    """Return of how many reductions of a map the harm is measured."""
    return f"{len(loss_map.with_harm()):,} of {len(loss_map):,}"


def changes(store: Store, run: str, candidate: str, split: str = "") -> Flips:
    """Compare a candidate of a search with the unchanged model on the same examples.

    Args:
        store: the results database.
        run: the search's id.
        candidate: canonical text of the candidate.
        split: a split that the candidate was scored on. Empty: where the search graded what the model writes for it, else
            validation.

    Raises:
        ReportError: if the search has no scores of it, or none of the unchanged model.
        StoreError: if there is no such run.
    """
    splits = [split] if split else [FINALISTS, VALIDATION]
    pairs = {name: [store.evaluation(run, name, text) for text in ("", candidate)] for name in splits}
    name = next((name for name, pair in pairs.items() if None not in pair), splits[-1])
    base, edited = pairs[name]
    if base is None or edited is None or not candidate:
        missing = repr(short_form(candidate)) if base is not None else "the unchanged model"
        raise ReportError(f"run {run} has no scores of {missing} on {name}; see 'laser runs show {run}'")
    examples = store.examples(run, name)
    return flips(replace(base, scores=base.scores[: edited.n]), edited, examples[: edited.n])


def candidates(store: Store, run: str) -> list[str]:
    """Return the candidates that a search scored on validation, in the order of scoring."""
    return [t.intervention for t in store.trials(run) if t.split == "validation" and t.status == "done" and t.intervention]


def corrected(store: Store, run: RunInfo) -> list[Flip]:
    """Return the test examples with a prompt that the best candidate of a finished search corrects."""
    best = (run.outcome or {}).get("best")
    return [flip for flip in changes(store, run.id, best, "test").of("corrected") if flip.prompt] if best else []


def summary(result: Flips, scorer: str = "answer") -> Mapping[str, str]:
    """Return the figures of a candidate as text, by name.

    Args:
        result: of ``changes``.
        scorer: what the search grades by. Where it grades what the model writes, only finalists have an accuracy.
    """
    c = result.comparison
    low, high = c.loss_interval
    interval = f", 95 % interval {low:+.4f} to {high:+.4f}" if math.isfinite(low) else " (a single example)"
    split = VALIDATION if c.split == FINALISTS else c.split
    values = {
        "examples": f"{c.n} of {split}{f', {c.facts} facts' if c.size != str(c.n) else ''}"
        + (", which the search chose by" if split == VALIDATION else ""),
        "accuracy": f"{c.base:.1%} before, {c.edited:.1%} after",
        "gain": in_points(c.gain, c.interval),
        "change of loss": f"{c.edited_loss - c.base_loss:+.4f} nats per token{interval}",
        "corrected and broken": f"{c.corrected} and {c.broken}, exact p {c.mcnemar_p:.2g}",
    }
    if scorer not in GENERATING:
        return values
    if c.split == VALIDATION:  # the likeliest token at each place of the answer was compared, and nothing was written
        return {name: values[name] for name in ("examples", "change of loss")} | {
            f"accuracy by {scorer}": "not measured: the model writes for finalists only; below is the likeliest token by token"
        }
    return {f"{name} by {scorer}" if name == "accuracy" else name: value for name, value in values.items()}
