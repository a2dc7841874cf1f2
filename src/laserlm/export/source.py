"""Write the checkpoint that a model was loaded from again, with the reduced matrices in the place of those that it has.

All that no reduction touches comes from the source's files: tensors that the model's class does not read keep their bits and
names, and processors, tokenizers, code and licences are copied.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from laserlm.errors import ExportError
from laserlm.models.adapter import has_adapter
from laserlm.models.language_model import LanguageModel
from laserlm.models.quantised import SKIPPED, candidates, packed_weights
from laserlm.models.source import side_files, source_folder
from laserlm.models.weight_files import StoredTensor, parameter_names, read_tensor, stored_metadata, stored_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """How the weights of a saved model differ from the source's.

    Args:
        changed: names of the tensors with other values.
        dropped: names of the codes and scales that belonged to changed packed weights.
        added: names of the second factors of low-rank layers, and of weights that were packed under other names.
        dtype: the dtype that tensors of the model's dtype were cast to, or None for the source's dtypes.
    """

    changed: tuple[str, ...]
    dropped: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    dtype: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Source:
    """A checkpoint in safetensors, and the tensors of the unchanged model that was loaded from it.

    Args:
        folder: its folder.
        stored: its tensors, as the headers of its files describe them.
        parameters: name in the model of each tensor that the model reads.
        converted: names of tensors that transformers puts together or divides.
        packed: the tensors that hold each weight of few bits, by the name of the weight as floats.
        in_parts: names in the model of what is put together from several weights of few bits.
        memory: the unchanged model's tensors, by their names in the model.
        base: the same, by their names in the source.
    """

    folder: Path
    stored: dict[str, StoredTensor]
    parameters: dict[str, str]
    converted: frozenset[str]
    packed: dict[str, list[str]]
    in_parts: frozenset[str]
    memory: dict[str, Tensor] = field(repr=False)
    base: dict[str, Tensor] = field(repr=False)

    @classmethod
    def of(cls, lm: LanguageModel) -> Source | None:
        """Return the checkpoint that an unchanged model was loaded from, or None if it is not here as safetensors.

        Raises:
            ExportError: if a tensor of the model has another shape than in its checkpoint.
        """
        # With the update of an adapter, the checkpoint has other weights than the model.
        folder = None if lm.loaded is None or lm.update is not None else source_folder(lm.loaded["name"], lm.loaded["revision"])
        stored = {} if folder is None else stored_tensors(folder)
        if folder is None or not stored:
            return None
        memory = lm.model.state_dict()
        packed: dict[str, list[str]] = {}
        in_parts: set[str] = set()
        by_name = parameter_names(lm.model, stored)
        if any(tensor.float_dtype is None for tensor in stored.values()) and quantisation_of(folder) in SKIPPED:
            if has_adapter(lm.loaded["name"]):  # type: ignore[index]
                return None  # packed weights cannot be compared with those in memory, which the adapter may have changed
            packed, by_name, in_parts = _packed(lm, stored, memory)
        parameters = {name: parameter for name, (parameter, _) in by_name.items()}
        converted = frozenset(name for name, (_, is_converted) in by_name.items() if is_converted)
        source = cls(folder, stored, parameters, converted, packed, frozenset(in_parts), memory, {})
        source.base.update(source.named_as_stored(lm, memory))
        for name, tensor in source.base.items():
            if name in packed:
                continue
            if tuple(tensor.shape) != stored[name].shape and stored[name].float_dtype is None:
                raise ExportError(
                    f"{name} of {lm.name} is packed ({stored[name].dtype}), and weights that transformers has unpacked are not "
                    "packed again; make an unpacked copy with AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER"
                    ", save_original_format=False), copy the tokenizer there too, and load that folder"
                )
            if tuple(tensor.shape) != stored[name].shape:
                raise ExportError(
                    f"{name} of {lm.name} is {tuple(tensor.shape)} in memory and {stored[name].shape} in {folder}; save the "
                    "model with save_pretrained first, and load that folder"
                )
        return source

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of its weights have."""
        sizes, of_packed = Counter[torch.dtype](), self._of_packed
        for name, tensor in self.stored.items():
            if tensor.float_dtype is not None and name not in of_packed:
                sizes[tensor.float_dtype] += tensor.bytes
        return sizes.most_common(1)[0][0] if sizes else torch.float32

    @cached_property
    def _of_packed(self) -> set[str]:
        """The names of all tensors that hold packed weights."""
        return {name for names in self.packed.values() for name in names}

    @cached_property
    def metadata(self) -> dict[str, str]:
        """What the headers of its files say beside their tensors."""
        return stored_metadata(self.folder)

    def bytes_with_floats(self, paths: Collection[str], dtype: torch.dtype, cast: torch.dtype | None) -> int:
        """Return the bytes of all tensors once some packed weights are written as floats.

        Args:
            paths: the parameters that are written as floats.
            dtype: the model's dtype.
            cast: dtype in place of the model's; None keeps the dtypes of the source.
        """
        names = [name for name in self.packed if self.parameters[name] in paths]
        gone, size = {part for name in names for part in self.packed[name]}, 0
        for name, tensor in self.stored.items():
            if name in gone:
                continue
            is_cast = cast is not None and tensor.float_dtype is not None and name not in self._of_packed
            size += tensor.bytes // tensor.float_dtype.itemsize * cast.itemsize if is_cast else tensor.bytes  # type: ignore[union-attr]
        return size + sum(self.base[name].numel() for name in names) * (cast or dtype).itemsize

    def modules_in_floats(self, lm: LanguageModel, written: Collection[str]) -> list[str]:
        """Return the linear modules that are not packed once some weights are written as floats.

        Args:
            lm: the model.
            written: names in the source of the weights that are written as floats.
        """
        packed = {self.parameters[name] for name in self.packed.keys() - set(written)}
        linear = [path for path, module in lm.model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        return [path for path in linear if f"{path}.weight" not in packed]

    def named_as_stored(self, lm: LanguageModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a state of the model by their names in the source."""
        tensors = {name: state[p] for name, p in self.parameters.items() if name not in self.converted}
        if self.converted:
            prefix = f"{lm.model.base_model_prefix}."
            for name, tensor in revert_weight_conversion(lm.model, dict(state)).items():
                names = self.converted & {name, prefix + name, name.removeprefix(prefix)}
                tensors |= dict.fromkeys(names, tensor)
        return tensors

    def write_weights(
        self, lm: LanguageModel, folder: Path, paths: Collection[str], cast: torch.dtype | None, shard_size: str
    ) -> Written:
        """Write the tensors of the model, as it is now, and those that it does not read, with their names in the source.

        Args:
            lm: the reduced model.
            folder: the folder to write to.
            paths: the parameters that are reduced.
            cast: dtype in place of the model's; None keeps the dtypes of the source.
            shard_size: maximum size of a file, such as ``5GB``.

        Raises:
            ExportError: if a reduced parameter is none of the source's tensors.
        """
        state = lm.model.state_dict()
        edited = self.named_as_stored(lm, state)
        different = {name for name, tensor in edited.items() if not _same(tensor, self.base[name])}
        changed = different & self.stored.keys()
        self._check_all_stored(lm, state, paths)
        dropped = {old for name in different & self.packed.keys() for old in self.packed[name]} - changed
        added = self._second_factors(state) | {name: edited[name] for name in different - changed}
        entries: dict[str, _Entry] = {}
        for name, stored in self.stored.items():
            dtype = self._dtype(lm, name, cast)
            if name in changed:
                entries[name] = _in_memory(edited[name], dtype or cast or lm.dtype)
            elif name not in dropped:
                size = stored.bytes if dtype is None else stored.bytes // stored.float_dtype.itemsize * dtype.itemsize  # type: ignore[union-attr]
                entries[name] = _Entry(size, _reader(self._stored_tensor, name, dtype, changed))
        for name, tensor in added.items():
            entries[name] = _in_memory(tensor, cast if cast is not None and tensor.is_floating_point() else tensor.dtype)
        # torchao describes each of its weights there. All other headers say that alone which they need.
        metadata = self.metadata if self.packed else {}
        floats = dict.fromkeys(different & self.packed.keys() & self.metadata.keys(), '{"_type": "Tensor"}')
        _write_shards(entries, folder, shard_size, {"format": "pt"} | metadata | floats)
        others = sorted(name for name in changed if self.parameters[name] not in paths and name not in self.converted)
        if others:
            text = "%d tensors are saved as they are in memory, where they are not as in %s: %s"
            log.warning(text, len(others), self.folder, _first(others))
        dtype_name = None if cast is None else str(cast).removeprefix("torch.")
        return Written(tuple(sorted(changed)), tuple(sorted(dropped)), tuple(sorted(added)), dtype_name)

    def copy_files(self, folder: Path) -> None:
        """Copy all files that go with the weights, and say which files of the source are not copied."""
        left_out = copy_side_files(self.folder, folder)
        if left_out:
            log.warning("weights in other formats and other models in %s are not copied: %s", self.folder, _first(left_out))

    def read_config(self) -> dict[str, Any]:
        """Return the content of ``config.json``."""
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        return config

    def _dtype(self, lm: LanguageModel, name: str, cast: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype to write a stored tensor in; None for what has no floating-point dtype."""
        stored = self.stored[name].float_dtype
        if cast is None or stored is None or name in self._of_packed:
            return stored
        of_model = self.base[name].dtype == lm.dtype if name in self.base else stored == self.dtype
        return cast if of_model else stored

    def _stored_tensor(self, name: str, dtype: torch.dtype | None, changed: set[str]) -> Tensor:
        """Return a tensor from the source's file, or from memory if it was changed there, as by an adapter that was merged."""
        tensor = read_tensor(self.stored[name].file, name)
        if dtype is None:
            return tensor
        if not self._is_as_stored(name, tensor):
            changed.add(name)
            tensor = self.base[name].cpu()
        return tensor.to(dtype)

    def _is_as_stored(self, name: str, tensor: Tensor) -> bool:
        """Return whether the model holds a tensor as it is stored; of tied tensors, transformers reads one of those stored."""
        base = self.base.get(name)
        if base is None or torch.equal(tensor.to(base.dtype), base.cpu()):
            return True
        twins = [n for n, t in self.base.items() if n != name and t.data_ptr() == base.data_ptr() and t.shape == base.shape]
        return any(torch.equal(read_tensor(self.stored[n].file, n).to(base.dtype), base.cpu()) for n in twins)

    def _check_all_stored(self, lm: LanguageModel, state: Mapping[str, Tensor], paths: Collection[str]) -> None:
        """Raise an ExportError if a reduced parameter is none of the source's tensors."""
        if parts := self.in_parts & set(paths):
            raise ExportError(
                f"{min(parts)} of {lm.name} is put together from several weights of few bits, which are not written as floats "
                "one by one; reduce other matrices, or an unquantised copy of the model"
            )
        written = set(self.parameters.values())
        pointers = {state[parameter].data_ptr() for parameter in written}
        lost = [path for path in paths if path not in written and state[path].data_ptr() not in pointers]
        if lost and not self.converted:
            raise ExportError(
                f"{lost[0]} of {lm.name} is stored in {self.folder} in another layout, so its reduction cannot be saved; load "
                "an unquantised checkpoint that save_pretrained wrote"
            )

    def _second_factors(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what low-rank layers have in addition to their weights, named after the weights that they were."""
        stored = {parameter: name for name, parameter in self.parameters.items() if name not in self.converted}
        added = {}
        for name, tensor in state.items():
            module, _, last = name.rpartition(".")
            if name in self.memory:
                continue
            if f"{module}.weight" not in stored:
                raise ExportError(f"{module} is stored in {self.folder} in another layout; save the dense form (--form dense)")
            added[f"{stored[f'{module}.weight'].removesuffix('weight')}{last}"] = tensor
        return added


def quantisation_of(folder: Path | None) -> str:
    """Return the method by which the weights of a checkpoint are stored; empty for floats, and without a folder."""
    file = None if folder is None else folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file is not None and file.is_file() else {}
    return str((config.get("quantization_config") or {}).get("quant_method", ""))


def _packed(
    lm: LanguageModel, stored: Mapping[str, StoredTensor], memory: Mapping[str, Tensor]
) -> tuple[dict[str, list[str]], dict[str, tuple[str, bool]], set[str]]:
    """Tell the packed weights of a checkpoint from its other tensors.

    Returns:
        The tensors that hold each packed weight, by the weight's name; what is made of each tensor and packed weight, as
        ``parameter_names`` says; and the parameters that are put together from several packed weights, as experts are.
    """
    few_bits = [name for name, tensor in stored.items() if tensor.float_dtype is None]
    possible = {candidate for name in few_bits for candidate in candidates(name)}
    read_as = parameter_names(lm.model, {*stored, *possible})
    weights = [n for n in possible & read_as.keys() if memory[read_as[n][0]].ndim > 1]
    packed = packed_weights(few_bits, stored, [n for n in weights if n not in stored or stored[n].float_dtype is None])
    of_packed = {part for parts in packed.values() for part in parts}
    in_parts = {read_as[name][0] for name in packed if read_as[name][1]}
    packed = {name: parts for name, parts in packed.items() if not read_as[name][1]}
    names = [name for name in stored.keys() & read_as.keys() - of_packed if read_as[name][0] not in in_parts]
    return packed, {name: read_as[name] for name in [*names, *packed]}, in_parts


def copy_side_files(source: Path, folder: Path) -> list[str]:
    """Copy the files that go with the weights of a checkpoint and that a folder does not have yet. Return the others."""
    kept, left_out = side_files(source)
    for name in kept:
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)
    return left_out


@dataclass(frozen=True)
class _Entry:
    """A tensor to write: its size in bytes, and a function that returns it."""

    bytes: int
    read: Callable[[], Tensor]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _in_memory(tensor: Tensor, dtype: torch.dtype) -> _Entry:
    return _Entry(tensor.numel() * dtype.itemsize, lambda: tensor.detach().to("cpu", dtype).contiguous().clone())


def _reader(read: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: read(*arguments).contiguous()


def _same(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same memory, or equal."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return (a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.numel() > 0) or torch.equal(a, b)


def _write_shards(entries: Mapping[str, _Entry], folder: Path, shard_size: str, metadata: dict[str, str]) -> None:
    """Write tensors to files of a maximum size, one file in memory at a time, and an index for several files.

    Args:
        entries: the tensors, by name.
        folder: the folder.
        shard_size: maximum size of a file, such as ``5GB``.
        metadata: what the header of every file says beside its tensors.
    """
    plan = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: entries[name].read() for name in names}, folder / file, metadata=metadata)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
