"""Read the matrices of a checkpoint one at a time, without loading the model."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from laserlm.errors import ModelError, WeightError
from laserlm.models.loading import CLASSES, head_kinds, set_up_bundled, silence_transformers
from laserlm.models.matrices import FLOATS, Matrix, find_matrices, view
from laserlm.models.plugins import read_config
from laserlm.paths import cache_folder

__all__ = ["CheckpointReader", "open_checkpoint"]


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint on disk.

    Args:
        name: the name it was opened by.
        family: the architecture's name in transformers.
        matrices: every weight matrix of every block.
    """

    name: str
    family: str
    matrices: tuple[Matrix, ...]
    _prefix: str = field(repr=False)
    _files: dict[str, Path] = field(repr=False)

    def read(self, matrix: Matrix) -> Tensor:
        """Return a matrix as an (out, in) tensor. Memory holds only the parameter that contains it.

        Raises:
            WeightError: if the checkpoint's name, shape or dtype for the matrix differs from the model's.
        """
        prefix = f"{self._prefix}."
        names = (matrix.path, matrix.path.removeprefix(prefix), prefix + matrix.path)
        name = next((n for n in names if n in self._files), None)
        if name is None:
            raise WeightError(
                f"{self.name} stores {matrix.id} in another layout than the model ({matrix.path}); load the model instead"
            )
        try:
            with safe_open(self._files[name], framework="pt") as opened:
                if matrix.expert is None:
                    parameter: Tensor = opened.get_tensor(name)
                else:  # read one expert, not the whole stack
                    parameter = opened.get_slice(name)[matrix.expert]
        except (OSError, SafetensorError) as error:
            raise WeightError(f"{self._files[name]} cannot be read ({error}); copy or download it again") from None
        if parameter.dtype not in FLOATS:
            raise WeightError(f"{matrix.id} is quantised ({parameter.dtype}); give an unquantised checkpoint")
        value = view(parameter, replace(matrix, expert=None))
        value = value.flatten(0, 1) if matrix.rows is not None else value
        if tuple(value.shape) != matrix.shape:
            raise WeightError(
                f"{self.name} stores {matrix.id} as {tuple(value.shape)}, not {matrix.shape}; load the model instead"
            )
        return value


def open_checkpoint(
    name: str | Path, *, revision: str | None = None, cache: Path | None = None, allow_remote_code: bool = False
) -> CheckpointReader:
    """Open a safetensors checkpoint without loading its model; files of a hub id are downloaded.

    Args:
        name: a hub id, a local folder, or ``bundled``.
        revision: commit, tag or branch of a hub id.
        cache: folder with the converted bundled model; None uses the user's cache folder.
        allow_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        ModelError: if the checkpoint does not exist or has no safetensors.
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
            config = read_config(folder, trust_remote_code=allow_remote_code)
            model = CLASSES[head_kinds(config)[0]].from_config(config, trust_remote_code=allow_remote_code)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"cannot read the config of {str(name)!r}: {reason}; give a folder that save_pretrained wrote"
        ) from error
    return CheckpointReader(str(name), str(config.model_type), find_matrices(model), model.base_model_prefix, files)


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor, by the tensor's name."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {name: folder / file for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    files: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            files |= dict.fromkeys(opened.keys(), file)
    return files
