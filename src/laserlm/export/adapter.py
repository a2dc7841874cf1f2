"""Write an intervention as an adapter of peft: a LoRA that is exactly W' - W for each changed matrix.

W minus some components is W plus a difference of low rank. Only the two factors of that difference are stored, so an adapter
takes kilobytes where the dense form takes the size of the model. ``peft.PeftModel.from_pretrained(base, folder)`` loads it.

The format is that of peft 0.21, ``adapter_config.json`` and ``adapter_model.safetensors``. The scale lora_alpha / r is 1.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import Edit, default_cache, resolve
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.edit.factors import StoredMatrix, difference_factors
from laserlm.errors import ExportError
from laserlm.export.load_in_subprocess import compute_in_float32
from laserlm.export.record import recorded_outputs
from laserlm.linalg.precision import full_precision
from laserlm.models.adapter import has_adapter
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading_errors import silence_transformers
from laserlm.models.matrices import Matrix, view
from laserlm.reductions import Intervention

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASK_TYPES = {"causal": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM", "embedding": "FEATURE_EXTRACTION"}
"""Task types of peft. With that of a classifier, peft asks the adapter for weights of the head, which no reduction changes."""
MAX_NAMED = 4
"""Number of matrices that an error names."""


@dataclass(frozen=True)
class Difference:
    """W' - W of one parameter as two factors; E = 1 unless the parameter stacks the matrices of E experts.

    Args:
        path: path of the parameter.
        down: (E, r, n).
        up: (E, m, r).
        transposed: whether the parameter stores the transpose (n, m).
        module: path of the module that peft wraps, with ``.base_layer`` for each wrapper around it.
        is_layer: whether peft adapts the layer. Otherwise it adapts the parameter alone (``target_parameters``).
        swapped: whether peft takes the stacked matrices for (n, m), as the module's ``is_transposed`` says.
    """

    path: str
    down: Tensor
    up: Tensor
    transposed: bool
    module: str
    is_layer: bool
    swapped: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[1]

    @property
    def target(self) -> str:
        """The name by which peft's config lists it."""
        return self.path.rpartition(".")[0] if self.is_layer else self.path

    @full_precision()
    def dense(self) -> Tensor:
        """Return the difference in the shape of the parameter, or (E, m, n) for experts."""
        difference = self.up @ self.down  # (E, m, n)
        if not self.is_layer:
            return difference
        return difference[0].T if self.transposed else difference[0]

    @property
    def names(self) -> tuple[str, str]:
        """Names of peft's ``lora_A`` and ``lora_B`` in the file."""
        prefix = f"base_model.model.{self.module}"
        return f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"

    def tensors(self) -> dict[str, Tensor]:
        """Return ``lora_A`` (E r, n) and ``lora_B`` (m, r E) by name; in the second, the experts are innermost."""
        down, up = (self.up.mT, self.down.mT) if self.swapped else (self.down, self.up)
        A, B = down.flatten(0, 1), up.permute(1, 2, 0).flatten(1)
        return dict(zip(self.names, (A.contiguous(), B.contiguous()), strict=True))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Difference:
        """Return this difference with other factors, from ``lora_A`` and ``lora_B``."""
        A, B = (tensors[name] for name in self.names)
        down, up = A.unflatten(0, (len(self.down), -1)), B.unflatten(1, (-1, len(self.down))).permute(2, 0, 1)
        down, up = (up.mT, down.mT) if self.swapped else (down, up)
        return replace(self, down=down, up=up)


