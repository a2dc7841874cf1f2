"""Commands that study a model, a reduction and what it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from laserlm.cli.progress import bar, say

if TYPE_CHECKING:
    from laserlm.analysis.flipping import Flips, Label
    from laserlm.models import LanguageModel
    from laserlm.results import Store as Results
    from laserlm.scoring.records import Evaluation
    from laserlm.tasks import Example, Split

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

    Matrices are read and decomposed one at a time: about ten times the largest one's float32 bytes are in memory.

    Example: laser analyze matrices bundled --type fc_up
    """
    from dataclasses import fields

    from laserlm.analysis import MatrixMetrics, best_of_each, correlations, gains, matrix_metrics
    from laserlm.analysis.figures import check_figure, matrices_figure, write_figure
    from laserlm.errors import AnalysisError
    from laserlm.models.stored import open_stored
    from laserlm.results import Store as Results

    if figure is not None:
        check_figure(figure)
        drawn = [f.name for f in fields(MatrixMetrics) if f.type in ("float", "int") and f.name != "layer"]
        if metric not in drawn:
            raise AnalysisError(f"no metric {metric!r} to draw; there are {', '.join(drawn)}")
    try:
        magnitudes = [float(t) for t in thresholds.split(",")]
    except ValueError:
        raise AnalysisError(f"cannot read the thresholds {thresholds!r}; write numbers by commas, such as 0.03,0.06") from None
    measured: dict[str, float] = {}
    screen: dict[str, float] = {}
    if run is not None:
        with Results.open(store) as results:
            info = results.find(run, kind="search")
            if info.model != model:
                raise AnalysisError(f"run {info.id} searched {info.model}, not {model}; study that model")
            trials = results.evaluations(info.id, "validation")
            if "" not in trials:
                raise AnalysisError(f"run {info.id} has not scored the unchanged model; finish it with the same 'laser search'")
        measured = gains(trials.pop(""), trials)
        screened = (info.outcome or {}).get("screened") or {}
        screen = best_of_each({text: -change for text, change in screened.get("expected", {}).items()})
    source = open_stored(model, revision=revision, cache=cache, allow_remote_code=allow_remote_code)
    found: list[MatrixMetrics] = []
    given: dict[str, Any] = {"side": side, "types": types or (), "thresholds": magnitudes}
    with bar("decomposing", unit="matrices") as advance:
        for one in matrix_metrics(source, on_skip=lambda m, why: say(f"{m.id} is left out: {why}"), **given):
            found.append(one)
            advance(len(found), len(source.matrices))
    rows = [m.as_dict() for m in found]
    tables = []
    if run is not None:
        tables = [
            {"metric": c.metric, "spearman": c.rho, "low": c.low, "high": c.high, "matrices": c.n}
            for c in correlations(found, measured, screen=screen)
        ]
    if listing.json:
        print_json(rows if run is None else {"matrices": rows, "correlations": tables})
    else:
        for row in rows:
            for name in ("nuclear", "energy", "shared"):
                row |= {f"{name}@{key}": value for key, value in row.pop(name).items()}
        keys = list(dict.fromkeys(key for row in rows for key in row))
        listing.print([{key: row.get(key) for key in keys} for row in rows], f"matrices of {model}")
        if tables:
            listing.print(tables, f"metrics of {model} and the gain that run {run} measured")
    if figure is not None and found:
        write_figure(matrices_figure(found, metric), figure)


What = Annotated[str, typer.Argument(help="A search's run (an id, the start of one, or 'last'), or a model.")]
Reduce = Annotated[list[str] | None, typer.Option(help="A reduction such as 27.fc_in@0.01, where a model is given.")]
SplitName = Annotated[str, typer.Option(help="validation, test or all, where a model is given.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the split, where a model is given.")]


