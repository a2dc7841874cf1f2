"""Train a model by transformers' Trainer, quietly, and go on from its last checkpoint after an interruption."""

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

__all__ = ["check_new", "fit"]


def check_new(folder: Path) -> None:
    """Raise a TaskError where a model could not be written to a folder after its training."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise TaskError(f"{folder} holds something else than a model that was trained here; give another folder")


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
    """Train a model in place, on the device that Trainer chooses; random numbers of the caller stay as they are.

    Args:
        model: any model whose ``forward`` returns a loss.
        examples: of a fixed length, each the keyword arguments of ``forward``.
        folder: for checkpoints; where it has whole ones, training goes on from the last of them.
        steps: optimizer steps in all.
        batch_size: examples of one step on each device.
        learning_rate: the highest, after the warm-up.
        seed: of the order of the examples and of dropout.
        save_every: steps between two checkpoints, the last of which is kept; None writes none.
        callbacks: called by Trainer.
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
    # A checkpoint's state is written last: one without it was being written when the process ended.
    whole = {
        int(state.parent.name.rpartition("-")[2]): state.parent for state in folder.glob("checkpoint-*/trainer_state.json")
    }
    last = max(whole, default=0)
    with _own_random():
        trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[*callbacks, _Progress(on_progress)])
        trainer.remove_callback(PrinterCallback)  # results go to the caller
        if last >= steps:  # interrupted after its last step; Trainer would take one more
            load_model(model, whole[last] / "model.safetensors")
        else:
            trainer.train(resume_from_checkpoint=str(whole[last]) if last else None)
    model.eval()


@contextmanager
def _own_random() -> Iterator[None]:
    """Put back the states of all random numbers, which Trainer seeds."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Progress(TrainerCallback):
    """Tells of each step."""

    def __init__(self, on_progress: Callable[[int, int], None] | None) -> None:
        self.on_progress = on_progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.on_progress is not None:
            self.on_progress(state.global_step, state.max_steps)
