"""Load a model with an adapter of peft merged into its weights."""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from laserlm.errors import MissingExtraError, ModelError, WeightError
from laserlm.models.finite import describe, not_finite
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import find_matrices
from laserlm.models.update import AdapterUpdate, factors_of, update_of

log = logging.getLogger(__name__)

CONFIG, RECORD = "adapter_config.json", "laser.json"
WEIGHTS = "adapter_model.safetensors"
LOCAL = "laser.local.json"
"""Paths on this machine of what a folder was made from. They are not in the record, which is published with the folder."""


def base_of(folder: str | Path) -> tuple[str, str | None] | None:
    """Return the name and the revision of the base model of an adapter, or None for a folder that holds no adapter.

    Raises:
        ModelError: if the adapter's config cannot be read, or names no base model.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() or (folder / "config.json").is_file():
        return None
    try:
        if (folder / RECORD).is_file():  # laserlm names some models in its own way
            base = json.loads((folder / RECORD).read_text(encoding="utf-8"))["base"]
            name = local_paths(folder).get("base", str(base["name"]))
            if is_gone({**base, "name": name}):
                raise ModelError(
                    f"the adapter {str(folder)!r} belongs to the local model {name!r}, which is not where it was; write "
                    f'where it is now into {folder / LOCAL}, as {{"base": "PATH"}}'
                )
            return name, base["revision"]
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return str(config["base_model_name_or_path"]), config.get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"the adapter {str(folder)!r} names no base model ({error!r}); save the adapter again") from None


def is_gone(base: Mapping[str, Any]) -> bool:
    """Return whether a recorded base model was a local folder that is not where it was.

    A record holds the last part of a path alone. A folder, or a model of the hub, of that name may be another model.
    """
    return base.get("hub", "") is None and not (Path(base["name"]).is_absolute() and Path(base["name"]).exists())


def local_paths(folder: Path) -> dict[str, str]:
    """Return the absolute paths of the base model and the calibration text of a saved folder, as far as they still exist."""
    try:
        paths = json.loads((folder / LOCAL).read_text(encoding="utf-8"))
        absolute = {name: Path(path).expanduser().absolute() for name, path in paths.items() if isinstance(path, str)}
        return {name: str(path) for name, path in absolute.items() if path.exists()}
    except (OSError, ValueError, AttributeError, RuntimeError):  # RuntimeError: there is no home folder for a ~
        return {}


def is_beside_a_model(folder: str | Path) -> bool:
    """Return whether a folder holds a model and an adapter for it."""
    return (Path(folder) / CONFIG).is_file() and (Path(folder) / "config.json").is_file()


def has_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds an adapter, which ``load`` merges."""
    return (Path(folder) / CONFIG).is_file()


@contextmanager
def model_alone(folder: str | Path) -> Iterator[Path]:
    """Yield a folder with links to all files of a folder except those of an adapter, which transformers would add."""
    with tempfile.TemporaryDirectory() as alone:
        for file in Path(folder).absolute().iterdir():
            if not file.name.startswith("adapter_"):
                (Path(alone) / file.name).symlink_to(file)
        yield Path(alone)