@dataclass(frozen=True)
class Pair:
    """The unchanged and the reduced model on the same examples.

    Args:
        model: the model's name.
        intervention: text of the reduction.
        base: scores of the unchanged model.
        edited: scores of the reduced one.
        examples: those that were scored.
        load: returns the model, loaded where it is not yet.
        settings: of the search, where they come from one.
    """

    model: str
    intervention: str
    base: Evaluation
    edited: Evaluation
    examples: tuple[Example, ...]
    load: Callable[[], LanguageModel]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Seed of ``:reference`` decompositions."""
        return int(self.settings.get("seed", 0))


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

    info = results.find(what, kind="search")
    best = (info.outcome or {}).get("best")
    if best is None:
        raise AnalysisError(f"run {info.id} is not finished; finish it with the same 'laser search'")
    if not best:
        raise AnalysisError(f"run {info.id} found nothing better than the unchanged model; give a model and --reduce SPEC")
    base, edited = (results.evaluation(info.id, "test", text) for text in ("", best))
    if base is None or edited is None:
        raise AnalysisError(f"run {info.id} has no test scores of its best; run the same 'laser search' with --restart")

    def loaded() -> LanguageModel:
        dtype = load.dtype or str(info.settings["dtype"]).removeprefix("torch.")
        lm = replace(load, dtype=dtype).load_named(info.model)
        if lm.hash != info.settings["model_hash"]:
            raise AnalysisError(f"{info.model} has other weights than run {info.id} searched; give its --revision or --kind")
        return lm

    return Pair(info.model, best, base, edited, results.examples(info.id, "test"), loaded, info.settings)


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
    from laserlm.errors import ScoringError, TokenizationError

    with _paired(what, load, task, reduce, split, limit, store) as pair:
        found = flips_(pair.base, pair.edited, pair.examples)
    chosen = [*found.of("corrected")[:shown], *found.of("broken")[:shown]]
    tokens: list[Any] = [None] * len(chosen)
    if top and chosen:
        wanted = {e.id: e for e in pair.examples}
        asked = [wanted[f.id] for f in chosen]
        try:
            sides = likeliest(pair.load(), asked, pair.intervention, k=top, batch_size=task.batch_size, seed=pair.seed)
            tokens = [{"before": before, "after": after} for before, after in sides]
        except (TokenizationError, ScoringError) as error:
            say(f"The likeliest tokens are not shown: {error}")
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
    print(f"{counts}; the same answer before and after for {found.same}")
    print(
        f"outside of all answers: {found.outside_before} before, {found.outside_after} after; "
        f"always giving the most frequent answer scores {found.majority}"
    )
    Listing().print(
        [
            {"answer": x.label, "is right": x.answers, "given before": x.before, "given after": x.after}
            for x in _frequent(found)
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
    draws: Annotated[int, typer.Option(min=1, help="Number of times that what is random is drawn.")] = 3,
    store: Store = STORE_DEFAULT,
) -> None:
    """Change the same matrices by as much in other ways: does low rank help because it is low rank?

    Example: laser analyze controls bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 300
    """
    from laserlm.analysis.controls import controls as controls_
    from laserlm.analysis.scorebook import scored
    from laserlm.results import Store as Results
    from laserlm.spec import Intervention

    known: dict[str, Evaluation] = {}
    seed = 0
    with Results.open(store) as results:
        if reduce:
            text, examples, lm = str(Intervention.parse(reduce)), task.split(split, limit), load.load_named(model)
        else:
            pair = _of_run(model, load, results)
            text, seed, lm = pair.intervention, pair.seed, pair.load()
            examples = _split_of(pair, task).limit(limit)
            known = {"": pair.base, text: pair.edited} if len(examples) == pair.base.n else {}
        with (
            scored(lm, examples, results, batch_size=task.batch_size, seed=seed) as score,
            bar("scoring controls", unit="models") as advance,
        ):

            def get(name: str, change: Any = None) -> Evaluation:
                return known[name] if name in known else score(name, change)

            found = controls_(lm, text, get, draws=draws, seed=seed, on_model=advance)
    rows = [c.as_dict() for c in found]
    if not listing.json:
        for row in rows:
            for name in ("interval", "behind_interval", "loss_interval"):
                low, high = row.pop(name) or (None, None)
                short = name.removesuffix("interval")
                row |= {f"{short}low": low, f"{short}high": high}
    listing.print(rows, f"{text} and its controls on {examples.task}, {examples.name}")


def _split_of(pair: Pair, task: TaskOptions) -> Split:
    """Return the examples of a search's test split as they were scored."""
    from laserlm.errors import AnalysisError
    from laserlm.tasks import Decoding, Split

    scorer: Any = pair.base.scorer
    if scorer in ("lm_eval", "lm_eval_text"):
        raise AnalysisError(f"{pair.base.task} is judged by its own library; give the model, --task and --reduce")
    how = dict(pair.settings.get("decoding", {}))
    how |= {"stops": tuple(how.get("stops", ())), "run_programs": task.allow_code_execution}
    return Split(pair.base.task, pair.base.split, pair.examples, scorer, Decoding(**how))


def _frequent(found: Flips) -> list[Label]:
    """Return the most frequent answers, and what is given most often without being one."""
    answers = [x for x in found.labels if x.answers]
    return [*answers[:8], *(x for x in found.labels if not x.answers)]
