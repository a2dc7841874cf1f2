"""What the searches of a results database found, to walk about in: the loss map, and what a candidate changed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from laserlm.errors import AnalysisError, ReportError
from laserlm.reductions import Size
from laserlm.store import RunInfo, Store
from laserlm.studies.flipping import Flip, Flips, flips
from laserlm.studies.rank_curve import LossAtRank, loss_map
from laserlm.web.pages import page

__all__ = [
    "LossMap",
    "candidates",
    "changes",
    "corrected",
    "grid",
    "grid_html",
    "measured",
    "name_of",
    "searches",
    "sizes",
    "summary",
    "text_of",
]

ORDER = ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_up", "fc_out")
"""Matrices as a block runs them; others come after these."""


@dataclass(frozen=True)
class LossMap:
    """Blocks by matrices.

    Args:
        columns: names of the matrices.
        rows: the name of each block and, for each column, what was measured there, or None.
        end: change of loss, in nats per token, at which the colours end on either side.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[LossAtRank | None, ...]], ...]
    end: float

    def colour(self, change: float) -> str:
        """Return the colour of a change of loss: blue where it falls, orange where it rises, none where it stays."""
        share = max(-1.0, min(1.0, change / self.end))
        hue, light = (205, 62) if share < 0 else (28, 60)
        return f"hsl({hue} 80% {100 - (100 - light) * abs(share):.0f}%)"


def searches(store: Store) -> list[RunInfo]:
    """Return the searches of a results database, the newest first."""
    return [run for run in store.runs() if run.kind == "search"]


def name_of(run: RunInfo) -> str:
    """Return what a search is called in a list."""
    best = (run.outcome or {}).get("best")
    found = run.status if best is None else best or "the unchanged model"
    return f"{run.id}: {run.model} on {run.task}, {run.created:%Y-%m-%d}, {found}"


def measured(store: Store, run: str) -> list[LossAtRank]:
    """Return what a search measured on validation of each single matrix and size; of a race, on as many examples as it got to.

    Args:
        store: the results database.
        run: the search's id.

    Raises:
        ReportError: if the unchanged model was not scored yet, or no reduction of a single matrix was.
        StoreError: if there is no such run.
    """
    done = {t.intervention for t in store.trials(run) if t.split == "validation" and t.status == "done"}
    trials = {text: found for text, found in store.evaluations(run, "validation").items() if text in done}
    base = trials.pop("", None)
    if base is None:
        raise ReportError(f"run {run} has not scored the unchanged model yet; go on with the same 'laser search'")
    try:
        return loss_map(base, trials)
    except AnalysisError as error:
        raise ReportError(f"run {run}: {error}") from None


def text_of(found: LossAtRank) -> str:
    """Return the canonical text of a reduction on the map."""
    return f"{found.matrix}@{found.size}"


def sizes(found: Sequence[LossAtRank]) -> list[str]:
    """Return the sizes on a map: kept fractions, then ranks, rising."""

    def order(text: str) -> tuple[bool, Decimal | int, str]:
        number, _, options = text.partition(":")
        size = Size.parse(number)
        return (False, size.rho, options) if size.rho is not None else (True, size.rank or 0, options)

    return sorted({m.size for m in found}, key=order)


def grid(found: Sequence[LossAtRank], size: str = "") -> LossMap:
    """Arrange what was measured in blocks by matrices.

    The colours end at the largest fall of the loss, or at the median rise where that is more, so that what breaks the model
    does not drown the rest.

    Args:
        found: of one search.
        size: the one to show; empty takes, of every matrix, the size at which the loss is lowest.

    Raises:
        ReportError: if nothing was measured at this size.
    """
    best: dict[tuple[str, int, str], LossAtRank] = {}
    for m in found:
        key = (m.stack, m.layer, m.name)
        if size in ("", m.size) and (key not in best or m.loss_change.value < best[key].loss_change.value):
            best[key] = m
    if not best:
        raise ReportError(f"the search measured nothing at size {size!r}; it has {', '.join(sizes(found))}")
    columns = sorted({(m.stack, m.name) for m in found}, key=_place)
    blocks = list(dict.fromkeys((m.stack, m.layer) for m in found))
    rises = sorted(m.loss_change.value for m in best.values() if m.loss_change.value > 0)
    falls = [-m.loss_change.value for m in best.values() if m.loss_change.value < 0]
    return LossMap(
        columns=tuple(f"{stack}.{name}" if stack else name for stack, name in columns),
        rows=tuple(
            (
                f"{stack}.{layer}" if stack else str(layer),
                tuple(best.get((stack, layer, name)) if of == stack else None for of, name in columns),
            )
            for stack, layer in blocks
        ),
        end=max([*falls, rises[len(rises) // 2] if rises else 0.0, 1e-6]),
    )


def grid_html(shown: LossMap) -> str:
    """Return a map as a table of buttons, which hold the text of their reduction; all that is data is escaped."""
    most = max(m.loss_change.n for _, row in shown.rows for m in row if m is not None)
    return page("app_map", map=shown, most=most, text_of=text_of)


def changes(store: Store, run: str, candidate: str, split: str = "validation") -> Flips:
    """Return what a candidate of a search corrects and breaks, against the unchanged model on the same examples.

    Args:
        store: the results database.
        run: the search's id.
        candidate: canonical text.
        split: one that the candidate was scored on.

    Raises:
        ReportError: if the search has no scores of it, or none of the unchanged model.
        StoreError: if there is no such run.
    """
    base, edited = (store.evaluation(run, split, text) for text in ("", candidate))
    if base is None or edited is None or not candidate:
        missing = repr(candidate) if base is not None else "the unchanged model"
        raise ReportError(f"run {run} has no scores of {missing} on {split}; see 'laser runs show {run}'")
    examples = store.examples(run, split)
    return flips(replace(base, scores=base.scores[: edited.n]), edited, examples[: edited.n])


def candidates(store: Store, run: str) -> list[str]:
    """Return all that a search scored on validation, those of the map among them, in the order they were scored."""
    return [t.intervention for t in store.trials(run) if t.split == "validation" and t.status == "done" and t.intervention]


def corrected(store: Store, run: RunInfo) -> list[Flip]:
    """Return the test examples that a finished search's best corrects and that have a prompt."""
    best = (run.outcome or {}).get("best")
    return [flip for flip in changes(store, run.id, best, "test").of("corrected") if flip.prompt] if best else []


def summary(found: Flips) -> Mapping[str, str]:
    """Return the figures of a candidate as text, by name."""
    c = found.comparison
    low, high = c.loss_interval
    interval = f", 95 % interval {low:+.4f} to {high:+.4f}" if math.isfinite(low) else " (a single example)"
    return {
        "examples": f"{c.n} of {c.split}" + (", which the search chose by" if c.split == "validation" else ""),
        "accuracy": f"{c.base:.1%} before, {c.edited:.1%} after",
        "gain": f"{100 * c.gain:+.1f} points, 95 % interval {100 * c.interval.low:+.1f} to {100 * c.interval.high:+.1f}",
        "change of loss": f"{c.edited_loss - c.base_loss:+.4f} nats per token{interval}",
        "corrected and broken": f"{c.corrected} and {c.broken}, McNemar p {c.mcnemar_p:.2g}",
    }


def _place(column: tuple[str, str]) -> tuple[str, int, str]:
    stack, name = column
    return stack, ORDER.index(name) if name in ORDER else len(ORDER), name
