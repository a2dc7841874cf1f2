"""Submissions of results: create them from runs, check them against a schema, collect them in a folder."""

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

FORMAT = 1
METHOD = "LASER"
MAX_BYTES = 1_000_000
"""Maximum size of a submission."""
MAX_VALUE_CHARACTERS = 60
"""Maximum characters of a wrong value in a message."""
MAX_PROBLEMS = 20
"""Maximum number of reported problems of a file."""
ROUNDING = 1.001e-3
"""Tolerance of a stated gain against the gain computed from the other figures, which may be rounded."""
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
    """The result of adding a file: the copy, or the problems for which it was refused."""

    file: Path
    target: Path | None
    problems: tuple[str, ...] = ()


def is_finished(info: RunInfo) -> bool:
    """Return whether a run is a finished search whose best candidate is not the unchanged model."""
    return info.kind == "search" and info.status == "done" and bool((info.outcome or {}).get("best"))


def submission(info: RunInfo, *, credit: str | None = None, report: str | None = None) -> dict[str, Any]:
    """Return the result of a finished search as a submission. Apart from the credit it names no person, path or machine.

    Args:
        info: the run.
        credit: name to show with the result.
        report: https address of a report.

    Raises:
        ReportError: if the run is not finished or found no reduction, or a value is not allowed in a submission.
    """
    if not is_finished(info):
        is_ended = info.status == "done" and info.kind == "search"
        reason = "it found nothing better than the unchanged model" if is_ended else f"it is a {info.kind}, {info.status}"
        raise ReportError(f"run {info.id} has no result to submit: {reason}; give a finished search, see 'laser runs list'")
    if info.adapter is not None:
        raise ReportError(
            f"run {info.id} cannot be submitted: it reduced the update of an adapter (--adapter), and a submission names a "
            "model alone; publish the adapter merged into its base, and search that model"
        )
    document = describe_run(info)
    document |= {name: value for name, value in (("credit", credit), ("report", report)) if value is not None}
    if problems := find_problems(document):
        raise ReportError(f"run {info.id} cannot be submitted: {'; '.join(problems)}")
    return document


def describe_run(info: RunInfo) -> dict[str, Any]:
    """Return a finished search in the form of a submission, without checks."""
    outcome: dict[str, Any] = info.outcome or {}
    settings, test = info.settings, outcome["test"]
    has_accuracy = settings["scorer"] != "perplexity"
    pairs = ("interval", "mcnemar_p", "corrected", "broken") if has_accuracy else ()
    result = {
        "n": test["n"],
        **_without_none(facts=test.get("facts")),
        "base": {"accuracy": test["base"] if has_accuracy else None, "loss": test["base_loss"]},
        "edited": {"accuracy": test["best"] if has_accuracy else None, "loss": test["best_loss"]},
        "gain": test["gain"] if has_accuracy else None,
        **_without_none(**{name: test[name] for name in (*pairs, "loss_interval")}),
    }
    decoding = settings.get("decoding") or {}
    versions = info.provenance.get("versions", {})
    return {
        "format": FORMAT,
        "method": METHOD,
        "model": {
            "name": " with the adapter ".join(public_name(name) for name in (info.model, info.adapter) if name),
            **_without_none(sha256=settings.get("model_hash"), config=settings.get("config")),
            **_without_none(dtype=settings.get("dtype", "").removeprefix("torch.") or None),
        },
        "task": {
            "name": info.task,
            "scorer": settings["scorer"],
            **_without_none(validation=settings.get("validation"), test=settings.get("test")),
            **({"decoding": {k: decoding[k] for k in ("new_tokens", "samples", "temperature", "masks")}} if decoding else {}),
        },
        "intervention": outcome["best"],
        "result": result,
        **({"harm": [_public_harm(harm) for harm in outcome["harms"]]} if outcome.get("harms") else {}),
        "search": _without_none(
            **{name: settings.get(name) for name in ("strategy", "metric", "grid", "seed")},
            **{name: outcome.get(name) for name in ("candidates", "scored", "complete")},
        ),
        "versions": {name: versions[name] for name in _schema()["properties"]["versions"]["properties"] if name in versions},
    }


def _public_harm(harm: dict[str, Any]) -> dict[str, Any]:
    """Return the harm on a guard without the name of a file."""
    name = harm["guard"] if harm["kind"] == "questions" else "own text" if harm["guard"] == "self" else "a text"
    figures = {"ratio": harm["ratio"], **_without_none(interval=harm["interval"]), "n": harm["comparison"]["n"]}
    return {"guard": name, **figures}


def public_name(model: str) -> str:
    """Return a model's name without folders of this machine: a hub id, or the last part of a path."""
    if model == "bundled":
        return BUNDLED
    if HUB_NAME.fullmatch(model) and not Path(model).exists():
        return model
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].strip(". ~") or "a local folder"


