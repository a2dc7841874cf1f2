"""LASER after training against a rank constraint during training: the same data, the same seeds, the same matrix and rank.

Source: an open question of Sharma, Ash and Misra, arXiv 2312.13558.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from laserlm.editing import applied
from laserlm.lab.constraint import RankConstraint
from laserlm.lab.recall.language import DRAWN, Language, Recipe, questions
from laserlm.lab.recall.model import trained
from laserlm.lab.recall.study import GRID, task_of
from laserlm.lab.training import fit
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import load
from laserlm.scoring.encoding import encode
from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.scoring.records import Evaluation
from laserlm.searching import search
from laserlm.spec import Intervention
from laserlm.tasks import Example, Split, Task, task

__all__ = ["Arm", "on_recall", "on_worldfacts"]

SIDES = {"clean": 0.0, "noisy": None}
"""Questions on noisy recall by the probability of noise in their sequences; None takes the recipe's."""
Told = Callable[[str, int, int], None]
"""Called with what is done, the number of steps done and their total."""


@dataclass(frozen=True)
class Arm:
    """One way to train a model, and what it is worth.

    Args:
        name: of the way.
        seed: of the training.
        intervention: what was applied after training, or constrained during it.
        sides: by name of the questions, the model against the one that was trained plainly.
    """

    name: str
    seed: int
    intervention: str
    sides: dict[str, Comparison]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        sides = {name: side.as_dict() for name, side in self.sides.items()}
        return {"name": self.name, "seed": self.seed, "intervention": self.intervention, **sides}


def on_recall(
    recipe: Recipe,
    folder: Path,
    *,
    penalties: Sequence[float] = (0.01, 0.1),
    every: int = 1,
    on_progress: Told = lambda *_: None,
) -> Iterator[Arm]:
    """Yield the ways to train on noisy recall, each measured on clean and on noisy questions.

    The matrix and rank are what a search finds best on the plainly trained model; where that keeps nothing of the matrix,
    a tenth of its rank is constrained too.

    Args:
        recipe: of all models.
        folder: for the models; those that are there are used again.
        penalties: weights of the tail's nuclear norm.
        every: steps between two projections.
        on_progress: called after each step of training.
    """
    language = Language(recipe)
    drawn = {name: language.draw(2000, seed=DRAWN + i + recipe.seed, alpha=a) for i, (name, a) in enumerate(SIDES.items(), 1)}
    splits = {
        name: Task.of(name, questions(language, sequences, name, noisy=name == "noisy")).every
        for name, sequences in drawn.items()
    }

    def train(name: str, *callbacks: Callable[[LanguageModel], RankConstraint]) -> LanguageModel:
        return trained(
            recipe,
            folder / name,
            callbacks=lambda lm: [make(lm) for make in callbacks],
            on_progress=lambda done, total: on_progress(name, done, total),
        )

    plain = train("plain")
    base = _evaluated(plain, splits)
    found = search(plain, task_of(recipe), strategy="exhaustive", grid=GRID).best
    yield Arm("plain", recipe.seed, "", _against(base, base))
    yield from _after(plain, found, base, splits, recipe.seed)
    (reduction,) = found.reductions
    some = Intervention.parse(f"{reduction.layers}.{reduction.matrix}@0.1")
    for held in dict.fromkeys((found, some)):
        lm = train(f"constraint-{held}", partial(RankConstraint, intervention=held, every=every))
        yield Arm("constraint", recipe.seed, str(held), _against(base, _evaluated(lm, splits)))
    for penalty in penalties:
        lm = train(f"penalty-{penalty:g}-{found}", partial(RankConstraint, intervention=found, every=every, penalty=penalty))
        yield Arm(f"penalty {penalty:g}", recipe.seed, str(found), _against(base, _evaluated(lm, splits)))
        yield from _after(lm, found, base, splits, recipe.seed, f"penalty {penalty:g}, then LASER")


