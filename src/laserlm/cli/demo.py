"""The command demo: a search, its proof and its report on the bundled model and facts."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from laserlm.cli.options import STORE_DEFAULT, Cache, Json, Store, print_json
from laserlm.cli.print_search import print_result
from laserlm.cli.progress import print_stderr, search_progress_bar
from laserlm.cli.search_options import Restart
from laserlm.provenance import mask_credentials
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.records import Evaluation
    from laserlm.searching import SearchResult
    from laserlm.tasks import Task

N_VALIDATION = 150
N_TEST = 500
MAX_HARM = 0.02


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
    facts = replace(facts, validation=facts.validation.limit(N_VALIDATION), test=facts.test.limit(N_TEST))
    if not json:
        print(
            f"SmolLM2-135M-Instruct on worldfacts: {N_VALIDATION} questions to choose on, "
            f"{N_TEST} others to measure on.\n"
            f"Components of all {sum(not m.parts for m in lm.matrices)} matrices of all blocks are weakened. "
            f"The perplexity of other text may rise by {MAX_HARM:.0%}."
        )
    with search_progress_bar() as show:
        result = search_(
            *(lm, facts),
            metric="loss",
            max_harm=MAX_HARM,
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
    _print_next(result)


def _print_next(result: SearchResult) -> None:
    """Print the commands that go on from the demo."""
    print("Go on with:")
    model, reduction = "bundled", f" --reduce {result.best}" if result.best else ""
    if short_form(result.best) != str(result.best):
        model, reduction = "FOLDER", ""
        print(f"  laser save bundled --run {result.run} --out {model}")
    print(f'  laser generate {model} "The capital of France is"{reduction}\n  laser runs show {result.run}')
    print("  laser search MODEL --task jsonl:FILE    (your own model and questions)")


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