def find_problems(document: Any) -> list[str]:
    """Return the problems of a submission: for each its path, the value, and the allowed values."""
    try:
        errors = list(islice(Draft202012Validator(_schema()).iter_errors(document), MAX_PROBLEMS))
    except RecursionError:
        return ["the document is nested too deep; a submission has three levels"]
    lines = sorted(line for error in errors for line in _explain(error))
    return list(dict.fromkeys(lines)) or _contradictions(document)


def load_submission(file: Path) -> dict[str, Any]:
    """Read and check a submission.

    Raises:
        ReportError: with all problems, if the file cannot be read, is too large or is invalid.
    """
    document = _parse(file)
    if problems := find_problems(document):
        raise ReportError(f"{file} is no submission: {'; '.join(problems)}; correct it, or leave it out")
    return dict(document)


def add(sources: Sequence[Path], to: Path) -> list[AddResult]:
    """Copy valid and new submissions into a folder, under names of safe characters and a digest; return a result per file.

    Args:
        sources: files of any origin.
        to: the folder; it is created if it does not exist.

    Raises:
        OSError: if the folder cannot be written.
    """
    return [_add(file, to) for file in sources]


def _add(file: Path, to: Path) -> AddResult:
    try:
        document = _parse(file)
    except ReportError as error:
        return AddResult(file, None, (str(error),))
    if problems := find_problems(document):
        return AddResult(file, None, tuple(problems))
    name, digest = _file_name(document)
    copy = next(to.glob(f"*-{digest}.json"), None)
    if copy is not None:
        return AddResult(file, None, (f"the same submission is there already, as {copy}; leave this one out",))
    target = to / name
    with atomic_file(target) as part:
        part.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return AddResult(file, target)


def _file_name(document: dict[str, Any]) -> tuple[str, str]:
    """Return a descriptive file name, and the digest in it, which is equal for equal documents.

    A copy that names another model or another person is another document, so it cannot keep the true one out.
    """
    model, task = document["model"], document["task"]
    digest = _digest(document)
    words = re.sub(r"[^a-z0-9]+", "-", f"{task['name']}-{model['name']}".lower()).strip("-")
    return f"{words[:60].strip('-') or 'result'}-{digest}.json", digest


def claim(document: dict[str, Any]) -> str:
    """Return what a submission or a described run claims to have measured: equal for equal measurements, whoever names them."""
    model, task = document["model"], document["task"]
    return _digest([model.get("sha256"), task.get("test"), task["scorer"], document["intervention"], document["result"]])


def _digest(value: Any) -> str:
    plain = json.loads(json.dumps(value), parse_int=float)  # 1 and 1.0 are the same number
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def _parse(file: Path) -> Any:
    try:
        if not file.is_file():
            raise ReportError(f"{file} is not a file; give files that 'laser leaderboard submit' wrote")
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ReportError(f"{file} cannot be read ({error}); give another file") from error
    if len(content) > MAX_BYTES:
        raise ReportError(f"{file} is larger than {MAX_BYTES:,} bytes, the maximum of a submission; give another file")
    try:
        return json.loads(content.decode(), parse_constant=_refuse_constant, object_pairs_hook=_unique_names)
    except RecursionError:
        raise ReportError(f"{file} is nested too deep; a submission has three levels") from None
    except ValueError as error:
        raise ReportError(f"{file} is not JSON ({error}); give a file that 'laser leaderboard submit' wrote") from None