def on_worldfacts(
    seed: int,
    *,
    steps: int = 100,
    batch_size: int = 16,
    learning_rate: float = 2e-5,
    validation: int = 300,
    test: int = 1000,
    penalties: Sequence[float] = (0.1,),
    every: int = 5,
    cache: Path | None = None,
    on_progress: Told = lambda *_: None,
) -> Iterator[Arm]:
    """Yield the ways to fine-tune the bundled model on worldfacts, each measured on facts that it was not tuned on.

    Args:
        seed: of the order of the examples.
        steps: of training.
        batch_size: questions in a step.
        learning_rate: of AdamW at its highest.
        validation: questions that the search chooses on.
        test: questions that are measured on.
        penalties: weights of the tail's nuclear norm.
        every: steps between two projections.
        cache: folder with the converted model.
        on_progress: called after each step of training.
    """
    facts = task("worldfacts")
    made = replace(facts, validation=facts.validation.limit(validation), test=facts.test.limit(test))
    measured = {e.fact for e in made.test}
    lessons = [e for e in facts.test if e.fact not in measured]
    splits = {"test": made.test}

    def tune(name: str, *callbacks: Callable[[LanguageModel], RankConstraint]) -> LanguageModel:
        lm = load("bundled", dtype="float32", cache=cache)
        with TemporaryDirectory() as folder:
            fit(
                lm.model,
                _Answers(lm, lessons),
                Path(folder),
                steps=steps,
                batch_size=batch_size,
                learning_rate=learning_rate,
                seed=seed,
                callbacks=[make(lm) for make in callbacks],
                on_progress=lambda done, total: on_progress(name, done, total),
                warmup_steps=steps // 10,
            )
        return replace(lm)  # whose hash is that of the new weights

    untuned = load("bundled", dtype="float32", cache=cache)
    plain = tune("plain")
    base = _evaluated(plain, splits)
    yield Arm("not tuned", seed, "", _against(base, _evaluated(untuned, splits)))
    yield Arm("plain", seed, "", _against(base, base))
    found = search(plain, made, metric="loss").best
    yield from _after(plain, found, base, splits, seed)
    if not found:
        return
    lm = tune(f"constraint {found}", partial(RankConstraint, intervention=found, every=every))
    yield Arm("constraint", seed, str(found), _against(base, _evaluated(lm, splits)))
    for penalty in penalties:
        lm = tune(f"penalty {penalty:g} {found}", partial(RankConstraint, intervention=found, every=every, penalty=penalty))
        yield Arm(f"penalty {penalty:g}", seed, str(found), _against(base, _evaluated(lm, splits)))
        yield from _after(lm, found, base, splits, seed, f"penalty {penalty:g}, then LASER")


class _Answers(Dataset[dict[str, Tensor]]):
    """Questions with their answers, the loss over the answers' tokens; padded on the right."""

    def __init__(self, lm: LanguageModel, examples: Sequence[Example]) -> None:
        rows = encode(lm, examples, "answer")
        whole = [(torch.tensor([*row.ids, row.targets[-1]]), len(row.targets)) for row in rows]
        T = max(len(ids) for ids, _ in whole)
        self.ids = torch.full((len(whole), T), int(lm.need_tokenizer().pad_token_id))
        self.mask = torch.zeros(len(whole), T, dtype=torch.long)
        self.labels = torch.full((len(whole), T), -100)
        for i, (ids, answer) in enumerate(whole):
            n = len(ids)
            self.ids[i, :n], self.mask[i, :n], self.labels[i, n - answer : n] = ids, 1, ids[n - answer :]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}


def _evaluated(lm: LanguageModel, splits: dict[str, Split]) -> dict[str, Evaluation]:
    return {name: evaluate(lm, split) for name, split in splits.items()}


def _against(base: dict[str, Evaluation], found: dict[str, Evaluation]) -> dict[str, Comparison]:
    return {name: compare(base[name], found[name]) for name in base}


def _after(
    lm: LanguageModel,
    found: Intervention,
    base: dict[str, Evaluation],
    splits: dict[str, Split],
    seed: int,
    name: str = "LASER",
) -> Iterator[Arm]:
    with applied(lm, found):
        yield Arm(name, seed, str(found), _against(base, _evaluated(lm, splits)))
