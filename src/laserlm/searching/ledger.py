"""Scores of interventions on a growing part of the examples, each scored once and saved as soon as it is."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation
from laserlm.scoring.tokenize import TokenSequence
from laserlm.searching.desk import EncodedSplit, ScoreTask, first_changed_block
from laserlm.searching.executors import Executor, WorkFailure
from laserlm.store import Run
from laserlm.tasks import Split

__all__ = ["ScoreLedger", "cut", "max_examples", "rows_between"]

AGAIN = "mend that, give workers more memory (or take fewer), and the same command goes on"
PIECES = 4
"""Pieces of work that every process gets at least, where examples have to be divided for that."""


@dataclass
class ScoreLedger:
    """Score interventions on the first examples of a split, from the frontier, and keep what there is already.

    Args:
        lm: the unchanged model; it is looked at, the executor runs it.
        run: where scores are saved, and where those of an earlier process are taken from.
        name: under which the executor has the material.
        material: the examples.
        executor: does the work.
        memory: bytes that the frontier's boundaries may take; examples are scored in chunks that keep to it.
        deadline: value of ``time.monotonic`` after which no more is begun.
        on_scored: called with an intervention after each part of it that was scored.

    Attributes:
        scores: what there is by intervention, of as many examples as it was scored on.
        failed: reasons of those that cannot be scored on more examples than they were.
        work: passes of one example through the whole model that were made, a pass through some blocks in proportion.
        scored: examples scored, counted for each intervention.
    """

    lm: LanguageModel
    run: Run
    name: str
    material: EncodedSplit
    executor: Executor
    memory: float = float("inf")
    deadline: float = float("inf")
    on_scored: Callable[[Intervention], None] = lambda _: None
    scores: dict[str, Evaluation] = field(init=False)
    failed: dict[str, str] = field(init=False)
    work: float = field(default=0.0, init=False)
    scored: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.scores, self.failed = self.run.trials(self.split.name)
        self._batch = self.executor.batch
        self._stops: set[int] = set()
        self._early: dict[tuple[str, int], tuple[ScoreTask, Any]] = {}

    @property
    def split(self) -> Split:
        """The examples, in the order in which they are used."""
        return self.material.split

    def n(self, intervention: Intervention) -> int:
        """Return the number of examples that an intervention was scored on."""
        found = self.scores.get(str(intervention))
        return found.n if found is not None else 0

    def fails(self, intervention: Intervention, stop: int) -> bool:
        """Return whether an intervention is known to have no scores on the first ``stop`` examples."""
        return str(intervention) in self.failed and self.n(intervention) < stop

    def first(self, intervention: Intervention, n: int) -> Evaluation:
        """Return the scores on the first ``n`` examples."""
        found = self.scores[str(intervention)]
        return replace(found, scores=found.scores[:n])

    def extend(
        self,
        interventions: Iterable[Intervention],
        stop: int,
        *,
        then: int | None = None,
        promising: Callable[[], Sequence[Intervention]] | None = None,
    ) -> None:
        """Score each on the first ``stop`` examples, as far as it is not; those that fail are found in ``failed``.

        Args:
            interventions: what is scored.
            stop: number of examples.
            then: number of examples that some of them will be scored on next.
            promising: returns these, the likeliest first.

        Raises:
            OutOfTimeError: at the deadline.
            ScoringError: if the unchanged model cannot be scored, or a single row does not fit into memory.
        """
        self._stops.add(stop)

        def ahead() -> list[ScoreTask]:
            return [] if then is None or promising is None else self._pieces(promising(), then)

        def needless(piece: ScoreTask) -> bool:
            return str(piece.intervention) in self.failed

        wanted = self._pieces(interventions, stop)
        self._early.clear()
        for piece, found in self.executor.run(wanted, deadline=self.deadline, needless=needless, ahead=ahead):
            if isinstance(found, WorkFailure) and not piece.intervention:
                raise ScoringError(f"the unchanged model could not be scored on {self.split.name}: {found}; {AGAIN}")
            self._early[str(piece.intervention), piece.start] = piece, found
            # Scores are saved in the order of the examples; those of later ones wait until the earlier ones are there.
            while (key := (str(piece.intervention), self.n(piece.intervention))) in self._early:
                self._save(*self._early.pop(key))
        if "" in self.failed:
            raise ScoringError(f"the unchanged model cannot be scored on {self.split.name}: {self.failed['']}")

    def release(self) -> None:
        """Free all boundaries."""
        self.executor.release(self.name)

    def share(self, intervention: Intervention) -> float:
        """Return the part of the blocks that a pass with this intervention has to run."""
        order = self.executor.order(self.name)
        return 1 - first_changed_block(intervention, self.lm.matrices, order) / len(order) if order else 1.0

    def _pieces(self, interventions: Iterable[Intervention], stop: int) -> list[ScoreTask]:
        """Return what is left to do, by examples and then by block, low blocks first."""
        shares = {i: self.share(i) for i in interventions if str(i) not in self.failed and self.n(i) < stop}
        short = sorted(shares, key=lambda i: (self.n(i), -shares[i]))
        return [
            ScoreTask(self.name, a, b, i, shares[i])
            for start, group in groupby(short, key=self.n)
            for same in [list(group)]
            for a, b in cut(
                self.lm,
                self.material,
                (start, stop),
                memory=self.memory,
                most=max_examples(
                    rows_between(self.material, start, stop), len(same), self.executor.workers, self.executor.batch
                ),
                stops=self._stops,
            )
            for i in same
        ]

    def _save(self, piece: ScoreTask, found: Evaluation | str) -> None:
        text = str(piece.intervention)
        examples = self.split.examples[piece.start : piece.stop]
        if self.executor.batch < self._batch:  # for all that goes on with this run
            self._batch = self.executor.batch
            self.run.note("batch_size", self._batch)
        if isinstance(found, str):
            self.run.fail(self.split.name, text, found, start=piece.start)
            self.failed[text] = found
        else:
            self.run.record(found, examples, start=piece.start)
            before = self.scores.get(text)
            if before is not None:
                found = replace(found, scores=before.scores + found.scores, seconds=before.seconds + found.seconds)
            self.scores[text] = found
        self.work += piece.work
        self.scored += len(examples)
        self.on_scored(piece.intervention)


def cut(
    lm: LanguageModel,
    material: EncodedSplit,
    where: tuple[int, int],
    *,
    memory: float,
    most: int | None = None,
    stops: Collection[int] = (),
) -> Iterator[tuple[int, int]]:
    """Cut a range of examples into chunks whose boundary fits into memory.

    Args:
        lm: the model.
        material: the examples.
        where: place of the first, and that just past the last.
        memory: bytes that a boundary may take, the old and the new one while it moves.
        most: rows of a chunk; None sets no bound.
        stops: places where a chunk ends in any case.
    """
    start, stop = where
    of_example: dict[int, list[TokenSequence]] = {}
    for row in material.rows:
        of_example.setdefault(row.example, []).append(row)
    a, count, longest, decoded = start, 0, 0, 0
    for i in range(start, stop):
        here = (max(len(r.ids) for r in of_example[i]), max(len(r.decoder) for r in of_example[i]))
        count, longest, decoded = count + len(of_example[i]), max(longest, here[0]), max(decoded, here[1])
        # No row is padded to more.
        full = 2 * count * (longest + decoded) * lm.width * lm.dtype.itemsize > memory or (most is not None and count > most)
        if i > a and (full or i in stops):
            yield a, i
            a, count, (longest, decoded) = i, len(of_example[i]), here
    yield a, stop


def rows_between(material: EncodedSplit, start: int, stop: int) -> int:
    """Return the number of rows of a range of examples."""
    return sum(start <= row.example < stop for row in material.rows)


def max_examples(rows: int, interventions: int, workers: int, batch: int) -> int:
    """Return the rows of a chunk at most that leave every process something to do, also with few interventions."""
    if workers == 1 or interventions >= PIECES * workers:
        return rows
    parts = -(-PIECES * workers // interventions)
    return batch * max(1, -(-rows // batch) // parts)
