"""The harm of what a search scored: what it measured itself, and what is measured after it for its loss map."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from laserlm.errors import AnalysisError
from laserlm.models.language_model import LanguageModel
from laserlm.provenance import provenance
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import compare
from laserlm.scoring.identity import digest
from laserlm.scoring.records import Evaluation
from laserlm.searching.driver import CHOOSING, METHOD, splits_of_guards
from laserlm.searching.executors import LocalExecutor
from laserlm.searching.guard import Guard, GuardKind, Harm
from laserlm.searching.ledger import ScoreLedger
from laserlm.searching.scorer import PrefixScorer
from laserlm.store import RunInfo, Store

MEMORY = 2**30
"""Bytes for cached activations and decompositions together."""


def stored_harms(store: Store, run: RunInfo) -> dict[str, Harm]:
    """Return the harm of what was measured on every guard of a search, by canonical text.

    It is that on the passages or questions that the search looked at when it chose. Of several guards it is that on the
    guard where it is largest.
    """
    guards: list[Mapping[str, Any]] = run.settings.get("guards", [])
    harms: dict[str, Harm] = {}
    for id in [*(r.id for r in store.runs() if r.settings.get("harm_of") == run.id), run.id]:
        of_guards = [_harms(guard, store.evaluations(id, CHOOSING.format(i))) for i, guard in enumerate(guards)]
        for text in set.intersection(*map(set, of_guards)) if of_guards else ():
            harms[text] = max((of[text] for of in of_guards), key=lambda harm: harm.change)
    return harms


def _harms(guard: Mapping[str, Any], evaluations: Mapping[str, Evaluation]) -> dict[str, Harm]:
    """Return the harm of what was scored on all examples of a guard."""
    base = evaluations.get("")
    if base is None or base.n < guard.get("n", 0):
        return {}
    kind: GuardKind = "text" if base.scorer == "perplexity" else "questions"
    complete = {text: e for text, e in evaluations.items() if text and e.n == base.n}
    return {text: Harm(str(guard["name"]), kind, compare(base, e)) for text, e in complete.items()}


def measure_map_harms(
    lm: LanguageModel,
    store: Store,
    run: RunInfo,
    guards: Sequence[Guard],
    interventions: Sequence[str],
    *,
    batch_size: int = 32,
    on_scored: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, str]:
    """Measure and store the harm of reductions on the guards of a search, and return why some could not be measured.

    After an interruption, the same call goes on where it stopped. ``stored_harms`` returns what is measured.

    Args:
        lm: the unchanged model of the search.
        store: the results database.
        run: the search.
        guards: its guards, as ``guards_of_run`` returns them.
        interventions: canonical texts.
        batch_size: sequences in one forward pass.
        on_scored: called with the number of passages and questions that are scored, and with that of all.

    Raises:
        AnalysisError: if the search has no guard.
        RunBusyError: if another process measures the same.
    """
    if not guards:
        raise AnalysisError(f"run {run.id} has no guard to measure harm on; search again with --guard FILE or --guard TASK")
    seed = int(run.settings.get("seed", 0))
    settings = {"model": run.model, "task": run.task, "model_hash": lm.hash, "harm_of": run.id, "method": METHOD}
    origin = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
    wanted = [Intervention(), *map(Intervention.parse, interventions)]
    parts = splits_of_guards(guards)
    splits = {name: parts[name] for name in (CHOOSING.format(i) for i in range(len(guards)))}
    failed: dict[str, str] = {}
    with store.run(kind="scores", key=digest(settings), settings=settings, provenance=origin) as work:
        executor = LocalExecutor(PrefixScorer(lm, splits, batch_size=batch_size, memory=MEMORY, seed=seed))
        ledgers = [ScoreLedger(lm, work, name, part, executor, MEMORY / 2) for name, part in splits.items()]
        total = sum(len(ledger.split) for ledger in ledgers) * len(wanted)

        def report(_: Intervention) -> None:
            on_scored(sum(ledger.n(i) for ledger in ledgers for i in wanted), total)

        for ledger in ledgers:
            ledger.on_scored = report
            ledger.extend(wanted, len(ledger.split))
            ledger.free()
            failed |= {text: ledger.failed[text] for text in map(str, wanted) if text in ledger.failed}
    return failed
