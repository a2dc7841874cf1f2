"""Score published interventions and compare the scores with the published values."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files

from laserlm.edit import applied
from laserlm.errors import SpecError
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.forward import Progress
from laserlm.scoring.records import Evaluation
from laserlm.tasks import Decoding, Task

CHECKPOINTS = {
    "gpt-j-6b": ("EleutherAI/gpt-j-6b", "float16"),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "float32"),
    "roberta-base": ("FacebookAI/roberta-base", "float32"),
    "mistral-7b-instruct-v0.1": ("mistralai/Mistral-7B-Instruct-v0.1", None),
}
"""Hub id and dtype of the models with published results, by their names in the publications."""
PERCENT = ("accuracy_percent",)
SEVERAL_MASKS = ("hotpotqa", "wikidata-qa", "epistemic-reasoning")
"""Tasks whose answers the authors' code gives a masked model as several masks."""


@dataclass(frozen=True)
class Published:
    """One published result.

    Args:
        model: short name of the model.
        task: the task's name.
        metric: ``accuracy_percent`` or ``pass_at_1``.
        base: of the unchanged model.
        base_loss: its loss in nats per answer token, where it is published.
        edited: under the intervention.
        edited_loss: its loss.
        intervention: canonical text.
        method: as the source calls it.
        source: where it is published.
    """

    model: str
    task: str
    metric: str
    base: float
    base_loss: float | None
    edited: float
    edited_loss: float | None
    intervention: str
    method: str
    source: str


@dataclass(frozen=True)
class PublishedComparison:
    """A published result and our result.

    Args:
        row: the published result.
        base: our evaluation of the unchanged model.
        edited: our evaluation under the same intervention.
        accuracies: our accuracies before and after, as the publication counts, on its scale.
        losses: our losses before and after, as the publication counts.
        settings: settings that change these values and are, or may be, different here.
    """

    row: Published
    base: Evaluation
    edited: Evaluation
    accuracies: tuple[float, float]
    losses: tuple[float, float]
    settings: tuple[str, ...]


def published(model: str | None = None, task: str | None = None) -> list[Published]:
    """Return the published results of a model on a task that can be run, because they state one intervention."""
    text = (files(__package__) / "data" / "published_results.csv").read_text(encoding="utf-8")
    rows: list[Published] = []
    for r in csv.DictReader(text.splitlines()):
        losses = {name: float(r[name]) if r[name] else None for name in ("base_loss", "edited_loss")}
        row = Published(**r | losses | {"base": float(r["base"]), "edited": float(r["edited"])})  # type: ignore[arg-type]
        try:
            Intervention.parse(row.intervention)
        except SpecError:
            continue  # "composed" does not say of what
        if row.intervention and row.model in CHECKPOINTS and model in (None, row.model) and task in (None, row.task):
            rows.append(row)
    return rows


def as_published(model: str, task: Task) -> Task:
    """Return a task as the authors scored it for a model: Llama writes ten tokens for CounterFact.

    Args:
        model: short name of the model.
        task: with the published split.
    """
    if not (model.startswith("llama") and task.name == "counterfact"):
        return task
    decoding = Decoding(new_tokens=10)
    split = replace(task.test, scorer="contains", decoding=decoding)
    return replace(task, test=split)


def compare_with_published(
    lm: LanguageModel,
    task: Task,
    rows: Sequence[Published],
    *,
    limit: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> list[PublishedComparison]:
    """Score the test split before and after each of some published interventions, decomposed as their authors did: at random.

    Args:
        lm: the unchanged model.
        task: with the published split; HumanEval was published without a split, so all of it is scored.
        rows: what is published of this model on this task.
        limit: only the first so many rows.
        batch_size: sequences in one forward pass.
        seed: of the decompositions, which are random.
        on_progress: called with the number of sequences done and their total.

    Raises:
        LaserError: if the model lacks a matrix, or cannot be scored.
    """
    published_task = as_published(rows[0].model, task)
    full_split = published_task.every if task.name == "humaneval" else published_task.test
    split = full_split.limit(limit)
    base = evaluate(lm, split, batch_size=batch_size, on_progress=on_progress)
    comparisons: list[PublishedComparison] = []
    for row in rows:
        reductions = Intervention.parse(row.intervention).reductions
        same = Intervention(tuple(replace(r, method="reference") for r in reductions))
        with applied(lm, same, seed=seed):
            edited = evaluate(lm, split, batch_size=batch_size, on_progress=on_progress)
        scale = 100 if row.metric in PERCENT else 1
        comparisons.append(
            PublishedComparison(
                row=row,
                base=base,
                edited=edited,
                accuracies=(scale * _accuracy(base), scale * _accuracy(edited)),
                losses=(_loss(lm, base), _loss(lm, edited)),
                settings=tuple(_settings(lm, task, row, base, len(full_split))),
            )
        )
    return comparisons


def _accuracy(e: Evaluation) -> float:
    """Return the accuracy with the answer looked for in the prompt too, where generated text is graded."""
    return e.figures.get("accuracy_reference", e.accuracy)


def _loss(lm: LanguageModel, e: Evaluation) -> float:
    """Return the mean loss; where a masked model has several masks, it is published over one more token than there are."""
    more = lm.kind == "masked" and e.task in SEVERAL_MASKS
    return sum(-s.logprob / (s.tokens + more) for s in e.scores) / e.n


def _settings(lm: LanguageModel, task: Task, row: Published, base: Evaluation, n: int) -> list[str]:
    notes = [f"{base.n} test rows{f', the first of {n}' if base.n < n else ''}; {task.source}"]
    dtype = CHECKPOINTS[row.model][1]
    if dtype is not None and str(lm.dtype) != f"torch.{dtype}":
        notes.append(f"dtype {lm.dtype}; published with {dtype}")
    notes.append("the published decomposition is random, with no seed stated: another seed moves the edited figures")
    if "accuracy_reference" in base.figures:
        notes.append(
            f"published accuracy finds the answer in the prompt too; in the continuation alone it is {base.accuracy:.1%} before"
        )
    if lm.kind == "masked" and task.name in SEVERAL_MASKS:
        notes.append("published loss of a masked model divides by one token too many, as here; true is more")
    if base.scorer == "choice":
        notes.append("a tie between two choices counts as wrong")
    if task.name == "hotpotqa":
        notes.append("published rows have answers of at most 15 tokens of Llama-2: --answer-tokenizer meta-llama/Llama-2-7b-hf")
    return notes
