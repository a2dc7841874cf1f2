"""The commands ``laser doctor`` and ``laser clear-cache``: the installation, the devices and the cache."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from laserlm.cli.doctor_check import check_gpu, show_check
from laserlm.cli.options import STORE_DEFAULT, Cache, Json, Store, print_json
from laserlm.paths import cache_folder, cached_files
from laserlm.provenance import mask_credentials, versions

PURPOSES = {
    "analysis": "entities, terms, frequency, calibration, figures as PNG or SVG",
    "app": "laser app",
    "cluster": "--executor ray, results in PostgreSQL",
    "eval": "lm-eval:NAME, laser lm-eval, humaneval",
    "gguf": "laser save --form gguf",
    "notebook": "the notebooks of examples/",
    "rl": "laser lab sokoban",
    **{name: f"laser search --track {name}" for name in ("mlflow", "tensorboard", "trackio", "wandb")},
}


def doctor(
    cache: Cache = None,
    store: Store = STORE_DEFAULT,
    device: Annotated[
        str | None, typer.Option(help="Device to check against the CPU.", show_default="cuda if available, else none")
    ] = None,
    json: Json = False,
) -> None:
    """Print the versions, missing extras and how to install them, the devices, and the size of the cache.

    On a machine with a CUDA GPU, also check that the GPU computes what the CPU computes: scores, the screen, padding, and
    what happens when memory runs out. The exit code is 1 if a check fails.

    Example: laser doctor
    """
    folder = cache or cache_folder()
    report: dict[str, Any] = {
        "versions": versions(),
        "extras": extras(),
        "devices": devices(),
        "bundled": bundled_model(folder),
        "cache": {
            "folder": str(folder),
            "bytes": {part: sum(map(size, files)) for part, files in cached_files(folder).items()},
        },
        "store": {"place": mask_credentials(store), "bytes": Path(store).stat().st_size if Path(store).is_file() else None},
        "gpu_check": check_gpu(device, [entry["device"] for entry in devices()]),
    }
    if json:
        print_json(report)
    else:
        show(report)
        show_check(report["gpu_check"])
    if not all(check["passed"] for check in report["gpu_check"]["checks"]):
        raise typer.Exit(1)


def clear_cache(
    cache: Cache = None,
    json: Json = False,
) -> None:
    """Remove the cached decompositions, converted models and downloaded data sets, and what killed processes left of them.

    laserlm recreates or downloads them when a command needs them. Results and the hub's cache are not removed. The
    environment variable LASER_CACHE_GIB bounds the decompositions (20 GiB unless set); the least recently used go first.

    Example: laser clear-cache
    """
    folder = cache or cache_folder()
    freed = {}
    for part, files in cached_files(folder).items():
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
            print("The next command that needs the bundled model converts it again from its package.")


def extras() -> dict[str, dict[str, Any]]:
    """Return, for each extra, its missing or outdated packages and the command that installs them."""
    from packaging.requirements import Requirement

    wanted = [Requirement(text) for text in requires("laserlm") or []]
    missing: dict[str, list[str]] = {}
    for extra in PURPOSES:
        missing[extra] = [
            f"{r.name}{r.specifier}"
            for r in wanted
            if r.marker and r.marker.evaluate({"extra": extra}) and not r.marker.evaluate({"extra": ""}) and not is_installed(r)
        ]
    return {
        extra: {"for": PURPOSES[extra], "missing": names, "install": f"pip install 'laserlm[{extra}]'"}
        for extra, names in missing.items()
    }


def is_installed(requirement: Any) -> bool:
    """Return whether the installed packages meet a requirement."""
    try:
        return bool(requirement.specifier.contains(version(requirement.name), prereleases=True))
    except PackageNotFoundError:
        return False


def devices() -> list[dict[str, Any]]:
    """Return the devices of this machine, the default of ``load`` first."""
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
    """Return whether the bundled model is ready, its folder and its package."""
    from laserlm.models import bundled

    folder, file = bundled.converted(cache), bundled.packaged_file()
    return {"ready": folder.is_dir(), "folder": str(folder), "package": bundled.PACKAGE, "installed": file is not None}


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size


def show(report: dict[str, Any]) -> None:
    """Print a report, one line per item."""
    lines = dict(report["versions"])
    for n, device in enumerate(report["devices"]):
        details = ", ".join(
            decimal(v) if k == "memory_bytes" else f"{v} {k}" if isinstance(v, int) else str(v) for k, v in device.items()
        )
        lines[f"device {n}"] = details if n else f"{details} (taken unless --device says otherwise)"
    model = report["bundled"]
    lines["bundled model"] = f"ready in {model['folder']}" if model["ready"] else "not set up: laser setup"
    for name, extra in report["extras"].items():
        status = f"missing {', '.join(extra['missing'])}: {extra['install']}" if extra["missing"] else "installed"
        lines[f"extra {name}"] = f"{status} ({extra['for']})"
    sizes = report["cache"]["bytes"]
    parts = ", ".join(f"{part} {decimal(count)}" for part, count in sizes.items() if count)
    lines["cache"] = f"{report['cache']['folder']}: {f'{parts}; laser clear-cache frees it' if parts else 'empty'}"
    store_bytes = report["store"]["bytes"]
    lines["results"] = report["store"]["place"] + ("" if store_bytes is None else f": {decimal(store_bytes)}")
    for name, line in lines.items():
        print(f"{name:<15}{line}")
