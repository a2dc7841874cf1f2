"""Print how a search went, what it chose and how to go on."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING

from laserlm.cli.options import STORE_DEFAULT
from laserlm.provenance import mask_credentials
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.searching import SearchResult

UNRANKED = 0.4
"""Share of pairs with the random candidate ahead above which the screen ranks hardly better than chance."""
DONE_EARLIER = "done earlier, nothing was run; --restart runs it again."


def print_end(result: SearchResult, model: str, store: str, seconds: float) -> None:
    """Print the run of a search, and the commands that go on from it."""
    print(f"\nRun {result.run} in {mask_credentials(store)}: " + (DONE_EARLIER if result.done_earlier else f"{seconds:.0f} s."))
    is_usual = store in (STORE_DEFAULT, os.environ.get("LASER_STORE"))
    where = "" if is_usual else f" --store {shlex.quote(mask_credentials(store))}"
    print(f"Go on with:\n  laser report {result.run}{where}\n  laser runs show {result.run}{where}")
    for command, comment in result.next_commands(model, "FOLDER"):
        print(f"  {command}{where}" + (f"    ({comment})" if comment else ""))


def print_result(result: SearchResult, *, is_perplexity: bool = False) -> None:
    """Print how a search chose, and what its choice changes on validation and on test."""
    from rich.console import Console
    from rich.table import Table

    from laserlm.searching.guard import LOSSES_OF_EXAMPLES

    _print_screen(result)
    _print_tables(result)
    if not result.complete:
        print("The time was used up: this is the best so far.")
    best = short_form(result.best)
    print(f"Best of {result.candidates} {result.unit}: {best or 'the unchanged model'}")
    if best != str(result.best):
        print(f"(all of it: laser runs show {result.run} --json)")
    table = Table("", "validation (chosen on)", "test (held out)")
    splits = (result.validation, result.test)
    table.add_row("passages" if is_perplexity else "questions", *(c.size for c in splits))
    if not is_perplexity:
        table.add_row("base accuracy", *(f"{c.base:.1%}" for c in splits))
        table.add_row("edited accuracy", *(f"{c.edited:.1%}" for c in splits))
        table.add_row("gain, points", *(f"{100 * c.gain:+.1f}" for c in splits))
        table.add_row(
            "95 % interval of the gain", *(f"{100 * c.interval.low:+.1f} to {100 * c.interval.high:+.1f}" for c in splits)
        )
        table.add_row("exact p", *(f"{c.mcnemar_p:.2g}" for c in splits))
        table.add_row("corrected / broken", *(f"{c.corrected} / {c.broken}" for c in splits))
    is_similarity = result.test.base_spearman is not None
    if is_similarity:
        for name in ("base", "edited"):
            values = [getattr(c, f"{name}_spearman") for c in splits]
            table.add_row(f"{name} Spearman correlation", *("" if v is None else f"{v:.3f}" for v in values))
    unit = " (nats per token)" if result.settings.get("scorer") not in LOSSES_OF_EXAMPLES else ""
    table.add_row(f"base loss{unit}", *(f"{c.base_loss:.3f}" for c in splits))
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

    from laserlm.scoring.statistics import in_points

    points = result.pareto
    if not points:
        return
    table = Table("", "reduction", title="Gain against harm, on what was chosen on", title_justify="left")
    columns = [*([] if is_perplexity else ["gain"]), "change of loss", *(f"{h.measure}, {h.guard}" for h in points[0].harms)]
    for column in columns:
        table.add_column(column, overflow="fold")
    for number, point in enumerate(points, 1):
        c = point.comparison
        chosen = " (chosen)" if point.intervention == str(result.best) else ""
        cells = [] if is_perplexity else [in_points(c.gain, c.interval)]
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

    from laserlm.scoring.statistics import in_points

    if result.rungs:
        columns = ("questions", "entered", "eliminated", "pruned", "failed", "added", "leader")
        table = Table(*columns, title="Race", title_justify="left")
        for r in result.rungs:
            counts = (r.examples, r.entered, r.eliminated, r.pruned, r.failed, r.added)
            table.add_row(*map(str, counts), short_form(r.leader) or "the unchanged model")
        Console().print(table)
    if result.strategy == "compose":
        table = Table(title="Accepted steps", title_justify="left")
        for name in ("added", "gain", "change of loss", "95 % interval"):
            table.add_column(name, overflow="fold")
        for step in result.steps:
            c = step.comparison
            table.add_row(
                step.added,
                in_points(c.gain, c.interval),
                f"{c.edited_loss - c.base_loss:+.3f}",
                f"{c.loss_interval.low:+.3f} to {c.loss_interval.high:+.3f}",
            )
        Console().print(table)
    if result.finalists:
        table = Table("finalist", "validation accuracy", title="Generated text decides", title_justify="left")
        for text, accuracy in result.finalists.items():
            table.add_row(short_form(text) or "the unchanged model", f"{accuracy:.1%}")
        Console().print(table)
