"""The matrices of a checkpoint, read one at a time without building the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.models.auto.configuration_auto import AutoConfig

from laserlm.errors import ModelError, WeightError
from laserlm.models.loading import CLASSES, head_kinds, set_up_bundled, silence_transformers
from laserlm.models.matrices import FLOATS, Matrix, find_matrices, view
from laserlm.paths import cache_folder

__all__ = ["CheckpointReader", "open_checkpoint"]


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint on disk.

    Args:
        name: how it was asked for.
        family: the architecture's name in transformers.
        matrices: every weight matrix of every block.
    """

    name: str
    family: str
    matrices: tuple[Matrix, ...]
    _prefix: str = field(repr=False)
    _files: dict[str, Path] = field(repr=False)

    def read(self, matrix: Matrix) -> Tensor:
        """Return a matrix as an (out, in) tensor; what is in memory is its parameter.

        Raises:
            WeightError: if the checkpoint stores it under another name or shape than the model has it, or quantised.
        """
        prefix = f"{self._prefix}."
        names = (matrix.path, matrix.path.removeprefix(prefix), prefix + matrix.path)
        name = next((n for n in names if n in self._files), None)
        if name is None:
            raise WeightError(
                f"{self.name} stores {matrix.id} in another layout than the model has it ({matrix.path}); load the model for it"
            )
        try:
            with safe_open(self._files[name], framework="pt") as opened:
                if matrix.expert is None:
                    parameter: Tensor = opened.get_tensor(name)
                else:  # one expert of the stack, not all of them
                    parameter = opened.get_slice(name)[matrix.expert]
        except (OSError, SafetensorError) as error:
            raise WeightError(f"{self._files[name]} cannot be read ({error}); copy or download it again") from None
        if parameter.dtype not in FLOATS:
            raise WeightError(f"{matrix.id} is quantised ({parameter.dtype}); give an unquantised checkpoint")
        seen = view(parameter, replace(matrix, expert=None))
        seen = seen.flatten(0, 1) if matrix.rows is not None else seen
        if tuple(seen.shape) != matrix.shape:
            raise WeightError(
                f"{self.name} stores {matrix.id} as {tuple(seen.shape)}, not {matrix.shape}; load the model for it"
            )
        return seen


def open_checkpoint(
    name: str | Path, *, revision: str | None = None, cache: Path | None = None, allow_remote_code: bool = False
) -> CheckpointReader:
    """Open a checkpoint of safetensors without building its model; from the hub its files are downloaded.

    Args:
        name: a hub id, a local folder, or ``bundled``.
        revision: commit, tag or branch of a hub id.
        cache: folder with the converted bundled model; None takes the user's cache folder.
        allow_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        ModelError: if there is no such checkpoint, or no safetensors in it.
    """
    source = set_up_bundled(cache or cache_folder()) if str(name) == "bundled" else name
    folder = Path(source)
    if not folder.is_dir():
        try:
            patterns = ["*.json", "*.safetensors", "*.py"]
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        except (OSError, ValueError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"cannot open {str(name)!r}: {reason}; give a folder with safetensors, or a hub id") from error
    files = _files_of(folder)
    if not files:
        raise ModelError(f"{str(name)!r} has no safetensors in {folder}; save it again with save_pretrained, or load the model")
    try:
        with silence_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=allow_remote_code)
            model = CLASSES[head_kinds(config)[0]].from_config(config, trust_remote_code=allow_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the config of {str(name)!r}: {reason}; give a folder that save_pretrained wrote"
        ) from error
    return CheckpointReader(str(name), str(config.model_type), find_matrices(model), model.base_model_prefix, files)


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor, by name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found
