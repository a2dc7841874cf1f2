"""Load a model by hub id, local folder, GGUF file or the word ``bundled``."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from rich.filesize import decimal
from safetensors import SafetensorError
from torch import Tensor
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME
from transformers.utils.quantization_config import GgufConfig

from laserlm.errors import ModelError, WeightError
from laserlm.garbage import no_collection
from laserlm.models import bundled, gguf
from laserlm.models.adapter import base_of, has_adapter, is_beside_a_model, model_alone, with_adapter
from laserlm.models.finite import describe, is_finite, not_finite
from laserlm.models.kinds import CLASSES, Kind, check_head, head_kinds, model_class
from laserlm.models.language_model import LanguageModel
from laserlm.models.loading_errors import as_model_error, silence_transformers
from laserlm.models.plugins import read_config
from laserlm.models.pooling import read_pooling
from laserlm.models.quantised import dequantise, step_of, way_out, with_floats
from laserlm.models.tokenizers import load_tokenizer, pad_with_a_known_token
from laserlm.models.weight_files import parameter_names, read_tensor, tensor_files
from laserlm.paths import atomic_folder, cache_folder

log = logging.getLogger(__name__)

COMPUTED = re.compile(r"(inv_freq|position_ids|\battn(ention)?\.(masked_)?bias)$")
"""Names of tensors that old checkpoints store and that transformers computes."""


@no_collection()
def load(
    name: str | Path,
    *,
    kind: Kind | None = None,
    revision: str | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    allow_pickle: bool = False,
    allow_remote_code: bool = False,
    adapter: str | Path | None = None,
    cache: str | Path | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer in evaluation mode. For the folder of a peft adapter, load its base model and merge it.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file (here, or ORG/REPO/FILE.gguf on the hub; the first file of a model
            that is split), or ``bundled`` for SmolLM2-135M-Instruct. GGUF files are converted once, to a folder in ``cache``.
        kind: the head to load; None uses the head that the checkpoint was saved with, and ``embedding`` for a folder of
            sentence-transformers with a pooling module.
        revision: commit, tag or branch of a hub id.
        dtype: dtype of the weights, such as ``float16``; None uses the checkpoint's dtype, and float32 for GGUF files.
        device: device of the model, such as ``cuda``; None uses CUDA if it is available, else the CPU.
        device_map: accelerate's placement for models larger than one device; excludes ``device``.
        allow_pickle: also read pickled weights, which can run code when loaded.
        allow_remote_code: run modelling code that comes with the checkpoint.
        adapter: folder of a LoRA adapter of peft for this model. It is merged, and reductions change its update of the weights
            in place of the weights.
        cache: folder for converted models and decompositions; None uses the user's cache folder.

    Raises:
        MissingExtraError: if an adapter is to be loaded and peft is not installed.
        ModelError: if the model cannot be found or loaded, or lacks the requested kind of head.
        WeightError: if weights are not finite (NaN or infinite).
    """
    if kind is not None and kind not in CLASSES:
        raise ModelError(f"no kind of model {kind!r}; there are {', '.join(CLASSES)}")
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r} and device_map={device_map!r} exclude each other; give one of them")
    name = os.path.expanduser(name)  # a shell leaves a ~ in quotes as it is
    options: dict[str, Any] = {"device": device, "device_map": device_map, "cache": cache}
    options |= {"kind": kind, "dtype": dtype, "allow_pickle": allow_pickle, "allow_remote_code": allow_remote_code}
    target = _device(device)
    # A GPU may round a merged weight differently, and the model's hash must not depend on it. A device_map fixes the devices.
    merged_on, moved_to = (options | {"device": "cpu"}, target) if device_map is None else (options, None)
    if adapter is not None:
        if not has_adapter(adapter := Path(adapter).expanduser()):
            raise ModelError(f"{str(adapter)!r} is no folder with an {ADAPTER_CONFIG_NAME}; give the folder of a LoRA adapter")
        return with_adapter(load(name, revision=revision, **merged_on), adapter, keeps_update=True, device=moved_to)
    if (base := base_of(name)) is not None:
        return with_adapter(load(base[0], revision=base[1], **merged_on), name, device=moved_to)
    if is_beside_a_model(name):
        with model_alone(name) as folder:
            return with_adapter(load(folder, **merged_on), name, device=moved_to)
    dtype = None if dtype is None else dtype_named(dtype)
    user_cache = None if cache is None else Path(cache).expanduser().absolute()
    cache = user_cache or cache_folder()
    source, commit = locate(name, revision, cache)
    common = {"revision": commit or revision or "main", "trust_remote_code": allow_remote_code}
    weights = {"dtype": dtype or "auto", "device_map": device_map} | ({} if allow_pickle else {"use_safetensors": True})
    pooling = read_pooling(source, commit or revision) if kind in (None, "embedding") and not gguf.is_gguf(name) else None
    kind = kind or (None if pooling is None else "embedding")
    model, tokenizer, kind = _read(str(name), source, kind, common, weights, target if device_map is None else None)
    commit = commit or getattr(model.config, "_commit_hash", None)
    loaded = {
        "name": str(Path(name).absolute()) if str(name) != "bundled" and Path(name).exists() else str(name),
        "kind": kind,
        "revision": commit or revision,
        "dtype": dtype,
        "allow_pickle": allow_pickle,
        "allow_remote_code": allow_remote_code,
        "cache": user_cache,
    }
    return LanguageModel(model, tokenizer, str(name), kind, revision=commit, cache=cache, pooling=pooling, loaded=loaded)


