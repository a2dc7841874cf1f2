"""Record where a result comes from: versions, revision, machine, command and time."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("laserlm", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python, laserlm and the packages that affect its numbers."""
    by_package = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            by_package[package] = version(package)
        except PackageNotFoundError:
            by_package[package] = "not installed"
    return by_package


def git_revision() -> str | None:
    """Return the git revision of laserlm's source tree, or None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        process = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return process.stdout.strip() if process.returncode == 0 else None


def mask_credentials(text: str) -> str:
    """Return the text with the user name and password of URLs masked."""
    return re.sub(r"(?<=password=)[^&\s]*", "***", re.sub(r"(?<=://)\S*@", "***@", text))


def provenance(*, device: str, dtype: str, seed: int | None = None) -> dict[str, Any]:
    """Return versions, git revision, machine, device, dtype, seed, command and time (UTC) as plain JSON values."""
    return {
        "versions": versions(),
        "git_revision": git_revision(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "command": [mask_credentials(argument) for argument in sys.argv],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
