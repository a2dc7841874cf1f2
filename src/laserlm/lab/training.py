"""Train a model by transformers' Trainer, quietly, and go on from its last checkpoint after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from torch.utils.data import Dataset
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer import Trainer
from transformers.trainer_callback import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import TrainingArguments

__all__ = ["fit"]


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
) -> list[dict[str, float]]:
    """Train a model in place, on the device that Trainer chooses, and return what was logged.

    Args:
        model: any model whose ``forward`` returns a loss.
        examples: of a fixed length, each the keyword arguments of ``forward``.
        folder: for checkpoints; where it has some, training goes on from the last one.
        steps: optimizer steps in all.
        batch_size: examples of one step.
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
        logging_steps=max(1, steps // 20),
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **more,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=[*callbacks, _Progress(on_progress)])
    trainer.remove_callback(PrinterCallback)  # results go to the caller, and logs nowhere else
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is not None and TrainerState.load_from_json(str(Path(last) / "trainer_state.json")).global_step >= steps:
        load_model(model, Path(last) / "model.safetensors")  # interrupted after its last step; Trainer would take one more
    else:
        trainer.train(resume_from_checkpoint=last)
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class _Progress(TrainerCallback):
    """Tells of each step."""

    def __init__(self, on_progress: Callable[[int, int], None] | None) -> None:
        self.on_progress = on_progress

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.on_progress is not None:
            self.on_progress(state.global_step, state.max_steps)