def _read(
    name: str,
    source: str | Path,
    kind: Kind | None,
    common: dict[str, Any],
    weights: dict[str, Any],
    device: torch.device | None = None,
) -> tuple[Any, Any, Kind]:
    """Return the model of a folder or hub id, its tokenizer, and the kind of its head.

    Args:
        name: what the user calls the model.
        source: folder or hub id.
        kind: the head to load; None uses the head that the checkpoint was saved with.
        common: options of transformers for config, weights and tokenizer.
        weights: options of transformers for the weights alone.
        device: the device that the model is moved to; None leaves it where transformers put it.
    """
    with as_model_error(name, source):
        config = read_config(source, **common)
        kind = kind or head_kinds(config)[0]
        check_head(name, config, kind)
        check_no_adapter(name, Path(source))
        if getattr(config, "_commit_hash", None):
            # Because of "main", transformers may load the converted weights of somebody's open pull request.
            common = common | {"revision": config._commit_hash}
        loader = model_class(config, kind)
        options = weights | common | ({"config": config} if dequantise(config) else {})
        with as_model_error(name, source, step_of(config)):
            model, info = loader.from_pretrained(source, output_loading_info=True, **options)
            model = with_floats(model, config)
        tokenizer = load_tokenizer(source, common, kind)
        pad_with_a_known_token(tokenizer, model)
        _keep_stored_weights(model)
        check_no_adapter(name, Path(source), model)
        _check_complete(name, config, info["missing_keys"], info["unexpected_keys"])
        model = model if device is None else model.to(device)
        _check_finite(name, model, source)
    _warn_of_unread(name, model, {*info["unexpected_keys"], *_ignored_tensors(model, source)})
    return model, tokenizer, kind


def locate(name: str | Path, revision: str | None, cache: Path) -> tuple[str | Path, str | None]:
    """Return the folder or hub id that a model's name means to transformers, and the commit of a GGUF file on the hub.

    The bundled model and GGUF files are converted when they are first named.

    Raises:
        ModelError: if a GGUF file cannot be found or converted.
    """
    if str(name) == "bundled":
        return set_up_bundled(cache), None
    if not gguf.is_gguf(name):
        return name, None
    files, commit = gguf.find_files(name, revision)
    stamps = gguf.stamps_of(files)
    folder = gguf.find_conversion(stamps, cache)
    if folder is None:
        folder = gguf.conversion_folder(files, cache)
        if folder.is_dir():
            gguf.remember(stamps, folder)
        else:
            gguf.remove_outdated(cache)
            _convert(files, stamps, folder)
    unread = gguf.read_record(folder).unread
    if unread:
        log.warning("%s has %d tensors that transformers does not read: %s", name, len(unread), _first_names(unread))
    return folder, commit


