"""A search as one HTML file: what was asked and found, where, at what cost, and how to go on."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from laserlm.errors import ReportError
from laserlm.paths import atomic_file
from laserlm.searching import SearchResult
from laserlm.store import RunInfo, Store
from laserlm.studies.estimates import Estimate
from laserlm.studies.flipping import Flips, flips
from laserlm.studies.rank_curve import LossAtRank, measured_of
from laserlm.studies.side_effects import OnText, Transfer, on_text, transfer
from laserlm.web.pages import page, plot, plot_library
from laserlm.web.plots import map_plot, screen_plot

__all__ = ["SideEffects", "side_effects", "write_report"]

EXAMPLES = 10
"""Corrected and broken examples shown, of each."""
TRIALS = 10


@dataclass(frozen=True)
class SideEffects:
    """What studies have recorded of an intervention beside its task.

    Args:
        divergences: mean divergence on neutral prompts, one for each set of prompts.
        texts: perplexities of general texts, by task.
        transfers: other tasks.
    """

    divergences: tuple[Estimate, ...]
    texts: tuple[tuple[str, OnText], ...]
    transfers: tuple[Transfer, ...]

    def __bool__(self) -> bool:
        return bool(self.divergences or self.texts or self.transfers)


def side_effects(store: Store, run: RunInfo, intervention: str) -> SideEffects:
    """Return what the database holds of an intervention on other tasks, of the model of a run."""
    divergences: list[Estimate] = []
    texts: list[tuple[str, OnText]] = []
    transfers: list[Transfer] = []
    same = [r for r in store.runs() if r.kind == "scores" and r.settings["model_hash"] == run.settings["model_hash"]]
    for other in same if intervention else []:
        divergences += [
            Estimate.mean(values)
            for name, values in store.notes(other.id).items()
            if name.startswith(f"divergence under {intervention} on ")
        ]
        if other.task == run.task:
            continue
        for split in dict.fromkeys(t.split for t in store.trials(other.id)):
            base, reduced = (store.evaluation(other.id, split, text) for text in ("", intervention))
            if base is None or reduced is None:
                continue
            if base.scorer == "perplexity":
                texts.append((other.task, on_text(base, reduced)))
            else:
                transfers.append(transfer(base, reduced, run.task))
    return SideEffects(tuple(divergences), tuple(texts), tuple(transfers))


def write_report(store: Store, run: str, out: Path) -> Path:
    """Write the report of a finished search to a file, which needs nothing else, and return its path.

    Args:
        store: the results database.
        run: the search's id, the start of one, or ``last``.
        out: the file.

    Raises:
        ReportError: if the search is not finished, or the file's folder is not there.
        StoreError: if there is no such run.
    """
    info = store.find(run, kind="search")
    if info.outcome is None:
        raise ReportError(
            f"run {info.id} is {info.status}, and a report is of a finished search; finish it with the same command"
        )
    if not out.absolute().parent.is_dir():
        raise ReportError(f"no folder {out.absolute().parent} to write the report in; make it first")
    try:
        found = SearchResult.from_dict(info.outcome)
    except (KeyError, TypeError) as error:
        raise ReportError(
            f"run {info.id} was written by an older laserlm and lacks {error}; search again with --restart"
        ) from None
    text = _page(store, info, found)
    with atomic_file(out) as part:
        part.write_text(text, encoding="utf-8")
    return out


def _page(store: Store, info: RunInfo, found: SearchResult) -> str:
    best = str(found.best)
    measured = measured_of(store, info)
    flipped = _flipped(store, info, best)
    screened = found.screened
    figures = {}
    if measured:
        figures["map"] = plot(map_plot(measured), "map")
    if screened is not None and screened.measured:
        figures["screen"] = plot(screen_plot(screened.expected, screened.measured), "screen")
    return page(
        "report",
        info=info,
        found=found,
        best=best,
        of_text=found.validation.n > 0 and info.settings.get("scorer") == "perplexity",
        verdict=found.verdict(),
        asked=_asked(info),
        library=plot_library() if figures else "",
        figures=figures,
        lowest=lowest(measured),
        top=sorted(measured, key=lambda m: m.loss_change.value)[:TRIALS],
        flips=flipped,
        examples=[(name, flipped.of(name)[:EXAMPLES]) for name in ("corrected", "broken")] if flipped else [],
        effects=side_effects(store, info, best),
        commands=_commands(info, best),
        versions=info.provenance.get("versions", {}),
    )


def _flipped(store: Store, info: RunInfo, best: str) -> Flips | None:
    base, reduced = (store.evaluation(info.id, "test", text) for text in ("", best))
    if not best or base is None or reduced is None or base.scorer == "perplexity":
        return None
    return flips(base, reduced, store.examples(info.id, "test"))


def lowest(measured: Sequence[LossAtRank]) -> tuple[list[str], list[tuple[str, list[LossAtRank | None]]]]:
    """Return the matrices, and for each block what has the lowest change of loss of each of them."""
    best: dict[tuple[str, int, str], LossAtRank] = {}
    for m in measured:
        key = (m.stack, m.layer, m.name)
        if key not in best or m.loss_change.value < best[key].loss_change.value:
            best[key] = m
    columns = list(dict.fromkeys((m.stack, m.name) for m in measured))
    rows = [
        (_label(stack, str(layer)), [best.get((stack, layer, name)) if of == stack else None for of, name in columns])
        for stack, layer in dict.fromkeys((m.stack, m.layer) for m in measured)
    ]
    return [_label(stack, name) for stack, name in columns], rows


def _label(stack: str, name: str) -> str:
    return f"{stack}.{name}" if stack else name


ASKED = {
    "model": "model",
    "model_hash": "sha256 of its weights",
    "dtype": "dtype",
    "task": "task",
    "scorer": "an example is scored by",
    "validation": "sha256 of the validation examples",
    "test": "sha256 of the test examples",
    "grid": "grid",
    "strategy": "strategy",
    "metric": "chosen by",
    "budget": "minutes at most",
    "seed": "seed",
}
"""Settings that a report shows, and what they are called there."""


def _asked(info: RunInfo) -> Mapping[str, str]:
    return {title: str(info.settings[key]) for key, title in ASKED.items() if info.settings.get(key) is not None}


def _commands(info: RunInfo, best: str) -> list[str]:
    """Return the commands that go on from here."""
    commands = [f"laser runs show {info.id}"]
    if best:
        commands += [
            shlex.join(["laser", "save", info.model, "--run", info.id, "--out", "reduced"]),
            "laser reproduce reduced    # makes it again and compares",
            f"laser analyze components {info.id}    # what the removed part says",
            f"laser analyze side-effects {info.id} --text FILE --on TASK    # what else changes",
        ]
    return commands
