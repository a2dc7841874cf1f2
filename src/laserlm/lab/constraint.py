"""Train a model while chosen matrices are held at a rank, or drawn towards it."""

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

__all__ = ["RankConstraint"]


class RankConstraint(TrainerCallback):
    """Hold chosen matrices at a rank while a ``transformers.Trainer`` trains the model, or draw them towards it.

    With W = U diag(s) V^T right after an optimizer step and r the rank that the reduction means, W becomes

        U diag(s_1, ..., s_r, max(s_(r+1) - t, 0), ..., max(s_k - t, 0)) V^T.

    - Without a penalty t is infinite: W becomes the nearest matrix of rank r at most, after every ``every``-th step and
      at the end of training. The rank of half-precision weights is r up to the rounding of what is written; matrices
      are decomposed in float32, or in float64 for float64 weights.
    - With a penalty, t = learning rate * penalty * every / (1 - m), the rate being that of the step just taken and m the
      momentum of plain descent, which lengthens its steps as much. This is the proximal step of
      penalty * (s_(r+1) + ... + s_k), which is thereby added to the objective; r = 0 is the nuclear norm. Gradient
      descent so becomes proximal gradient descent; an adaptive optimizer keeps the penalty apart from the scales it
      gives the gradient, as AdamW keeps weight decay: there the singular values fall by the sum of the learning rates
      times the penalty. Nothing is projected at the end.

    Parameters change in place, so the optimizer keeps them and its state. Between two projections, and in checkpoints
    saved there, the matrices have full rank. Weights must be whole on each device, not sharded.

    Training leaves ``lm.model`` in training mode, and ``lm.hash`` as it was if it had been asked for; go on with
    ``dataclasses.replace(lm)``, which has neither.

    Args:
        lm: the model; ``lm.model`` is what the Trainer is given.
        intervention: which matrices, and to what rank, such as ``20-29.mlp@0.1``; without options. Empty constrains nothing.
        every: optimizer steps from one projection, or proximal step, to the next.
        penalty: weight of the sum of the singular values beyond the rank in the objective; None projects.

    Attributes:
        removed: share of the sum of squared singular values that the last projection or proximal step took, by matrix id.

    Raises:
        SpecError: if the text cannot be read, or has ``:bottom``, ``:reference`` or ``:splitK``.
        MatrixError: if it names a matrix that the model does not have.
        ValueError: if ``every`` is below 1, or the penalty negative or not finite.

    Source: arXiv 2312.13558 leaves open what reductions during training do. The proximal step is the partial singular
    value thresholding of Oh, Tai, Bazin, Kim and Kweon, Partial Sum Minimization of Singular Values in Robust PCA:
    Algorithm and Applications, TPAMI 2016, arXiv 1503.01444.
    """

    def __init__(
        self, lm: LanguageModel, intervention: InterventionLike, *, every: int = 1, penalty: float | None = None
    ) -> None:
        if every < 1:
            raise ValueError(f"every={every} is no number of optimizer steps; give 1 or more")
        if penalty is not None and not 0 <= penalty < math.inf:
            raise ValueError(f"penalty={penalty} is out of range; give a finite number from 0, or None to project")
        edits = resolve(lm.matrices, intervention)
        for r in (edit.reduction for edit in edits):
            if r.keep != "top" or r.method != "exact" or r.split != 1:
                raise SpecError(
                    f"{r} cannot be held during training, which keeps the largest singular values of whole matrices, "
                    f"exactly; write {r.layers}.{r.matrix}@{r.size}, without ':bottom', ':reference' and ':splitK'"
                )
        self.lm = lm
        self.every = every
        self.penalty = penalty
        self.removed: dict[str, float] = {}
        self._edits = [edit for edit in edits if not edit.is_identity]
        self._projected: int | None = None  # the step after which it last was

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Check that what is about to be trained are the matrices to constrain.

        Raises:
            ModelError: if the Trainer has another model, an intervention is applied to it, or a parameter is not trained.
            WeightError: if a matrix is quantised, held as two factors, or not in memory.
        """
        if unwrap_model(kwargs["model"]) is not self.lm.model:
            raise ModelError(
                f"the Trainer has another {type(kwargs['model']).__name__} than the {type(self.lm.model).__name__} of "
                f"{self.lm.name} to constrain; give it model=lm.model, of the very lm that RankConstraint was given"
            )
        if self.lm.active:
            raise ModelError(f"the weights are changed by {self.lm.intervention}; leave the 'with applied' block, then train")
        for edit in self._edits:
            read_matrix(self.lm.model, edit.matrix)
            if not self._parameter(edit).requires_grad:
                raise ModelError(
                    f"{edit.matrix.id} ({edit.matrix.path}) is frozen, so training could not adapt it to its rank; "
                    "set its requires_grad, or leave it out of the intervention"
                )
            if self.penalty is not None:
                self._rate(edit, kwargs["optimizer"])
        self.removed = {}
        self._projected = None

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Project, or take the proximal step, where it is due.

        The end of the step would be too late: there the schedule has already set the learning rate of the next.
        """
        step = state.global_step + 1  # counted up only after this event
        if step % self.every:
            return
        if self.penalty is None:
            self._project(step)
            return
        for edit in self._edits:
            self._lower(edit, self._rate(edit, kwargs["optimizer"]) * self.penalty * self.every)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Project what was trained since the last projection; with a penalty, do nothing."""
        # The best checkpoint, which may just have been loaded, can be from between two projections.
        if self.penalty is None and (self._projected != state.global_step or args.load_best_model_at_end):
            self._project(state.global_step)

    def _project(self, step: int) -> None:
        for edit in self._edits:
            self._lower(edit, math.inf)
        self._projected = step

    @torch.no_grad()
    def _lower(self, edit: Edit, by: float) -> None:
        """Lower the singular values beyond the rank, to zero at most, in place."""
        if by == 0:  # leaves every bit alone, which the product of the factors would not
            self.removed[edit.matrix.id] = 0.0
            return
        try:
            d = decompose(read_matrix(self.lm.model, edit.matrix))
        except WeightError as error:
            raise WeightError(f"cannot constrain {edit.matrix.id} ({edit.matrix.path}): {error}") from None
        S = d.S  # (k,)
        kept = torch.ones_like(S)
        kept[edit.rank :] = (1 - by / S[edit.rank :]).clamp_min(0)  # by / 0 is infinite, and so kept is 0
        place = view(self._parameter(edit), edit.matrix)
        place.copy_(((d.left * kept) @ d.right).reshape(place.shape))
        energy = S.square()
        lost = (energy * (1 - kept.square())).sum() / energy.sum()
        self.removed[edit.matrix.id] = float(lost.nan_to_num())  # of a matrix of zeros nothing is lost

    def _parameter(self, edit: Edit) -> nn.Parameter:
        return self.lm.model.get_parameter(edit.matrix.path)

    def _rate(self, edit: Edit, optimizer: Optimizer) -> float:
        """Return the learning rate at which the optimizer trains a matrix, made longer by its momentum."""
        parameter = self._parameter(edit)
        for group in optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return float(group["lr"]) / (1 - float(group.get("momentum", 0.0)))
        raise ModelError(
            f"the optimizer does not hold {edit.matrix.id} ({edit.matrix.path}), so its penalty has no learning rate; "
            "give the Trainer an optimizer of all parameters, or leave the matrix out of the intervention"
        )
