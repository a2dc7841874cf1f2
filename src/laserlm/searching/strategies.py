"""How a search tries its candidates: each strategy is a function of the session, and leaves its choice in ``session.best``."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from laserlm.errors import ScoringError
from laserlm.reductions import Intervention
from laserlm.scoring.statistics import dense_ranks, spearman
from laserlm.searching.candidates import Candidate
from laserlm.searching.components import PARTS, choose_components, cost_of_step
from laserlm.searching.compose import compose, in_order
from laserlm.searching.config import SearchConfig, Strategy
from laserlm.searching.executors import OutOfTimeError
from laserlm.searching.ledger import BASE
from laserlm.searching.race import choose, race, rung_sizes
from laserlm.searching.result import ScreenReport
from laserlm.searching.scorer import Failure
from laserlm.searching.screen import OUT_OF_TIME, Prediction, Screening
from laserlm.searching.session import MEAN_SHARE, SearchSession
from laserlm.searching.strengths import weaken_components
from laserlm.searching.work import SCREEN_PASSES, screen_tasks

log = logging.getLogger(__name__)
SCREEN_SHARE = 0.75
"""Largest share of the time left that the screen takes, so that some is left to score what it ranked."""


def exhaustive(session: SearchSession) -> None:
    """Score every candidate on every validation example."""
    ledger = session.on_validation
    everything = [BASE, *(c.intervention for c in session.candidates)]
    session.begin("exhaustive", everything, len(ledger.split))
    try:
        ledger.extend([BASE], len(ledger.split))  # which would be the last of thousands
        ledger.extend(everything, len(ledger.split))
    finally:
        scored = [i for i in everything if ledger.n(i) and str(i) not in ledger.failed]
        session.choose(scored, min(map(ledger.n, scored), default=0))
    session.compare_harms()


def race_candidates(session: SearchSession) -> None:
    """Screen all candidates, and let the most promising race on more and more validation examples."""
    config, ledger = session.config, session.on_validation
    screening, seconds = screen_candidates(session)
    chosen, random_ones = choose(session.candidates, screening.predictions, config)

    def on_rung(number: int, rungs: int, interventions: Sequence[Intervention], stop: int) -> None:
        session.begin(
            f"rung {number} of {rungs}", interventions, stop, later=_cost_of_later_rungs(session, interventions, stop)
        )

    try:
        entered = [*chosen, *random_ones]
        for rung in race(ledger, entered, session.candidates, session.ranking_metric, config, on_rung, session.allows):
            session.rungs.append(rung)
            session.best = Intervention.parse(rung.leader)
            if session.screen_report is None:
                session.screen_report = _screen_report(session, screening, chosen, random_ones, rung.examples, seconds)
    except OutOfTimeError:
        # The best of what the last complete rung left, or of what the first one has scored.
        everything = [BASE, *(c.intervention for c in session.candidates)]
        session.choose(everything, session.rungs[-1].examples if session.rungs else min(config.first_rung, len(ledger.split)))
        raise
    session.compare_harms()


def compose_reductions(session: SearchSession) -> None:
    """Add one reduction after another, each only if it improves validation significantly."""
    config, ledger = session.config, session.on_validation
    screening = screen_candidates(session)[0] if config.screens else Screening()
    ordered = in_order(session.candidates, screening.predictions, config)

    def on_try(number: int, tried: Intervention) -> None:
        later = MEAN_SHARE * len(ledger.split) * (len(ordered) - number - 1)
        session.begin(f"trial {number + 1} of {len(ordered)}", [tried], len(ledger.split), later=later)

    session.begin("compose", [BASE], len(ledger.split), later=MEAN_SHARE * len(ledger.split) * len(ordered))
    for step in compose(ledger, ordered, session.ranking_metric, config, on_try, session.allows):
        session.steps.append(step)
        session.best = Intervention.parse(step.intervention)


STRATEGIES: Mapping[Strategy, Callable[[SearchSession], None]] = {
    "components": choose_components,
    "strengths": weaken_components,
    "race": race_candidates,
    "exhaustive": exhaustive,
    "compose": compose_reductions,
}


def expected_cost(session: SearchSession) -> float:
    """Return the work up to the choice as far as it can be foreseen, in passes of one example."""
    config, n = session.config, len(session.on_validation.split)
    if config.is_of_components:
        return cost_of_step(n, config) * (min(config.steps, PARTS) if config.strategy == "components" else 1)
    if config.strategy == "exhaustive":
        return n * (1 + MEAN_SHARE * len(session.candidates))
    cost = float(SCREEN_PASSES * screen_size(n, config)) if config.screens else 0.0
    if config.strategy == "compose":
        tried = min(config.candidates, len(session.candidates)) if config.mode == "joint" else len(session.candidates)
        return cost + n * (1 + MEAN_SHARE * tried)
    return cost + _cost_of_rungs(session, min(config.candidates + config.random_candidates, len(session.candidates)))


def screen_size(examples: int, config: SearchConfig) -> int:
    """Return the number of examples of the screen: those beyond the first rung, or half of all where that is more."""
    return min(config.screen_examples, max(examples - config.first_rung, (examples + 1) // 2))


def screen_candidates(session: SearchSession) -> tuple[Screening, float]:
    """Return what the screen found, and its seconds; an earlier process may have run it.

    Raises:
        ScoringError: if workers ended at it, or if it could rank no candidate.
        OutOfTimeError: if the time was used up before it could rank one.
    """
    run = session.run
    if "screen" in run.notes:
        noted = run.notes["screen"]
        predictions = {text: Prediction(*values) for text, values in noted["predictions"].items()}
        return Screening(predictions, noted.get("unranked", {})), noted["seconds"]
    session.begin("screen", [], 0, later=expected_cost(session))
    session.report_progress(BASE)
    start = time.perf_counter()
    screening = _run_screening(session)
    session.count(SCREEN_PASSES * screen_size(len(session.on_validation.split), session.config))
    if not screening.predictions:
        if OUT_OF_TIME in screening.unranked.values():
            raise OutOfTimeError
        reasons = "; ".join(f"{reason} ({n} candidates)" for reason, n in Counter(screening.unranked.values()).most_common(3))
        raise ScoringError(
            f"the screen could rank none of the {len(session.candidates)} candidates: {reasons}. Load the model with another "
            "dtype (--dtype bfloat16 or float32), or score every candidate with --strategy exhaustive."
        )
    for reason, n in Counter(screening.unranked.values()).items():
        log.warning("the screen could not rank %d of %d candidates: %s", n, len(session.candidates), reason)
    seconds = time.perf_counter() - start
    values = {text: [p.change, p.deviation, p.examples] for text, p in screening.predictions.items()}
    run.note("screen", {"predictions": values, "unranked": screening.unranked, "seconds": seconds})
    return screening, seconds


def _run_screening(session: SearchSession) -> Screening:
    ledger = session.on_validation
    n = screen_size(len(ledger.split), session.config)
    tasks = screen_tasks(
        session.candidates,
        ledger.name,
        len(ledger.split) - n,  # the last examples of the order: the first rungs then add new evidence
        SCREEN_PASSES * n,
        ledger.executor.workers,
        between_choices=session.ranking_metric == "accuracy" and ledger.encoded.scorer == "choice",
        seconds=SCREEN_SHARE * (ledger.deadline - time.monotonic()),
    )
    screening = Screening()
    for _, result in ledger.executor.run(tasks, deadline=ledger.deadline, is_cancelled=lambda _: False):
        if isinstance(result, Failure):
            raise ScoringError(f"the screen could not be run: {result.reason}")
        screening |= result
    return screening


def _cost_of_later_rungs(session: SearchSession, interventions: Sequence[Intervention], stop: int) -> float:
    """Return the work of the rungs after this one."""
    share = sum(map(session.on_validation.share, interventions)) / len(interventions)
    return _cost_of_rungs(session, session.config.keep * len(interventions), stop, share)


def _cost_of_rungs(session: SearchSession, alive: float, done: int = 0, share: float = MEAN_SHARE) -> float:
    """Return the work of the rungs beyond the first ``done`` examples, if as many candidates leave as may stay."""
    config, cost = session.config, 0.0
    for size in rung_sizes(len(session.on_validation.split), config.first_rung):
        if size > done:
            alive = max(1.0, alive)
            cost += (size - done) * (1 + alive * share)
            alive, done = config.keep * alive, size
    return cost


def _screen_report(
    session: SearchSession,
    screening: Screening,
    chosen: Sequence[Candidate],
    random_ones: Sequence[Candidate],
    n: int,
    seconds: float,
) -> ScreenReport:
    """Compare the predictions of the screen with the changes of loss that the first rung measured."""
    ledger, predictions = session.on_validation, screening.predictions
    base_loss = ledger.first(BASE, n).loss
    entered = [c.intervention for c in (*chosen, *random_ones) if str(c.intervention) in predictions]
    expected = {str(i): predictions[str(i)].expected for i in entered}
    measured = {str(i): ledger.first(i, n).loss - base_loss for i in entered if ledger.n(i) >= n}
    ranks = dense_ranks([expected[text] for text in measured]), dense_ranks(list(measured.values()))
    correlation = spearman(*ranks) if len(measured) > 2 else math.nan
    drawn = {str(c.intervention) for c in random_ones}
    pairs = [(measured[a], measured[b]) for a in measured if a in drawn for b in measured if b not in drawn]
    n_examples = screen_size(len(ledger.split), session.config)
    return ScreenReport(
        examples=n_examples,
        candidates=len(predictions),
        chosen=len(chosen),
        controls=len(random_ones),
        correlation=correlation if math.isfinite(correlation) else None,
        controls_ahead=sum(a < b for a, b in pairs) / len(pairs) if pairs else None,
        seconds=seconds,
        expected=expected,
        measured=measured,
        unranked=len(screening.unranked),
        reasons=dict(Counter(screening.unranked.values())),
        left_out=n_examples - min(p.examples for p in predictions.values()),
    )
