"""Write a model as a folder that ``from_pretrained`` loads, with a record of how it was made."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from huggingface_hub import metadata_load
from rich.filesize import decimal
from safetensors import SafetensorError
from torch import Tensor
from yaml import YAMLError

from laserlm.edit.factors import StoredMatrix
from laserlm.errors import ExportError, LaserError
from laserlm.export.adapter import Adapter
from laserlm.export.card import card
from laserlm.export.load_in_subprocess import REPORTS, compute_in_float32, fingerprint
from laserlm.export.source import Source
from laserlm.export.source_check import differences
from laserlm.export.transformers_4 import adapt_tokenizer, config_for_transformers_4
from laserlm.linalg.precision import full_precision
from laserlm.low_rank import LowRankConfig, LowRankLinear
from laserlm.models.adapter import LOCAL, base_of, local_paths
from laserlm.models.bundled import HUB_ID
from laserlm.models.kinds import CLASSES, model_class
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import dequantise, dtype_named
from laserlm.models.loading_errors import silence_transformers
from laserlm.models.source import source_folder
from laserlm.paths import atomic_folder, check_new_folder
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

Form = Literal["dense", "factored", "adapter"]
RECORD = "laser.json"
CARD = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
HIDDEN_CONFIG = "config.json.part"
"""Name of the config until the folder is complete. Without a config.json, the folder of a killed save does not load."""
FORMAT = 1
PATH_FIELDS = {"name", "task", "guard"}
"""Fields of the record that may be paths: of the base model, the calibration text, the task and the guards."""
PATH_PREFIX = re.compile(r"(?:perplexity|jsonl|hub|lm-eval):")
"""What may precede a path in the name of a task or guard."""
SHARD_SIZE = re.compile(r"\d+(\.\d+)?\s*[KMGT]i?B", re.IGNORECASE)


@dataclass(frozen=True)
class SaveOptions:
    """The form of a saved model.

    Args:
        form: ``dense``, ``factored`` or ``adapter``.
        dtype: dtype of the saved weights, such as ``float16``; None keeps the model's dtypes.
        overwrite: whether to replace a folder that laserlm wrote before.
        shard_size: maximum size of a weight file, such as ``5GB``.
        hub_id: repository that the folder will be uploaded to, for its card; None for none.
    """

    form: Form = "dense"
    dtype: str | torch.dtype | None = None
    overwrite: bool = False
    shard_size: str = "5GB"
    hub_id: str | None = None


@dataclass(frozen=True)
class SavedModel:
    """A model that was saved.

    Args:
        folder: its folder.
        form: ``dense``, ``factored``, ``adapter`` or ``gguf``.
        matrices: storage of each reduced matrix.
        parameters: number of parameters of the saved model, or of the adapter; tied parameters count once.
        base_parameters: number of parameters of the base model.
        bytes: size of the weights on disk.
        record: content of ``laser.json``.
    """

    folder: Path
    form: Form | Literal["gguf"]
    matrices: tuple[StoredMatrix, ...]
    parameters: int
    base_parameters: int
    bytes: int
    record: dict[str, Any] = field(repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields except the record as plain JSON values."""
        return {
            "folder": str(self.folder),
            "form": self.form,
            "parameters": self.parameters,
            "base_parameters": self.base_parameters,
            "bytes": self.bytes,
            "matrices": [m.as_dict() for m in self.matrices],
        }

    def __str__(self) -> str:
        if self.form == "adapter":
            noun = "matrix" if len(self.matrices) == 1 else "matrices"
            return (
                f"{self.folder}: an adapter for {len(self.matrices)} {noun}, {self.parameters:,} parameters in "
                f"{decimal(self.bytes)}; the dense form takes {decimal(self.record['dense_bytes'])}"
            )
        if self.form == "gguf":
            return f"{self.folder / self.record['gguf']}: {decimal(self.bytes)}, with a Modelfile for Ollama next to it"
        factors = sum(not m.reason_kept_dense for m in self.matrices)
        return (
            f"{self.folder}: {self.parameters:,} parameters ({self.parameters / self.base_parameters:.1%} of "
            f"{self.base_parameters:,}), {self.bytes / 2**20:.1f} MiB of weights, {factors} matrices held as two factors, "
            f"{len(self.matrices) - factors} as one"
        )


