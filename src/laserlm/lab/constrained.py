"""Compare LASER after training with a rank constraint during training: same data, seeds, matrix and rank.

Source: an open question of Sharma, Ash and Misra, arXiv 2312.13558.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from laserlm.lab.recall.language import QUESTION_SEED_OFFSET, Language, RecallConfig, questions
from laserlm.lab.recall.model import load_or_train
from laserlm.lab.recall.study import GRID, recall_task
from laserlm.lab.training import fit
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import load
from laserlm.models.matrices import read_matrix
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.scoring.tokenize import encode
from laserlm.searching import search
from laserlm.tasks import Example, Split, Task, task

UNCHANGED = Intervention()
OnProgress = Callable[[str, int, int], None]
"""Called with the name of a training, the number of steps done and their total."""


@dataclass(frozen=True)
class TrainingResult:
    """One training and its results.

    Args:
        name: name of the method.
        seed: seed of the training.
        intervention: the intervention applied after training, or constrained during it.
        comparisons: by name of the test questions, the model compared with the plainly trained one.
        residual_energy: by constrained matrix, the share of the squared singular values beyond the rank.
    """

    name: str
    seed: int
    intervention: str
    comparisons: dict[str, Comparison]
    residual_energy: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return {
            "name": self.name,
            "seed": self.seed,
            "intervention": self.intervention,
            "tails": self.residual_energy,
            **{name: comparison.as_dict() for name, comparison in self.comparisons.items()},
        }


def compare_on_recall(
    config: RecallConfig,
    folder: Path,
    *,
    penalties: Sequence[float] = (0.001, 0.01),
    every: int = 1,
    on_progress: OnProgress = lambda *_: None,
) -> Iterator[TrainingResult]:
    """Train on noisy recall with each method; yield the results on clean and on noisy questions.

    A search on the plainly trained model chooses the matrix and the rank. A tenth of the rank of that matrix is a second
    choice. If the search finds no reduction, the only result is that of the plain model.

    Args:
        config: configuration of all models.
        folder: folder for the models; models that are there are loaded.
        penalties: weights of the nuclear norm of the singular values beyond the rank.
        every: steps between two projections.
        on_progress: called after each training step.
    """
    language = Language(config)
    clean = language.draw(2000, seed=2 * QUESTION_SEED_OFFSET + config.seed, alpha=0.0)
    noisy = language.draw(2000, seed=3 * QUESTION_SEED_OFFSET + config.seed)
    splits = {
        "clean": Task.of("clean", questions(language, clean, "clean")).every,
        "noisy": Task.of("noisy", questions(language, noisy, "noisy", noisy=True)).every,
    }

    def train(name: str, *constraints: Callable[[LanguageModel], RankConstraint]) -> LanguageModel:
        return load_or_train(
            config,
            folder / name,
            callbacks=lambda lm: [constraint(lm) for constraint in constraints],
            on_progress=lambda done, total: on_progress(name, done, total),
        )

    plain = train("plain")
    best = search(plain, recall_task(config), strategy="exhaustive", grid=GRID).best
    baseline = _PlainBaseline(plain, splits, config.seed, best)
    yield baseline.result("plain", plain)
    if not best:
        return
    (reduction,) = best.reductions
    for constraint in dict.fromkeys((best, Intervention.parse(f"{reduction.layers}.{reduction.matrix}@0.1"))):
        yield baseline.result("LASER after it", plain, constraint)
        lm = train(f"constraint-{constraint}-{every}", partial(RankConstraint, intervention=constraint, every=every))
        yield baseline.result("constraint", lm, constraint=constraint)
    for penalty in penalties:
        penalised = partial(RankConstraint, intervention=best, every=every, penalty=penalty)
        lm = train(f"penalty-{penalty:g}-{best}-{every}", penalised)
        yield from baseline.penalised_results(penalty, lm)


def compare_on_worldfacts(
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
    on_progress: OnProgress = lambda *_: None,
) -> Iterator[TrainingResult]:
    """Fine-tune the bundled model on worldfacts with each method; yield the results on other facts.

    The first phrasing of each fact is used. The learning rates of this short training sum up to less than 0.002, so only
    large penalties change a singular value. If a search on the plainly tuned model finds no reduction, the results end
    with that model.

    Args:
        seed: seed of the order of the examples.
        steps: training steps.
        batch_size: questions per step.
        learning_rate: highest learning rate of AdamW.
        validation: number of questions for the search.
        test: number of test questions.
        penalties: weights of the nuclear norm of the singular values beyond the rank.
        every: steps between two projections.
        cache: folder with the converted model.
        on_progress: called after each training step.
    """
    facts = task("worldfacts", phrasings="rewrite")
    limited = replace(facts, validation=facts.validation.limit(validation), test=facts.test.limit(test))
    test_facts = {e.fact for e in limited.test}
    training_examples = [e for e in facts.test if e.fact not in test_facts]

    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    tune = partial(_tuned, training_examples, settings, cache, on_progress)
    plain = tune("plain")
    best = search(plain, limited, strategy="race", metric="loss").best
    baseline = _PlainBaseline(plain, {"test": limited.test}, seed, best)
    yield baseline.result("not tuned", load("bundled", dtype="float32", cache=cache))
    yield baseline.result("plain", plain)
    if not best:
        return
    yield baseline.result("LASER after it", plain, best)
    lm = tune("constraint", partial(RankConstraint, intervention=best, every=every))
    yield baseline.result("constraint", lm, constraint=best)
    for penalty in penalties:
        lm = tune(f"penalty {penalty:g}", partial(RankConstraint, intervention=best, every=every, penalty=penalty))
        yield from baseline.penalised_results(penalty, lm)


def _tuned(
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    cache: Path | None,
    on_progress: OnProgress,
    name: str,
    *constraints: Callable[[LanguageModel], RankConstraint],
) -> LanguageModel:
    """Return the bundled model, fine-tuned on examples under constraints."""
    lm = load("bundled", dtype="float32", cache=cache)
    with TemporaryDirectory() as folder:
        fit(
            lm.model,
            _AnswerDataset(lm, examples),
            Path(folder),
            **settings,
            callbacks=[constraint(lm) for constraint in constraints],
            on_progress=lambda done, total: on_progress(name, done, total),
            warmup_steps=settings["steps"] // 10,
        )
    return replace(lm)  # the copy computes the hash of the new weights


class _PlainBaseline:
    """Compares models with the plainly trained one, whose best reduction is ``best``."""

    def __init__(self, plain: LanguageModel, splits: dict[str, Split], seed: int, best: Intervention) -> None:
        self.splits = splits
        self.seed = seed
        self.best = best
        self.base = {name: evaluate(plain, split) for name, split in splits.items()}

    def result(
        self, name: str, lm: LanguageModel, edit: Intervention = UNCHANGED, *, constraint: Intervention = UNCHANGED
    ) -> TrainingResult:
        """Return the result of a model that was trained under ``constraint``, with ``edit`` applied."""
        with applied(lm, edit):
            comparisons = {name: compare(base, evaluate(lm, self.splits[name])) for name, base in self.base.items()}
            residual_energy = {
                e.matrix.id: _energy_beyond(read_matrix(lm.model, e.matrix), e.rank)
                for e in resolve(lm.matrices, constraint or edit or self.best)
            }
        return TrainingResult(name, self.seed, str(constraint or edit), comparisons, residual_energy)

    def penalised_results(self, penalty: float, lm: LanguageModel) -> Iterator[TrainingResult]:
        """Yield the results of a model that was trained with a penalty, without and with the best reduction."""
        yield self.result(f"penalty {penalty:g}", lm, constraint=self.best)
        yield self.result(f"penalty {penalty:g}, LASER after it", lm, self.best)


def _energy_beyond(W: Tensor, rank: int) -> float:
    """Return the share of the squared singular values beyond a rank."""
    energy = torch.linalg.svdvals(W.float()).square()
    return float(energy[rank:].sum() / energy.sum()) if bool(energy.any()) else 0.0


class _AnswerDataset(Dataset[dict[str, Tensor]]):
    """Questions with their answers, padded on the right; the labels are the tokens of the answers."""

    def __init__(self, lm: LanguageModel, examples: Sequence[Example]) -> None:
        rows = encode(lm, examples, "answer")
        sequences = [torch.tensor([*row.ids, row.targets[-1]]) for row in rows]
        shape = len(sequences), max(map(len, sequences))
        self.ids = torch.full(shape, int(lm.require_tokenizer().pad_token_id))
        self.mask = torch.zeros(shape, dtype=torch.long)
        self.labels = torch.full(shape, -100)
        for i, (row, ids) in enumerate(zip(rows, sequences, strict=True)):
            n, start = len(ids), len(ids) - len(row.targets)
            self.ids[i, :n], self.mask[i, :n], self.labels[i, start:n] = ids, 1, ids[start:]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "attention_mask": self.mask[index], "labels": self.labels[index]}