def set_up_bundled(cache: Path) -> Path | str:
    """Return the folder of the bundled model, or its hub id if its package is not installed.

    The first call converts the model to safetensors. An interrupted conversion leaves no folder behind.

    Raises:
        ModelError: if the installed package's file has the wrong sha256.
    """
    folder = bundled.converted(cache)
    if folder.is_dir():
        return folder
    file = bundled.packaged_file()
    if file is None:
        return bundled.HUB_ID
    bundled.check(file)
    _convert([file.absolute()], gguf.stamps_of([file]), folder)
    return folder


def _convert(files: Sequence[Path], stamps: gguf.Stamps, folder: Path) -> None:
    """Write a GGUF model as safetensors, with its tokenizer. An interrupted conversion leaves no folder behind."""
    metadata, names = gguf.read_header(files)
    try:
        with gguf.parsed_once(), atomic_folder(folder) as part:
            needed = gguf.check_space(files, folder.parent)
            log.warning("%s is converted once, which may take minutes, to %s (up to %s)", files[0], folder, decimal(needed))
            file = files[0] if len(files) == 1 else gguf.merge(files, part / "merged.gguf")
            # If GGUF kernels are installed, transformers would keep the blocks packed, which cannot be decomposed.
            weights = {"dtype": torch.float32, "quantization_config": GgufConfig(gguf_file=file.name, dequantize=True)}
            model, tokenizer, _ = _read(str(files[0]), file.parent, None, {"gguf_file": file.name}, weights)
            for parameter in model.parameters():
                parameter.data = _narrowest(parameter.data)
            with silence_transformers():
                model.save_pretrained(part)
                model.config.dtype = torch.float32
                gguf.restore_rope_scaling(file, model.config)
                model.config.save_pretrained(part)
                if tokenizer is not None:
                    tokenizer.save_pretrained(part)
            (part / "merged.gguf").unlink(missing_ok=True)
            gguf.remember(stamps, part, unread=gguf.unread_tensors(metadata, names, model))
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write {files[0]} to {folder}: {error}; free space there, or give --cache") from error


def _narrowest(tensor: Tensor) -> Tensor:
    """Return a tensor in the first of float16, bfloat16 and its own dtype that holds all its values exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(tensor.to(dtype).to(tensor.dtype), tensor):
            return tensor.to(dtype)
    return tensor


def _device(device: str | torch.device | None) -> torch.device:
    """Return the device to load on: by default CUDA if it is available, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if torch.backends.mps.is_available() else [])]
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if (
        target is None
        or target.type not in known
        or (target.type == "cuda" and (target.index or 0) >= torch.cuda.device_count())
    ):
        raise ModelError(f"no device {str(device)!r} here; there are {', '.join(known)}")
    return target