def check_target(out: Path, overwrite: bool, model: str | Path | None = None) -> None:
    """Raise an error unless the folder may be written.

    Args:
        out: the folder.
        overwrite: whether a folder that laserlm wrote before may be replaced.
        model: the name that the model is loaded by; its folder is not replaced.

    Raises:
        WriteError: if it is the current folder, or one above it.
        ExportError: if it holds other files, or the model.
    """
    check_new_folder(out)
    _check_holds_no_source(out, model)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise ExportError(f"{out} exists already; give another folder, or --overwrite (overwrite=True)")
        if not (out / RECORD).is_file():
            raise ExportError(
                f"{out} was not written by laserlm (it has no {RECORD}), so it is not replaced; remove it yourself"
            )


def _check_holds_no_source(out: Path, model: str | Path | None) -> None:
    """Raise an ExportError if a folder is that of a model, of its base model, or one above them."""
    while model is not None:
        source = Path(model).expanduser()
        if source.exists() and str(model) != "bundled" and out.resolve() in (source.resolve(), *source.resolve().parents):
            raise ExportError(f"{out} holds the model that is loaded, {source}, and is not replaced; give another folder")
        base = base_of(source)
        model = None if base is None else base[0]


def check_request(lm: LanguageModel, out: Path, options: SaveOptions) -> None:
    """Raise an error unless the model can be written with these options. Call it before the computation starts.

    Raises:
        ExportError: if the form or size is unknown, the folder exists or holds the model, or the model was loaded from factors.
        WriteError: if the folder is the current one, or one above it.
        ModelError: if the dtype is unknown, or an intervention is applied now.
    """
    if options.form not in get_args(Form):
        raise ExportError(f"no form {options.form!r}; there are {', '.join(get_args(Form))}")
    if SHARD_SIZE.fullmatch(options.shard_size) is None:
        raise ExportError(f"cannot read the shard size {options.shard_size!r}; write a number and KB, MB or GB, such as 5GB")
    if options.dtype is not None:
        dtype_named(options.dtype)
    check_target(out, options.overwrite, lm.loaded["name"] if lm.loaded else lm.name)
    low_rank = [path for path, module in lm.model.named_modules() if isinstance(module, LowRankLinear)]
    if low_rank:
        raise ExportError(
            f"{lm.name} already stores {low_rank[0]} as two factors; load its base model, which its {RECORD} names"
        )
    _ = lm.hash  # raises if an intervention is applied