def _refuse_constant(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the name {_short_repr(name)} occurs twice in one object")
        values[name] = value
    return values


@lru_cache(maxsize=1)
def _schema() -> dict[str, Any]:
    text = (files(__package__) / "submission.schema.json").read_text(encoding="utf-8")
    return dict(json.loads(text))


def _explain(error: Any) -> list[str]:
    """Return messages for one violation of the schema."""
    path = error.json_path.removeprefix("$").removeprefix(".")
    value, schema = error.instance, error.schema
    if error.validator == "required":
        missing = [name for name in schema["required"] if name not in value]
        return [f"{path + '.' if path else ''}{name}: is missing, and is required" for name in missing]
    if error.validator == "additionalProperties":
        unknown = [_short_repr(name) for name in value if name not in schema["properties"]]
        more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
        known = ", ".join(schema["properties"])
        return [f"{path or 'the document'}: {', '.join(unknown[:3])}{more} is unknown here; allowed are {known}"]
    return [f"{path or 'the document'}: {_short_repr(value)} is not allowed; write {_allowed(schema)}"]


def _allowed(schema: dict[str, Any]) -> str:
    if "const" in schema:
        return json.dumps(schema["const"])
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    text = " or ".join(KINDS[kind] for kind in kinds)
    if "maximum" in schema:
        low = f"from {schema['minimum']}" if "minimum" in schema else f"above {schema['exclusiveMinimum']}"
        text += f" {low} to {schema['maximum']}"
    if "maxLength" in schema:
        low, high = schema["minLength"], schema["maxLength"]
        text += f" of {high} characters" if low == high else f" of {low} to {high} characters"
    if "maxItems" in schema:
        few = "" if schema["minItems"] == schema["maxItems"] else f"{schema['minItems']} to "
        text += f" of {few}{schema['maxItems']} {'numbers' if 'type' in schema['items'] else 'entries'}"
    return f"{text}: {schema['description']}" if "description" in schema else text


def _short_repr(value: Any) -> str:
    """Return the start of a value as text without control characters."""
    if isinstance(value, str):
        return f"{value[:MAX_VALUE_CHARACTERS]!r}..." if len(value) > MAX_VALUE_CHARACTERS else repr(value)
    if isinstance(value, dict):
        return f"an object of {len(value)} names"
    if isinstance(value, list):
        return f"an array of {len(value)} items"
    text = json.dumps(value)
    return f"{text[:MAX_VALUE_CHARACTERS]}..." if len(text) > MAX_VALUE_CHARACTERS else text


def _contradictions(document: dict[str, Any]) -> list[str]:
    """Return the problems that no schema finds: inconsistent figures, an invalid intervention."""
    result, text = document["result"], document["intervention"]
    problems = []
    try:
        canonical = str(Intervention.parse(text))
        if canonical != text:
            problems.append(f"intervention: {_short_repr(text)} is not in canonical form; write {_short_repr(canonical)}")
    except SpecError as error:
        problems.append(f"intervention: {error}")
    for i, harm in enumerate(document.get("harm", ())):
        low, high = harm.get("interval", (harm["ratio"], harm["ratio"]))
        if not low - ROUNDING <= harm["ratio"] <= high + ROUNDING:
            problems.append(
                f"harm[{i}].interval: [{low}, {high}] does not hold the ratio, {harm['ratio']:g}; write its 95 % interval"
            )
    base, edited = result["base"]["accuracy"], result["edited"]["accuracy"]
    is_perplexity = document["task"]["scorer"] == "perplexity"
    if any((value is None) != is_perplexity for value in (base, edited, result["gain"])):
        allowed = "null for accuracy and gain, for a perplexity has none" if is_perplexity else "numbers for accuracy and gain"
        return [*problems, f"result: with the scorer {document['task']['scorer']} write {allowed}"]
    if not is_perplexity:
        problems += _gain_problems(result, edited - base)
    change = _difference(result)
    for name, value, label in (
        ("interval", result["gain"], "the gain"),
        ("loss_interval", change, "the change of loss"),
    ):
        if name in result and value is not None:
            low, high = result[name]
            if not low - 1e-9 <= value <= high + 1e-9:
                problems.append(f"result.{name}: [{low}, {high}] does not hold {label}, {value:g}; write its 95 % interval")
        elif name in result:
            problems.append(f"result.{name}: there is no value that it is the interval of; leave it out")
    return problems


def _gain_problems(result: dict[str, Any], difference: float) -> list[str]:
    """Return the problems of a gain that does not follow from the accuracies, or from the pairs and their number."""
    problems = []
    gain, n = result["gain"], result["n"]
    if abs(gain - difference) > ROUNDING:
        problems.append(f"result.gain: {gain} is not edited - base, {difference:g}; write that difference")
    if "corrected" in result and "broken" in result:
        corrected, broken = int(result["corrected"]), int(result["broken"])
        if corrected + broken > n:
            return [*problems, f"result: {corrected} corrected and {broken} broken are more than n, {n}; write n or fewer"]
        if abs((corrected - broken) / n - gain) > ROUNDING:
            pairs = f"({corrected} corrected - {broken} broken) / {n}"
            problems.append(f"result.gain: {gain} is not {pairs} = {(corrected - broken) / n:g}; write that")
        expected, is_mcnemar = mcnemar(corrected, broken), result.get("facts", n) >= n  # else the facts decide
        if is_mcnemar and not math.isclose(result.get("mcnemar_p", expected), expected, rel_tol=0.02, abs_tol=ROUNDING):
            problems.append(f"result.mcnemar_p: {result['mcnemar_p']} is not the exact two-sided {expected:.4g}; write that")
    return problems


def _difference(result: dict[str, Any]) -> float | None:
    losses = [result[side].get("loss") for side in ("base", "edited")]
    return None if None in losses else losses[1] - losses[0]


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}