@dataclass(frozen=True)
class Adapter:
    """An intervention as a LoRA.

    Args:
        differences: the difference of each changed parameter.
        matrices: the storage of each reduced matrix.
        config: content of ``adapter_config.json``.
    """

    differences: tuple[Difference, ...]
    matrices: tuple[StoredMatrix, ...]
    config: dict[str, Any]

    @classmethod
    def of(
        cls,
        lm: LanguageModel,
        intervention: Intervention,
        *,
        cache: DecompositionCache | None = None,
        seed: int = 0,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """Return the adapter of an intervention on an unchanged model.

        Args:
            lm: the unchanged model.
            intervention: the intervention.
            cache: decomposition cache; None uses the one in ``lm.cache``.
            seed: seed of ``:reference`` decompositions.
            dtype: dtype of the factors; None uses float32, or float64 for a float64 model, which keeps W' exact.

        Raises:
            ExportError: if nothing changes, weights that several layers share would, the dtype cannot hold the factors, or the
                model has an adapter merged.
            LaserError: as ``applied``.
        """
        edits = [edit for edit in resolve(lm.matrices, intervention) if not edit.is_identity]
        if not edits:
            raise ExportError(f"{str(intervention) or 'an empty reduction'} changes nothing, so there is no adapter to save")
        refuse_unstorable(lm, {edit.matrix.path: edit.matrix.id for edit in edits})
        dtype = dtype or torch.promote_types(lm.dtype, torch.float32)
        cache = cache or default_cache(lm.cache)
        groups: dict[str, list[Edit]] = {}
        for edit in edits:
            groups.setdefault(edit.matrix.path, []).append(edit)
        differences = _equal_stacks([_difference(lm, group, cache, seed, dtype, groups) for group in groups.values()])
        check_finite(differences)
        ranks = {difference.path: difference.rank for difference in differences}
        matrices = tuple(_stored(lm, edit, ranks[edit.matrix.path]) for edit in edits)
        return cls(differences, matrices, peft_config(lm, differences))

    @property
    def parameters(self) -> int:
        """Number of values that the adapter stores."""
        return sum(d.down.numel() + d.up.numel() for d in self.differences)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the stored factors."""
        return self.differences[0].down.dtype

    def write(self, lm: LanguageModel, folder: Path, *, required: bool = False) -> list[list[float]] | None:
        """Write weights and config to a folder. Return some outputs of the model with the adapter, computed in float32.

        Args:
            lm: the unchanged model.
            folder: the folder.
            required: whether the unchanged model computes outputs from tokens.

        Raises:
            ExportError: if outputs are required, and the model with the adapter fails.
        """
        tensors: dict[str, Tensor] = {}
        for difference in self.differences:
            tensors |= {name: tensor.cpu() for name, tensor in difference.tensors().items()}
        save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = folder / ADAPTER_CONFIG
        config.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        (folder / ADAPTER_WEIGHTS).chmod(config.stat().st_mode)  # safetensors makes it unreadable for other users
        model, state = type(lm.model), lm.model.state_dict()
        if lm.update is not None:  # the new adapter is added to the base model
            state |= {path: weight.base for path, weight in lm.update.weights.items()}
        with silence_transformers():
            changed = model.from_pretrained(None, config=lm.model.config, state_dict=state, dtype=lm.dtype)
        compute_in_float32(changed)
        self.add_to(changed)
        return recorded_outputs(changed.eval(), required=required)

    def read(self, folder: Path) -> Adapter:
        """Return this adapter with the factors that a folder holds.

        Raises:
            ExportError: if the file cannot be read, or holds other tensors.
        """
        file = folder / ADAPTER_WEIGHTS
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"{file} cannot be read ({error}); save the adapter again") from None
        shapes = {name: tensor.shape for d in self.differences for name, tensor in d.tensors().items()}
        if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
            raise ExportError(f"{file} holds other tensors than an adapter for the recorded reductions; save the adapter again")
        return replace(self, differences=tuple(d.with_tensors(tensors) for d in self.differences))

    def add_to(self, model: nn.Module) -> None:
        """Add the differences to the weights of a model, in float32 or wider; the changed parameters keep that dtype."""
        for d in self.differences:
            parameter = model.get_parameter(d.path)
            delta = replace(d, down=_wide(d.down), up=_wide(d.up)).dense()
            parameter.data = _wide(parameter.data) + delta.to(parameter.device).reshape(parameter.shape)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stored(lm: LanguageModel, edit: Edit, rank: int) -> StoredMatrix:
    """Return the storage of a matrix; the rank of a part of a parameter is its share of the parameter's rank."""
    m, n = lm.model.get_parameter(edit.matrix.path).shape[-2:]
    if edit.matrix.rows is not None:
        rank = edit.reduction.split * (len(edit.strengths) if edit.reduction.method == "exact" else edit.max_rank)
    matrix = edit.matrix
    return StoredMatrix(matrix.id, matrix.path, matrix.shape, edit.rank, rank * (m + n), f"an adapter of rank {rank}")


def refuse_unstorable(lm: LanguageModel, changed: Mapping[str, str]) -> None:
    """Do nothing if an adapter can change these parameters of a model.

    Args:
        lm: the unchanged model.
        changed: what an error calls each parameter, by its path.

    Raises:
        ExportError: if the model has an adapter merged, so that no folder holds the weights that a new one would change; if
            a parameter has several paths in the model, because peft would add the difference once for each; or if its layer
            gives out more than a tensor, to which peft cannot add anything.
    """
    if lm.loaded is not None and has_adapter(lm.loaded["name"]):
        raise ExportError(
            f"{lm.name} is a base model with a merged adapter, and no folder holds the merged weights that a new adapter would "
            "name as its base; save the dense form (--form dense), or merge the adapter with peft's merge_and_unload, save the "
            "result, and reduce that folder"
        )
    paths = Counter(id(parameter) for _, parameter in lm.model.named_parameters(remove_duplicate=False))
    shared = [name for path, name in changed.items() if paths[id(lm.model.get_parameter(path))] > 1]
    if shared:
        more = f" and {len(shared) - MAX_NAMED} more" if len(shared) > MAX_NAMED else ""
        raise ExportError(
            f"an adapter cannot change {', '.join(shared[:MAX_NAMED])}{more}: several layers share the weights, and peft would "
            "add the difference once for each layer; save the dense form (--form dense)"
        )
    layers = {name: lm.model.get_submodule(path.rpartition(".")[0]) for path, name in changed.items()}
    others = [name for name, layer in layers.items() if _gives_out_more_than_a_tensor(layer)]
    if others:
        more = f" and {len(others) - MAX_NAMED} more" if len(others) > MAX_NAMED else ""
        raise ExportError(
            f"an adapter cannot change {', '.join(others[:MAX_NAMED])}{more}: the layer gives out more than a tensor, and peft "
            "would fail in a forward pass; leave it out, or save the dense form (--form dense)"
        )


@torch.no_grad()
def _gives_out_more_than_a_tensor(layer: nn.Module) -> bool:
    """Return whether a linear layer has a ``forward`` of its own that returns a tuple, as a router may."""
    if not isinstance(layer, nn.Linear) or type(layer).forward is nn.Linear.forward:
        return False
    return not isinstance(layer(layer.weight.new_zeros(1, layer.in_features)), Tensor)


def check_finite(differences: Sequence[Difference]) -> None:
    """Do nothing if all factors are finite.

    Raises:
        ExportError: if their dtype cannot hold some.
    """
    if not all(bool(d.down.isfinite().all() and d.up.isfinite().all()) for d in differences):
        dtype = differences[0].down.dtype
        raise ExportError(f"the factors hold values that are too large for {dtype}; save them in bfloat16 or float32")


@torch.no_grad()
def _difference(
    lm: LanguageModel,
    edits: Sequence[Edit],
    cache: DecompositionCache,
    seed: int,
    dtype: torch.dtype,
    changed: dict[str, list[Edit]],
) -> Difference:
    """Return the difference of one parameter under its edits; ``changed`` lists all changed parameters."""
    path = edits[0].matrix.path
    module_path, _, name = path.rpartition(".")
    module, parameter = lm.model.get_submodule(module_path), lm.model.get_parameter(path)
    is_layer = name == "weight" and isinstance(module, nn.Linear | Conv1D)
    experts = parameter.shape[0] if parameter.ndim == 3 else 1
    pairs = [_pair(lm, [e for e in edits if (e.matrix.expert or 0) == i], cache, seed, parameter) for i in range(experts)]
    rank = max(len(down) for down, _ in pairs)
    padded = [_padded(down, up, rank) for down, up in pairs]
    down, up = torch.stack([down for down, _ in padded]), torch.stack([up for _, up in padded])  # (E, r, n), (E, m, r)
    # peft nests its wrappers of several parameters of a module; the last parameter is the outermost.
    names = [] if is_layer else [n for n, _ in module.named_parameters(recurse=False) if f"{module_path}.{n}" in changed]
    depth = len(names) - 1 - names.index(name) if names else 0
    return Difference(
        path,
        down.to(dtype),
        up.to(dtype),
        transposed=edits[0].matrix.transposed,
        module=module_path + ".base_layer" * depth,
        is_layer=is_layer,
        swapped=parameter.ndim == 3 and bool(getattr(module, "is_transposed", False)),
    )


def _padded(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return factors (..., r, n) and (..., m, r) with zeros up to a rank."""
    return pad(down, (0, 0, 0, rank - down.shape[-2])), pad(up, (0, rank - up.shape[-1]))


def _equal_stacks(differences: Sequence[Difference]) -> tuple[Difference, ...]:
    """Return the differences with one rank for all stacks of experts: peft warns of other ranks by parameter."""
    rank = max((d.rank for d in differences if not d.is_layer), default=0)
    padded = [(d.down, d.up) if d.is_layer else _padded(d.down, d.up, rank) for d in differences]
    return tuple(replace(d, down=down, up=up) for d, (down, up) in zip(differences, padded, strict=True))


def _pair(
    lm: LanguageModel, edits: Sequence[Edit], cache: DecompositionCache, seed: int, parameter: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the factors (r, n) and (m, r) of edits of one matrix or of its parts."""
    m, n = parameter.shape[-2:][::-1] if edits and edits[0].matrix.transposed else parameter.shape[-2:]
    downs, ups = [parameter.new_zeros(0, n, dtype=torch.float32)], [parameter.new_zeros(m, 0, dtype=torch.float32)]
    for edit in edits:
        blocks = difference_factors(lm, edit, cache, seed)
        downs += [down for _, down in blocks]
        ups.append(in_all_rows(torch.block_diag(*(up for up, _ in blocks)), edit.matrix, m))
    return torch.cat(downs), torch.cat(ups, 1)


def in_all_rows(up: Tensor, matrix: Matrix, m: int) -> Tensor:
    """Return the factor of a matrix, or of a part of a fused matrix, in the m rows of the parameter."""
    if matrix.rows is None:
        return up
    whole = up.new_zeros(m, up.shape[1])
    view(whole, replace(matrix, transposed=False, expert=None)).copy_(up.unflatten(0, (matrix.rows.groups, -1)))
    return whole


def peft_config(lm: LanguageModel, differences: Sequence[Difference]) -> dict[str, Any]:
    """Return the content of ``adapter_config.json``."""
    rank = next((d.rank for d in differences if not d.is_layer), max(d.rank for d in differences))
    layers = sorted(d.target for d in differences if d.is_layer)
    # peft matches ends of names. "^" keeps a pattern to the complete name.
    ranks = {f"^{d.target}": d.rank for d in differences if d.rank != rank}
    others = [name for name, _ in lm.model.named_modules() if any(name.endswith(f".{layer}") for layer in layers)]
    source = str(lm.model.config._name_or_path or lm.name)
    return {
        "peft_type": "LORA",
        "task_type": TASK_TYPES.get(lm.kind),
        "base_model_name_or_path": str(Path(source).absolute()) if Path(source).exists() else source,
        "revision": lm.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": ranks,
        "alpha_pattern": ranks,
        "target_modules": layers,
        "exclude_modules": [name for name in others if name not in layers] or None,
        "target_parameters": sorted(d.target for d in differences if not d.is_layer) or None,
        "fan_in_fan_out": any(d.transposed for d in differences),
        "lora_dropout": 0.0,
        "bias": "none",
    }
