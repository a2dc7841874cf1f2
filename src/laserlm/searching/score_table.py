"""The evaluations of many interventions on the same examples, in little memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from laserlm.scoring.records import Evaluation, ExampleScore


@dataclass
class _Row:
    """The scores of one intervention, split into their log-probabilities and what equals that of other scores."""

    head: Evaluation  # with its first score only
    logprobs: array[float] = field(default_factory=lambda: array("d"))
    rest: list[ExampleScore] = field(default_factory=list)


class ScoreTable(Mapping[str, Evaluation]):
    """Evaluations by the canonical text of their intervention, in about 17 bytes for each score.

    On one example most interventions predict the same tokens. Their scores differ in the log-probability alone, so the rest
    of a score is kept once for all of them.
    """

    def __init__(self, evaluations: Iterable[Evaluation] = ()) -> None:
        self._rows: dict[str, _Row] = {}
        self._shared: dict[tuple[ExampleScore, bool | None], ExampleScore] = {}
        for evaluation in evaluations:
            self.append(evaluation)

    def __getitem__(self, intervention: str) -> Evaluation:
        return self.first(intervention, len(self._rows[intervention].rest))

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, intervention: object) -> bool:
        return intervention in self._rows

    def n(self, intervention: str) -> int:
        """Return the number of examples that an intervention was scored on."""
        return len(self._rows[intervention].rest) if intervention in self._rows else 0

    def first(self, intervention: str, n: int) -> Evaluation:
        """Return the scores on the first ``n`` examples.

        Raises:
            KeyError: if the intervention has no scores.
        """
        row = self._rows[intervention]
        scores = (_with_logprob(rest, x) for rest, x in zip(row.rest[:n], row.logprobs[:n], strict=True))
        return replace(row.head, scores=tuple(scores))

    def append(self, evaluation: Evaluation) -> None:
        """Add scores after those that the intervention has; the times add up."""
        row = self._rows.get(evaluation.intervention)
        if row is None:
            row = self._rows[evaluation.intervention] = _Row(replace(evaluation, scores=evaluation.scores[:1]))
        else:
            row.head = replace(row.head, seconds=row.head.seconds + evaluation.seconds)
        for score in evaluation.scores:
            rest = _with_logprob(score, 0.0)
            row.rest.append(self._shared.setdefault((rest, rest.tied), rest))  # equal scores may differ in ``tied``
            row.logprobs.append(score.logprob)


def _with_logprob(score: ExampleScore, logprob: float) -> ExampleScore:
    """Return the same score with another log-probability; ``replace`` would take several times as long."""
    other = object.__new__(ExampleScore)
    vars(other).update(vars(score), logprob=logprob)
    return other
