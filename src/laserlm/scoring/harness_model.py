"""The model type ``laser`` of lm-evaluation-harness: any model under an intervention."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from laserlm.edit import applied
from laserlm.models.loading import load


@register_model("laser")
class LaserLM(HFLM):  # type: ignore[misc]
    """A model under an intervention, for the harness.

    Args:
        pretrained: a model for ``laserlm.load``.
        reduce: the intervention, such as ``28.fc_up@0.05``.
        dtype: a dtype for ``laserlm.load``; ``auto`` is the checkpoint's own.
        device: the harness's device. If it is a GPU and there is none, the model is on the CPU.
        revision: revision of a hub id.
        seed: seed of ``:reference`` decompositions.
        trust_remote_code: run modelling code that comes with the checkpoint.
        allow_remote_code: the same, by its name in ``laserlm.load``.
        harness_options: further options of the harness's Hugging Face model.
    """

    def __init__(
        self,
        pretrained: str,
        reduce: str = "",
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
        allow_remote_code: bool = False,
        **harness_options: Any,
    ) -> None:
        import torch

        is_absent = device is not None and device.startswith("cuda") and not torch.cuda.is_available()
        lm = load(
            pretrained,
            dtype=None if dtype == "auto" else dtype,
            device=None if is_absent else device,
            revision=revision,
            allow_remote_code=trust_remote_code or allow_remote_code,
        )
        self.interventions = ExitStack()
        self.interventions.enter_context(applied(lm, str(reduce), seed=int(seed)))
        super().__init__(pretrained=lm.model, tokenizer=lm.tokenizer, **harness_options)
