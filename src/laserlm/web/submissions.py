"""Results that are passed on: written from a run, checked against a schema, collected in a folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonschema import Draft202012Validator

from laserlm.errors import ReportError, SpecError
from laserlm.paths import atomic_file
from laserlm.reductions import Intervention
from laserlm.scoring.statistics import mcnemar

if TYPE_CHECKING:
    from laserlm.store import RunInfo

__all__ = ["FORMAT", "AddResult", "add", "described", "finished", "problems", "public_name", "read", "submission"]

FORMAT = 1
METHOD = "LASER"
LIMIT = 1_000_000
"""Bytes of a submission at most."""
SHOWN = 60
"""Characters of a wrong value that a message shows."""
PROBLEMS = 20
"""Problems told of one file at most."""
ROUNDING = 1.001e-3
"""Difference of a stated gain from what follows from the other figures that their rounding explains."""
BUNDLED = "SmolLM2-135M-Instruct (bundled, Q4_1)"
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
KINDS = {
    "object": "an object",
    "array": "an array",
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "null": "null",
}


@dataclass(frozen=True)
class AddResult:
    """What became of one file that was to be added.

    Args:
        file: as given.
        target: the file it was copied to, None where it was refused.
        problems: why it was refused.
    """

    file: Path
    target: Path | None
    problems: tuple[str, ...] = ()


def finished(info: RunInfo) -> bool:
    """Return whether a run is a search that came to its end and found something better than the unchanged model."""
    return info.kind == "search" and info.status == "done" and bool((info.outcome or {}).get("best"))


def submission(info: RunInfo, *, credit: str | None = None, report: str | None = None) -> dict[str, Any]:
    """Return what a finished search found, to be passed on: no paths, no names of users or machines but the credit.

    Args:
        info: the run.
        credit: a name to show with it.
        report: an https address where more is told about it.

    Raises:
        ReportError: if the run found nothing or is not finished, or a value is not allowed in a submission.
    """
    if not finished(info):
        ended = info.status == "done" and info.kind == "search"
        reason = "it found nothing better than the unchanged model" if ended else f"it is a {info.kind}, {info.status}"
        raise ReportError(f"run {info.id} has no result to submit: {reason}; give a finished search, see 'laser runs list'")
    document = described(info)
    document |= {name: value for name, value in (("credit", credit), ("report", report)) if value is not None}
    if wrong := problems(document):
        raise ReportError(f"run {info.id} cannot be submitted: {'; '.join(wrong)}")
    return document


def described(info: RunInfo) -> dict[str, Any]:
    """Return a finished search in the form of a submission, unchecked."""
    outcome: dict[str, Any] = info.outcome or {}
    settings, test = info.settings, outcome["test"]
    counts = settings["scorer"] != "perplexity"  # which has no accuracy
    pairs = ("interval", "mcnemar_p", "corrected", "broken") if counts else ()
    result = {
        "n": test["n"],
        "base": {"accuracy": test["base"] if counts else None, "loss": test["base_loss"]},
        "edited": {"accuracy": test["best"] if counts else None, "loss": test["best_loss"]},
        "gain": test["gain"] if counts else None,
        **_known(**{name: test[name] for name in (*pairs, "loss_interval")}),
    }
    decoding = settings.get("decoding") or {}
    versions = info.provenance.get("versions", {})
    return {
        "format": FORMAT,
        "method": METHOD,
        "model": {
            "name": public_name(info.model),
            **_known(sha256=settings.get("model_hash"), config=settings.get("config")),
            **_known(dtype=settings.get("dtype", "").removeprefix("torch.") or None),
        },
        "task": {
            "name": info.task,
            "scorer": settings["scorer"],
            **_known(validation=settings.get("validation"), test=settings.get("test")),
            **({"decoding": {k: decoding[k] for k in ("new_tokens", "samples", "temperature", "masks")}} if decoding else {}),
        },
        "intervention": outcome["best"],
        "result": result,
        "search": _known(
            **{name: settings.get(name) for name in ("strategy", "metric", "grid", "seed")},
            **{name: outcome.get(name) for name in ("candidates", "scored", "complete")},
        ),
        "versions": {name: versions[name] for name in _schema()["properties"]["versions"]["properties"] if name in versions},
    }


def public_name(model: str) -> str:
    """Return a model's name without the folders of this machine.

    A hub id stays as it is; of a path the last part is left.
    """
    if model == "bundled":
        return BUNDLED
    if HUB_NAME.fullmatch(model) and not Path(model).exists():
        return model
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].strip(". ~") or "a local folder"


def problems(document: Any) -> list[str]:
    """Return what is wrong with a submission: for each thing its place, the value, and what is allowed there."""
    try:
        errors = list(islice(Draft202012Validator(_schema()).iter_errors(document), PROBLEMS))
    except RecursionError:
        return ["the document is nested too deep; a submission has three levels"]
    said = sorted(line for error in errors for line in _explained(error))
    return list(dict.fromkeys(said)) or _contradictions(document)


def read(file: Path) -> dict[str, Any]:
    """Read a submission and check all of it.

    Raises:
        ReportError: if it cannot be read, is too large, or is wrong; every problem is told.
    """
    document = _parsed(file)
    if wrong := problems(document):
        raise ReportError(f"{file} is no submission: {'; '.join(wrong)}; correct it, or leave it out")
    return dict(document)


def add(sources: Sequence[Path], to: Path) -> list[AddResult]:
    """Copy those submissions that are right and new into a folder, each under a name of safe characters and a digest.

    Args:
        sources: files of any origin.
        to: the folder, made where it is missing.

    Returns:
        For each file where it went, or why it was refused.

    Raises:
        OSError: if the folder cannot be written.
    """
    return [_added(file, to) for file in sources]


def _added(file: Path, to: Path) -> AddResult:
    try:
        document = _parsed(file)
    except ReportError as error:
        return AddResult(file, None, (str(error),))
    if wrong := problems(document):
        return AddResult(file, None, tuple(wrong))
    name, digest = _file_name(document)
    there = next(to.glob(f"*-{digest}.json"), None)
    if there is not None:
        return AddResult(file, None, (f"the same result is there already, as {there}; leave this one out",))
    target = to / name
    with atomic_file(target) as part:
        part.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return AddResult(file, target)


def _file_name(document: dict[str, Any]) -> tuple[str, str]:
    """Return a name that says what it is, and the digest in it of what was measured: the same whoever hands it in."""
    model, task = document["model"], document["task"]
    same = [
        model.get("sha256", model["name"]),
        task.get("test", task["name"]),
        task["scorer"],
        document["intervention"],
        document["result"],
    ]
    plain = json.loads(json.dumps(same), parse_int=float)  # 1 and 1.0 are one number
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]
    words = re.sub(r"[^a-z0-9]+", "-", f"{task['name']}-{model['name']}".lower()).strip("-")
    return f"{words[:60].strip('-') or 'result'}-{digest}.json", digest


def _parsed(file: Path) -> Any:
    try:
        if not file.is_file():
            raise ReportError(f"{file} is not a file; give files that 'laser leaderboard submit' wrote")
        with file.open("rb") as stream:
            content = stream.read(LIMIT + 1)
    except OSError as error:
        raise ReportError(f"{file} cannot be read ({error}); give another file") from error
    if len(content) > LIMIT:
        raise ReportError(f"{file} is larger than {LIMIT:,} bytes, which is more than a submission needs; give another file")
    try:
        return json.loads(content.decode(), parse_constant=_refused, object_pairs_hook=_once)
    except RecursionError:
        raise ReportError(f"{file} is nested too deep; a submission has three levels") from None
    except ValueError as error:
        raise ReportError(f"{file} is not JSON ({error}); give a file that 'laser leaderboard submit' wrote") from None


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {_shown(name)} stands twice in one object")
        found[name] = value
    return found


@lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    text = (files(__package__) / "submission.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _explained(error: Any) -> list[str]:
    """Return what one violation of the schema means."""
    place = error.json_path.removeprefix("$").removeprefix(".")
    value, schema = error.instance, error.schema
    if error.validator == "required":
        missing = [name for name in schema["required"] if name not in value]
        return [f"{place + '.' if place else ''}{name}: is missing, and is required" for name in missing]
    if error.validator == "additionalProperties":
        unknown = [_shown(name) for name in value if name not in schema["properties"]]
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        known = ", ".join(schema["properties"])
        return [f"{place or 'the document'}: {', '.join(unknown[:3])}{more} is unknown here; allowed are {known}"]
    return [f"{place or 'the document'}: {_shown(value)} is not allowed; write {_allowed(schema)}"]


def _allowed(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    said = " or ".join(KINDS[kind] for kind in kinds)
    if "maximum" in schema:
        low = f"from {schema['minimum']}" if "minimum" in schema else f"above {schema['exclusiveMinimum']}"
        said += f" {low} to {schema['maximum']}"
    if "maxLength" in schema:
        low, high = schema["minLength"], schema["maxLength"]
        said += f" of {high} characters" if low == high else f" of {low} to {high} characters"
    if "maxItems" in schema:
        said += f" of {schema['maxItems']} numbers"
    return f"{said}: {schema['description']}" if "description" in schema else said


def _shown(value: Any) -> str:
    """Return a value of any origin, shortened, as text that does nothing to a terminal."""
    if isinstance(value, str):
        return f"{value[:SHOWN]!r}..." if len(value) > SHOWN else repr(value)
    if isinstance(value, dict):
        return f"an object of {len(value)} names"
    if isinstance(value, list):
        return f"an array of {len(value)} items"
    text = json.dumps(value)
    return f"{text[:SHOWN]}..." if len(text) > SHOWN else text


def _contradictions(document: dict[str, Any]) -> list[str]:
    """Return what no schema can tell: figures that do not fit each other, an intervention that means nothing."""
    result, text = document["result"], document["intervention"]
    said = []
    try:
        canonical = str(Intervention.parse(text))
        if canonical != text:
            said.append(f"intervention: {_shown(text)} is not in canonical form; write {_shown(canonical)}")
    except SpecError as error:
        said.append(f"intervention: {error}")
    base, edited = result["base"]["accuracy"], result["edited"]["accuracy"]
    of_text = document["task"]["scorer"] == "perplexity"
    if any((value is None) != of_text for value in (base, edited, result["gain"])):
        allowed = "null for accuracy and gain, for a perplexity has none" if of_text else "numbers for accuracy and gain"
        return [*said, f"result: with the scorer {document['task']['scorer']} write {allowed}"]
    if not of_text:
        said += _gains(result, edited - base)
    change = _difference(result)
    for name, value, what in (
        ("interval", result["gain"], "the gain"),
        ("loss_interval", change, "the change of loss"),
    ):
        if name in result and value is not None:
            low, high = result[name]
            if not low - 1e-9 <= value <= high + 1e-9:
                said.append(f"result.{name}: [{low}, {high}] does not hold {what}, {value:g}; write its 95 % interval")
        elif name in result:
            said.append(f"result.{name}: there is no value that it is the interval of; leave it out")
    return said


def _gains(result: dict[str, Any], difference: float) -> list[str]:
    """Return where the gain does not follow from the accuracies, or from the pairs and their number."""
    said = []
    gain, n = result["gain"], result["n"]
    if abs(gain - difference) > ROUNDING:
        said.append(f"result.gain: {gain} is not edited - base, {difference:g}; write that difference")
    if "corrected" in result and "broken" in result:
        corrected, broken = int(result["corrected"]), int(result["broken"])
        if corrected + broken > n:
            return [*said, f"result: {corrected} corrected and {broken} broken are more than n, {n}; write n or fewer"]
        if abs((corrected - broken) / n - gain) > ROUNDING:
            pairs = f"({corrected} corrected - {broken} broken) / {n}"
            said.append(f"result.gain: {gain} is not {pairs} = {(corrected - broken) / n:g}; write that")
        expected = mcnemar(corrected, broken)
        if not math.isclose(result.get("mcnemar_p", expected), expected, rel_tol=0.02, abs_tol=ROUNDING):
            said.append(f"result.mcnemar_p: {result['mcnemar_p']} is not the exact two-sided {expected:.4g}; write that")
    return said


def _difference(result: dict[str, Any]) -> float | None:
    losses = [result[side].get("loss") for side in ("base", "edited")]
    return None if None in losses else losses[1] - losses[0]


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
