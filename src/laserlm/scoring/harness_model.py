"""The model type ``laser`` of lm-evaluation-harness: any model, with weights reduced."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from laserlm.edit import applied
from laserlm.models.loading import load

__all__ = ["LaserLM"]


@register_model("laser")
class LaserLM(HFLM):  # type: ignore[misc]
    """A model of laserlm under an intervention, for the harness.

    Args:
        pretrained: as ``laserlm.load`` takes it.
        reduce: the intervention, such as ``28.fc_up@0.05``.
        dtype: as ``laserlm.load`` takes it; ``auto`` is the checkpoint's own.
        device: as the harness gives it; a GPU that is not there means the CPU.
        revision: of a hub id.
        seed: of ``:reference`` decompositions.
        given: all else that the harness's own Hugging Face model takes.
    """

    def __init__(
        self,
        pretrained: str,
        reduce: str = "",
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        **given: Any,
    ) -> None:
        import torch

        absent = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
        lm = load(pretrained, dtype=None if dtype == "auto" else dtype, device=None if absent else device, revision=revision)
        self.interventions = ExitStack()
        self.interventions.enter_context(applied(lm, str(reduce), seed=int(seed)))
        super().__init__(pretrained=lm.model, tokenizer=lm.tokenizer, **given)
