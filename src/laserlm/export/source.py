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
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from laserlm.errors import ExportError
from laserlm.models.language_model import LanguageModel
from laserlm.models.source import side_files, source_folder
from laserlm.models.weight_files import StoredTensor, parameter_names, read_tensor, stored_tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Written:
    """How the weights of a saved model differ from the source's.

    Args:
        changed: names of the tensors with other values.
        dropped: names of the scales that belonged to changed eight-bit tensors.
        added: names of the second factors of low-rank layers.
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
        memory: the unchanged model's tensors, by their names in the model.
        base: the same, by their names in the source.
    """

    folder: Path
    stored: dict[str, StoredTensor]
    parameters: dict[str, str]
    converted: frozenset[str]
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
        by_name = parameter_names(lm.model, stored)
        if any(tensor.dtype.startswith("F8") for tensor in stored.values()):
            # Eight-bit floats count as converted because of their scales, which are no weights of the model.
            same = {n: p for n, (p, _) in by_name.items() if stored[n].shape == tuple(memory[p].shape)}
            by_name = {n: (p, False) for n, p in same.items()}
        parameters = {name: parameter for name, (parameter, _) in by_name.items()}
        converted = frozenset(name for name, (_, is_converted) in by_name.items() if is_converted)
        source = cls(folder, stored, parameters, converted, memory, {})
        source.base.update(source.named_as_stored(lm, memory))
        for name, tensor in source.base.items():
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
        sizes = Counter[torch.dtype]()
        for tensor in self.stored.values():
            if tensor.float_dtype is not None:
                sizes[tensor.float_dtype] += tensor.bytes
        return sizes.most_common(1)[0][0] if sizes else torch.float32

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
        changed = {name for name, tensor in edited.items() if not _same(tensor, self.base[name])}
        self._check_all_stored(lm, state, paths)
        eight_bit = [name for name in changed if self.stored[name].float_dtype is None]
        dropped = {f"{name}{end}" for name in eight_bit for end in ("_scale_inv", "_scale")} & self.stored.keys()
        added = self._second_factors(state)
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
        _write_shards(entries, folder, shard_size)
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
        if cast is None or stored is None or name.endswith(("_scale", "_scale_inv")):
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


def _write_shards(entries: Mapping[str, _Entry], folder: Path, shard_size: str) -> None:
    """Write tensors to files of a maximum size, one file in memory at a time, and an index for several files."""
    plan = split_state_dict_into_shards_factory(
        dict(entries),
        get_storage_size=lambda entry: entry.bytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_size,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: entries[name].read() for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
