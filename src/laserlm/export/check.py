"""Check a saved model: load it in a fresh process, or rebuild it and compare the weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.errors import ExportError, ModelError
from laserlm.export import load_in_subprocess
from laserlm.export.calibration_text import OWN_TEXT_FILE
from laserlm.export.compression import compress
from laserlm.export.load_in_subprocess import REPORTS
from laserlm.export.products import own_products
from laserlm.export.record import FLOAT32_TOLERANCE, file_hashes, read_record, relative_difference
from laserlm.export.saving import save
from laserlm.export.source_check import differences
from laserlm.export.update_adapter import adapter_of
from laserlm.low_rank import LowRankLinear, Part
from laserlm.models.adapter import LOCAL, is_gone
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import dtype_named, locate
from laserlm.models.source import source_folder
from laserlm.models.weight_files import stored_tensors
from laserlm.paths import cache_folder
from laserlm.reductions import Intervention

TOLERANCE = {"float64": 1e-5, "float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
"""Largest relative difference that rounding explains, by dtype: of weights, and of outputs computed in that dtype."""
TRAINED_TOLERANCE = 1e-2
"""Largest relative difference of trained factors: Adam makes steps of the same size of large and of tiny gradients."""


@dataclass(frozen=True)
class LoadCheck:
    """The result of loading a saved model in a fresh process.

    Args:
        form: ``dense``, ``factored`` or ``adapter``.
        imported_laserlm: whether that process imported laserlm; it does not for the dense form.
        difference: largest difference between computed and recorded outputs, as a share of the largest output; None if none
            were recorded, as for a model that takes no tokens, so that only its loading and its files were checked.
        tolerance: largest difference that rounding explains.
        changed: files that have changed since the model was saved.
        in_float32: whether both outputs were computed in float32 from the saved weights. It is False for folders of
            laserlm 0.1.0, which recorded the outputs before the weights were rounded to the saved dtype.
        lost: a line for each tensor, setting or file of the base model that no reduction touches and that is not the same;
            None if they were not compared, because the base model is not here as safetensors.
    """

    form: str
    imported_laserlm: bool
    difference: float | None
    tolerance: float
    changed: tuple[str, ...]
    in_float32: bool = True
    lost: tuple[str, ...] | None = None

    @property
    def changed_weights(self) -> tuple[str, ...]:
        """The weight files among the changed files."""
        return tuple(name for name in self.changed if name.endswith(".safetensors"))

    @property
    def agrees(self) -> bool:
        """Whether the weight files are unchanged, and the outputs equal the recorded outputs up to rounding."""
        same_outputs = self.difference is None or self.difference <= self.tolerance
        return same_outputs and not self.changed_weights and not self.lost

    def __str__(self) -> str:
        alone = "with peft on its base model" if self.form == "adapter" else "with transformers alone"
        how = "with laserlm imported" if self.imported_laserlm else alone
        compared = (
            "its outputs were not compared because none were recorded"
            if self.difference is None
            else f"its outputs differ from those recorded by {self.difference:.1e} of the largest (rounding explains "
            f"{self.tolerance:.0e})"
        )
        if self.difference is not None and not self.in_float32:
            compared += " because laserlm 0.1.0 recorded them before it rounded the weights"
        changed = f"; changed since it was saved: {', '.join(self.changed)}" if self.changed else ""
        kept = "" if self.lost is None else "; all that no reduction touches is as in the base model"
        kept = f"; unlike the base model: {self.lost[0]} (and {len(self.lost) - 1} more)" if self.lost else kept
        return f"loads as {self.form} {how}; {compared}{kept}{changed}"


def load_check(folder: str | Path, *, allow_remote_code: bool = False) -> LoadCheck:
    """Load a saved model in a fresh process, and compare its files and outputs with those recorded when it was saved.

    The outputs are computed in float32 from the saved weights, one block at a time, whatever the dtype of the weights is. If
    the base model is here, its tensors, config and files that no reduction touches are compared with those of the folder.

    Args:
        folder: a folder that ``save`` or ``compress`` wrote.
        allow_remote_code: run modelling code that the folder brings.

    Raises:
        ExportError: if it does not load or lacks weights, or the base model of an adapter is gone.
    """
    folder = Path(folder).absolute()
    record = read_record(folder)
    if record.get("allow_remote_code") and not allow_remote_code:
        raise ExportError(
            f"{folder} brings its own code; --allow-remote-code (allow_remote_code=True) runs it, if you trust the folder"
        )
    arguments = [str(folder), *(["--allow-remote-code"] if allow_remote_code else [])]
    if record["form"] == "adapter":
        if is_gone(record["base"]):
            raise ExportError(
                f"{folder} belongs to the local model {record['base']['name']!r}, which is not where it was; write where it is "
                f'now into {folder / LOCAL}, as {{"base": "PATH"}}'
            )
        arguments.insert(1, str(locate(record["base"]["name"], record["base"]["revision"], cache_folder())[0]))
    process = subprocess.run(
        [sys.executable, "-P", str(Path(load_in_subprocess.__file__)), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if process.returncode != 0:
        reason = (process.stderr.strip().splitlines() or ["no reason given"])[-1]
        missing = re.search(r"^ModuleNotFoundError: No module named '(\w+)", reason)
        next_step = f"pip install {missing[1]}" if missing else "save it again"
        raise ExportError(f"{folder} does not load: {reason}; {next_step}")
    output: dict[str, Any] = json.loads(process.stdout.strip().splitlines()[-1])
    expected = record.get("loading_report", {})  # some tensors are not for the class that loads the model, in the base neither
    for name in REPORTS:
        others = sorted(set(output[name]) ^ set(expected.get(name, ())))
        if others:
            raise ExportError(f"{folder} loads with {name.replace('_', ' ')}: {', '.join(others[:4])}; save it again")
    recorded, current = record["files"], file_hashes(folder)
    in_float32 = "fingerprint_dtype" in record
    of_dtype = max(TOLERANCE.get(name, 3e-2) for name in record["dtype"].values())
    return LoadCheck(
        form=record["form"],
        imported_laserlm=output["imported"],
        difference=_difference(output["fingerprint"], record["fingerprint"]),
        tolerance=FLOAT32_TOLERANCE if in_float32 else of_dtype,
        changed=tuple(sorted(name for name in {*recorded, *current} if recorded.get(name) != current.get(name))),
        in_float32=in_float32,
        lost=_lost(folder, record),
    )


def _lost(folder: Path, record: dict[str, Any]) -> tuple[str, ...] | None:
    """Return what the folder has otherwise than its base model; None if they cannot be compared here."""
    if "source" not in record or is_gone(record["base"]):
        return None
    try:
        source = source_folder(record["base"]["name"], record["base"]["revision"])
        return None if source is None or not stored_tensors(source) else tuple(differences(source, folder, record["source"]))
    except ModelError:  # the hub's cache may hold the config without the weights
        return None


@dataclass(frozen=True)
class Reproduction:
    """The comparison of a rebuilt model with the saved model.

    Args:
        identical: whether all weights are equal, bit by bit.
        difference: largest difference of a weight, as a share of the largest weight of its tensor. Factors are multiplied out.
        tolerance: largest difference that rounding in the saved dtype explains.
        tensors: number of tensors compared.
    """

    identical: bool
    difference: float
    tolerance: float
    tensors: int

    @property
    def agrees(self) -> bool:
        """Whether the weights are equal up to the rounding of a decomposition on another machine."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        if self.identical:
            return f"all {self.tensors} tensors are equal, bit by bit"
        return (
            f"{self.tensors} tensors compared; the largest difference is {self.difference:.1e} of its tensor's largest weight "
            f"(rounding explains {self.tolerance:.0e})"
        )