def with_adapter(
    lm: LanguageModel, folder: str | Path, *, keeps_update: bool = False, device: torch.device | None = None
) -> LanguageModel:
    """Return the model that a base model becomes with the adapter of a folder; the base model must not be used again.

    Args:
        lm: the base model.
        folder: the adapter's folder.
        keeps_update: keep what a LoRA adds to each weight, and the weight without it. Reductions then change the update.
        device: the device that the merged model is moved to; None leaves it where the base model is.

    Raises:
        MissingExtraError: if peft is not installed.
        ModelError: if the adapter does not fit the base model, or was saved for other weights.
        WeightError: if the adapter makes weights that are not finite, or its update is kept and the base model is quantised or
            offloaded.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise MissingExtraError("an adapter is loaded by peft: pip install peft") from error
    _check_base(lm, Path(folder))
    if not (Path(folder) / WEIGHTS).is_file() and not (lm.loaded or {}).get("allow_pickle"):
        raise ModelError(
            f"the adapter {str(folder)!r} has no {WEIGHTS}, and pickled weights can run code; --allow-pickle "
            "(allow_pickle=True) reads them, if you trust the folder"
        )
    base_hash = _hash_of_base(lm) if keeps_update else ""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # peft would go on with a part of it
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            wrapped: Any = PeftModel.from_pretrained(lm.model, str(folder))
            factors = factors_of(wrapped) if keeps_update else {}
            names = get_peft_model_state_dict(wrapped, save_embedding_layers=False) if keeps_update else {}
            bases = {path: _base_layer(wrapped, path).weight.detach().clone() for path in factors}
            model: Any = wrapped.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, UserWarning, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot load the adapter {str(folder)!r} on {lm.name}: {reason}; save the adapter again") from error
    if counts := not_finite(model):
        raise WeightError(
            f"the adapter {str(folder)!r} makes weights of {lm.name} that are not finite: {describe(counts)}. It is damaged or "
            "overflows the dtype; load it with --dtype float32 (dtype=...), or save the adapter again"
        )
    if keeps_update:
        update = update_of(Path(folder), base_hash, _others(names, factors), model, bases, factors)
        return _with_update(lm, Path(folder), update, model, device)
    log.warning("the adapter in %s is merged into the weights of its base model", folder)
    model.config._name_or_path = str(folder) if is_beside_a_model(folder) else model.config._name_or_path
    loaded = {**(lm.loaded or {}), "name": str(Path(folder).absolute()), "revision": None}
    return replace(lm, model=model if device is None else model.to(device), name=str(folder), revision=None, loaded=loaded)


def _hash_of_base(lm: LanguageModel) -> str:
    """Return the hash of a base model whose adapter's update is to be kept.

    Raises:
        WeightError: if its weights are quantised or not in memory, so that what merging adds to them cannot be told.
    """
    find_matrices(lm.model)  # refuses quantised weights
    return lm.hash  # refuses offloaded ones


def _with_update(
    lm: LanguageModel, folder: Path, update: AdapterUpdate, model: Any, device: torch.device | None
) -> LanguageModel:
    """Return the merged model, whose reductions change the update, on a device.

    Raises:
        ModelError: if the adapter updates no weight matrix of a block.
    """
    if device is not None:
        model, update = model.to(device), update.to(device)
    loaded = {**(lm.loaded or {}), "adapter": str(folder.absolute())}
    merged = replace(lm, model=model, update=update, loaded=loaded)
    if not merged.matrices:
        raise ModelError(f"the adapter {str(folder)!r} updates no weight matrix of a block; there is nothing to reduce")
    if update.others:
        first = ", ".join(update.others[:3])
        log.warning("%d tensors of the adapter %s are merged and not reduced: %s ...", len(update.others), folder, first)
    return merged


def _base_layer(wrapped: Any, path: str) -> Any:
    return wrapped.get_base_model().get_submodule(path.removesuffix(".weight")).get_base_layer()


def _others(names: Iterable[str], factors: Mapping[str, Any]) -> list[str]:
    """Return the names of an adapter's tensors that are not factors of an update."""
    modules = {path.removesuffix(".weight") for path in factors}
    prefix = "base_model.model."
    own = {f"{prefix}{module}.lora_{side}.weight" for module in modules for side in "AB"}
    return sorted(set(names) - own)


def _check_base(lm: LanguageModel, folder: Path) -> None:
    """Raise a ModelError if the record of an adapter names other weights than those of the base model that was loaded."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        base, dtype = record["base"], record["dtype"]["base"]
        recorded, kind = str(base["hash"]), base["kind"]
    except (OSError, ValueError, KeyError, TypeError):  # an adapter that laserlm did not save
        return
    floats = [t for t in lm.model.state_dict().values() if t.is_floating_point()]
    # The hash is of the weights as they were loaded: another dtype or head, or offloaded weights, cannot be compared.
    is_comparable = kind == lm.kind and all(str(t.dtype) == f"torch.{dtype}" and t.device.type != "meta" for t in floats)
    if is_comparable and lm.hash != recorded:
        raise ModelError(
            f"the adapter {str(folder)!r} was saved for {base['name']} with weights {recorded[:12]}, and {lm.name} has "
            f"{lm.hash[:12]}; write where that model is into {folder / LOCAL}, or save the adapter again"
        )
