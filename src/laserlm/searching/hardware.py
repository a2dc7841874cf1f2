"""What computes the scores of a run. It is not part of the run's key, but it moves scores, most of all in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from laserlm.models.language_model import LanguageModel


def hardware_of(lm: LanguageModel) -> dict[str, Any]:
    """Return the devices of a model, its dtype and its attention kernel, as plain values for the database."""
    devices = dict.fromkeys(_name(p.device) for p in lm.model.parameters() if p.device.type != "meta")
    return {
        "device": " and ".join(devices),
        "dtype": str(lm.dtype).removeprefix("torch."),
        "attention": getattr(lm.model.config, "_attn_implementation", None) or "eager",
    }


def describe(hardware: Mapping[str, Any]) -> str:
    """Return in words what ``hardware_of`` found, and the batch size that was noted with it."""
    return "{device}, {dtype}, attention {attention}, batch size {batch_size}".format_map(hardware)


def _name(device: torch.device) -> str:
    """Return the model of a GPU, without its number on this machine, or the type of another device."""
    return f"{torch.cuda.get_device_name(device)} (cuda)" if device.type == "cuda" else device.type
