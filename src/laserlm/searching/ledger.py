"""Scores of interventions on a growing part of the examples, each computed once and saved at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from laserlm.errors import ScoringError
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import Intervention
from laserlm.scoring.records import Evaluation, TokenSequence
from laserlm.searching import base_scores
from laserlm.searching.executors import Executor
from laserlm.searching.hardware import describe
from laserlm.searching.score_table import ScoreTable
from laserlm.searching.scorer import EncodedSplit, Failure, first_changed_block
from laserlm.searching.work import ScoreTask
from laserlm.store import Run
from laserlm.tasks import Split

log = logging.getLogger(__name__)
NEXT_STEP = "fix the cause or give the workers more memory, then run the same command again: the search continues"
BASE = Intervention()
CHUNKS_PER_WORKER = 4
"""Work items that every process gets at least, where examples have to be divided for that."""


@dataclass
class ScoreLedger:
    """Scores of interventions on the first examples of a split; no score is computed twice.

    Args:
        lm: the unchanged model; the executor runs it.
        run: where scores are saved, and where the scores of an earlier process are.
        name: of the split, for the executor.
        encoded: the split.
        executor: does the work.
        memory: bytes for cached activations; examples are scored in chunks whose activations fit.
        deadline: value of ``time.monotonic`` after which no more is begun.
        on_scored: called with an intervention after each part of it that was scored.
        reuses: whether the scores of the unchanged model may come from an earlier search.

    Attributes:
        scores: by canonical text of the intervention, over as many examples as it was scored on.
        failed: why scoring stopped, by intervention. Its earlier scores remain in ``scores``.
        cost: work so far, in passes of one example through the full model.
        scored: examples scored, counted for each intervention.
    """

    lm: LanguageModel
    run: Run
    name: str
    encoded: EncodedSplit
    executor: Executor
    memory: float = float("inf")
    deadline: float = float("inf")
    on_scored: Callable[[Intervention], None] = lambda _: None
    reuses: bool = False
    scores: ScoreTable = field(init=False)
    failed: dict[str, str] = field(init=False)
    cost: float = field(default=0.0, init=False)
    scored: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.scores = ScoreTable(self.run.evaluations(self.split.name))
        self.failed = self.run.failures(self.split.name)
        self._batch_size = self._first_batch_size = self.executor.batch_size
        self._earlier = self.run.notes.get("computed_on", [])[-1:]  # of the process before this one
        self._is_new = True  # nothing was saved by this process
        self._is_base_kept = bool(self.n(BASE))  # scores of an earlier process may be of other hardware
        self._stops: set[int] = set()
        self._unsaved: dict[tuple[str, int], tuple[ScoreTask, Any]] = {}

    @property
    def split(self) -> Split:
        """The examples, in the order in which they are scored."""
        return self.encoded.split

    def n(self, intervention: Intervention) -> int:
        """Return the number of examples that an intervention was scored on."""
        return self.scores.n(str(intervention))

    def fails(self, intervention: Intervention, stop: int) -> bool:
        """Return whether an intervention is known to have no scores on the first ``stop`` examples."""
        return str(intervention) in self.failed and self.n(intervention) < stop

    def first(self, intervention: Intervention, n: int) -> Evaluation:
        """Return the scores on the first ``n`` examples."""
        return self.scores.first(str(intervention), n)

    def extend(
        self,
        interventions: Iterable[Intervention],
        stop: int,
        *,
        next_stop: int | None = None,
        promising: Callable[[], Sequence[Intervention]] | None = None,
    ) -> None:
        """Score each on the first ``stop`` examples, unless it is scored there; ``failed`` has those that cannot be.

        Args:
            interventions: to score.
            stop: number of examples.
            next_stop: number of examples that some of them will be scored on next.
            promising: returns these, the likeliest first.

        Raises:
            OutOfTimeError: at the deadline.
            ScoringError: if the unchanged model cannot be scored, or a single sequence does not fit into memory.
        """
        self._stops.add(stop)
        interventions = list(interventions)
        if BASE in interventions:
            self._read_base()

        def speculate() -> list[ScoreTask]:
            return [] if next_stop is None or promising is None else self._tasks(promising(), next_stop)

        def is_cancelled(task: ScoreTask) -> bool:
            return str(task.intervention) in self.failed

        tasks = self._tasks(interventions, stop)
        self._unsaved.clear()
        for task, result in self.executor.run(tasks, deadline=self.deadline, is_cancelled=is_cancelled, speculate=speculate):
            if isinstance(result, Failure) and result.of_workers and not task.intervention:
                raise ScoringError(
                    f"the unchanged model could not be scored on {self.split.name}: {result.reason}; {NEXT_STEP}"
                )
            self._unsaved[str(task.intervention), task.start] = task, result
            # Scores are saved in the order of the examples, so scores of later examples wait for earlier ones.
            while (key := (str(task.intervention), self.n(task.intervention))) in self._unsaved:
                self._save(*self._unsaved.pop(key))
        if "" in self.failed:
            raise ScoringError(f"the unchanged model cannot be scored on {self.split.name}: {self.failed['']}")
        if BASE in interventions and self.n(BASE) == len(self.split):
            self._keep_base()

    def free(self) -> None:
        """Free all cached activations."""
        self.executor.free(self.name)

    def share(self, intervention: Intervention) -> float:
        """Return the part of the blocks that a pass with this intervention has to run."""
        order = self.executor.block_order(self.name)
        return 1 - first_changed_block(intervention, self.lm.matrices, order) / len(order) if order else 1.0

    def _tasks(self, interventions: Iterable[Intervention], stop: int) -> list[ScoreTask]:
        """Return the missing work items, by examples and then by block, low blocks first.

        The unchanged model is last, where its pass begins at the highest of the blocks.
        """
        shares = {i: self.share(i) for i in interventions if str(i) not in self.failed and self.n(i) < stop}
        ordered = sorted(shares, key=lambda i: (self.n(i), not i, -shares[i]))
        tasks: list[ScoreTask] = []
        for start, group in groupby(ordered, key=self.n):
            same = list(group)
            most = max_sequences(self.encoded.count(start, stop), len(same), self.executor.workers, self.executor.batch_size)
            for a, b in cut(self.lm, self.encoded, start, stop, memory=self.memory, most=most, stops=self._stops):
                tasks += [ScoreTask(self.name, a, b, i, shares[i]) for i in same]
        return tasks

    @cached_property
    def _file_of_base(self) -> Path | None:
        self.executor.block_order(self.name)  # waits for a worker, which says what its hardware is
        hardware = self.executor.hardware | {"batch_size": self._first_batch_size}
        return base_scores.find_file(self.lm, self.encoded, hardware)

    def _read_base(self) -> None:
        """Take all scores of the unchanged model from an earlier search on the same examples, if there are any."""
        if not self.reuses or self.n(BASE) or self._file_of_base is None:
            return
        kept = base_scores.read(self._file_of_base, self.lm, self.encoded)
        if kept is not None:
            self.run.record(kept, self.split.examples)
            self.scores.append(kept)
            self._is_base_kept = True

    def _keep_base(self) -> None:
        if not self._is_base_kept and self._file_of_base is not None:
            base_scores.write(self._file_of_base, self.scores[str(BASE)])
            self._is_base_kept = True

    def _save(self, task: ScoreTask, result: Evaluation | Failure) -> None:
        text = str(task.intervention)
        examples = self.split.examples[task.start : task.stop]
        if self.executor.batch_size < self._batch_size:  # for every process that continues this run
            self._batch_size = self.executor.batch_size
            self.run.note("batch_size", self._batch_size)
            self._note_hardware()
        if self._is_new:
            self._note_hardware()
            self._is_new = False
        if isinstance(result, Failure):
            self.run.fail(self.split.name, text, result.reason, start=task.start)
            self.failed[text] = result.reason
        else:
            self.run.record(result, examples, start=task.start)
            self.scores.append(result)
        self.cost += task.cost
        self.scored += len(examples)
        self.on_scored(task.intervention)

    def _note_hardware(self) -> None:
        """Note what computes the scores; warn if an earlier process had something else."""
        now = self.executor.hardware | {"batch_size": self.executor.batch_size}
        noted = self.run.notes.get("computed_on", [])
        if now in noted[-1:]:
            return
        # A batch that this process has halved is no reason to warn.
        if self._is_new and self._earlier and self._earlier[-1] != now | {"batch_size": self._first_batch_size}:
            log.warning(
                "run %s goes on with %s; its earlier scores are from %s: they may differ in the last digits, and by more in "
                "half precision; --restart computes all of them anew",
                self.run.id,
                describe(now),
                describe(self._earlier[-1]),
            )
        self.run.note("computed_on", [*noted, now])


def cut(
    lm: LanguageModel,
    encoded: EncodedSplit,
    start: int,
    stop: int,
    *,
    memory: float,
    most: int | None = None,
    stops: Collection[int] = (),
) -> Iterator[tuple[int, int]]:
    """Cut a range of examples into chunks whose cached activations fit into memory.

    Args:
        lm: the model.
        encoded: the split.
        start: index of the first example.
        stop: index just past the last one.
        memory: bytes for cached activations, the old and the new ones while the cache moves up.
        most: sequences of a chunk; None sets no bound.
        stops: indices at which a chunk ends in any case.
    """
    sequences: dict[int, list[TokenSequence]] = {}
    for sequence in encoded.sequences:
        sequences.setdefault(sequence.example, []).append(sequence)
    first, count, encoder_length, decoder_length = start, 0, 0, 0
    for i in range(start, stop):
        longest = (max(len(s.ids) for s in sequences[i]), max(len(s.decoder) for s in sequences[i]))
        count += len(sequences[i])
        encoder_length, decoder_length = max(encoder_length, longest[0]), max(decoder_length, longest[1])
        # No sequence is padded to more than the longest.
        needed = 2 * count * (encoder_length + decoder_length) * lm.width * lm.dtype.itemsize
        if i > first and (needed > memory or (most is not None and count > most) or i in stops):
            yield first, i
            first, count, (encoder_length, decoder_length) = i, len(sequences[i]), longest
    yield first, stop


def max_sequences(sequences: int, interventions: int, workers: int, batch_size: int) -> int:
    """Return the most sequences of a chunk that leave every process work, also with few interventions."""
    if workers == 1 or interventions >= CHUNKS_PER_WORKER * workers:
        return sequences
    parts = -(-CHUNKS_PER_WORKER * workers // interventions)
    return batch_size * max(1, -(-sequences // batch_size) // parts)
