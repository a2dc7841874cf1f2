"""Train a model with transformers' Trainer, without output; an interrupted training resumes from its last checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model
from torch.utils.data import Dataset
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import Trainer
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from laserlm.errors import TaskError


def check_new(folder: Path) -> None:
    """Raise a TaskError if a folder is not free for a new model."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TaskError(f"{folder} exists and holds no model of this training; give another folder")


def fit(
    model: PreTrainedModel,
    examples: Dataset[Any],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    save_every: int | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    on_progress: Callable[[int, int], None] | None = None,
    **more: Any,
) -> None:
    """Train a model in place on the device that Trainer chooses; the caller's random states do not change.

    Args:
        model: any model whose ``forward`` returns a loss.
        examples: examples of equal length; each is the keyword arguments of ``forward``.
        folder: folder for checkpoints; training resumes from the last complete checkpoint in it.
        steps: total number of optimizer steps.
        batch_size: examples per step and device.
        learning_rate: learning rate after the warm-up.
        seed: seed of the order of the examples and of dropout.
        save_every: steps between two checkpoints, the last of which is kept; None writes none.
        callbacks: callbacks of the Trainer.
        on_progress: called after each step with the number of steps done and their total.
        more: further ``TrainingArguments``.
    """
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        save_strategy="no" if save_every is None else "steps",
        save_steps=save_every or 500,
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    # The Trainer writes a checkpoint's state last: a checkpoint without it is incomplete.
    checkpoints = {
        int(state.parent.name.rpartition("-")[2]): state.parent for state in folder.glob("checkpoint-*/trainer_state.json")
    }
    last = max(checkpoints, default=0)
    with _restored_random_states():
        trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[*callbacks, _Progress(on_progress)])
        trainer.remove_callback(PrinterCallback)  # results go to the caller
        if last >= steps:  # Trainer would take one more step
            load_model(model, checkpoints[last] / "model.safetensors")
        else:
            trainer.train(resume_from_checkpoint=str(checkpoints[last]) if last else None)
    model.eval()


@contextmanager
def _restored_random_states() -> Iterator[None]:
    """Restore all random states at the end of the context; Trainer seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Progress(TrainerCallback):
    """Reports each step."""

    def __init__(self, on_progress: Callable[[int, int], None] | None) -> None:
        self.on_progress = on_progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.on_progress is not None:
            self.on_progress(state.global_step, state.max_steps)
