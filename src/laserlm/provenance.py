"""What every saved thing records about how it was made."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["masked", "provenance", "versions"]

PACKAGES = ("laserlm", "torch", "transformers", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Return the versions of Python, laserlm and the packages that decide its numbers."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_revision() -> str | None:
    """Return the git revision of the source tree laserlm runs from, or None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def masked(text: str) -> str:
    """Return a text without the user name and password of a URL in it."""
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
        "command": [masked(argument) for argument in sys.argv],
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
