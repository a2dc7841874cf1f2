"""Write a model as a folder that plain ``from_pretrained`` loads, with a record of how it was made."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from torch import Tensor

from laserlm.edit.factors import StoredMatrix
from laserlm.errors import ExportError
from laserlm.export.card import card
from laserlm.export.load_in_subprocess import fingerprint
from laserlm.low_rank import LowRankConfig, LowRankLinear
from laserlm.models.bundled import HUB_ID
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import CLASSES, dtype_named, silence_transformers
from laserlm.paths import atomic_folder
from laserlm.provenance import provenance

__all__ = [
    "RECORD",
    "Form",
    "SaveOptions",
    "SavedModel",
    "check_request",
    "check_target",
    "command_of",
    "file_hashes",
    "read_record",
    "write",
]

Form = Literal["dense", "factored"]
RECORD = "laser.json"
CARD = "README.md"
FORMAT = 1
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


@dataclass(frozen=True)
class SaveOptions:
    """How a model is written.

    Args:
        form: ``dense`` or ``factored``.
        dtype: of the saved weights, such as ``float16``; None keeps that of each.
        overwrite: replace a folder that laserlm wrote before.
        shard_size: bytes of a weight file at most, such as ``5GB``.
    """

    form: Form = "dense"
    dtype: str | torch.dtype | None = None
    overwrite: bool = False
    shard_size: str = "5GB"


@dataclass(frozen=True)
class SavedModel:
    """What was saved.

    Args:
        folder: where.
        form: ``dense`` or ``factored``.
        holdings: how each reduced matrix is held.
        parameters: of the saved model; tied ones count once.
        base_parameters: of the model it was made from.
        bytes: of the weights on disk.
        record: what ``laser.json`` holds.
    """

    folder: Path
    form: Form
    holdings: tuple[StoredMatrix, ...]
    parameters: int
    base_parameters: int
    bytes: int
    record: dict[str, Any] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the record as plain JSON values."""
        return {
            "folder": str(self.folder),
            "form": self.form,
            "parameters": self.parameters,
            "base_parameters": self.base_parameters,
            "bytes": self.bytes,
            "matrices": [h.as_dict() for h in self.holdings],
        }

    def __str__(self) -> str:
        factors = sum(not h.dense for h in self.holdings)
        return (
            f"{self.folder}: {self.parameters:,} parameters ({self.parameters / self.base_parameters:.1%} of "
            f"{self.base_parameters:,}), {self.bytes / 2**20:.1f} MiB of weights, {factors} matrices held as two factors, "
            f"{len(self.holdings) - factors} as one"
        )


