"""Find the files of a GGUF model, read their headers, merge them, and find what they were converted to.

transformers parses a GGUF file several times, which takes a minute for each command. So ``load`` converts the file once, to
a folder in the cache that loads like any checkpoint. The content of the file names the folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from huggingface_hub import hf_hub_download
from rich.filesize import decimal
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS, get_gguf_config
from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
from transformers.integrations.gguf.reader import read_gguf_metadata
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.utils.hub import extract_commit_hash

from laserlm.errors import ModelError
from laserlm.paths import atomic_file, cached_files

RECORD = "gguf.json"
"""Name of the record in a converted folder."""
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""The rotary scaling of Llama 3.1, 3.2 and 3.3, which differ in the factor."""
Stamps = list[list[Any]]
SPLIT = ("split.no", "split.count")
PARSE_ERRORS = (OSError, ValueError, KeyError, IndexError, struct.error)


@dataclass(frozen=True)
class Record:
    """What is known about the files that a folder was converted from.

    Args:
        files: the stamps of every GGUF model with this content.
        unread: names of the tensors that transformers does not read.
    """

    files: list[Stamps]
    unread: list[str]


def is_gguf(name: str | Path) -> bool:
    """Whether the name of a model means a GGUF file, here or on the hub."""
    return Path(name).suffix.lower() == ".gguf" and not Path(name).is_dir()


def find_files(name: str | Path, revision: str | None = None) -> tuple[list[Path], str | None]:
    """Return the files of a GGUF model in order, and their commit if they come from the hub.

    Args:
        name: a local file, or ``ORG/REPO/FILE.gguf`` on the hub; the first file of a model that is split.
        revision: commit, tag or branch on the hub.

    Raises:
        ModelError: if a file does not exist, or ``name`` is not the first file.
    """
    path = Path(name)
    names = _part_names(path.name)
    if len(path.parts) > 2 and not path.is_absolute() and not str(name).startswith((".", "~")) and not path.parent.exists():
        return _download(path, names, revision)
    if not path.is_file():
        raise ModelError(f"no GGUF file {str(name)!r}; check the path, or give ORG/REPO/FILE.gguf of the hub")
    files = [path.absolute().with_name(part) for part in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelError(f"{name} is the first of {len(files)} files; {path.parent} lacks {', '.join(missing)}: copy it there")
    return files, None


def _part_names(name: str) -> list[str]:
    """Return the names of all files of a model by the name of the first."""
    split = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", name, re.IGNORECASE)
    if split is None:
        return [name]
    stem, number, count, suffix = split.groups()
    first, *others = [f"{stem}-{i:05}-of-{count}{suffix}" for i in range(1, int(count) + 1)]
    if name != first:
        raise ModelError(f"{name} is file {int(number)} of {int(count)} of a model; name the first file, {first}")
    return [first, *others]


def _download(path: Path, names: Sequence[str], revision: str | None) -> tuple[list[Path], str | None]:
    repository, subfolder = "/".join(path.parts[:2]), "/".join(path.parts[2:-1]) or None
    try:
        files = [Path(hf_hub_download(repository, name, subfolder=subfolder, revision=revision)) for name in names]
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"no GGUF file {str(path)!r} here, and the hub gives none: {reason}; check the path and the files of {repository}"
        ) from error
    return files, extract_commit_hash(str(files[0]), None)


def read_header(files: Sequence[Path]) -> tuple[dict[str, Any], list[str]]:
    """Return the metadata of a GGUF model, with the lengths of its arrays of text, and the names of its tensors.

    Raises:
        ModelError: if a file is damaged, or is not the part that its name says.
    """
    with _as_model_error(files[0]):
        metadata, first_names = read_gguf_metadata(str(files[0]))
    _check_part(files, 0, metadata)
    names = [*first_names]
    for number, file in enumerate(files[1:], start=1):
        reader = _open(file)  # is parsed fast, because only the first file has the vocabulary
        _check_part(files, number, {name: reader.fields[name].contents() for name in SPLIT if name in reader.fields})
        names += [tensor.name for tensor in reader.tensors]
    return metadata, names


