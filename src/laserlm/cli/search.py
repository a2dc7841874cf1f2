"""The commands that search: search and demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import STORE_DEFAULT, Cache, Json, ModelOptions, Store, TaskOptions, print_json, with_options
from laserlm.cli.progress import say, searching_bar
from laserlm.provenance import masked

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.records import Evaluation
    from laserlm.searching import SearchResult
    from laserlm.tasks import Task

DEMO_VALIDATION = 300
DEMO_TEST = 1000
UNRANKED = 0.4
"""Share of pairs with the random candidate ahead from which the screen is said to have ranked hardly better than chance."""
CLUSTER_PANEL = "Cluster options"

Restart = Annotated[bool, typer.Option("--restart", help="Begin anew even where the database has this search already.")]


@with_options(model=ModelOptions, task=TaskOptions)
def search(
    model: ModelOptions,
    task: TaskOptions,
    strategy: Annotated[
        str,
        typer.Option(help="race (screen, then rungs), exhaustive (all on everything) or compose (one after another)."),
    ] = "race",
    grid: Annotated[str, typer.Option(help="paper, mlp, fine, or text such as 27-29.mlp@0.05,0.5.")] = "fine",
    metric: Annotated[
        str | None, typer.Option(help="Choose by accuracy or by loss; default: accuracy, but for perplexity.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="Of compose: joint (what the screen expects most of) or greedy (from the last block down).")
    ] = "joint",
    width: Annotated[int, typer.Option(min=1, help="Candidates that the screen sends on.")] = 48,
    keep: Annotated[
        float, typer.Option(min=0, max=1, help="Share that goes on from a rung; 1 drops only what is beaten beyond the bound.")
    ] = 0.34,
    delta: Annotated[float, typer.Option(min=0, max=1, help="Error probability of the race's bound.")] = 0.05,
    budget: Annotated[
        float | None, typer.Option(min=0, help="Minutes after which the best so far is measured and the search ends.")
    ] = None,
    memory: Annotated[float, typer.Option(min=0, help="GiB for the frontier's boundary, and for decompositions.")] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of each split.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the order of examples and of ':reference' decompositions.")] = 0,
    executor: Annotated[
        str, typer.Option(help="local (this process) or ray (workers on a Ray cluster).", rich_help_panel=CLUSTER_PANEL)
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            help="auto for the cluster of this machine, or HOST:PORT; default: one is started.",
            rich_help_panel=CLUSTER_PANEL,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that have the model; default: all there is room for.", rich_help_panel=CLUSTER_PANEL
        ),
    ] = None,
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="Cores of each.", rich_help_panel=CLUSTER_PANEL)] = 1.0,
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of each.", rich_help_panel=CLUSTER_PANEL)] = 0.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what it will take: pieces, operations, memory, time; search nothing.")
    ] = False,
    store: Store = STORE_DEFAULT,
    restart: Restart = False,
    json: Json = False,
) -> None:
    """Find the best intervention of a grid on validation, and measure it once on test.

    An interrupted search goes on where it stopped when the same command is given again.

    Example: laser search bundled --task worldfacts --limit 300
    """
    begun = time.monotonic()
    from dataclasses import replace

    from laserlm.errors import ScoringError
    from laserlm.reductions import Grid
    from laserlm.searching import RaceOptions, Ray
    from laserlm.searching import search as search_

    if executor not in ("local", "ray"):
        raise ScoringError(f"no executor {executor!r}; there are local and ray")
    if executor == "local" and (address is not None or workers is not None or gpus_per_worker):
        raise ScoringError("--address, --workers and --gpus-per-worker are for a cluster; add --executor ray")
    if executor == "ray" and not gpus_per_worker and (model.device or "cpu") != "cpu":
        raise ScoringError(f"--device {model.device} is this process's own; workers get GPUs by --gpus-per-worker")
    cluster = Ray(address, workers, cpus_per_worker, gpus_per_worker) if executor == "ray" else None
    wanted = Grid.parse(grid)  # before the model is loaded
    whole = task.make()
    made = replace(whole, validation=whole.validation.limit(limit), test=whole.test.limit(limit))
    # Where workers run the model, this process only looks at it.
    looks = cluster is not None and not (dry_run and gpus_per_worker)
    lm = (replace(model, device="cpu") if looks and not (model.device or model.device_map) else model).load()
    given: dict[str, Any] = {
        "strategy": strategy,
        "grid": wanted,
        "batch_size": task.batch_size,
        "seed": seed,
        "memory": memory * 2**30,
        "mode": mode,
        "options": RaceOptions(width=width, keep=keep, delta=delta),
    }
    if dry_run:
        from laserlm.cli.dry_run import tell

        tell(lm, made, given, cluster, start=time.monotonic() - begun, json=json)
        return
    say(f"results are kept in {masked(store)}")
    with searching_bar() as on_step:
        found = search_(
            lm,
            made,
            metric=metric,  # type: ignore[arg-type]
            store=store,
            budget=budget,
            **given,
            restart=restart,
            executor=cluster,
            on_step=on_step,
        )
    if json:
        print_json(found.as_dict())
    else:
        print_found(found, of_text=made.validation.scorer == "perplexity")


def demo(
    cache: Cache = None,
    store: Store = STORE_DEFAULT,
    restart: Restart = False,
    json: Json = False,
) -> None:
    """Run the whole job on the bundled model and facts: search, prove on held-out facts, show; and write a report.

    Example: laser demo
    """
    from dataclasses import replace

    from laserlm.models import load
    from laserlm.searching import search as search_
    from laserlm.store import Store as Results
    from laserlm.tasks import task
    from laserlm.web.report import write_report

    start = time.monotonic()
    lm = load("bundled", cache=cache)
    whole = task("worldfacts")
    made = replace(whole, validation=whole.validation.limit(DEMO_VALIDATION), test=whole.test.limit(DEMO_TEST))
    if not json:
        print(
            f"SmolLM2-135M-Instruct on worldfacts: {DEMO_VALIDATION} questions to choose on, "
            f"{DEMO_TEST} others to measure on.\n"
            f"A race among all {sum(not m.parts for m in lm.matrices)} matrices of all blocks at up to 15 ranks each; "
            "the lowest loss wins, since so few questions\ntell losses apart better than hit rates."
        )
    with searching_bar() as on_step:
        found = search_(lm, made, metric="loss", store=store, restart=restart, on_step=on_step)
    with Results.open(store) as results:
        base = results.evaluation(found.run, "test", "")
        best = results.evaluation(found.run, "test", str(found.best))
        beside = Path() if "://" in store else Path(store).expanduser().parent
        report = write_report(results, found.run, beside / f"report-{found.run}.html")
    if base is None or best is None:
        raise AssertionError("a finished search has scored both on test")
    questions = _questions(lm, made, base, best)
    if json:
        seconds = time.monotonic() - start
        print_json(found.as_dict() | {"questions": questions, "report": str(report), "seconds": seconds})
        return
    print_found(found)
    _print_questions(questions)
    print(f"\nDone in {time.monotonic() - start:.0f} s; run {found.run} in {masked(store)}.")
    print(f"All of it to look at: {report}")
    reduction = f" --reduce {found.best}" if found.best else ""
    print(f'Go on with:\n  laser generate bundled "The capital of France is"{reduction}\n  laser runs show {found.run}')
    print("  laser search MODEL --task jsonl:FILE    (your own model and questions)")


def print_found(found: SearchResult, *, of_text: bool = False) -> None:
    from rich.console import Console
    from rich.table import Table

    best = str(found.best) or "the unchanged model"
    _print_way(found)
    print(f"Best of {found.candidates} candidates: {best}")  # whole, for it is to be copied
    table = Table("", "validation (chosen on)", "test (held out)")
    both = (found.validation, found.test)
    table.add_row("passages" if of_text else "questions", *(str(c.n) for c in both))
    if not of_text:
        table.add_row("base accuracy", *(f"{c.base:.1%}" for c in both))
        table.add_row("LASER accuracy", *(f"{c.edited:.1%}" for c in both))
        table.add_row("gain", *(f"{c.gain:+.1%}" for c in both))
        table.add_row("95 % interval of the gain", *(f"{c.interval.low:+.1%} to {c.interval.high:+.1%}" for c in both))
        table.add_row("exact McNemar p", *(f"{c.mcnemar_p:.2g}" for c in both))
        table.add_row("corrected / broken", *(f"{c.corrected} / {c.broken}" for c in both))
    table.add_row("base loss (nats per token)", *(f"{c.base_loss:.3f}" for c in both))
    table.add_row("LASER loss", *(f"{c.edited_loss:.3f}" for c in both))
    table.add_row("95 % interval of its change", *(f"{c.loss_interval.low:+.3f} to {c.loss_interval.high:+.3f}" for c in both))
    Console().print(table)
    for sentence in found.verdict():
        print(sentence)
    if found.failed:
        print(f"{len(found.failed)} candidates could not be scored; see 'laser runs show {found.run} --json'")


def _print_way(found: SearchResult) -> None:
    """Print how a search came to its choice."""
    from rich.console import Console
    from rich.table import Table

    if found.screened is not None:
        s = found.screened
        print(f"The screen ranked {s.candidates} candidates by the gradient over {s.examples} questions in {s.seconds:.0f} s.")
        if found.rungs and s.correlation is not None:
            print(
                f"Of the {s.chosen} it sent on and {s.controls} drawn at random, the first rung measured changes of loss "
                f"that correlate {s.correlation:.2f} with its ranks"
                + (f";\n{s.controls_ahead:.0%} of the pairs put the random one ahead." if s.controls_ahead is not None else ".")
            )
            if (s.controls_ahead or 0) > UNRANKED or s.correlation <= 0:
                print("So the screen hardly ranked them: a larger --width or --strategy exhaustive may find a better one.")
    if found.rungs:
        table = Table(
            "questions", "entered", "beaten", "halved", "failed", "joined", "leader", title="Race", title_justify="left"
        )
        for r in found.rungs:
            counts = (r.examples, r.entered, r.beaten, r.halved, r.failed, r.joined)
            table.add_row(*map(str, counts), r.leader or "the unchanged model")
        Console().print(table)
    if found.strategy == "compose":
        table = Table(title="Accepted steps", title_justify="left")
        for name in ("added", "gain", "95 % interval", "change of loss", "95 % interval"):
            table.add_column(name, overflow="fold")
        for step in found.steps:
            c = step.comparison
            change = c.edited_loss - c.base_loss
            table.add_row(
                step.added,
                f"{c.gain:+.1%}",
                f"{c.interval.low:+.1%} to {c.interval.high:+.1%}",
                f"{change:+.3f}",
                f"{c.loss_interval.low:+.3f} to {c.loss_interval.high:+.3f}",
            )
        Console().print(table)
    if found.finalists:
        table = Table("finalist", "validation accuracy", title="What the model writes decides", title_justify="left")
        for text, accuracy in found.finalists.items():
            table.add_row(text or "the unchanged model", f"{accuracy:.1%}")
        Console().print(table)
    if not found.complete:
        print("The time was used up: this is the best so far.")


def _questions(lm: LanguageModel, task: Task, base: Evaluation, best: Evaluation) -> list[dict[str, str]]:
    """Answer the first test question that was corrected, the first broken and the first unchanged, before and after."""
    from laserlm.edit import applied
    from laserlm.scoring.generation import generate

    changes = [
        {(False, True): "corrected", (True, False): "broken"}.get((b.correct, e.correct), "unchanged")
        for b, e in zip(base.scores, best.scores, strict=True)
    ]
    chosen = [changes.index(c) for c in ("corrected", "broken", "unchanged") if c in changes]
    chosen += [i for i in range(len(changes)) if i not in chosen][: 3 - len(chosen)]
    prompts = [task.test.examples[i].prompt for i in chosen]
    texts = []
    for intervention in ("", best.intervention):
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

    table = Table("", "question", "right", "base", "LASER", title="Three held-out questions", title_justify="left")
    for q in questions:
        table.add_row(*(escape(q[key]) for key in ("change", "prompt", "answer", "base", "laser")))
    Console().print(table)
