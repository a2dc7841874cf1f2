"""Commands that study a model, a reduction and what it changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import (
    STORE_DEFAULT,
    Json,
    Listing,
    LoadOptions,
    Store,
    TaskOptions,
    print_json,
    with_options,
)
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.analysis.flipping import Flips
    from laserlm.models import LanguageModel
    from laserlm.results import Store as Results
    from laserlm.scoring.records import Evaluation
    from laserlm.tasks import Example

app = typer.Typer(no_args_is_help=True, help="Study a model, a reduction, and what it changed.")
Figure = Annotated[Path | None, typer.Option(help="Also draw it: .html (self-contained), .png or .svg (with a browser).")]


@app.command()
@with_options(listing=Listing)
def matrices(
    listing: Listing,
    model: Annotated[str, typer.Argument(help="Hub id, local folder with safetensors, or 'bundled'.")],
    types: Annotated[list[str] | None, typer.Option("--type", help="Only this type or name; may be repeated.")] = None,
    thresholds: Annotated[
        str, typer.Option(help="Magnitudes below which an entry counts as zero in the shared-subspace share, by commas.")
    ] = "0.03,0.06,0.12",
    side: Annotated[str, typer.Option(help="Singular vectors that layers share: right (inputs) or left (outputs).")] = "right",
    run: Annotated[str | None, typer.Option(help="Correlate every metric with the gains that this search measured.")] = None,
    figure: Figure = None,
    metric: Annotated[str, typer.Option(help="Metric of the figure.")] = "effective_rank",
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")] = None,
    allow_remote_code: Annotated[bool, typer.Option("--allow-remote-code", help="Run code that comes with the model.")] = False,
    cache: Annotated[Path | None, typer.Option(envvar="LASER_CACHE", help="Folder with the converted bundled model.")] = None,
    store: Store = STORE_DEFAULT,
) -> None:
    """Measure the spectrum of every matrix: ranks, energy, noise, what layers share. The model is not built.

    Matrices are read one at a time, so that the memory is that of two of them.

    Example: laser analyze matrices bundled --type fc_up
    """
    from laserlm.analysis import best_of_each, correlations, gains, matrix_metrics
    from laserlm.analysis.figures import matrices_figure, write_figure
    from laserlm.errors import AnalysisError
    from laserlm.models.stored import open_stored
    from laserlm.results import Store as Results

    source = open_stored(model, revision=revision, cache=cache, allow_remote_code=allow_remote_code)
    measured: dict[str, float] = {}
    screen: dict[str, float] = {}
    if run is not None:
        with Results.open(store) as results:
            info = results.find(run)
            trials = results.evaluations(info.id, "validation")
        if "" not in trials:
            raise AnalysisError(f"run {info.id} has not scored the unchanged model yet; finish it with the same 'laser search'")
        measured = gains(trials.pop(""), trials)
        screened = (info.outcome or {}).get("screened") or {}
        screen = best_of_each({text: -change for text, change in screened.get("expected", {}).items()})
    found = []
    given: dict[str, Any] = {"side": side}
    with bar("decomposing", unit="matrices") as advance:
        total = len(source.matrices)
        for one in matrix_metrics(source, types=types or (), thresholds=[float(t) for t in thresholds.split(",")], **given):
            found.append(one)
            advance(len(found), total)
    if figure is not None:
        write_figure(matrices_figure(found, metric), figure)
    rows = [m.as_dict() for m in found]
    if not listing.json:
        for row in rows:
            for name in ("nuclear", "energy", "shared"):
                row |= {f"{name}@{key}": value for key, value in row.pop(name).items()}
        keys = list(dict.fromkeys(key for row in rows for key in row))
        rows = [{key: row.get(key) for key in keys} for row in rows]
    if not measured:
        listing.print(rows, f"matrices of {model}")
        return
    tables = [
        {"metric": c.metric, "spearman": c.rho, "low": c.low, "high": c.high, "matrices": c.n}
        for c in correlations(found, measured, screen=screen)
    ]
    if listing.json:
        print_json({"matrices": rows, "correlations": tables})
    else:
        listing.print(tables, f"metrics of {model} and the gain that run {run} measured")


What = Annotated[str, typer.Argument(help="A search's run (an id, the start of one, or 'last'), or a model.")]
Reduce = Annotated[list[str] | None, typer.Option(help="A reduction such as 27.fc_in@0.01, where a model is given.")]
SplitName = Annotated[str, typer.Option(help="validation, test or all, where a model is given.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the split, where a model is given.")]


@dataclass(frozen=True)
class Pair:
    """The unchanged and the reduced model on the same examples."""

    model: str
    intervention: str
    base: Evaluation
    edited: Evaluation
    examples: tuple[Example, ...]
    load: Any  # returns the LanguageModel

    @property
    def scorer(self) -> Any:
        """How the examples were scored."""
        return self.base.scorer

    def loaded(self) -> LanguageModel:
        """Return the model, loaded now where that was not needed before."""
        found: LanguageModel = self.load()
        return found


@contextmanager
def _paired(
    what: str, load: LoadOptions, task: TaskOptions, reduce: list[str] | None, split: str, limit: int | None, store: str
) -> Iterator[Pair]:
    """Yield the scores that a search recorded on its test split, or those of a model, made only where they are missing."""
    from laserlm.analysis.scorebook import scored
    from laserlm.errors import AnalysisError
    from laserlm.results import Store as Results
    from laserlm.spec import Intervention

    with Results.open(store) as results:
        if not reduce:
            yield _of_run(what, load, results)
            return
        text = str(Intervention.parse(reduce))
        if not text:
            raise AnalysisError("no reduction to study: give --reduce SPEC, or the id of a search's run")
        examples = task.split(split, limit)
        lm = load.load_named(what)
        with scored(lm, examples, results, batch_size=task.batch_size) as score:
            base, edited = score(""), score(text)
        yield Pair(lm.name, text, base, edited, examples.examples, lambda: lm)


def _of_run(what: str, load: LoadOptions, results: Results) -> Pair:
    from laserlm.errors import AnalysisError

    info = results.find(what)
    best = (info.outcome or {}).get("best")
    if info.kind != "search" or best is None:
        raise AnalysisError(f"run {info.id} is not a finished search; finish it, or give a model and --reduce SPEC")
    if not best:
        raise AnalysisError(f"run {info.id} found nothing better than the unchanged model; give a model and --reduce SPEC")
    base, edited = (results.evaluation(info.id, "test", text) for text in ("", best))
    if base is None or edited is None:
        raise AnalysisError(f"run {info.id} has no test scores of its best; run the same 'laser search' with --restart")
    return Pair(info.model, best, base, edited, results.examples(info.id, "test"), lambda: load.load_named(info.model))


@app.command()
@with_options(load=LoadOptions, task=TaskOptions)
def flips(
    what: What,
    load: LoadOptions,
    task: TaskOptions,
    reduce: Reduce = None,
    split: SplitName = "test",
    limit: Limit = None,
    top: Annotated[int, typer.Option(min=0, help="Likeliest first tokens shown, before and after.")] = 5,
    shown: Annotated[int, typer.Option(min=0, help="Corrected and broken examples shown, of each.")] = 5,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Tell which examples a reduction corrects and breaks, by group, and what the model says instead.

    Example: laser analyze flips bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from dataclasses import asdict

    from laserlm.analysis.flipping import flips as flips_
    from laserlm.analysis.flipping import likeliest

    with _paired(what, load, task, reduce, split, limit, store) as pair:
        found = flips_(pair.base, pair.edited, pair.examples)
    chosen = [*found.of("corrected")[:shown], *found.of("broken")[:shown]]
    tokens: list[Any] = [None] * len(chosen)
    if top and chosen:
        wanted = {e.id: e for e in pair.examples}
        tokens = [
            {"before": before, "after": after}
            for before, after in likeliest(pair.loaded(), [wanted[f.id] for f in chosen], pair.intervention, k=top)
        ]
    if json:
        examples = [asdict(f) | {"likeliest": t} for f, t in zip(chosen, tokens, strict=True)]
        print_json({"model": pair.model, "intervention": pair.intervention, **found.as_dict(), "shown": examples})
        return
    _print_flips(pair, found)
    rows = [
        {"change": f.change, "prompt": f.prompt, "answer": f.answer, "before": f.before, "after": f.after}
        | {f"likeliest {side}": " ".join(map(repr, of)) for side, of in (t or {}).items()}
        for f, t in zip(chosen, tokens, strict=True)
    ]
    Listing().print(rows, "corrected and broken examples")


def _print_flips(pair: Pair, found: Flips) -> None:
    print(found.comparison)
    counts = ", ".join(f"{len(found.of(change))} {name}" for change, name in NAMES.items())
    print(f"{counts}; the same answer before and after for {found.same:.1%}")
    print(
        f"outside of all answers: {found.outside_before:.1%} before, {found.outside_after:.1%} after; "
        f"always giving the most frequent answer scores {found.majority:.1%}"
    )
    Listing().print(
        [
            {"answer": x.label, "is right": x.answers, "given before": x.before, "given after": x.after}
            for x in found.labels[:8]
        ],
        "the most frequent answers",
    )
    if found.groups:
        Listing().print(
            [
                {
                    "group": g.group + (" (few)" if g.few else ""),
                    "n": g.comparison.n,
                    "before": g.comparison.base,
                    "after": g.comparison.edited,
                    "gain": g.comparison.gain,
                    "low": g.comparison.interval.low,
                    "high": g.comparison.interval.high,
                    "corrected": g.comparison.corrected,
                    "broken": g.comparison.broken,
                    "p": g.comparison.mcnemar_p,
                }
                for g in found.groups
            ],
            "groups",
        )


NAMES: dict[Any, str] = {"corrected": "corrected", "broken": "broken", "right": "right twice", "wrong": "wrong twice"}


@app.command()
@with_options(load=LoadOptions, task=TaskOptions, listing=Listing)
def controls(
    model: Annotated[str, typer.Argument(help="Hub id, local folder, .gguf file, 'bundled', or a search's run.")],
    load: LoadOptions,
    task: TaskOptions,
    listing: Listing,
    reduce: Reduce = None,
    split: SplitName = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the split.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Draws of what is random.")] = 3,
    store: Store = STORE_DEFAULT,
) -> None:
    """Change the same matrices by as much in other ways: does low rank help because it is low rank?

    Example: laser analyze controls bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 300
    """
    from laserlm.analysis.controls import controls as controls_
    from laserlm.analysis.scorebook import scored
    from laserlm.errors import AnalysisError
    from laserlm.results import Store as Results
    from laserlm.spec import Intervention
    from laserlm.tasks import Split

    with Results.open(store) as results:
        if reduce:
            text, examples, lm = str(Intervention.parse(reduce)), task.split(split, limit), load.load_named(model)
        else:
            pair = _of_run(model, load, results)
            of = Split(pair.base.task, pair.base.split, pair.examples, pair.scorer)
            text, examples, lm = pair.intervention, of.limit(limit), pair.loaded()
        if not text:
            raise AnalysisError("no reduction to study: give --reduce SPEC, or the id of a search's run")
        with (
            scored(lm, examples, results, batch_size=task.batch_size) as score,
            bar("scoring controls", unit="models") as advance,
        ):
            found = controls_(lm, text, score, seeds=seeds, on_model=advance)
    rows = [c.as_dict() for c in found]
    if not listing.json:
        for row in rows:
            for name, short in (("interval", ""), ("loss_interval", "loss_")):
                low, high = row.pop(name) or (None, None)
                row |= {f"{short}low": low, f"{short}high": high}
    listing.print(rows, f"{text} and its controls on {examples.task}, {examples.name}")
