"""Find tensors in the safetensors files of a folder, from the headers of the files."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from laserlm.errors import ModelError

__all__ = ["tensor_files"]


def tensor_files(folder: Path) -> dict[str, Path]:
    """Return the file of every tensor, by the tensor's name; empty if the folder has no safetensors.

    Raises:
        ModelError: if a file is damaged, or the index names a file that does not exist.
    """
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) if index.is_file() else set()
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error}); copy or download it again") from error
    files: dict[str, Path] = {}
    for file in sorted(map(folder.joinpath, shards)) or sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                files |= dict.fromkeys(opened.keys(), file)
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file} is damaged or was cut short ({error}); copy or download it again") from error
    return files
