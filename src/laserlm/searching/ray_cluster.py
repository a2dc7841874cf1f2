"""The Ray cluster of a search: its address, its workers, and how many have room.

Ray starts the workers and sends them their work; https://docs.ray.io explains how to start a cluster.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from laserlm.errors import MissingExtraError, ScoringError

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Ray:
    """Which Ray cluster to search on, and with how many workers.

    Args:
        address: ``auto`` for the cluster that this machine is part of, ``HOST:PORT`` for the one that this head leads; None
            starts one on this machine for this search.
        workers: processes that hold the model; None takes as many as fit.
        cpus: cores of each worker; with a fraction, several workers share one core.
        gpus: GPUs of each worker; the model is divided over several. None is one GPU for each worker if the cluster has GPUs,
            and a part of one if there are fewer GPUs than ``workers``.
    """

    address: str | None = None
    workers: int | None = None
    cpus: float = 1.0
    gpus: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ScoringError(f"{self.workers} workers can do nothing; write 1 or more, or leave it out for all that fit")
        if self.cpus <= 0 or (self.gpus or 0) < 0:
            raise ScoringError(f"a worker needs cpus above 0 and gpus of 0 or more; got cpus {self.cpus}, gpus {self.gpus}")
        if self.address is not None and self.address.startswith("ray://"):
            raise ScoringError(
                f"no search through {self.address}: Ray's client does not stream results; run the search on a node of the "
                "cluster, with --address auto"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        return asdict(self)


def import_ray() -> ModuleType:
    """Import Ray, without its usage reports unless the user has switched them on."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(
            "a search on a cluster needs Ray: pip install 'laserlm[cluster]'; or leave out --executor ray"
        ) from error
    return ray


def connect(ray: ModuleType, cluster: Ray) -> None:
    """Connect this process to the cluster, or start one."""
    settings: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": True}
    if cluster.address is None:
        settings |= {"address": "local", "include_dashboard": False}
        if torch.cuda.is_available():  # Ray may not find every kind of GPU by itself
            settings["num_gpus"] = torch.cuda.device_count()
        if cluster.workers is not None:
            settings["num_cpus"] = math.ceil(cluster.workers * cluster.cpus)
    else:
        settings["address"] = cluster.address
    try:
        if cluster.address not in (None, "auto"):
            host, _, port = str(cluster.address).rpartition(":")
            socket.create_connection((host, int(port)), timeout=10).close()  # Ray would try again for minutes
        ray.init(**settings)
    except (OSError, ValueError, RuntimeError) as error:
        raise ScoringError(
            f"no Ray cluster at {cluster.address or 'this machine'}: {error}; start one with 'ray start --head', or leave out "
            "--address"
        ) from error


def with_gpus(ray: ModuleType, cluster: Ray) -> Ray:
    """Return the settings with a number of GPUs for each worker. With fewer GPUs than workers, several share one."""
    if cluster.gpus is not None:
        return cluster
    n_gpus = sum(int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"])
    return replace(cluster, gpus=1 / math.ceil((cluster.workers or 1) / n_gpus) if n_gpus else 0.0)


def count_room(ray: ModuleType, cluster: Ray) -> int:
    """Return how many workers fit on the cluster; each has to fit on one node."""
    needs = [(name, each) for name, each in (("CPU", cluster.cpus), ("GPU", cluster.gpus)) if each]
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # In binary, a tenth of a CPU is a little more than a tenth.
    return sum(int(min(node.get(name, 0) / each for name, each in needs) + 1e-9) for node in nodes)


def needs_text(cluster: Ray) -> str:
    """Return the CPUs and GPUs of one worker as text."""
    return resources_text({"CPU": cluster.cpus, "GPU": cluster.gpus or 0})


def resources_text(resources: Mapping[str, float]) -> str:
    """Return numbers of CPUs and GPUs as text."""
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in ("CPU", "GPU"))
