"""Write a model as a folder that ``from_pretrained`` loads, with its card and its record."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.filesize import decimal
from safetensors import SafetensorError

from laserlm.edit.factors import StoredMatrix
from laserlm.errors import ExportError, LaserError
from laserlm.export.adapter import Adapter
from laserlm.export.card import card
from laserlm.export.record import (
    CARD,
    FORMAT,
    RECORD,
    computes_outputs,
    describe_base,
    describe_update,
    file_hashes,
    paths_here,
    without_folders,
    without_paths,
)
from laserlm.export.source import Source, copy_side_files, quantisation_of
from laserlm.export.weights import HIDDEN_CONFIG, dtype_name, write_from_source, write_model
from laserlm.low_rank import LowRankLinear
from laserlm.models.adapter import LOCAL, base_of
from laserlm.models.kinds import CLASSES, model_class
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading import dtype_named
from laserlm.models.source import source_folder
from laserlm.paths import atomic_folder, check_new_folder
from laserlm.provenance import provenance

Form = Literal["dense", "factored", "adapter"]
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
        ExportError: if the form or size is unknown, the folder exists or holds the model, the model was loaded from factors, or
            factors are to be stored next to eight-bit weights.
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
    if lm.update is not None:
        check_target(out, options.overwrite, str(lm.update.folder))
    low_rank = [path for path, module in lm.model.named_modules() if isinstance(module, LowRankLinear)]
    if low_rank:
        raise ExportError(
            f"{lm.name} already stores {low_rank[0]} as two factors; load its base model, which its {RECORD} names"
        )
    source = None if lm.update is not None else _folder_of_source(lm)
    if options.form == "factored" and (method := quantisation_of(source)):
        raise ExportError(
            f"{lm.name} is quantised by {method}, and one config cannot describe both its weights and factors; save the dense "
            "form (--form dense), or reduce an unquantised copy"
        )
    _ = lm.hash  # raises if an intervention is applied


def _folder_of_source(lm: LanguageModel) -> Path | None:
    return None if lm.loaded is None else source_folder(lm.loaded["name"], lm.loaded["revision"])


def write(
    lm: LanguageModel,
    out: Path,
    edit: AbstractContextManager[Sequence[StoredMatrix]],
    options: SaveOptions,
    entries: dict[str, Any],
    adapter: Adapter | None = None,
    files: Mapping[str, bytes] = {},
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
        files: contents of further files, by name.

    Raises:
        ExportError: if the folder exists by then, or cannot be written.
    """
    check_target(out, options.overwrite)
    dtype = lm.dtype if options.dtype is None else dtype_named(options.dtype)
    dtype = dtype if adapter is None else adapter.dtype
    source = Source.of(lm) if adapter is None else None
    keeps_dtypes = source is not None and not _is_cast(lm, options)
    saved_dtype = source.dtype if source is not None and keeps_dtypes else dtype
    described = {
        "base": describe_base(lm),
        **({} if lm.update is None else {"update": describe_update(lm)}),
        "dtype": {"base": dtype_name(lm.dtype), "saved": dtype_name(saved_dtype)},
        "shard_size": options.shard_size,
        **entries,
    }
    parameters = _count(lm)
    required = computes_outputs(lm.model)
    try:
        with atomic_folder(out, existing="replace" if options.overwrite else "refuse") as part, edit as matrices:
            opened: dict[str, Any] = {}
            if adapter is not None:
                outputs = adapter.write(lm, part, required=required)
            elif source is not None:
                cast = None if keeps_dtypes else dtype
                outputs, opened = write_from_source(lm, source, part, matrices, cast, options.shard_size, required=required)
            else:
                outputs = write_model(lm, part, dtype, options.shard_size, required=required)
                if (folder := _folder_of_source(lm)) is not None:
                    copy_side_files(folder, part)
            for name, content in files.items():
                (part / name).write_bytes(content)
            counts = {"base": parameters, "saved": _count(lm) if adapter is None else adapter.parameters}
            record = _record(lm, part, matrices, options, opened | described, counts, outputs)
            record = _complete(lm, part, out.name, options.hub_id, record)
    except LaserError:
        raise
    except (OSError, SafetensorError) as error:
        raise ExportError(f"cannot write {out}: {error}; free space there, or give another folder") from error
    return SavedModel(out, record["form"], tuple(matrices), counts["saved"], parameters, record["weight_bytes"], record)


def _record(
    lm: LanguageModel,
    folder: Path,
    matrices: Sequence[StoredMatrix],
    options: SaveOptions,
    entries: dict[str, Any],
    parameters: dict[str, int],
    outputs: list[list[float]] | None,
) -> dict[str, Any]:
    """Return the record of a folder whose weights are written."""
    is_factored = options.form == "adapter" or any(not m.reason_kept_dense for m in matrices)
    form = options.form if is_factored else "dense"
    module = type(lm.model).__module__  # a model of the lab registers itself when its module is imported
    return {
        "format": FORMAT,
        "form": form,
        "imports": module if module.startswith("laserlm.") else "laserlm" if form == "factored" else None,
        "asked_form": options.form,
        "loader": _loader_name(lm),
        "allow_remote_code": _uses_remote_code(lm),
        **entries,
        "matrices": [m.as_dict() for m in matrices],
        "parameters": parameters,
        "weight_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "dense_bytes": sum(parameter.nbytes for parameter in lm.model.parameters()),
        "fingerprint": outputs,
        "fingerprint_dtype": "float32",
        "provenance": provenance(device=str(lm.device), dtype=dtype_name(lm.dtype)),
    }


def _complete(lm: LanguageModel, folder: Path, name: str, hub_id: str | None, record: dict[str, Any]) -> dict[str, Any]:
    """Write the card, the local paths and the record, which is returned, and show the config to loaders."""
    paths = paths_here(lm, record)
    record["provenance"].pop("command")  # it may name files and folders of this machine
    record = without_paths(record)
    (folder / CARD).write_text(card(record, name, hub_id), encoding="utf-8")
    if (folder / HIDDEN_CONFIG).exists():  # an adapter has no config
        (folder / HIDDEN_CONFIG).rename(folder / "config.json")
    record["files"] = file_hashes(folder)
    if paths:
        (folder / LOCAL).write_text(json.dumps(paths, indent=2) + "\n", encoding="utf-8")
    (folder / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return record


def command_of(
    lm: LanguageModel, command: str, arguments: Sequence[str], out: Path, options: SaveOptions, form: str | None = None
) -> str:
    """Return the shell command that writes the folder from the base model, in this form if one is named."""
    load = ["--dtype", dtype_name(lm.dtype)] if lm.loaded is None or _is_cast(lm, SaveOptions()) else []
    load += ["--allow-remote-code"] if _uses_remote_code(lm) else []
    load += ["--allow-pickle"] if (lm.loaded or {}).get("allow_pickle") else []
    load += ["--revision", lm.revision] if lm.revision else []
    load += ["--kind", lm.kind] if lm.kind != "causal" else []
    load += ["--adapter", str(lm.update.folder)] if lm.update is not None else []
    save = ["--form", form or options.form, "--shard-size", options.shard_size]
    save += ["--save-dtype", str(options.dtype).removeprefix("torch.")] if options.dtype is not None else []
    return shlex.join(map(without_folders, ["laser", command, lm.name, *load, *arguments, *save, "--out", out.name]))


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


def _count(lm: LanguageModel) -> int:
    return sum(p.numel() for p in lm.model.parameters())
