"""Check a saved model: load it in a fresh process, or make it again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import ExportError
from laserlm.export import load_in_subprocess
from laserlm.export.checkpoint import file_hashes, read_record
from laserlm.export.compression import compress
from laserlm.export.saving import save
from laserlm.low_rank import LowRankLinear, Part
from laserlm.models.language_model import LanguageModel

__all__ = ["LoadCheck", "Reproduction", "load_check", "reproduce"]

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest difference of an output, as a share of the largest output, that rounding in a dtype explains."""


@dataclass(frozen=True)
class LoadCheck:
    """What a fresh process found in a saved model.

    Args:
        form: ``dense`` or ``factored``.
        imported_laserlm: whether laserlm was imported there; it is not for the dense form.
        difference: largest difference of its outputs from those recorded, as a share of the largest; None where the model
            takes no tokens, so that only its loading was checked.
        tolerance: what rounding explains.
        changed: files that are not as they were written.
    """

    form: str
    imported_laserlm: bool
    difference: float | None
    tolerance: float
    changed: tuple[str, ...]

    @property
    def agrees(self) -> bool:
        """Whether the outputs are those recorded, up to rounding."""
        return self.difference is None or self.difference <= self.tolerance

    def __str__(self) -> str:
        how = "with laserlm imported" if self.imported_laserlm else "with transformers alone"
        compared = (
            "it takes no tokens, so its outputs were not compared"
            if self.difference is None
            else f"its outputs differ from those recorded by {self.difference:.1e} of the largest (rounding explains "
            f"{self.tolerance:.0e})"
        )
        changed = f"; changed since it was saved: {', '.join(self.changed)}" if self.changed else ""
        return f"loads as {self.form} {how}; {compared}{changed}"