def _check_part(files: Sequence[Path], number: int, metadata: Mapping[str, Any]) -> None:
    part, count = (metadata.get(name, 0) for name in SPLIT)
    if (part, max(count, 1)) != (number, len(files)):
        raise ModelError(
            f"{files[number]} is file {part + 1} of {max(count, 1)} of a model, and its name says {number + 1} of "
            f"{len(files)}; give the files the names that llama-gguf-split gave them, such as NAME-00001-of-00003.gguf"
        )


def _open(file: Path) -> GGUFReader:
    with _as_model_error(file):
        return gguf.GGUFReader(str(file))  # transformers names it by text too, so that parsed_once knows it


@contextmanager
def _as_model_error(file: Path) -> Iterator[None]:
    try:
        yield
    except PARSE_ERRORS as error:
        raise ModelError(f"{file} cannot be read as GGUF ({error}); if it is damaged, copy or download it again") from error


def read_config_from_header(files: Sequence[Path]) -> Any:
    """Return the config of a GGUF model without parsing its vocabulary, which takes transformers many seconds.

    Raises:
        ModelError: if a file is damaged, or is not the part that its name says.
        ValueError: if transformers does not know the architecture.
    """
    metadata, names = read_header(files)
    architecture = metadata["general.architecture"]
    if architecture in GGUF_CONFIG_ARCHS:
        return AutoConfig.for_model(**get_gguf_config(metadata, tuple(names)))
    metadata[f"{architecture}.vocab_size"] = metadata.get("tokenizer.ggml.tokens", 0)
    with tempfile.TemporaryDirectory() as folder:  # for a file with this header, but without vocabulary and weights
        writer = GGUFWriter(Path(folder) / "header.gguf", architecture)
        for key, value in metadata.items():
            if not key.startswith(("tokenizer.", "split.", "general.architecture")) and value != []:
                is_long = isinstance(value, int) and value.bit_length() > 31
                writer.add_key_value(key, value, GGUFValueType.UINT64 if is_long else GGUFValueType.get_type(value))
        for name in names:
            writer.add_tensor(name, np.zeros(1, np.float32))
        _write(writer)
        return AutoConfig.from_pretrained(folder, gguf_file="header.gguf")


