"""The commands that search: search and demo."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laserlm.cli.options import (
    STORE_DEFAULT,
    Cache,
    DataOptions,
    Json,
    ModelOptions,
    Store,
    TaskOptions,
    print_json,
    with_options,
)
from laserlm.cli.progress import print_stderr, search_progress_bar
from laserlm.provenance import mask_credentials
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.records import Evaluation
    from laserlm.searching import Ray, SearchConfig, SearchProgress, SearchResult
    from laserlm.tasks import Task

DEMO_VALIDATION = 300
DEMO_TEST = 1000
DEMO_MAX_HARM = 0.02
UNRANKED = 0.4
"""Share of pairs with the random candidate ahead from which the screen is said to rank hardly better than chance."""
SEARCH_PANEL = "Search options"
CLUSTER_PANEL = "Cluster options"

DONE_EARLIER = "done earlier, nothing was run; --restart runs it again."
NOT_CONFIGURED = frozenset({"config_file", "save_config", "restart", "dry_run", "json"})
"""What a configuration does not hold, for it says what one command does, not how a search goes."""

Restart = Annotated[
    bool, typer.Option("--restart", help="Search anew; earlier scores are dropped.", rich_help_panel=SEARCH_PANEL)
]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The settings of a search; what is not given is set by the effort."""

    effort: Annotated[str, typer.Option(help="Effort: quick, normal or thorough.")] = "normal"
    metric: Annotated[
        str | None, typer.Option(help="Metric of the choice: accuracy or loss.", show_default="accuracy; loss for perplexity")
    ] = None
    grid: Annotated[str, typer.Option(help="Grid: paper, mlp, fine, or text such as 27-29.mlp@0.05,0.5.")] = "fine"
    limit: Annotated[int | None, typer.Option(min=1, help="Most questions of each split.", show_default="all")] = None
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Strategy: components, race, exhaustive or compose.",
            show_default="components; race for another grid",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None
    max_harm: Annotated[
        float | None,
        typer.Option(
            help="Largest rise of perplexity on the guards.",
            show_default="0.05 for components, else none",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file or task to keep, or self; repeatable.",
            show_default="self, the model's own text",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None
    mode: Annotated[
        str,
        typer.Option(
            help="Order of compose: joint (by the screen) or greedy (last block first).", rich_help_panel=SEARCH_PANEL
        ),
    ] = "joint"
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", "--width", min=1, help="Candidates in the race.", show_default="48", rich_help_panel=SEARCH_PANEL
        ),
    ] = None
    keep: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share kept after each rung.", show_default="0.34", rich_help_panel=SEARCH_PANEL),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of components at most.", show_default="12", rich_help_panel=SEARCH_PANEL),
    ] = None
    delta: Annotated[
        float,
        typer.Option(min=0, max=1, help="Error probability of eliminations and composed steps.", rich_help_panel=SEARCH_PANEL),
    ] = 0.05
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes until the search ends.", show_default="none", rich_help_panel=SEARCH_PANEL),
    ] = None
    memory: Annotated[
        float, typer.Option(min=0, help="GiB for cached activations and decompositions together.", rich_help_panel=SEARCH_PANEL)
    ] = 1.0
    seed: Annotated[
        int, typer.Option(help="Seed of the order of questions and random candidates.", rich_help_panel=SEARCH_PANEL)
    ] = 0
    # Settings of the library that are seldom needed; the help does not list them, a configuration may hold them.
    sizes_per_matrix: Annotated[int | None, typer.Option(min=1, hidden=True)] = None
    random_candidates: Annotated[int | None, typer.Option(min=0, hidden=True)] = None
    screen_examples: Annotated[int | None, typer.Option(min=1, hidden=True)] = None
    first_rung: Annotated[int | None, typer.Option(min=1, hidden=True)] = None

    def config(self, batch_size: int) -> SearchConfig:
        """Return the settings for the library, without the guards, whose data ``load_guards`` reads."""
        from laserlm.reductions import Grid
        from laserlm.searching import SearchConfig

        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("effort", "limit", "guard")}
        settings = {name: value for name, value in given.items() if value is not None}
        settings |= {"grid": Grid.parse(self.grid), "memory": self.memory * 2**30, "batch_size": batch_size}
        return SearchConfig.of(self.effort, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where a search runs."""

    executor: Annotated[
        str, typer.Option(help="Executor: local (this process) or ray (a cluster).", rich_help_panel=CLUSTER_PANEL)
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the cluster: auto or HOST:PORT.", show_default="start one", rich_help_panel=CLUSTER_PANEL
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that hold the model.", show_default="all that fit", rich_help_panel=CLUSTER_PANEL),
    ] = None
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="CPU cores of each worker.", rich_help_panel=CLUSTER_PANEL)] = (
        1.0
    )
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0, help="GPUs of each worker.", show_default="1 if there are GPUs, else 0", rich_help_panel=CLUSTER_PANEL
        ),
    ] = None

    def cluster(self, device: str | None) -> Ray | None:
        """Return the cluster, or None for this process.

        Raises:
            typer.BadParameter: if options do not go together.
        """
        from laserlm.searching import Ray

        if self.executor not in ("local", "ray"):
            raise typer.BadParameter(f"no executor {self.executor!r}; there are local and ray")
        if self.executor == "local":
            if self.address is not None or self.workers is not None or self.gpus_per_worker:
                raise typer.BadParameter("--address, --workers and --gpus-per-worker are for a cluster; add --executor ray")
            return None
        if not self.gpus_per_worker and (device or "cpu") != "cpu":
            raise typer.BadParameter(f"--device {device} is for this process; give workers GPUs with --gpus-per-worker")
        gpus = 0.0 if self.gpus_per_worker is None and device == "cpu" else self.gpus_per_worker
        return Ray(self.address, self.workers, self.cpus_per_worker, gpus)


def _use_configuration(context: typer.Context, file: Path | None) -> Path | None:
    """Take the options of a configuration for those that the command line leaves out."""
    if file is not None and not context.resilient_parsing:  # else the shell completes a word
        from laserlm.cli.config_file import option_types, read_configuration

        context.default_map = read_configuration(file, option_types(search, NOT_CONFIGURED))
    return file


@with_options(model_options=ModelOptions, task_options=TaskOptions, options=SearchOptions, cluster_options=ClusterOptions)
def search(
    model_options: ModelOptions,
    task_options: TaskOptions,
    options: SearchOptions,
    cluster_options: ClusterOptions,
    store: Store = STORE_DEFAULT,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config", help="YAML file of options; the command line wins.", callback=_use_configuration, is_eager=True
        ),
    ] = None,
    save_config: Annotated[Path | None, typer.Option(help="Write the options to this file.")] = None,
    track: Annotated[
        str | None,
        typer.Option(
            help="Report to trackio, wandb, mlflow or tensorboard.", show_default="none", rich_help_panel=SEARCH_PANEL
        ),
    ] = None,
    restart: Restart = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the work, memory and time; search nothing.", rich_help_panel=SEARCH_PANEL)
    ] = False,
    json: Json = False,
) -> None:
    """Find the best intervention on validation questions, and measure it once on test questions.

    The same command continues an interrupted search.

    Example: laser search bundled --task worldfacts --limit 300
    """
    begun = time.monotonic()
    print_stderr(f"reading the questions of {task_options.task}")  # PyTorch, which the next line imports, takes seconds
    from laserlm.cli.config_file import as_configuration, write_configuration
    from laserlm.cli.tracking import tracked_search, tracker
    from laserlm.scoring.scorers import GENERATING
    from laserlm.searching import search as search_

    reports_to = tracker(track) if track else None
    configuration = as_configuration(
        *(options, task_options, model_options, cluster_options),
        model=model_options.model,
        task=task_options.task,
        track=track,
    )
    cluster = cluster_options.cluster(model_options.device)
    config = options.config(task_options.batch_size)  # wrong settings are reported before the model is loaded
    if save_config is not None:
        where = {} if store == STORE_DEFAULT else {"store": store}
        write_configuration(save_config, configuration | as_configuration(**where))
    task = task_options.load()
    if options.guard:
        config = replace(config, guards=load_guards(options.guard, task_options.data_folder))
    task = replace(task, validation=task.validation.limit(options.limit), test=task.test.limit(options.limit))
    print_stderr(f"loading {model_options.model}")
    lm = _on_driver(model_options, cluster, dry_run=dry_run).load()
    task_options.announce(lm, task.validation)
    validation, test = (task_options.for_model(lm, split) for split in (task.validation, task.test))
    task = replace(task, validation=validation, test=test)
    if dry_run:
        from laserlm.cli.dry_run import print_dry_run

        print_dry_run(lm, task, config, cluster, start=time.monotonic() - begun, json=json)
        return
    print_stderr(f"results are kept in {mask_credentials(store)}")
    by_loss = task.validation.scorer in GENERATING
    with tracked_search(reports_to, configuration, by_loss=by_loss) as tracked, search_progress_bar(by_loss=by_loss) as show:

        def on_step(step: SearchProgress) -> None:
            show(step)
            tracked.on_step(step)

        result = search_(
            lm,
            task,
            config,
            store=store,
            restart=restart,
            executor=cluster,
            on_step=on_step,
            on_stage=show,
            options=configuration,
        )
        tracked.finish(result)
    if json:
        if result.done_earlier:
            print_stderr(DONE_EARLIER)
        print_json(result.as_dict())
        return
    print_result(result, is_perplexity=task.validation.scorer == "perplexity")
    print_end(result, model_options.model, store, time.monotonic() - begun)


def print_end(result: SearchResult, model: str, store: str, seconds: float) -> None:
    """Print the run of a search, and the commands that go on from it."""
    print(f"\nRun {result.run} in {mask_credentials(store)}: " + (DONE_EARLIER if result.done_earlier else f"{seconds:.0f} s."))
    name, is_usual = shlex.quote(model), store in (STORE_DEFAULT, os.environ.get("LASER_STORE"))
    where = "" if is_usual else f" --store {shlex.quote(mask_credentials(store))}"
    print(f"Go on with:\n  laser report {result.run}{where}\n  laser runs show {result.run}{where}")
    if not result.best:
        wider = "--strategy race" if result.strategy == "components" else "--effort thorough"
        print(f"  the same search with {wider}")
        return
    print(f"  laser save {name} --run {result.run} --out FOLDER{where}")
    if len(result.pareto) > 1:
        print(f"  laser save {name} --run {result.run} --point N --out FOLDER{where}    (another point of the list)")


def load_guards(names: Sequence[str], data_folder: Path | None) -> tuple[str | Task, ...]:
    """Return guards as the library takes them: texts by their names, tasks with their data."""
    from laserlm.searching.guard import is_text

    options = DataOptions(data_folder=data_folder)
    return tuple(name if is_text(name) else options.load_task(name) for name in names)


def _on_driver(options: ModelOptions, cluster: Ray | None, *, dry_run: bool) -> ModelOptions:
    """Return how this process loads the model: on the CPU where only workers run it."""
    only_workers_run_it = cluster is not None and not (dry_run and cluster.gpus != 0)
    if only_workers_run_it and not (options.device or options.device_map):
        return replace(options, device="cpu")
    return options


def demo(
    cache: Cache = None,
    store: Store = STORE_DEFAULT,
    restart: Restart = False,
    json: Json = False,
) -> None:
    """Search, prove and show on the bundled model and facts, and write a report.

    Example: laser demo
    """
    from laserlm.models import load
    from laserlm.searching import search as search_
    from laserlm.store import Store as Results
    from laserlm.tasks import task
    from laserlm.web.report import write_report

    start = time.monotonic()
    print_stderr("loading bundled")
    lm = load("bundled", cache=cache)
    facts = task("worldfacts")
    facts = replace(facts, validation=facts.validation.limit(DEMO_VALIDATION), test=facts.test.limit(DEMO_TEST))
    if not json:
        print(
            f"SmolLM2-135M-Instruct on worldfacts: {DEMO_VALIDATION} questions to choose on, "
            f"{DEMO_TEST} others to measure on.\n"
            f"Components of all {sum(not m.parts for m in lm.matrices)} matrices of all blocks are removed in a few steps. "
            f"The perplexity of other text may rise by {DEMO_MAX_HARM:.0%}."
        )
    with search_progress_bar() as show:
        result = search_(
            *(lm, facts),
            effort="quick",
            strategy="components",
            metric="loss",
            max_harm=DEMO_MAX_HARM,
            store=store,
            restart=restart,
            on_step=show,
            on_stage=show,
        )
    with Results.open(store) as results:
        base = results.evaluation(result.run, "test", "")
        edited = results.evaluation(result.run, "test", str(result.best))
        folder = Path() if "://" in store else Path(store).expanduser().parent
        report = write_report(results, result.run, folder / f"report-{result.run}.html", overwrite=True)
    if base is None or edited is None:
        raise AssertionError("a finished search has scored both on test")
    questions = _questions(lm, facts, base, edited)
    if json:
        seconds = time.monotonic() - start
        print_json(result.as_dict() | {"questions": questions, "report": str(report), "seconds": seconds})
        return
    print_result(result)
    _print_questions(questions)
    print(f"\nDone in {time.monotonic() - start:.0f} s; run {result.run} in {mask_credentials(store)}.")
    print(f"The report: {report}")
    print("Go on with:")
    model, reduction = "bundled", f" --reduce {result.best}" if result.best else ""
    if short_form(result.best) != str(result.best):
        model, reduction = "FOLDER", ""
        print(f"  laser save bundled --run {result.run} --out {model}")
    print(f'  laser generate {model} "The capital of France is"{reduction}\n  laser runs show {result.run}')
    print("  laser search MODEL --task jsonl:FILE    (your own model and questions)")


def print_result(result: SearchResult, *, is_perplexity: bool = False) -> None:
    """Print how a search chose, and what its choice changes on validation and on test."""
    from rich.console import Console
    from rich.table import Table

    _print_screen(result)
    _print_tables(result)
    if not result.complete:
        print("The time was used up: this is the best so far.")
    what = "components" if result.strategy == "components" else "candidates"
    best = short_form(result.best)
    print(f"Best of {result.candidates} {what}: {best or 'the unchanged model'}")
    if best != str(result.best):
        print(f"(all of it: laser runs show {result.run} --json)")
    table = Table("", "validation (chosen on)", "test (held out)")
    splits = (result.validation, result.test)
    table.add_row("passages" if is_perplexity else "questions", *(c.size for c in splits))
    if not is_perplexity:
        table.add_row("base accuracy", *(f"{c.base:.1%}" for c in splits))
        table.add_row("edited accuracy", *(f"{c.edited:.1%}" for c in splits))
        table.add_row("gain", *(f"{c.gain:+.1%}" for c in splits))
        table.add_row("95 % interval of the gain", *(f"{c.interval.low:+.1%} to {c.interval.high:+.1%}" for c in splits))
        table.add_row("exact p", *(f"{c.mcnemar_p:.2g}" for c in splits))
        table.add_row("corrected / broken", *(f"{c.corrected} / {c.broken}" for c in splits))
    table.add_row("base loss (nats per token)", *(f"{c.base_loss:.3f}" for c in splits))
    table.add_row("edited loss", *(f"{c.edited_loss:.3f}" for c in splits))
    table.add_row(
        "95 % interval of its change", *(f"{c.loss_interval.low:+.3f} to {c.loss_interval.high:+.3f}" for c in splits)
    )
    Console().print(table)
    for sentence in (*result.verdict(), *result.harm_sentences()):
        print(sentence)
    print_pareto(result, is_perplexity=is_perplexity)
    if result.failed:
        print(f"{len(result.failed)} candidates could not be scored; see 'laser runs show {result.run} --json'")


def print_pareto(result: SearchResult, *, is_perplexity: bool = False) -> None:
    """Print gain and harm of the points that no other one dominates, with the numbers that ``laser save --point`` takes."""
    from rich.console import Console
    from rich.table import Table

    points = result.pareto
    if not points:
        return
    table = Table("", "reduction", title="Gain against harm, on what was chosen on", title_justify="left")
    columns = [*([] if is_perplexity else ["gain"]), "change of loss", *(f"perplexity, {h.guard}" for h in points[0].harms)]
    for column in columns:
        table.add_column(column, overflow="fold")
    for number, point in enumerate(points, 1):
        c = point.comparison
        chosen = " (chosen)" if point.intervention == str(result.best) else ""
        cells = [] if is_perplexity else [f"{c.gain:+.1%} [{c.interval.low:+.1%}, {c.interval.high:+.1%}]"]
        cells.append(f"{c.edited_loss - c.base_loss:+.3f} [{c.loss_interval.low:+.3f}, {c.loss_interval.high:+.3f}]")
        cells += [f"x{h.ratio:.3f} [{h.interval.low:.3f}, {h.interval.high:.3f}]" for h in point.harms]
        table.add_row(str(number), short_form(point.intervention) + chosen, *cells)
    Console().print(table)
    print(result.pareto_note())


def _print_screen(result: SearchResult) -> None:
    """Print what the screen did, and how well its ranks agree with the first rung."""
    s = result.screened
    if s is None:
        return
    print(f"The screen ranked {s.candidates} candidates by the gradient over {s.examples} questions in {s.seconds:.0f} s.")
    for sentence in s.warnings():
        print(sentence)
    if not result.rungs or s.correlation is None:
        return
    print(
        f"Check on the first rung, with the {s.chosen} best candidates of the screen and {s.controls} random ones:\n"
        f"the rank correlation with the measured change of loss is {s.correlation:.2f}"
        + (
            f"; in {s.controls_ahead:.0%} of pairs the random candidate is better (50 % = chance)."
            if s.controls_ahead is not None
            else "."
        )
    )
    if (s.controls_ahead or 0) > UNRANKED or s.correlation <= 0:
        print("The screen hardly ranked them. --effort thorough or --strategy exhaustive may find a better one.")


def _print_tables(result: SearchResult) -> None:
    """Print the rungs of a race, the steps of a composition and the finalists."""
    from rich.console import Console
    from rich.table import Table

    if result.rungs:
        columns = ("questions", "entered", "eliminated", "pruned", "failed", "added", "leader")
        table = Table(*columns, title="Race", title_justify="left")
        for r in result.rungs:
            counts = (r.examples, r.entered, r.eliminated, r.pruned, r.failed, r.added)
            table.add_row(*map(str, counts), short_form(r.leader) or "the unchanged model")
        Console().print(table)
    if result.strategy == "compose":
        table = Table(title="Accepted steps", title_justify="left")
        for name in ("added", "gain", "95 % interval", "change of loss", "95 % interval"):
            table.add_column(name, overflow="fold")
        for step in result.steps:
            c = step.comparison
            table.add_row(
                step.added,
                f"{c.gain:+.1%}",
                f"{c.interval.low:+.1%} to {c.interval.high:+.1%}",
                f"{c.edited_loss - c.base_loss:+.3f}",
                f"{c.loss_interval.low:+.3f} to {c.loss_interval.high:+.3f}",
            )
        Console().print(table)
    if result.finalists:
        table = Table("finalist", "validation accuracy", title="Generated text decides", title_justify="left")
        for text, accuracy in result.finalists.items():
            table.add_row(short_form(text) or "the unchanged model", f"{accuracy:.1%}")
        Console().print(table)


def _questions(lm: LanguageModel, task: Task, base: Evaluation, edited: Evaluation) -> list[dict[str, str]]:
    """Answer the first test question that was corrected, the first broken and the first unchanged, before and after."""
    from laserlm.edit import applied
    from laserlm.scoring.generation import generate

    changes = [
        {(False, True): "corrected", (True, False): "broken"}.get((b.correct, e.correct), "unchanged")
        for b, e in zip(base.scores, edited.scores, strict=True)
    ]
    chosen = [changes.index(c) for c in ("corrected", "broken", "unchanged") if c in changes]
    chosen += [i for i in range(len(changes)) if i not in chosen][: 3 - len(chosen)]
    prompts = [task.test.examples[i].prompt for i in chosen]
    texts = []
    for intervention in ("", edited.intervention):
        with applied(lm, intervention):
            texts.append([t.strip().partition("\n")[0] for t in generate(lm, prompts, max_new_tokens=8)])
    return [
        {"change": changes[i], "prompt": prompt, "answer": task.test.examples[i].answer, "base": before, "laser": after}
        for i, prompt, before, after in zip(chosen, prompts, *texts, strict=True)
    ]


def _print_questions(questions: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("", "question", "right", "base", "edited", title="Three held-out questions", title_justify="left")
    for q in questions:
        table.add_row(*(escape(q[key]) for key in ("change", "prompt", "answer", "base", "laser")))
    Console().print(table)