def reproduce(folder: str | Path, lm: LanguageModel, *, calibration: str | Path | None = None) -> Reproduction:
    """Rebuild a saved model from its base model with new decompositions, and compare the weights.

    Args:
        folder: a folder that ``save`` or ``compress`` wrote.
        lm: the base model that its record names.
        calibration: path of the calibration text of a compressed model; None uses the recorded path.

    Raises:
        ExportError: if the folder has no record, or ``lm`` or the text differs from the recorded one.
    """
    folder = Path(folder)
    record = read_record(folder)
    expected = (record.get("update") or record["base"])["hash"]
    if lm.hash != expected:
        raise ExportError(
            f"{folder} was made from {record['base']['name']} with weights {expected[:12]}; "
            f"{lm.name} has {lm.hash[:12]}; load the recorded revision in {record['dtype']['base']}"
        )
    keeps_dtypes = "source" in record and record["source"]["dtype"] is None
    if keeps_dtypes and lm.loaded is not None:  # it was loaded in the recorded dtype, but is not to be saved in it
        lm = replace(lm, loaded=lm.loaded | {"dtype": None})
    options: dict[str, Any] = {
        "form": record["asked_form"],
        "dtype": None if keeps_dtypes else record["dtype"]["saved"],
        "shard_size": record["shard_size"],
    }
    if record["form"] == "adapter":
        return _compare_adapter(folder, lm, record)
    with tempfile.TemporaryDirectory() as temporary:
        rebuilt = Path(temporary) / "rebuilt"
        if "compression" in record:
            own_text = folder / OWN_TEXT_FILE if (record["compression"].get("text") or {}).get("own") else None
            _rebuild_compressed(record["compression"], lm, rebuilt, calibration or own_text, options)
        else:
            seed = record["decomposition"]["seed"]
            save(lm, record["intervention"], rebuilt, seed=seed, cache=DecompositionCache(), **options)
        tolerance = TOLERANCE.get(record["dtype"]["saved"], 3e-2)
        if record.get("compression", {}).get("refine"):
            tolerance = max(tolerance, TRAINED_TOLERANCE)
        return _compare_weights(folder, rebuilt, tolerance)