def _write(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def merge(files: Sequence[Path], target: Path) -> Path:
    """Write one GGUF file with the metadata and tensors of several, and return its path.

    Raises:
        ModelError: if a file is damaged.
    """
    readers = [_open(file) for file in files]
    first = readers[0]
    writer = GGUFWriter(target, first.fields["general.architecture"].contents(), endianess=first.endianess)
    for field in first.fields.values():
        if not field.name.startswith(("GGUF.", "split.", "general.architecture")):
            value_type, *item_types = field.types
            writer.add_key_value(field.name, field.contents(), value_type, sub_type=item_types[-1] if item_types else None)
    tensors = [tensor for reader in readers for tensor in reader.tensors]
    for t in tensors:
        writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, t.data.nbytes, t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for t in tensors:  # one at a time, so that memory does not hold the model
        writer.write_tensor_data(t.data, tensor_endianess=first.endianess)
    writer.close()
    return target


def restore_rope_scaling(file: Path, config: Any) -> None:
    """Give a config the rotary scaling of Llama 3, which a GGUF file holds as factors that transformers does not read.

    Factors that are not those of Llama 3 are left to ``unread_tensors``.
    """
    factors = next((tensor.data for tensor in _open(file).tensors if tensor.name == ROPE_FACTORS), None)
    default = getattr(config, "rope_parameters", None) or {}
    if factors is None or "rope_theta" not in default:
        return
    config.rope_parameters = default | LLAMA3 | {"factor": float(factors.max())}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    unscaled = default["rope_theta"] ** -(np.arange(len(factors)) / len(factors))
    if scaled.shape != factors.shape or not np.allclose(unscaled / scaled.numpy(), factors, rtol=1e-3):
        config.rope_parameters = default


def unread_tensors(metadata: Mapping[str, Any], names: Sequence[str], model: Any) -> list[str]:
    """Return the names of the tensors of a GGUF model that transformers leaves out without a word."""
    architecture = metadata["general.architecture"]
    if architecture in GGUF_ARCHS:
        return []  # read by another reader, which reports them
    processor: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    known = {*get_gguf_hf_weights_map(model, processor(config={}))}
    if (getattr(model.config, "rope_parameters", None) or {}).get("rope_type") == "llama3":
        known.add(ROPE_FACTORS)
    return sorted({*names} - known)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, instead of for each of config, weights and tokenizer."""
    public_names = vars(gguf)
    public_names["GGUFReader"] = functools.cache(GGUFReader)
    try:
        yield
    finally:
        public_names["GGUFReader"] = GGUFReader


def check_space(files: Sequence[Path], folder: Path) -> int:
    """Return the bytes that a converted model takes at most: 2 for each weight in half precision, else 4.

    Raises:
        ModelError: if the disk of the folder has fewer bytes left, or a file is damaged.
    """
    halves = (GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
    tensors = [tensor for file in files for tensor in _open(file).tensors]
    needed = sum(int(t.n_elements) * (2 if t.tensor_type in halves else 4) for t in tensors)
    needed += sum(file.stat().st_size for file in files) if len(files) > 1 else 0  # for the merged file
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"to convert {files[0]} takes {decimal(needed)}, and {folder} has {decimal(free)} left; free space there, or give "
            "--cache a folder on another disk"
        )
    return needed


def conversion_folder(files: Sequence[Path], cache: Path) -> Path:
    """Return the folder in the cache for the content of these files, which are hashed. It exists once they are converted."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return cache / "models" / f"gguf-{digest.hexdigest()[:12]}"


def find_conversion(stamps: Stamps, cache: Path) -> Path | None:
    """Return the folder in the cache that was converted from files with these stamps, or None."""
    return next((folder for folder in _conversions(cache) if stamps in read_record(folder).files), None)


def read_record(folder: Path) -> Record:
    """Return what is known about the files of a converted folder; nothing, if its record is damaged."""
    try:
        return Record(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Record([], [])


def remember(stamps: Stamps, folder: Path, *, unread: Sequence[str] | None = None) -> None:
    """Note in a converted folder that files with these stamps have its content, so that they need not be hashed again.

    Raises:
        ModelError: if the files have changed since.
    """
    if not _is_unchanged(stamps):
        raise ModelError(f"{stamps[0][0]} changed while laserlm read it; run the command again when it is complete")
    old = read_record(folder)
    seen = [other for other in old.files if _is_unchanged(other) and other != stamps]
    record = Record([*seen, stamps], old.unread if unread is None else [*unread])
    with suppress(OSError), atomic_file(folder / RECORD) as part:  # where it cannot be written, files are hashed each time
        part.write_text(json.dumps(asdict(record)), encoding="utf-8")


def remove_outdated(cache: Path) -> None:
    """Remove the converted folders whose GGUF files were all changed or removed. The bundled model stays."""
    for folder in _conversions(cache):
        if folder.name.startswith("gguf-") and not any(map(_is_unchanged, read_record(folder).files)):
            shutil.rmtree(folder, ignore_errors=True)


def _conversions(cache: Path) -> list[Path]:
    return [folder for folder in cached_files(cache)["models"] if (folder / RECORD).is_file()]


def stamps_of(files: Sequence[Path]) -> Stamps:
    """Return path, bytes and times of change (ns) of every file of a model."""
    stats = [(str(file.absolute()), file.stat()) for file in files]
    return [[path, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path, s in stats]


def _is_unchanged(stamps: Stamps) -> bool:
    try:
        return stamps_of([Path(path) for path, *_ in stamps]) == stamps
    except OSError:
        return False
