"""What ``laser doctor`` checks on a GPU: that it computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict
from typing import Any

from laserlm.errors import ModelError


def check_gpu(device: str | None, known: Collection[str]) -> dict[str, Any]:
    """Return the checks of a device, or why there are none.

    Args:
        device: the device; None takes the first CUDA GPU, if there is one.
        known: the devices of this machine.

    Raises:
        ModelError: if this machine has no such device.
    """
    from laserlm.searching.device_check import check_device, missing_gpu

    if device is None and (reason := missing_gpu()):
        return {"device": None, "reason": reason, "checks": []}
    target = "cuda:0" if device in (None, "cuda") else str(device)
    if target not in known:
        raise ModelError(f"no device {device!r} here; there are {', '.join(known)}")
    return {"device": target, "reason": None, "checks": [asdict(check) for check in check_device(target)]}


def show_check(report: dict[str, Any]) -> None:
    """Print the checks of a device, one line each."""
    if report["reason"]:
        print(f"{'gpu check':<15}{report['reason']}")
    for check in report["checks"]:
        print(f"{'check':<15}{'passed' if check['passed'] else 'FAILED'}  {check['name']}: {check['detail']}")
    if failed := sum(not check["passed"] for check in report["checks"]):
        print(
            f"{failed} checks of {report['device']} failed: its scores may be wrong; search with --device cpu, and report them"
        )