def write(
    lm: LanguageModel,
    out: Path,
    edit: AbstractContextManager[Sequence[StoredMatrix]],
    options: SaveOptions,
    entries: dict[str, Any],
    adapter: Adapter | None = None,
) -> SavedModel:
    """Write the model as it is inside ``edit``: config, weights, tokenizer, generation config, card and record.

    Everything is written to a temporary folder next to ``out``, which is moved into place at the end. Until the weights
    are complete, the temporary folder cannot be loaded either.

    Args:
        lm: the unchanged model.
        out: the folder.
        edit: a context that reduces the model and yields the storage of its reduced matrices.
        options: form of the saved model.
        entries: what the caller adds to the record.
        adapter: what is written in place of the model, config and tokenizer.

    Raises:
        ExportError: if the folder exists by then, or cannot be written.
    """
    check_target(out, options.overwrite)
    dtype = lm.dtype if options.dtype is None else dtype_named(options.dtype)
    dtype = dtype if adapter is None else adapter.dtype
    source = Source.of(lm) if adapter is None else None
    keeps_dtypes = source is not None and not _is_cast(lm, options)
    saved_dtype = source.dtype if source is not None and keeps_dtypes else dtype
    base = {
        "base": _describe_base(lm, lm.hash) | {"licence": _licence_of(lm)},
        "dtype": {"base": _name(lm.dtype), "saved": _name(saved_dtype)},
    }
    base_parameters = _count(lm)
    try:
        with atomic_folder(out, existing="replace" if options.overwrite else "refuse") as part, edit as matrices:
            opened: dict[str, Any] = {}
            if adapter is not None:
                outputs = adapter.write(lm, part)
            elif source is not None:
                cast = None if keeps_dtypes else dtype
                outputs, opened = _write_from_source(lm, source, part, matrices, cast, options.shard_size)
            else:
                outputs = _write_model(lm, part, dtype, options.shard_size)
            form = options.form if adapter is not None or any(not m.reason_kept_dense for m in matrices) else "dense"
            module = type(lm.model).__module__  # a model of the lab registers itself when its module is imported
            record: dict[str, Any] = {
                "format": FORMAT,
                "form": form,
                "imports": module if module.startswith("laserlm.") else "laserlm" if form == "factored" else None,
                "asked_form": options.form,
                "loader": _loader_name(lm),
                "allow_remote_code": _uses_remote_code(lm),
                **opened,
                **base,
                "shard_size": options.shard_size,
                **entries,
                "matrices": [m.as_dict() for m in matrices],
                "parameters": {"base": base_parameters, "saved": _count(lm) if adapter is None else adapter.parameters},
                "weight_bytes": sum(file.stat().st_size for file in part.glob("*.safetensors")),
                "dense_bytes": sum(parameter.nbytes for parameter in lm.model.parameters()),
                "fingerprint": outputs,
                "fingerprint_dtype": "float32",
                "provenance": provenance(device=str(lm.device), dtype=_name(lm.dtype)),
            }
            paths = {"base": str(Path(lm.name).absolute())} if _is_local(lm.name) else {}
            if text := record.get("compression", {}).get("text"):
                paths["calibration"] = str(Path(text["name"]).absolute())
            record["provenance"].pop("command")  # it may name files and folders of this machine
            record = _without_paths(record)
            (part / CARD).write_text(card(record, out.name, options.hub_id), encoding="utf-8")
            if adapter is None:
                (part / HIDDEN_CONFIG).rename(part / "config.json")
            record["files"] = file_hashes(part)
            if paths:
                (part / LOCAL).write_text(json.dumps(paths, indent=2) + "\n", encoding="utf-8")
            (part / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except LaserError:
        raise
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {out}: {error}; free space there, or give another folder") from error
    parameters, weight_bytes = record["parameters"]["saved"], record["weight_bytes"]
    return SavedModel(out, form, tuple(matrices), parameters, base_parameters, weight_bytes, record)


def command_of(
    lm: LanguageModel, command: str, arguments: Sequence[str], out: Path, options: SaveOptions, form: str | None = None
) -> str:
    """Return the shell command that writes the folder from the base model, in this form if one is named."""
    load = ["--dtype", _name(lm.dtype)] if lm.loaded is None or _is_cast(lm, SaveOptions()) else []
    load += ["--allow-remote-code"] if _uses_remote_code(lm) else []
    load += ["--allow-pickle"] if (lm.loaded or {}).get("allow_pickle") else []
    load += ["--revision", lm.revision] if lm.revision else []
    load += ["--kind", lm.kind] if lm.kind != "causal" else []
    save = ["--form", form or options.form, "--shard-size", options.shard_size]
    save += ["--save-dtype", str(options.dtype).removeprefix("torch.")] if options.dtype is not None else []
    return shlex.join(map(_without_folders, ["laser", command, lm.name, *load, *arguments, *save, "--out", out.name]))


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


def _write_model(lm: LanguageModel, folder: Path, dtype: torch.dtype, shard_size: str) -> list[list[float]] | None:
    """Write weights, config and tokenizer. Return some outputs of the written weights, computed in float32.

    Return None if the model takes no tokens, or if transformers does not know the names of its weights.
    """
    model = lm.model
    state = _cast(model.state_dict(), model.dtype, dtype)
    _check_finite(lm, state, dtype)
    layers = {path: module.as_dict() for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    with silence_transformers(), _config_with_layers(model.config, layers):
        _write_weights(lm, dict(state), folder, dtype, shard_size)
        _write_tokenizer(lm, folder)
        # As ``load_check`` does, except that the weights are those in memory, not those on the disk.
        config = type(model.config).from_json_file(folder / HIDDEN_CONFIG)
        loader: Any = type(model)
        loaded, info = loader.from_pretrained(None, config=config, state_dict=state, dtype=dtype, output_loading_info=True)
        compute_in_float32(loaded)
        with full_precision():
            return None if info["missing_keys"] else fingerprint(loaded.eval())


def _write_from_source(
    lm: LanguageModel,
    source: Source,
    folder: Path,
    matrices: Sequence[StoredMatrix],
    cast: torch.dtype | None,
    shard_size: str,
) -> tuple[list[list[float]] | None, dict[str, Any]]:
    """Write the source's checkpoint with the reduced matrices. Return some outputs, and what the record says of the source."""
    model = lm.model
    _check_finite(lm, _cast(model.state_dict(), model.dtype, cast or model.dtype), cast or model.dtype)
    source.copy_files(folder)
    written = source.write_weights(lm, folder, [m.path for m in matrices], cast, shard_size)
    adapt_tokenizer(folder)
    config = source.read_config()
    if cast is not None:
        config = _with_dtype(config, {_name(lm.dtype), _name(source.dtype)}, _name(cast))
    layers = {path: module.as_dict() for path, module in model.named_modules() if isinstance(module, LowRankLinear)}
    if layers:
        config["quantization_config"] = LowRankConfig(layers).to_dict()
    elif written.dropped:
        names = [name.removesuffix(".weight") for name in written.changed]
        skipped = config["quantization_config"].get("modules_to_not_convert") or []
        config["quantization_config"]["modules_to_not_convert"] = [*skipped, *names]
    file = folder / HIDDEN_CONFIG
    file.write_text(json.dumps(config_for_transformers_4(config), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(file.stat().st_mode)  # safetensors makes them unreadable for other users
    lost = differences(source.folder, folder, written.as_dict(), config_file=HIDDEN_CONFIG)
    if lost:
        raise ExportError(f"{lm.name} cannot be saved as it is: {lost[0]} (and {len(lost) - 1} more); report this")
    loader: Any = type(model)
    with silence_transformers():
        loaded_config = type(model.config).from_json_file(file)
        dequantise(loaded_config)
        loaded, info = loader.from_pretrained(
            folder, config=loaded_config, dtype="auto", output_loading_info=True, use_safetensors=True
        )
        compute_in_float32(loaded)
        with full_precision():
            outputs = fingerprint(loaded.eval())
    report = {name: sorted(map(str, info[name])) for name in REPORTS}
    return outputs, {"source": written.as_dict(), "loading_report": report}


def _write_weights(lm: LanguageModel, state: dict[str, Tensor], folder: Path, dtype: torch.dtype, shard_size: str) -> None:
    lm.model.save_pretrained(folder, state_dict=state, max_shard_size=shard_size)
    file = (folder / "config.json").rename(folder / HIDDEN_CONFIG)
    config = json.loads(file.read_text(encoding="utf-8"))
    if dtype != lm.dtype:
        config = _with_dtype(config, {_name(lm.dtype)}, _name(dtype))
    file.write_text(json.dumps(config_for_transformers_4(config), indent=2) + "\n", encoding="utf-8")
    for weights in folder.glob("*.safetensors"):
        weights.chmod(file.stat().st_mode)  # safetensors makes them unreadable for other users


def _check_finite(lm: LanguageModel, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Raise an ExportError if a parameter is not finite in the saved dtype."""
    ids = {m.path: m.id for m in lm.matrices if m.part_of is None}
    for name, parameter in lm.model.named_parameters():
        if bool(state[name].isfinite().all()):
            continue
        matrix = ids.get(name) or ids.get(f"{name.rpartition('.')[0]}.weight")
        where = f"{name} ({matrix})" if matrix else name
        if bool(parameter.isfinite().all()):
            raise ExportError(
                f"{where} holds values up to {float(parameter.detach().abs().max()):.3g}, and {_name(dtype)} ends at "
                f"{torch.finfo(dtype).max:.3g}; save it in bfloat16 or float32 (--save-dtype)"
            )
        raise ExportError(
            f"{where} holds {int((~parameter.isfinite()).sum()):,} values that are not finite; load the base model again, "
            "or in bfloat16 or float32"
        )


def _write_tokenizer(lm: LanguageModel, folder: Path) -> None:
    if lm.tokenizer is None:
        return
    lm.tokenizer.save_pretrained(folder)
    adapt_tokenizer(folder)


@contextmanager
def _config_with_layers(config: Any, layers: dict[str, Any]) -> Iterator[None]:
    """List the low-rank layers in the config inside a ``with`` block."""
    if not layers:
        yield
        return
    config.quantization_config = LowRankConfig(layers)
    try:
        yield
    finally:
        del config.quantization_config


def _cast(state: dict[str, Tensor], old: torch.dtype, new: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of dtype ``old`` in dtype ``new`` on the CPU, and the others unchanged.

    Tied tensors stay tied, because safetensors stores them once.
    """
    cast: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Tensor] = {}
    result = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr() or id(tensor), tuple(tensor.shape), tensor.stride())
        if key not in cast:
            cast[key] = tensor.to("cpu", new) if tensor.dtype == old and tensor.device.type != "meta" else tensor
        result[name] = cast[key]
    return result


def _with_dtype(config: Any, old: set[str], new: str) -> Any:
    """Return a config, and its nested configs, with dtype ``new`` in place of those in ``old``."""
    if not isinstance(config, dict):
        return config
    return {k: new if k in ("dtype", "torch_dtype") and v in old else _with_dtype(v, old, new) for k, v in config.items()}


def _is_cast(lm: LanguageModel, options: SaveOptions) -> bool:
    """Return whether the weights are to be in another dtype than the checkpoint's: the user's, here or on loading."""
    return options.dtype is not None or bool(lm.loaded and lm.loaded["dtype"]) or lm.dtype != lm.model.config.dtype


def _uses_remote_code(lm: LanguageModel) -> bool:
    return type(lm.model).__module__.startswith("transformers_modules.")


def _loader_name(lm: LanguageModel) -> str:
    """Return the class of transformers that loads the model: a class of its family for a model with a tower or another head."""
    own = type(lm.model).__name__
    is_own = lm.loaded is not None and model_class(lm.model.config, lm.kind) is not CLASSES[lm.kind]
    return own if is_own else CLASSES[lm.kind].__name__


def _is_local(name: str) -> bool:
    return name != "bundled" and Path(name).expanduser().exists()


def _without_paths(value: Any, field: str = "") -> Any:
    """Return plain JSON values with the last part alone of each path in a field that may hold one."""
    if isinstance(value, dict):
        return {key: _without_paths(v, key) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(v) for v in value]
    return _without_folders(value) if field in PATH_FIELDS and isinstance(value, str) else value


def _without_folders(text: str) -> str:
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
        found = metadata_load(folder / CARD) if folder is not None and (folder / CARD).is_file() else None
    except (OSError, ValueError, YAMLError):
        found = None
    return {key: str(found[key]) for key in LICENCE_KEYS if key in found} if isinstance(found, dict) else {}


def _describe_base(lm: LanguageModel, base_hash: str) -> dict[str, Any]:
    return {
        "name": lm.name,
        "hub": HUB_ID if lm.name == "bundled" else None if Path(lm.name).exists() else "/".join(lm.name.split("/")[:2]),
        "revision": lm.revision,
        "hash": base_hash,
        "family": lm.family,
        "kind": lm.kind,
    }


def _count(lm: LanguageModel) -> int:
    return sum(p.numel() for p in lm.model.parameters())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