def _rebuild_compressed(
    settings: dict[str, Any], lm: LanguageModel, out: Path, calibration: str | Path | None, options: dict[str, Any]
) -> None:
    text: dict[str, Any] | None = settings.get("text")
    if text is not None:
        file = Path(calibration or text["name"])
        if not file.is_file() or hashlib.sha256(file.read_bytes()).hexdigest() != text["sha256"]:
            raise ExportError(
                f"{file} is not the text that the model was calibrated on (sha256 {text['sha256'][:12]}); give "
                "--calibration FILE"
            )
        options = options | {"calibration": file, "tokens": text["tokens"]}
    if settings["allocation"] != "uniform":  # version 0.1.0 kept no matrix dense for its share, and had ranks of any size
        options |= {"dense_above": settings.get("dense_above", 1.0), "rank_multiple": settings.get("rank_multiple", 1)}
    options |= {"refine": settings.get("refine", 0)}
    options |= {"products": settings.get("products", own_products(lm))}  # version 0.1.0 had the model's own alone
    compress(lm, out, **{name: settings[name] for name in ("ratio", "method", "allocation")}, **options)


def _compare_weights(saved: Path, rebuilt: Path, tolerance: float) -> Reproduction:
    saved_weights, rebuilt_weights = _Weights(saved), _Weights(rebuilt)
    if saved_weights.names != rebuilt_weights.names:
        different = sorted(saved_weights.names ^ rebuilt_weights.names)
        raise ExportError(f"the rebuilt model has other tensors than {saved}: {', '.join(different[:4])}")
    identical, largest = True, 0.0
    for name in sorted(saved_weights.names):
        a, b = saved_weights.read(name), rebuilt_weights.read(name)
        if torch.equal(a, b):
            continue
        identical = False
        if a.shape != b.shape:
            raise ExportError(f"{name} of the rebuilt model is {tuple(b.shape)}; {saved} has {tuple(a.shape)}")
        largest = max(largest, relative_difference(b.double(), a.double()))
    return Reproduction(identical, largest, tolerance, len(saved_weights.names))


def _compare_adapter(folder: Path, lm: LanguageModel, record: dict[str, Any]) -> Reproduction:
    """Compare the difference of each changed parameter, multiplied out, with that of a new adapter."""
    saved_dtype, seed = record["dtype"]["saved"], record["decomposition"]["seed"]
    intervention = Intervention.parse(record["intervention"])
    rebuilt = adapter_of(lm, intervention, cache=DecompositionCache(), seed=seed, dtype=dtype_named(saved_dtype))
    saved = rebuilt.read(folder)
    # The model's device may be a GPU, and the file was read on the CPU.
    pairs = [(a.dense().cpu(), b.dense().cpu()) for a, b in zip(rebuilt.differences, saved.differences, strict=True)]
    identical = all(torch.equal(a, b) for a, b in pairs)
    largest = max(relative_difference(a.double(), b.double()) for a, b in pairs)
    return Reproduction(identical, largest, TOLERANCE.get(saved_dtype, 3e-2), len(pairs))


class _Weights:
    """The tensors of a saved model by name. The factors of a layer are multiplied out, because their signs are arbitrary."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._layers: dict[str, Any] = config.get("quantization_config", {}).get("modules", {})
        self._files: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with self._open(file) as opened:
                self._files |= dict.fromkeys(opened.keys(), file)
        second_factors = {
            name for path in self._layers for name in self._files if re.fullmatch(rf"{re.escape(path)}\.(up\d+|order)", name)
        }
        self.names = self._files.keys() - second_factors

    def read(self, name: str) -> Tensor:
        """Return a tensor; for a low-rank layer, the product (m, n) of its factors."""
        path, _, last = name.rpartition(".")
        if last != "weight" or path not in self._layers:
            return self._tensor(name)
        entry = self._layers[path]
        parts = [Part(*part) for part in entry["parts"]]
        weight = self._tensor(name)
        layer = LowRankLinear(weight.shape[1], sum(p.rows for p in parts), parts, groups=entry["groups"], device="meta")
        others = {name: self._tensor(f"{path}.{name}") for name in layer.state_dict() if name != "weight"}
        layer.load_state_dict({"weight": weight, **others}, assign=True)
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


def _difference(outputs: list[list[float]] | None, recorded: list[list[float]] | None) -> float | None:
    if outputs is None or recorded is None:
        return None
    return relative_difference(torch.tensor(outputs), torch.tensor(recorded))
