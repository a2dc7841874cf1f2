"""Write a search as one HTML file: settings, result, loss map, examples, side effects and next commands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from laserlm.errors import ReportError
from laserlm.paths import atomic_file, check_new_file
from laserlm.scoring.scorers import GENERATING
from laserlm.searching import SearchResult
from laserlm.store import RunInfo, Store
from laserlm.studies.estimates import Estimate
from laserlm.studies.flipping import Flips, flips
from laserlm.studies.loss_map import LossMap
from laserlm.studies.removed_components import stored_components
from laserlm.studies.side_effects import OnText, Transfer, on_text, transfer
from laserlm.web.flip_rows import flip_rows
from laserlm.web.pages import page, plot, plot_library
from laserlm.web.plots import COLOURS, harm_plot, map_plots, screen_plot
from laserlm.web.removed import removed_counts

EXAMPLES = 10
"""Number of corrected and of broken examples shown."""
TRIALS = 10
COMPONENTS = 12


@dataclass(frozen=True)
class SideEffects:
    """Stored side effects of an intervention.

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
    """Return the side effects of an intervention on the model of a run, as far as the database has them."""
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


def write_report(store: Store, run: str, out: Path, *, overwrite: bool = False) -> Path:
    """Write the report of a finished search to a file, which needs nothing else, and return its path.

    Args:
        store: the results database.
        run: the search's id, the start of one, or ``last``.
        out: the file.
        overwrite: whether to replace a report that is there.

    Raises:
        ReportError: if the search is not finished, or the file's folder is not there.
        WriteError: if the file exists and may not be replaced, or cannot be written.
        StoreError: if there is no such run.
    """
    info = store.find(run, kind="search")
    if info.outcome is None:
        raise ReportError(
            f"run {info.id} is {info.status}, and a report is of a finished search; finish it with the same command"
        )
    check_new_file(
        out,
        kind="a report",
        is_ours=lambda start: start.startswith(b"<!doctype html>") and b"laserlm" in start,
        overwrite=overwrite,
    )
    if not out.absolute().parent.is_dir():
        raise ReportError(f"no folder {out.absolute().parent} to write the report in; make it first")
    try:
        result = SearchResult.from_dict(info.outcome | {"run": info.id})
    except (KeyError, TypeError) as error:
        raise ReportError(
            f"run {info.id} was written by an older laserlm and lacks {error}; search again with --restart"
        ) from None
    text = _page(store, info, result)
    with atomic_file(out) as part:
        part.write_text(text, encoding="utf-8")
    return out


def _page(store: Store, info: RunInfo, result: SearchResult) -> str:
    best = str(result.best)
    loss_map = LossMap.read_or_empty(store, info)
    flipped = _flipped(store, info, best)
    screened = result.screened
    of_text = result.validation.n > 0 and info.settings.get("scorer") == "perplexity"
    figures = {}
    if len(result.points) > 1:
        figures["harm"] = plot(harm_plot(result, of_text=of_text), "harm")
    if screened is not None and screened.measured:
        figures["screen"] = plot(screen_plot(screened.expected, screened.measured), "screen")
    maps = [(name, plot(figure, f"map-{i}")) for i, (name, figure) in enumerate(map_plots(loss_map))] if loss_map else []
    changes = {"corrected": flipped.of("corrected"), "broken": flipped.of("broken")} if flipped else {}
    removed = removed_counts(result.best)
    return page(
        "report",
        info=info,
        result=result,
        best=best,
        of_text=of_text,
        by=f" by {info.settings['scorer']}" if info.settings.get("scorer") in GENERATING else "",
        verdict=result.verdict(),
        bound=math.exp(result.harm_bound) if math.isfinite(result.harm_bound) else None,
        parts=[str(r) for r in result.best.reductions],
        removed=removed,
        components=stored_components(store, info.settings["model_hash"], best)[:COMPONENTS] if removed else [],
        asked=_settings(info, ASKED),
        hashes=_settings(info, HASHES),
        library=plot_library() if figures or maps else "",
        figures=figures,
        maps=maps,
        colours=COLOURS,
        loss_map=loss_map,
        lowest=loss_map.table(loss_map.lowest()),
        top=sorted(loss_map, key=lambda m: m.loss_change.value)[:TRIALS],
        flips=flipped,
        examples=flip_rows({change: of[:EXAMPLES] for change, of in changes.items()}),
        effects=side_effects(store, info, best),
        commands=_commands(info, result),
        save=f"{result.save_command(info.model)} --point N --out FOLDER",
        versions=info.provenance.get("versions", {}),
    )


def _flipped(store: Store, info: RunInfo, best: str) -> Flips | None:
    base, reduced = (store.evaluation(info.id, "test", text) for text in ("", best))
    if not best or base is None or reduced is None or base.scorer == "perplexity":
        return None
    return flips(base, reduced, store.examples(info.id, "test"))


ASKED = {
    "model": "model",
    "adapter": "adapter whose update is reduced",
    "dtype": "dtype",
    "task": "task",
    "scorer": "an example is scored by",
    "grid": "grid",
    "strategy": "strategy",
    "metric": "chosen by",
    "budget": "minutes at most",
    "seed": "seed",
}
"""Settings that a report shows, and their titles."""
HASHES = {
    "model_hash": "sha256 of the weights",
    "validation": "sha256 of the validation examples",
    "test": "sha256 of the test examples",
}


def _settings(info: RunInfo, titles: dict[str, str]) -> dict[str, str]:
    return {title: str(info.settings[key]) for key, title in titles.items() if info.settings.get(key) is not None}


def _about_components(result: SearchResult) -> str:
    """Return what the study of components shows of a choice."""
    counts = removed_counts(result.best)
    if counts is None:
        return "what the removed part says"
    return f"what the {'changed' if counts.scaled else 'removed'} components read and write"


def _commands(info: RunInfo, result: SearchResult) -> list[str]:
    """Return the next commands."""
    commands = result.next_commands(info.model, "reduced")
    if result.best:
        commands += [
            (f"laser analyze side-effects {info.id} --text FILE --on TASK", "what else changes"),
            *([(f"laser analyze components {info.id}", _about_components(result))] if info.adapter is None else []),
            ("laser reproduce reduced", "makes it again and compares"),
        ]
    commands.append((f"laser runs show {info.id}", ""))
    return [f"{command}    # {comment}" if comment else command for command, comment in commands]
