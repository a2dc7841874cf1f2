"""Read the matrices of a checkpoint one at a time, without loading the model."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.quantizers.auto import get_hf_quantizer

from laserlm.errors import ModelError, WeightError
from laserlm.low_rank import METHOD
from laserlm.models import adapter, bundled, gguf
from laserlm.models.kinds import CLASSES, Kind, check_head, head_kinds, model_class
from laserlm.models.left_out import line_of, weights_left_out
from laserlm.models.loading import check_no_wrappers, locate
from laserlm.models.loading_errors import as_model_error
from laserlm.models.matrices import FLOATS, Matrix, find_matrices, view
from laserlm.models.plugins import read_config
from laserlm.models.quantised import method_of, way_out
from laserlm.models.weight_files import parameter_names, tensor_files
from laserlm.paths import cache_folder

log = logging.getLogger(__name__)


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
    _names: dict[str, str] = field(repr=False)
    _files: dict[str, Path] = field(repr=False)

    def read(self, matrix: Matrix) -> Tensor:
        """Return a matrix as an (out, in) tensor. Memory holds only the parameter that contains it.

        Raises:
            WeightError: if the checkpoint's name, shape or dtype for the matrix differs from the model's.
        """
        name = self._names.get(matrix.path)
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
    """Open a checkpoint without loading its model; files of a hub id are downloaded, GGUF files are converted once.

    Args:
        name: a hub id, a local folder with safetensors, a ``.gguf`` file, or ``bundled``.
        revision: commit, tag or branch of a hub id.
        cache: folder with converted models; None uses the user's cache folder.
        allow_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        ModelError: if the checkpoint does not exist, has no safetensors, or one of its files is damaged.
    """
    source, _ = locate(name, revision, cache or cache_folder())
    folder = Path(source)
    if not folder.is_dir():
        try:
            patterns = ["*.json", "*.safetensors", "*.py"]
            folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
        except (OSError, ValueError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"cannot open {str(name)!r}: {reason}; give a folder with safetensors, or a hub id") from error
    files = tensor_files(folder)
    if not files:
        raise ModelError(f"{str(name)!r} has no safetensors in {folder}; save it again with save_pretrained, or load the model")
    with as_model_error(str(name), folder):
        config = read_config(folder, trust_remote_code=allow_remote_code)
        model = _build_on_meta(config, head_kinds(config)[0], allow_remote_code)
    stored = parameter_names(model, files)
    names = {parameter: stored_name for stored_name, (parameter, is_converted) in stored.items() if not is_converted}
    return CheckpointReader(str(name), str(config.model_type), find_matrices(model), names, files)


def list_matrices(
    name: str | Path,
    *,
    kind: Kind | None = None,
    revision: str | None = None,
    allow_remote_code: bool = False,
    cache: Path | None = None,
) -> tuple[Matrix, ...]:
    """Return every matrix of a model, as ``load(name).matrices``, from the config and the headers of its files alone.

    The weights need not be there. A GGUF file is not converted. A warning names weights of blocks that are no matrices here.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file, or ``bundled``.
        kind: the head to build; None uses the head that the checkpoint was saved with.
        revision: commit, tag or branch of a hub id.
        allow_remote_code: run modelling code that comes with the checkpoint.
        cache: folder with converted models; None uses the user's cache folder.

    Raises:
        ModelError: if the model cannot be found, lacks the requested kind of head, or one of its files is damaged.
        WeightError: if the model is quantised.
    """
    if (base := adapter.base_of(name)) is not None:
        name, revision = base
    source, files = _locate_header(name, revision, cache or cache_folder())
    with as_model_error(str(name), source):
        options = {"revision": revision or "main", "trust_remote_code": allow_remote_code}
        config = gguf.read_config_from_header(files) if files else read_config(source, **options)
        kind = kind or head_kinds(config)[0]
        check_head(str(name), config, kind)
        if step := way_out(config):
            raise WeightError(f"{str(name)!r} has no matrices to list. {step}")
        model = _build_on_meta(config, kind, allow_remote_code)
        if method_of(config) == METHOD:
            quantizer, _, _ = get_hf_quantizer(config, None, None, True, {})
            quantizer.preprocess_model(model=model)  # puts low-rank layers in place of dense ones
    if Path(source).is_dir():
        check_no_wrappers(str(name), tensor_files(Path(source)))  # raises for a damaged file too
    matrices = find_matrices(model)
    if line := line_of(weights_left_out(model, matrices)):
        log.warning("%s: %s", name, line)
    return matrices


def _locate_header(name: str | Path, revision: str | None, cache: Path) -> tuple[str | Path, list[Path]]:
    """Return the folder or hub id with the config of a model, or its GGUF files, if they are not converted yet."""
    if str(name) == "bundled":
        folder, file = bundled.converted(cache), bundled.packaged_file()
        if folder.is_dir() or file is None:
            return folder if folder.is_dir() else bundled.HUB_ID, []
        return file, [file]
    if not gguf.is_gguf(name):
        return name, []
    files, _ = gguf.find_files(name, revision)
    converted = gguf.find_conversion(gguf.stamps_of(files), cache)
    return (name, files) if converted is None else (converted, [])


def _build_on_meta(config: Any, kind: Kind, allow_remote_code: bool) -> Any:
    loader = model_class(config, kind)
    with torch.device("meta"):
        if loader is not CLASSES[kind]:
            return loader._from_config(config)
        return loader.from_config(config, trust_remote_code=allow_remote_code)
