"""Verify a submission: measure it again here, and record in the results database that the figures agree."""

from __future__ import annotations

from typing import Any

from laserlm.edit import applied
from laserlm.errors import ReportError
from laserlm.models.language_model import LanguageModel
from laserlm.provenance import provenance
from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.store import Store
from laserlm.tasks import Split
from laserlm.web.submissions import ROUNDING, claim

KIND = "verification"
"""Kind of the runs that record a verification."""
LOSS_TOLERANCE = 2e-3
"""Difference of two losses, in nats per answer token, that another machine and rounding to three digits explain."""


def verified_claims(store: Store | None) -> frozenset[str]:
    """Return the claims that were measured again with the same result. See ``claim``."""
    runs = store.runs() if store is not None else []
    return frozenset(str(run.settings["claim"]) for run in runs if run.kind == KIND and run.status == "done")


def verify(document: dict[str, Any], store: Store, lm: LanguageModel, split: Split, *, batch_size: int = 32) -> Comparison:
    """Score the unchanged and the edited model again, and record the verification if the figures of a submission hold.

    Args:
        document: a submission without problems.
        store: the results database.
        lm: the model of the submission.
        split: the test examples of the submission, with its decoding.
        batch_size: sequences per forward pass.

    Raises:
        ReportError: if the submission cannot be verified, the model or the examples are others, or the figures differ.
    """
    _check_same("weights", document["model"].get("sha256"), lm.hash, "load the model that was measured")
    task = document["task"]
    _check_same("test examples", task.get("test"), split.hash, "give its --task, --data and other task options")
    if task.get("validation") in (None, task["test"]):
        raise ReportError("the test split had a part in the choice, or the file does not say; such a result cannot be verified")
    seed = int(document.get("search", {}).get("seed", 0))
    evaluations = []
    for intervention in ("", document["intervention"]):
        with applied(lm, intervention, seed=seed):
            evaluations.append(evaluate(lm, split, scorer=task["scorer"], batch_size=batch_size))
    again = compare(*evaluations)
    if differences := _differences(document["result"], again):
        raise ReportError(f"the figures do not hold: {'; '.join(differences)}. The row stays reported")
    name = claim(document)
    settings = {"model": lm.name, "model_hash": lm.hash, "task": split.task, "scorer": task["scorer"], "claim": name}
    origin = provenance(device=str(lm.device), dtype=str(lm.dtype), seed=seed)
    with store.run(kind=KIND, key=name, settings=settings, provenance=origin) as run:
        if run.outcome is None:
            run.finish({"best": document["intervention"], "test": again.as_dict()})
    return again


def _check_same(what: str, stated: str | None, here: str, step: str) -> None:
    if stated is None:
        raise ReportError(f"the submission has no sha256 of its {what}, so nobody can verify it; ask for a new one")
    if stated != here:
        raise ReportError(f"the {what} here have sha256 {here[:12]}..., and the submission {stated[:12]}...; {step}")


def _differences(result: dict[str, Any], again: Comparison) -> list[str]:
    """Return each figure of a submission that differs from the one measured again."""
    figures: list[tuple[str, float | None, float, float]] = [
        (name, result.get(name), getattr(again, name), 0) for name in ("n", "corrected", "broken")
    ]
    for side, accuracy, loss in (("base", again.base, again.base_loss), ("edited", again.edited, again.edited_loss)):
        figures.append((f"{side} accuracy", result[side]["accuracy"], accuracy, ROUNDING))
        figures.append((f"{side} loss", result[side].get("loss"), loss, LOSS_TOLERANCE))
    return [
        f"{name} is {here:g} here and {stated:g} in the submission"
        for name, stated, here, tolerance in figures
        if stated is not None and not abs(stated - here) <= tolerance
    ]