def load_check(folder: str | Path) -> LoadCheck:
    """Load a saved model in a fresh process, and compare what it computes with what was recorded when it was saved.

    Raises:
        ExportError: if it does not load, or lacks weights.
    """
    folder = Path(folder).absolute()
    record = read_record(folder)
    done = subprocess.run(
        [sys.executable, "-P", str(Path(load_in_subprocess.__file__)), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ExportError(f"{folder} does not load: {reason}; save it again")
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    for name in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if told[name]:
            raise ExportError(f"{folder} loads with {name.replace('_', ' ')}: {', '.join(told[name][:4])}; save it again")
    dtypes = record["dtype"].values()
    hashes = record["files"]
    now = file_hashes(folder)
    return LoadCheck(
        form=record["form"],
        imported_laserlm=told["imported"],
        difference=_difference(told["fingerprint"], record["fingerprint"]),
        tolerance=max(TOLERANCE.get(name, 3e-2) for name in dtypes),
        changed=tuple(sorted(name for name in {*hashes, *now} if hashes.get(name) != now.get(name))),
    )


@dataclass(frozen=True)
class Reproduction:
    """How a model made again compares with the saved one.

    Args:
        identical: whether all weights are equal, bit by bit.
        difference: largest difference of a weight, factors multiplied out, as a share of the largest weight of its tensor.
        tolerance: what the rounding of the saved dtype explains.
        tensors: number of tensors compared.
    """

    identical: bool
    difference: float
    tolerance: float
    tensors: int

    @property
    def agrees(self) -> bool:
        """Whether the weights are equal up to the rounding of a decomposition computed elsewhere."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.identical:
            return f"all {self.tensors} tensors are equal, bit by bit"
        return (
            f"{self.tensors} tensors compared; the largest difference is {self.difference:.1e} of its tensor's largest weight "
            f"(rounding explains {self.tolerance:.0e})"
        )


def reproduce(folder: str | Path, lm: LanguageModel, *, calibration: str | Path | None = None) -> Reproduction:
    """Make a saved model again from its base model, with decompositions of its own, and compare the weights.

    Args:
        folder: what ``save`` or ``compress`` wrote.
        lm: the base model that its record names.
        calibration: where the text is now that a compressed model was calibrated on; None takes the place recorded.

    Raises:
        ExportError: if the folder has no record, or ``lm`` or the text is not what it was made from.
    """
    folder = Path(folder)
    record = read_record(folder)
    if lm.hash != record["base"]["hash"]:
        raise ExportError(
            f"{folder} was made from {record['base']['name']} with weights {record['base']['hash'][:12]}; "
            f"{lm.name} has {lm.hash[:12]}: load the right revision, in {record['dtype']['base']}"
        )
    common: dict[str, Any] = {
        "form": record["asked_form"],
        "dtype": record["dtype"]["saved"],
        "shard_size": record["shard_size"],
    }
    with tempfile.TemporaryDirectory() as temporary:
        again = Path(temporary) / "again"
        if "compression" in record:
            _compress_again(record["compression"], lm, again, calibration, common)
        else:
            seed = record["decomposition"]["seed"]
            save(lm, record["intervention"], again, seed=seed, cache=DecompositionCache(), **common)
        return _compared(folder, again, TOLERANCE.get(record["dtype"]["saved"], 3e-2))


def _compress_again(
    how: dict[str, Any], lm: LanguageModel, out: Path, calibration: str | Path | None, common: dict[str, Any]
) -> None:
    text: dict[str, Any] | None = how.get("text")
    tokens = {} if text is None else {"tokens": text["tokens"]}
    file = None if text is None else Path(calibration or text["name"])
    if (
        text is not None
        and file is not None
        and (not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != text["sha256"])
    ):
        raise ExportError(
            f"{file} is not the text that the model was calibrated on (sha256 {text['sha256'][:12]}); give --calibration FILE"
        )
    asked = {name: how[name] for name in ("ratio", "method", "allocation")}
    compress(lm, out, calibration=file, **asked, **tokens, **common)


def _compared(one: Path, other: Path, tolerance: float) -> Reproduction:
    ours, theirs = (_Weights(folder) for folder in (one, other))
    if ours.names != theirs.names:
        odd = sorted(ours.names ^ theirs.names)
        raise ExportError(f"made again, the model holds other tensors than {one}: {', '.join(odd[:4])}")
    identical, largest = True, 0.0
    for name in sorted(ours.names):
        a, b = ours.read(name), theirs.read(name)
        if torch.equal(a, b):
            continue
        identical = False
        if a.shape != b.shape:
            raise ExportError(f"made again, {name} is {tuple(b.shape)}; {one} has {tuple(a.shape)}")
        wide = a.double()
        difference = float((wide - b.double()).abs().max() / wide.abs().max().clamp_min(1e-30))
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return Reproduction(identical, largest, tolerance, len(ours.names))


class _Weights:
    """The tensors of a saved model by name; the factors of a layer are one, multiplied out, for their signs are arbitrary.

    Raises:
        ExportError: if a file cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._layers: dict[str, Any] = config.get("quantization_config", {}).get("modules", {})
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with self._open(file) as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        second = {name for path in self._layers for name in self._files if re.fullmatch(rf"{re.escape(path)}\.up\d+", name)}
        self.names = self._files.keys() - second

    def read(self, name: str) -> Tensor:
        """Return a tensor, or the weight (m, n) that a layer's factors make."""
        path, _, last = name.rpartition(".")
        if last != "weight" or path not in self._layers:
            return self._tensor(name)
        held = self._layers[path]
        parts = [Part(*part) for part in held["parts"]]
        weight = self._tensor(name)
        layer = LowRankLinear(weight.shape[1], sum(p.rows for p in parts), parts, groups=held["groups"], device="meta")
        factors = {f"up{i}": self._tensor(f"{path}.up{i}") for i, p in enumerate(parts) if p.rank is not None}
        layer.load_state_dict({"weight": weight, **factors}, assign=True)
        return layer.dense()

    def _tensor(self, name: str) -> Tensor:
        with self._open(self._files[name]) as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    @staticmethod
    def _open(file: Path) -> Any:
        try:
            return safe_open(file, framework="pt")
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{file} cannot be read ({error}); save the model again") from None


def _difference(found: list[list[float]] | None, recorded: list[list[float]] | None) -> float | None:
    if found is None or recorded is None:
        return None
    a, b = torch.tensor(found), torch.tensor(recorded)
    difference = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
    return difference if math.isfinite(difference) else math.inf
