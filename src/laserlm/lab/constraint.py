"""Train a model while chosen matrices are constrained to a rank, or penalised for exceeding it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.modeling_utils import unwrap_model
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from laserlm.edit.apply import Edit, InterventionLike, resolve
from laserlm.errors import ModelError, SpecError, WeightError
from laserlm.linalg.decomposition import decompose
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import read_matrix, view


class RankConstraint(TrainerCallback):
    """Constrain or penalise the rank of chosen matrices while a ``transformers.Trainer`` trains the model.

    Let W = U diag(s) V^T be a matrix right after an optimizer step, and r the rank of the reduction. W becomes

        U diag(s_1, ..., s_r, max(s_(r+1) - t, 0), ..., max(s_k - t, 0)) V^T.

    - Without a penalty t is infinite: W becomes the nearest matrix of rank r or less. This happens after every ``every``-th
      step and at the end of training. Half-precision weights have rank r up to rounding. The decomposition is in float32,
      or in float64 for float64 weights.
    - With a penalty, t = learning rate * penalty * every / (1 - m), with the learning rate of the last step and the momentum
      m of plain descent. This is the proximal step of penalty * (s_(r+1) + ... + s_k), so this term is added to the
      objective. r = 0 gives the nuclear norm. Gradient descent becomes proximal gradient descent. With an adaptive
      optimizer the penalty is decoupled from the gradient's scales, as the weight decay of AdamW is: the singular values
      fall by the penalty times the sum of the learning rates. There is no projection at the end.

    Parameters change in place, so the optimizer keeps its state. Between two projections, and in checkpoints saved there,
    the matrices have full rank. Every device must hold complete weights, not shards.

    After training, ``lm.model`` is in training mode. Call ``lm.model.eval()`` before the model is scored or saved.

    Args:
        lm: the model; give ``lm.model`` to the Trainer.
        intervention: matrices and ranks, such as ``20-29.mlp@0.1``, without options. Empty constrains nothing.
        every: optimizer steps between two projections or proximal steps.
        penalty: weight of the sum of the singular values beyond the rank; None projects.

    Attributes:
        removed: by matrix id, the share of the squared singular values that the last projection or proximal step removed.

    Raises:
        SpecError: if the text cannot be parsed, or has ``:bottom``, ``:reference`` or ``:splitK``.
        MatrixError: if the model has no such matrix.
        ValueError: if ``every`` is below 1, or the penalty is negative or not finite.

    Source: arXiv 2312.13558 leaves open what reductions during training do. The proximal step is the partial singular
    value thresholding of Oh, Tai, Bazin, Kim and Kweon, Partial Sum Minimization of Singular Values in Robust PCA:
    Algorithm and Applications, TPAMI 2016, arXiv 1503.01444.
    """

    def __init__(
        self, lm: LanguageModel, intervention: InterventionLike, *, every: int = 1, penalty: float | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be 1 or more, got {every}")
        if penalty is not None and not 0 <= penalty < math.inf:
            raise ValueError(f"penalty must be finite and 0 or more, or None to project; got {penalty}")
        edits = resolve(lm.matrices, intervention)
        for r in (edit.reduction for edit in edits):
            if r.size.strengths is not None:
                raise SpecError(f"{r} cannot constrain training, which keeps the largest singular values; write a rank: r40")
            if r.keep != "top" or r.method != "exact" or r.split != 1:
                raise SpecError(
                    f"{r} cannot constrain training, which keeps the largest singular values of complete matrices exactly; "
                    f"write {r.layers}.{r.matrix}@{r.size}, without ':bottom', ':reference' and ':splitK'"
                )
        self.lm = lm
        self.every = every
        self.penalty = penalty
        self.removed: dict[str, float] = {}
        self._edits = [edit for edit in edits if not edit.is_identity]
        self._last_projection: int | None = None  # number of a step

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that the Trainer is about to train the constrained matrices.

        Raises:
            ModelError: if the Trainer has another model, an intervention is applied, or a parameter is not trained.
            WeightError: if a matrix is quantised, held as two factors, or not in memory.
        """
        if unwrap_model(kwargs["model"]) is not self.lm.model:
            raise ModelError(
                f"the Trainer's model, a {type(kwargs['model']).__name__}, is not the {type(self.lm.model).__name__} of "
                f"{self.lm.name}; give the Trainer model=lm.model of the lm that RankConstraint has"
            )
        if self.lm.active:
            raise ModelError(f"the weights are changed by {self.lm.intervention}; leave the 'with applied' block, then train")
        for edit in self._edits:
            read_matrix(self.lm.model, edit.matrix)
            if not self._parameter(edit).requires_grad:
                raise ModelError(
                    f"{edit.matrix.id} ({edit.matrix.path}) is frozen; set its requires_grad, or leave it out of the "
                    "intervention"
                )
            if self.penalty is not None:
                self._rate(edit, kwargs["optimizer"])
        self.removed = {}
        self._last_projection = None

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Project, or take the proximal step, after every ``every``-th step."""
        # At the end of the step the schedule has already set the learning rate of the next step.
        step = state.global_step + 1  # the Trainer counts up after this event
        if step % self.every:
            return
        if self.penalty is None:
            self._project(step)
            return
        for edit in self._edits:
            self._lower(edit, self._rate(edit, kwargs["optimizer"]) * self.penalty * self.every)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Project if the last step was not projected; do nothing with a penalty."""
        # The best checkpoint, which the Trainer may have loaded, can be from between two projections.
        if self.penalty is None and (self._last_projection != state.global_step or args.load_best_model_at_end):
            self._project(state.global_step)

    def _project(self, step: int) -> None:
        for edit in self._edits:
            self._lower(edit, math.inf)
        self._last_projection = step

    @torch.no_grad()
    def _lower(self, edit: Edit, amount: float) -> None:
        """Subtract an amount from the singular values beyond the rank, down to zero at most, in place."""
        if amount == 0:  # the product of the factors would change bits
            self.removed[edit.matrix.id] = 0.0
            return
        try:
            d = decompose(read_matrix(self.lm.model, edit.matrix))
        except WeightError as error:
            raise WeightError(f"cannot constrain {edit.matrix.id} ({edit.matrix.path}): {error}") from None
        S = d.S  # (k,)
        scale = torch.ones_like(S)
        scale[edit.rank :] = (1 - amount / S[edit.rank :]).clamp_min(0)  # 0 for a singular value of 0
        target = view(self._parameter(edit), edit.matrix)
        target.copy_(((d.left * scale) @ d.right).reshape(target.shape))
        energy = S.square()
        removed = (energy * (1 - scale.square())).sum() / energy.sum()
        self.removed[edit.matrix.id] = float(removed.nan_to_num())  # 0 for a matrix of zeros

    def _parameter(self, edit: Edit) -> nn.Parameter:
        return self.lm.model.get_parameter(edit.matrix.path)

    def _rate(self, edit: Edit, optimizer: Optimizer) -> float:
        """Return the learning rate of a matrix divided by (1 - momentum)."""
        parameter = self._parameter(edit)
        for group in optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return float(group["lr"]) / (1 - float(group.get("momentum", 0.0)))
        raise ModelError(
            f"the optimizer does not train {edit.matrix.id} ({edit.matrix.path}), so its penalty has no learning rate; "
            "give the Trainer an optimizer of all parameters, or leave the matrix out of the intervention"
        )
