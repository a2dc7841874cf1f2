"""The command that scores a model, with or without an intervention."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import Json, TaskOptions, UpdatedModelOptions, print_json, with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.scoring.evaluate import Comparison
    from laserlm.scoring.records import Evaluation
    from laserlm.searching.guard import Harm


@with_options(model_options=UpdatedModelOptions, task_options=TaskOptions)
def evaluate(
    model_options: UpdatedModelOptions,
    task_options: TaskOptions,
    reduce: Annotated[list[str] | None, typer.Option(help="Reduction such as 27.fc_in@0.01; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="Split to score: validation, test or all.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of examples from the start of the split.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Also score the unchanged model, and compare.")] = False,
    guard: Annotated[list[str] | None, typer.Option(help="Measure harm on self, a text or task; repeatable.")] = None,
    scores: Annotated[Path | None, typer.Option(help="File for one JSON line per example.")] = None,
    json: Json = False,
) -> None:
    """Score a model on a task: accuracy with its 95 % interval, log-loss, majority-class rate.

    Example: laser evaluate bundled --task worldfacts --limit 200 --reduce 28.fc_up@0.05 --compare
    """
    from laserlm.cli.search_options import load_guards
    from laserlm.edit import applied
    from laserlm.reductions import Intervention, short_form
    from laserlm.scoring.evaluate import compare as compare_
    from laserlm.scoring.evaluate import evaluate as evaluate_
    from laserlm.searching.guard import guards_of, measure_harm

    intervention = Intervention.read(reduce or [])  # before the model is loaded
    if guard and not intervention:
        raise typer.BadParameter("--guard measures what a reduction costs; add --reduce SPEC")
    guards = load_guards(guard or [], task_options.data_folder)
    examples = task_options.split(split, limit)
    if scores is not None and not scores.absolute().parent.is_dir():
        raise typer.BadParameter(f"--scores: there is no folder {scores.absolute().parent}; create it first")
    lm = model_options.load()
    task_options.announce(lm, examples)
    examples = task_options.for_model(lm, examples)
    evaluations = []
    for current in [Intervention(), intervention] if compare else [intervention]:
        # The bar covers the decomposition too, which takes long for many matrices.
        with progress_bar(f"scoring {short_form(current) or 'the unchanged model'}") as advance, applied(lm, current):
            evaluations.append(evaluate_(lm, examples, batch_size=task_options.batch_size, on_progress=advance))
    harms = []
    for of_guard in guards_of(lm, guards):
        with progress_bar(f"measuring the harm on {of_guard.name}"):
            harms.append(measure_harm(lm, of_guard, intervention, task_options.batch_size))
    _print(evaluations, compare_(*evaluations) if compare else None, harms, json)
    if scores is not None:
        lines = [json_.dumps(asdict(score), ensure_ascii=False) for score in evaluations[-1].scores]
        scores.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _print(evaluations: list[Evaluation], comparison: Comparison | None, harms: list[Harm], json: bool) -> None:
    edited = evaluations[-1]
    if json:
        result: dict[str, Any] = edited.as_dict()
        if comparison is not None:
            result |= {"base": evaluations[0].as_dict(), "comparison": comparison.as_dict()}
        if harms:
            result["harms"] = [harm.as_dict() for harm in harms]
        print_json(result)
        return
    for evaluation in evaluations:
        print(evaluation)
    if edited.scorer not in ("perplexity", "preference", "similarity"):
        print(f"always giving the most frequent answer scores {edited.majority_rate:.1%}; scored by {edited.scorer}")
    for name in edited.figures:
        print(f"{name} " + " -> ".join(f"{evaluation.figures[name]:.3f}" for evaluation in evaluations))
    if edited.balanced_accuracy is not None:
        print(f"balanced accuracy {edited.balanced_accuracy:.1%} over {len(edited.classes)} classes")
    if comparison is not None and edited.scorer == "perplexity":
        low, high = comparison.loss_interval
        change = comparison.edited_loss - comparison.base_loss
        print(f"change of loss {change:+.4f} [{low:+.4f}, {high:+.4f}] nats/token over {comparison.n} passages")
    elif comparison is not None:
        print(comparison)
    for harm in harms:
        print(f"harm: {harm}")
    if comparison is not None and edited.intervention and not harms:
        print("harm: not measured; measure it with --guard self, or --guard with a text file or a task")