def check_target(out: Path, overwrite: bool) -> None:
    """Raise an ExportError where a folder may not be written."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise ExportError(f"{out} exists already; give another folder, or --overwrite (overwrite=True)")
        if not (out / RECORD).is_file():
            raise ExportError(f"{out} was not written by laserlm (it has no {RECORD}) and is left alone; remove it yourself")


def check_request(lm: LanguageModel, out: Path, how: SaveOptions) -> None:
    """Raise an error where a model cannot be written in a way, before anything is computed.

    Raises:
        ExportError: if there is no such form or size, the folder is there already, or the model was loaded from factors.
        ModelError: if there is no such dtype, or an intervention is applied at the moment.
    """
    if how.form not in get_args(Form):
        raise ExportError(f"no form {how.form!r}; there are {', '.join(get_args(Form))}")
    if SHARD_SIZE.fullmatch(how.shard_size) is None:
        raise ExportError(f"cannot read {how.shard_size!r}, the size of a weight file; write a number and KB, MB or GB: 5GB")
    if how.dtype is not None:
        dtype_named(how.dtype)
    check_target(out, how.overwrite)
    held = [path for path, module in lm.model.named_modules() if isinstance(module, LowRankLinear)]
    if held:
        raise ExportError(
            f"{lm.name} holds {held[0]} as two factors already; make the folder from its base model, which its {RECORD} names"
        )
    _ = lm.hash


def write(
    lm: LanguageModel,
    out: Path,
    change: AbstractContextManager[Sequence[StoredMatrix]],
    how: SaveOptions,
    record: dict[str, Any],
) -> SavedModel:
    """Write a model as it is inside ``change``: config, weights, tokenizer, generation config, card and record.

    All is written to a temporary folder beside ``out``, which cannot be loaded before the weights are whole and is moved
    into place at the end.

    Raises:
        ExportError: if the folder is there by then, or cannot be written.
    """
    check_request(lm, out, how)
    to = lm.dtype if how.dtype is None else dtype_named(how.dtype)
    base = {
        "name": lm.name,
        "hub": HUB_ID if lm.name == "bundled" else None if Path(lm.name).exists() else lm.name,
        "revision": lm.revision,
        "hash": lm.hash,
        "family": lm.family,
        "kind": lm.kind,
    }
    base_parameters = _count(lm)
    try:
        with atomic_folder(out, existing="replace" if how.overwrite else "refuse") as part, change as holdings:
            parameters = _count(lm)
            with silence_transformers():
                _write_weights(lm, part, to, how.shard_size)
                # Whoever finds the folder of a save that was killed finds nothing that loads.
                config = (part / "config.json").rename(part / "config.json.part")
                _write_tokenizer(lm, part)
            weights = sum(f.stat().st_size for f in part.glob("*.safetensors"))
            made = how.form if any(not h.dense for h in holdings) else "dense"
            own = type(lm.model).__module__  # a model of the lab registers itself when its module is imported
            whole = {
                "format": FORMAT,
                "form": made,
                "imports": own if own.startswith("laserlm.") else "laserlm" if made == "factored" else None,
                "asked_form": how.form,
                "loader": CLASSES[lm.kind].__name__,
                "base": base,
                "dtype": {"base": _name(lm.dtype), "saved": _name(to)},
                "shard_size": how.shard_size,
                **record,
                "matrices": [h.as_dict() for h in holdings],
                "parameters": {"base": base_parameters, "saved": parameters},
                "weight_bytes": weights,
                "fingerprint": fingerprint(lm.model),
                "provenance": provenance(device=str(lm.device), dtype=_name(lm.dtype)),
            }
            (part / CARD).write_text(card(whole), encoding="utf-8")
            config.rename(part / "config.json")
            whole["files"] = file_hashes(part)
            (part / RECORD).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {out}: {error}; free space there, or give another folder") from error
    return SavedModel(out, whole["form"], tuple(holdings), parameters, base_parameters, weights, whole)


def command_of(lm: LanguageModel, verb: str, options: Sequence[str], out: Path, how: SaveOptions) -> str:
    """Return the command that makes a folder from the model as it was loaded."""
    load = ["--dtype", _name(lm.dtype)]
    load += ["--revision", lm.revision] if lm.revision else []
    load += ["--kind", lm.kind] if lm.kind != "causal" else []
    write = ["--form", how.form, "--shard-size", how.shard_size]
    write += ["--save-dtype", str(how.dtype).removeprefix("torch.")] if how.dtype is not None else []
    return shlex.join(["laser", verb, lm.name, *load, *options, *write, "--out", out.name])


def read_record(folder: Path) -> dict[str, Any]:
    """Return what a saved model's ``laser.json`` holds.

    Raises:
        ExportError: if there is none, it cannot be read, or a newer laserlm wrote it.
    """
    file = folder / RECORD
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{folder} has no {RECORD}; give a folder that 'laser save' wrote") from None
    except ValueError as error:
        raise ExportError(f"{file} cannot be read ({error}); save the model again") from None
    if record["format"] > FORMAT:
        raise ExportError(f"{file} is of format {record['format']}; this laserlm reads up to {FORMAT}: install a newer one")
    return record


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a saved model but its record, by name."""
    found = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.name != RECORD):
        with file.open("rb") as stream:
            found[file.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def _write_weights(lm: LanguageModel, folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    model = lm.model
    layers = {path: module.as_dict() for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    with _configured(model.config, layers):
        state = model.state_dict()
        if dtype != model.dtype:
            state = _cast(state, model.dtype, dtype)
        model.save_pretrained(folder, state_dict=state, max_shard_size=shard_size)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if dtype != model.dtype:
        config = _renamed(config, _name(model.dtype), _name(dtype))
    file.write_text(json.dumps(_for_transformers_4(config), indent=2) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(file.stat().st_mode)  # safetensors keeps them from all other users


def _write_tokenizer(lm: LanguageModel, folder: Path) -> None:
    if lm.tokenizer is None:
        return
    lm.tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}  # some kinds of tokenizer write none
    if config.get("tokenizer_class") == "TokenizersBackend":  # the name that transformers 5 gave to this class
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _for_transformers_4(config: Any) -> Any:
    """Return a config, nested ones too, that also says where transformers 4 looks for it how positions are rotated.

    transformers 4 does not know ``rope_parameters``: without an error it would compute with a default instead.
    """
    if not isinstance(config, dict):
        return config
    config = {name: _for_transformers_4(value) for name, value in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return config
    own = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    scaling = {name: value for name, value in rope.items() if name not in own}
    if config.get("model_type") == "gpt_neox":
        own = {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    if rope.get("rope_type", "default") != "default":
        own["rope_scaling"] = scaling
    return own | config


@contextmanager
def _configured(config: Any, layers: dict[str, Any]) -> Iterator[None]:
    """Let a config name low-rank layers until the end of the block."""
    if not layers:
        yield
        return
    config.quantization_config = LowRankConfig(layers)
    try:
        yield
    finally:
        del config.quantization_config


def _cast(state: dict[str, Tensor], old: torch.dtype, new: torch.dtype) -> dict[str, Tensor]:
    """Return tensors in another dtype, on the CPU; those in a dtype of their own keep it.

    Tensors that are one stay one, for safetensors keeps tied weights once.
    """
    cast: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    done = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride())
        if key not in cast:
            cast[key] = tensor.to("cpu", new) if tensor.dtype == old and tensor.device.type != "meta" else tensor
        done[name] = cast[key]
    return done


def _renamed(config: Any, old: str, new: str) -> Any:
    """Return a config whose dtypes, those of nested configs too, have another name."""
    if not isinstance(config, dict):
        return config
    return {k: new if k == "dtype" and v == old else _renamed(v, old, new) for k, v in config.items()}


def _count(lm: LanguageModel) -> int:
    return sum(p.numel() for p in lm.model.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
