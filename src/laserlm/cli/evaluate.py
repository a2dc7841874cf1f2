"""The command that scores a model, with or without an intervention."""

from __future__ import annotations

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import Json, ModelOptions, TaskOptions, print_json, with_options
from laserlm.cli.progress import bar

if TYPE_CHECKING:
    from laserlm.scoring.evaluate import Comparison
    from laserlm.scoring.records import Evaluation


@with_options(model=ModelOptions, task=TaskOptions)
def evaluate(
    model: ModelOptions,
    task: TaskOptions,
    reduce: Annotated[list[str] | None, typer.Option(help="A reduction such as 27.fc_in@0.01; may be repeated.")] = None,
    split: Annotated[str, typer.Option(help="validation, test or all.")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the split.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Score the unchanged model too, and compare in pairs.")] = False,
    scores: Annotated[Path | None, typer.Option(help="Write one JSON line for each example to this file.")] = None,
    json: Json = False,
) -> None:
    """Score a model on a task: accuracy with its 95 % interval, log-loss, majority-class rate.

    Example: laser evaluate bundled --task worldfacts --limit 200 --reduce 28.fc_up@0.05 --compare
    """
    from laserlm.edit import applied
    from laserlm.reductions import Intervention
    from laserlm.scoring.evaluate import compare as compare_
    from laserlm.scoring.evaluate import evaluate as evaluate_

    intervention = Intervention.parse(reduce or [])  # before the model is loaded
    examples = task.split(split, limit)
    if scores is not None and not scores.absolute().parent.is_dir():
        raise typer.BadParameter(f"no folder {scores.absolute().parent} to write the scores in")
    lm = model.load()
    found = []
    for applied_now in [Intervention(), intervention] if compare else [intervention]:
        # The bar stands outside, for decomposing many matrices takes its time too.
        with bar(f"scoring {applied_now or 'the unchanged model'}") as advance, applied(lm, applied_now):
            found.append(
                evaluate_(lm, examples, batch_size=task.batch_size, on_progress=lambda done, total: advance(done, total, ""))
            )
    paired = compare_(*found) if compare else None
    _print(found, paired, json)
    edited = found[-1]
    if scores is not None:
        scores.write_text("".join(json_.dumps(asdict(s), ensure_ascii=False) + "\n" for s in edited.scores), encoding="utf-8")


def _print(found: list[Evaluation], paired: Comparison | None, json: bool) -> None:
    edited = found[-1]
    if json:
        result: dict[str, Any] = edited.as_dict()
        if paired is not None:
            result |= {"base": found[0].as_dict(), "comparison": paired.as_dict()}
        print_json(result)
        return
    for one in found:
        print(one)
    if edited.scorer != "perplexity":
        print(f"always giving the most frequent answer scores {edited.majority_rate:.1%}; scored by {edited.scorer}")
    for name in edited.figures:
        print(f"{name} " + " -> ".join(f"{one.figures[name]:.3f}" for one in found))
    if edited.balanced_accuracy is not None:
        print(f"balanced accuracy {edited.balanced_accuracy:.1%} over {len(edited.classes)} classes")
    if paired is not None and edited.scorer == "perplexity":
        low, high = paired.loss_interval
        change = paired.edited_loss - paired.base_loss
        print(f"change of loss {change:+.4f} [{low:+.4f}, {high:+.4f}] nats/token over {paired.n} passages")
    elif paired is not None:
        print(paired)
