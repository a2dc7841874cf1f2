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

from laserlm.edit import applied, resolve
from laserlm.lab.constraint import RankConstraint
from laserlm.lab.recall.language import DRAWN, Language, Recipe, questions
from laserlm.lab.recall.model import trained
from laserlm.lab.recall.study import GRID, task_of
from laserlm.lab.training import fit
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import load
from laserlm.models.matrices import read_matrix
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.scoring.tokenize import encode
from laserlm.searching import search
from laserlm.tasks import Example, Split, Task, task

__all__ = ["TrainingResult", "on_recall", "on_worldfacts"]

NOTHING = Intervention()
Told = Callable[[str, int, int], None]
"""Called with what is done, the number of steps done and their total."""


@dataclass(frozen=True)
class TrainingResult:
    """One way to train a model, and what it is worth.

    Args:
        name: of the way.
        seed: of the training.
        intervention: what was applied after training, or constrained during it.
        sides: by name of the questions, the model against the one that was trained plainly.
        tails: by matrix that is constrained somewhere, the share of the sum of squared singular values beyond its rank.
    """

    name: str
    seed: int
    intervention: str
    sides: dict[str, Comparison]
    tails: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        sides = {name: side.as_dict() for name, side in self.sides.items()}
        return {"name": self.name, "seed": self.seed, "intervention": self.intervention, "tails": self.tails, **sides}


def on_recall(
    recipe: Recipe,
    folder: Path,
    *,
    penalties: Sequence[float] = (0.001, 0.01),
    every: int = 1,
    on_progress: Told = lambda *_: None,
) -> Iterator[TrainingResult]:
    """Yield the ways to train on noisy recall, each measured on clean and on noisy questions.

    The matrix and rank are what a search finds best on the plainly trained model, and a tenth of that matrix's rank besides.
    Where the search finds nothing, there is the plain model alone.

    Args:
        recipe: of all models.
        folder: for the models; those that are there are used again.
        penalties: weights of the tail's nuclear norm.
        every: steps between two projections.
        on_progress: called after each step of training.
    """
    language = Language(recipe)
    clean = language.draw(2000, seed=2 * DRAWN + recipe.seed, alpha=0.0)
    noisy = language.draw(2000, seed=3 * DRAWN + recipe.seed)
    splits = {
        "clean": Task.of("clean", questions(language, clean, "clean")).every,
        "noisy": Task.of("noisy", questions(language, noisy, "noisy", noisy=True)).every,
    }

    def train(name: str, *callbacks: Callable[[LanguageModel], RankConstraint]) -> LanguageModel:
        return trained(
            recipe,
            folder / name,
            callbacks=lambda lm: [make(lm) for make in callbacks],
            on_progress=lambda done, total: on_progress(name, done, total),
        )

    plain = train("plain")
    found = search(plain, task_of(recipe), strategy="exhaustive", grid=GRID).best
    compared = _Compared(plain, splits, recipe.seed, found)
    yield compared.arm("plain", plain)
    if not found:
        return
    (reduction,) = found.reductions
    for held in dict.fromkeys((found, Intervention.parse(f"{reduction.layers}.{reduction.matrix}@0.1"))):
        yield compared.arm("LASER after it", plain, held)
        lm = train(f"constraint-{held}-{every}", partial(RankConstraint, intervention=held, every=every))
        yield compared.arm("constraint", lm, held=held)
    for penalty in penalties:
        make = partial(RankConstraint, intervention=found, every=every, penalty=penalty)
        lm = train(f"penalty-{penalty:g}-{found}-{every}", make)
        yield compared.arm(f"penalty {penalty:g}", lm, held=found)
        yield compared.arm(f"penalty {penalty:g}, LASER after it", lm, found)


def on_worldfacts(
    seed: int,
    *,
    steps: int = 60,
    batch_size: int = 8,
    learning_rate: float = 5e-5,
    validation: int = 300,
    test: int = 1000,
    penalties: Sequence[float] = (100.0, 1000.0),
    every: int = 5,
    cache: Path | None = None,
    on_progress: Told = lambda *_: None,
) -> Iterator[TrainingResult]:
    """Yield the ways to fine-tune the bundled model on worldfacts, each measured on facts that it was not tuned on.

    The first phrasing of each fact is used. The learning rates of so short a training sum up to less than two thousandths,
    so that only large penalties move a singular value. Where a search on the plainly tuned model finds nothing, there is that
    model alone.

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
    facts = task("worldfacts", phrasings="rewrite")
    made = replace(facts, validation=facts.validation.limit(validation), test=facts.test.limit(test))
    measured = {e.fact for e in made.test}
    lessons = [e for e in facts.test if e.fact not in measured]

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

    plain = tune("plain")
    found = search(plain, made, metric="loss").best
    compared = _Compared(plain, {"test": made.test}, seed, found)
    yield compared.arm("not tuned", load("bundled", dtype="float32", cache=cache))
    yield compared.arm("plain", plain)
    if not found:
        return
    yield compared.arm("LASER after it", plain, found)
    yield compared.arm("constraint", tune("constraint", partial(RankConstraint, intervention=found, every=every)), held=found)
    for penalty in penalties:
        make = partial(RankConstraint, intervention=found, every=every, penalty=penalty)
        lm = tune(f"penalty {penalty:g}", make)
        yield compared.arm(f"penalty {penalty:g}", lm, held=found)
        yield compared.arm(f"penalty {penalty:g}, LASER after it", lm, found)


class _Compared:
    """Measures models against the plainly trained one."""

    def __init__(self, plain: LanguageModel, splits: dict[str, Split], seed: int, found: Intervention) -> None:
        self.splits = splits
        self.seed = seed
        self.found = found
        self.base = {name: evaluate(plain, split) for name, split in splits.items()}

    def arm(
        self, name: str, lm: LanguageModel, after: Intervention = NOTHING, *, held: Intervention = NOTHING
    ) -> TrainingResult:
        """Return what a model is worth that was trained with ``held`` constrained, under ``after``."""
        with applied(lm, after):
            sides = {split: compare(base, evaluate(lm, self.splits[split])) for split, base in self.base.items()}
            tails = {
                e.matrix.id: _tail(read_matrix(lm.model, e.matrix), e.rank)
                for e in resolve(lm.matrices, held or after or self.found)
            }
        return TrainingResult(name, self.seed, str(held or after), sides, tails)


def _tail(W: Tensor, rank: int) -> float:
    energy = torch.linalg.svdvals(W.float()).square()
    return float(energy[rank:].sum() / energy.sum()) if bool(energy.any()) else 0.0


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
