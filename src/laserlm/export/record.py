"""The record of a saved model, ``laser.json``: what it holds, its hashes, and no path of this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import metadata_load
from torch import Tensor
from yaml import YAMLError

from laserlm.errors import ExportError
from laserlm.export.load_in_subprocess import fingerprint
from laserlm.models.adapter import LOCAL, local_paths
from laserlm.models.bundled import HUB_ID
from laserlm.models.language_model import LanguageModel
from laserlm.models.source import source_folder
from laserlm.out_of_memory import is_out_of_memory

log = logging.getLogger(__name__)

RECORD = "laser.json"
CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
FORMAT = 1
PATH_FIELDS = {"name", "adapter", "task", "guard"}
"""Fields of the record that may be paths: of the base model, the adapter, the calibration text, the task and the guards."""
PATH_PREFIX = re.compile(r"(?:perplexity|jsonl|hub|lm-eval):")
"""What may precede a path in the name of a task or guard."""
FLOAT32_TOLERANCE = 1e-3
"""Largest relative difference of outputs that are computed in float32 from the same weights, on two machines."""
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
"""What a forward pass raises that wants another input than tokens."""


def computes_outputs(model: Any) -> bool:
    """Return whether a model computes outputs from tokens alone."""
    try:
        return fingerprint(model) is not None
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        return False


def recorded_outputs(model: Any, *, required: bool = False) -> list[list[float]] | None:
    """Return the outputs that a record keeps; None, with a warning, where the model computes none from tokens alone.

    Args:
        model: the model that is saved.
        required: whether the unchanged model computes outputs, so that this one must too.

    Raises:
        ExportError: if outputs are required, and the model fails.
    """
    try:
        return fingerprint(model)
    except FAILURES as error:
        if is_out_of_memory(error):
            raise
        if required:
            raise ExportError(
                f"the unchanged {type(model).__name__} computes outputs from tokens, and the model to be saved ends with "
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}; save the dense form, reduce other "
                "matrices, and report this"
            ) from error
        log.warning(
            "%s computes nothing from tokens alone (%s), so no outputs are recorded, and 'laser load-check' compares tensors "
            "and files alone",
            *(type(model).__name__, str(error).strip().partition("\n")[0]),
        )
        return None


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Return the largest difference as a share of the largest reference value; infinite if it is not finite."""
    difference = float((value - reference).abs().max() / reference.abs().max().clamp_min(1e-30))
    return difference if math.isfinite(difference) else math.inf


def read_record(folder: Path) -> dict[str, Any]:
    """Return the content of a saved model's ``laser.json``.

    Raises:
        ExportError: if it does not exist, cannot be read, was written by a newer laserlm, or belongs to a GGUF file.
    """
    file = folder / RECORD
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{folder} has no {RECORD}; give a folder that 'laser save' wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{file} cannot be read ({error}); save the model again") from None
    if not isinstance(record, dict) or not isinstance(record.get("format"), int):
        raise ExportError(f"{file} is no record of a saved model (it has no format number); save the model again")
    if record["format"] > FORMAT:
        raise ExportError(f"{file} is of format {record['format']}; this laserlm reads up to {FORMAT}: upgrade laserlm")
    if record.get("form") == "gguf":
        raise ExportError(
            f"{folder} holds a GGUF file, whose weights are not compared; measure it with 'laser evaluate "
            f"{folder / str(record.get('gguf'))} --task TASK', or save the form dense for this check"
        )
    paths = local_paths(folder)
    if "base" in paths and isinstance(record.get("base"), dict):
        record["base"]["name"] = paths["base"]
    if "adapter" in paths and isinstance(record.get("update"), dict):
        record["update"]["name"] = paths["adapter"]
    text = (record.get("compression") or {}).get("text") if isinstance(record.get("compression"), dict) else None
    if "calibration" in paths and isinstance(text, dict):
        text["name"] = paths["calibration"]
    return record


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a saved model except its record, local paths and hidden files, by name."""
    hashes = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name not in (RECORD, LOCAL)):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):  # such as those that a download from the hub adds
            continue
        with file.open("rb") as stream:
            hashes[name.as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes


def describe_base(lm: LanguageModel) -> dict[str, Any]:
    """Return the base model as plain values for the record."""
    return {
        "name": lm.name,
        "hub": HUB_ID if lm.name == "bundled" else None if Path(lm.name).exists() else "/".join(lm.name.split("/")[:2]),
        "revision": lm.revision,
        "hash": lm.hash if lm.update is None else lm.update.base_hash,
        "family": lm.family,
        "kind": lm.kind,
        "licence": _licence_of(lm),
    }


def describe_update(lm: LanguageModel) -> dict[str, Any] | None:
    """Return the adapter whose update is reduced as plain values for the record; None without one."""
    return None if lm.update is None else {"name": str(lm.update.folder), "hash": lm.hash}


def paths_here(lm: LanguageModel, record: dict[str, Any]) -> dict[str, str]:
    """Return the paths of the base model and the calibration text on this machine, which the record does not hold."""
    is_local = lm.name != "bundled" and Path(lm.name).expanduser().exists()
    paths = {"base": str(Path(lm.name).absolute())} if is_local else {}
    if lm.update is not None:
        paths["adapter"] = str(lm.update.folder.absolute())
    text = record.get("compression", {}).get("text")
    if text and not text["own"]:
        paths["calibration"] = str(Path(text["name"]).absolute())
    return paths


def without_paths(value: Any, field: str = "") -> Any:
    """Return plain JSON values with the last part alone of each path in a field that may hold one."""
    if isinstance(value, dict):
        return {key: without_paths(v, key) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(v) for v in value]
    return without_folders(value) if field in PATH_FIELDS and isinstance(value, str) else value


def without_folders(text: str) -> str:
    """Return a text with the last part alone of the path of a file or folder here; a prefix of a task stays."""
    match = PATH_PREFIX.match(text)
    prefix = match[0] if match else ""
    path = text.removeprefix(prefix)
    is_path = path.startswith(("/", "~/", "./", "../"))
    with suppress(OSError, ValueError):  # such as a part that is too long for a file name
        is_path = is_path or ("/" in path and Path(path).exists())
    return prefix + Path(path).name if is_path else text


def _licence_of(lm: LanguageModel) -> dict[str, str]:
    """Return what the card of the base model says of its licence, with the hub's keys; empty if it says nothing."""
    if lm.name == "bundled":
        return {"license": "apache-2.0"}
    folder = None if lm.loaded is None else source_folder(lm.loaded["name"], lm.loaded["revision"])
    try:
        metadata = metadata_load(folder / CARD) if folder is not None and (folder / CARD).is_file() else None
    except (OSError, ValueError, YAMLError):
        metadata = None
    return {key: str(metadata[key]) for key in LICENCE_KEYS if key in metadata} if isinstance(metadata, dict) else {}
