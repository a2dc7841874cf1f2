"""What is installed, what is missing, where the work is done and what the cache holds: doctor, clear-cache."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from laserlm.cli.options import STORE_DEFAULT, Cache, Json, Store, print_json
from laserlm.paths import cache_folder, cached
from laserlm.provenance import masked, versions

PURPOSES = {
    "analysis": "entities, terms, frequency, calibration, figures as PNG or SVG",
    "app": "laser app",
    "cluster": "--executor ray, results in PostgreSQL",
    "eval": "lm-eval:NAME, laser lm-eval, humaneval",
    "notebook": "the notebooks of examples/",
    "rl": "laser lab sokoban",
}


def doctor(
    cache: Cache = None,
    store: Store = STORE_DEFAULT,
    json: Json = False,
) -> None:
    """Tell what is installed, which extras are missing and how to get them, the device, and what the cache holds.

    Example: laser doctor
    """
    folder = cache or cache_folder()
    found = {
        "versions": versions(),
        "extras": extras(),
        "devices": devices(),
        "bundled": bundled_model(folder),
        "cache": {"folder": str(folder), "bytes": {part: sum(map(size, files)) for part, files in cached(folder).items()}},
        "store": {"place": masked(store), "bytes": Path(store).stat().st_size if Path(store).is_file() else None},
    }
    if json:
        print_json(found)
    else:
        show(found)


def clear_cache(
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Remove what laserlm has cached: decompositions, the converted bundled model, downloaded data sets.

    All of it is made or fetched again when it is needed. Results and the hub's own cache are left alone.

    Example: laser clear-cache
    """
    folder = cache or cache_folder()
    freed = {}
    for part, files in cached(folder).items():
        freed[part] = sum(map(size, files))
        for file in files:
            if file.is_dir():
                shutil.rmtree(file)
            else:
                file.unlink(missing_ok=True)
    if json:
        print_json({"folder": str(folder), "freed_bytes": freed})
    else:
        print(f"{decimal(sum(freed.values()))} freed in {folder}")
        if freed["models"]:
            print("The bundled model is converted again by the next command that needs it, where its package is installed.")


def extras() -> dict[str, dict[str, Any]]:
    """Return for each extra the packages that are not installed, or not in a version that serves, and what installs them."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requires("laserlm") or []]
    missing: dict[str, list[str]] = {}
    for extra in PURPOSES:
        missing[extra] = [
            f"{r.name}{r.specifier}"
            for r in wanted
            if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""}) and not installed(r)
        ]
    return {
        extra: {"for": PURPOSES[extra], "missing": names, "install": f"pip install 'laserlm[{extra}]'"}
        for extra, names in missing.items()
    }


def installed(requirement: Any) -> bool:
    """Tell whether a requirement is met by what is installed."""
    try:
        return bool(requirement.specifier.contains(version(requirement.name), prereleases=True))
    except PackageNotFoundError:
        return False


def devices() -> list[dict[str, Any]]:
    """Return what a model can be put on, best first; the first is what ``load`` takes unless told otherwise."""
    import torch

    gpus = [
        {"device": f"cuda:{i}", "name": p.name, "memory_bytes": p.total_memory}
        for i in range(torch.cuda.device_count())
        for p in [torch.cuda.get_device_properties(i)]
    ]
    cpu = {"device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    mps = [{"device": "mps"}] if torch.backends.mps.is_available() else []
    return [*gpus, cpu, *mps]


def bundled_model(cache: Path) -> dict[str, Any]:
    """Return whether the bundled model can be loaded without setup, and from where."""
    from laserlm.models import bundled

    folder, file = bundled.converted(cache), bundled.packaged_file()
    return {"ready": folder.is_dir(), "folder": str(folder), "package": bundled.PACKAGE, "installed": file is not None}


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def show(found: dict[str, Any]) -> None:
    """Print what was found, a line for each thing."""
    lines = dict(found["versions"])
    for n, device in enumerate(found["devices"]):
        details = ", ".join(
            decimal(v) if k == "memory_bytes" else f"{v} {k}" if isinstance(v, int) else str(v) for k, v in device.items()
        )
        lines[f"device {n}"] = details if n else f"{details} (taken unless --device says otherwise)"
    model = found["bundled"]
    lines["bundled model"] = f"ready in {model['folder']}" if model["ready"] else "not set up: laser setup"
    for name, extra in found["extras"].items():
        lacks = f"missing {', '.join(extra['missing'])}: {extra['install']}" if extra["missing"] else "installed"
        lines[f"extra {name}"] = f"{lacks} ({extra['for']})"
    sizes = found["cache"]["bytes"]
    parts = ", ".join(f"{part} {decimal(count)}" for part, count in sizes.items() if count)
    lines["cache"] = f"{found['cache']['folder']}: {f'{parts}; laser clear-cache frees it' if parts else 'empty'}"
    kept = found["store"]["bytes"]
    lines["results"] = found["store"]["place"] + ("" if kept is None else f": {decimal(kept)}")
    for name, line in lines.items():
        print(f"{name:<15}{line}")