def dtype_named(dtype: str | torch.dtype) -> torch.dtype:
    """Return the floating-point dtype with this name.

    Raises:
        ModelError: if the name is not that of a floating-point dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ModelError(f"no dtype {dtype!r}; write float32, bfloat16 or float16")
    return value


def check_no_adapter(name: str, folder: Path, model: Any = None) -> None:
    """Do nothing unless a folder with a model has a peft adapter too, or transformers has added one to the model.

    Raises:
        ModelError: if there is an adapter, with which the matrices are not those of the model.
    """
    if (folder / ADAPTER_CONFIG_NAME).is_file() or getattr(model, "_hf_peft_config_loaded", False):
        raise ModelError(
            f"{name!r} has a model and a peft adapter ({ADAPTER_CONFIG_NAME}); merge the adapter with peft's merge_and_unload "
            "and save the result, or give each a folder of its own"
        )


def check_no_wrappers(name: str, tensors: Iterable[str]) -> None:
    """Do nothing unless a checkpoint was saved with peft's wrappers around its layers.

    Raises:
        ModelError: if it was, so that its layers have other names than those of the model.
    """
    wrapped = [tensor for tensor in tensors if ".base_layer." in tensor]
    if wrapped:
        raise ModelError(
            f"{name!r} stores {_first_names(wrapped)}: peft names the layers so that it wraps, and the checkpoint was saved "
            "with the wrappers; save it again after peft's merge_and_unload(), or unload() to leave the adapter out"
        )


def _check_complete(name: str, config: Any, missing_keys: Iterable[str], unexpected_keys: Iterable[str]) -> None:
    if missing_keys:
        check_no_wrappers(name, unexpected_keys)
        others = f"; it has {_first_names(unexpected_keys)} instead" if unexpected_keys else ""
        step = way_out(config) or f"It was saved as {config.architectures}: give the kind= that fits it"
        if prefix := _common_prefix(set(missing_keys), set(unexpected_keys)):
            step = f"All names begin with {prefix!r}, as of a wrapper around the model; save them without it"
        raise ModelError(
            f"the checkpoint {name!r} has no weights for {_first_names(missing_keys)}, which would be random{others}. {step}"
        )


def _common_prefix(missing: set[str], unexpected: set[str]) -> str:
    """Return what was put in front of the names of all tensors; empty if that is not why some are missing."""
    first = min(unexpected, default="")
    prefixes = {first.removesuffix(name) for name in missing if first.endswith(f".{name}")}
    # Of tied weights one alone is stored, so not all that is missing is there under the longer name.
    return next((prefix for prefix in prefixes if unexpected <= {prefix + name for name in missing}), "")


def _check_finite(name: str, model: Any, source: str | Path) -> None:
    """Raise a WeightError if weights are not finite: because the checkpoint is damaged, or because of the dtype."""
    counts = not_finite(model)
    if not counts:
        return
    fault, dtype = f"{name!r} has weights that are not finite: {describe(counts)}", str(model.dtype).removeprefix("torch.")
    files = tensor_files(_stored_folder(model, source))
    stored = [stored for stored, (read_as, _) in parameter_names(model, files).items() if read_as in counts]
    if stored and all(is_finite(read_tensor(files[tensor], tensor)) for tensor in stored):
        raise WeightError(f"{fault}. The file holds larger values than {dtype} does; load it with --dtype float32 (dtype=...)")
    if (Path(source) / gguf.RECORD).is_file():
        step = f"Its converted copy in {source} is damaged; remove it with 'laser clear-cache', and run the command again"
    elif stored or model.dtype == torch.float32:
        step = "The checkpoint is damaged; copy or download it again, or give another one"
    else:
        step = f"The checkpoint is damaged or overflows {dtype}; load it with --dtype float32, or copy it again"
    raise WeightError(f"{fault}. {step}")


def _first_names(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:4]) + (f" and {len(ordered) - 4} more" if len(ordered) > 4 else "")


def _stored_folder(model: Any, source: str | Path) -> Path:
    """Return the folder that a model was read from: for a hub id, the one in the hub's cache."""
    folder = Path(source)
    if not folder.is_dir():
        config = try_to_load_from_cache(str(source), "config.json", revision=getattr(model.config, "_commit_hash", None))
        folder = Path(config).parent if isinstance(config, str) else folder
    return folder


def _ignored_tensors(model: Any, source: str | Path) -> list[str]:
    """Return the stored tensors that the model's class leaves out without a word, such as those of a vision tower."""
    folder = _stored_folder(model, source)
    ignored = "|".join(model._keys_to_ignore_on_load_unexpected or ())
    if not ignored:
        return []
    read = set(model.state_dict())  # a pattern such as attn.bias also matches the c_attn.bias that the model has
    prefix = model.base_model_prefix
    return [
        name
        for name in tensor_files(folder)
        if re.search(ignored, name) and not {name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")} & read
    ]


def _warn_of_unread(name: str, model: Any, tensors: Iterable[str]) -> None:
    names = [tensor for tensor in tensors if not COMPUTED.search(tensor)]
    if names:
        log.warning(
            "%s stores %d tensors that %s does not read (%s): scores are without them, and so are models that are not saved "
            "from safetensors",
            *(name, len(names), type(model).__name__, _first_names(names)),
        )


def _keep_stored_weights(model: Any) -> None:
    """Let RWKV score with its weights as they are stored.

    In its first forward pass it would divide some by powers of two, which keeps activations within float16: what is saved after
    a pass would be divided twice. Without that, outputs differ by the epsilon of the norms, and overflows are errors.
    """
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0
