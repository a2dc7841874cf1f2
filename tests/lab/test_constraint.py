"""Ranks held or drawn towards during training: what becomes of the matrices, and of the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.trainer import Trainer
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from laserlm.edit import applied
from laserlm.errors import MatrixError, ModelError, SpecError, WeightError
from laserlm.lab.constraint import RankConstraint
from laserlm.models import LanguageModel, read_matrix
from laserlm.models.matrices import Matrix

Make = Callable[..., LanguageModel]

STILL = {"learning_rate": 0.0}
"""Training that changes no weight, so that only the constraint does."""


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trainer]:
    """Train a model on random tokens; ``steps`` optimizer steps of two sequences."""

    def run(lm: LanguageModel, *callbacks: TrainerCallback, steps: int = 2, optimizer: Any = None, **options: Any) -> Trainer:
        ids = torch.randint(0, 512, (2 * steps, 12), generator=torch.Generator().manual_seed(3))
        arguments = TrainingArguments(
            **{
                "output_dir": str(tmp_path / "trainer"),
                "report_to": "none",
                "disable_tqdm": True,
                "use_cpu": True,
                "save_strategy": "no",
                "logging_strategy": "no",
                "dataloader_pin_memory": False,
                "max_steps": steps,
                "per_device_train_batch_size": 2,
                "learning_rate": 1e-2,
                "seed": 0,
                **options,
            }
        )
        trainer = Trainer(
            model=lm.model,
            args=arguments,
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=list(callbacks),
            optimizers=(optimizer, None),
        )
        trainer.train()
        return trainer

    return run


class Watch(TrainerCallback):
    """Note the rank of a matrix at the end of every step."""

    def __init__(self, lm: LanguageModel, id: str) -> None:
        self.lm = lm
        self.id = id
        self.ranks: list[int] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ranks.append(rank(weight(self.lm, self.id)))


def matrix(lm: LanguageModel, id: str) -> Matrix:
    return next(m for m in lm.matrices if m.id == id)


def weight(lm: LanguageModel, id: str) -> Tensor:
    """Return a copy of a matrix, (out, in)."""
    return read_matrix(lm.model, matrix(lm, id)).clone()


def rank(weight: Tensor) -> int:
    return int(torch.linalg.matrix_rank(weight.float()))


def singular_values(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.double())


def truncated(weight: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (U[:, :rank] * S[:rank] @ Vh[:rank]).float()


def parameters(lm: LanguageModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2"])
def test_a_trained_model_has_the_rank_it_was_held_at_and_full_rank_elsewhere(family: str, make: Make, train: Any) -> None:
    lm = make(family)
    before = parameters(lm)
    train(lm, RankConstraint(lm, "0.out_proj@r3+1.fc_in@r4+2.mlp@0.25"), steps=3)
    held = {"0.out_proj": 3, "1.fc_in": 4, "2.fc_in": 8, "2.fc_up": 8, "2.fc_out": 8}
    for m in lm.matrices:
        assert rank(read_matrix(lm.model, m)) == held.get(m.id, m.max_rank), m.id
        assert not torch.equal(lm.model.get_parameter(m.path), before[m.path]), m.id


@pytest.mark.parametrize(
    ("family", "id"),
    [
        ("opt", "1.fc_in"),
        ("gpt2", "1.fc_in"),  # stored transposed
        ("gpt2", "1.k_proj"),  # columns of a fused one, stored transposed
        ("gpt_neox", "1.q_proj"),  # rows of every head of a fused one
        ("phi3", "1.fc_up"),  # half of a fused one
        ("mixtral", "1.experts.2.fc_in"),  # half of a fused one in a stack
        ("t5", "decoder.1.cross_k_proj"),
    ],
)
def test_a_projection_is_the_truncated_decomposition_and_touches_nothing_else(
    family: str, id: str, make: Make, train: Any
) -> None:
    lm = make(family)
    before, original = parameters(lm), weight(lm, id)
    constraint = RankConstraint(lm, f"{id}@r5")
    train(lm, constraint, steps=1, **STILL)
    torch.testing.assert_close(weight(lm, id), truncated(original, 5), atol=2e-6, rtol=0)
    S = singular_values(original)
    assert constraint.removed == {id: pytest.approx(float(S[5:].square().sum() / S.square().sum()), rel=1e-5)}
    changed = [name for name, p in lm.model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == [matrix(lm, id).path]


def test_one_part_of_a_fused_matrix_is_held_and_the_others_are_trained_as_they_were(make: Make, train: Any) -> None:
    lm = make("gpt2")
    originals = {name: weight(lm, f"1.{name}") for name in ("q_proj", "k_proj", "v_proj")}
    train(lm, RankConstraint(lm, "1.k_proj@r2"), steps=1, **STILL)
    assert rank(weight(lm, "1.k_proj")) == 2
    assert torch.equal(weight(lm, "1.q_proj"), originals["q_proj"])
    assert torch.equal(weight(lm, "1.v_proj"), originals["v_proj"])


def test_every_third_step_of_four_and_the_end(make: Make, train: Any) -> None:
    lm = make("opt")
    watch = Watch(lm, "1.fc_in")
    train(lm, RankConstraint(lm, "1.fc_in@r4", every=3), watch, steps=4)
    assert watch.ranks == [32, 32, 4, 32]
    assert rank(weight(lm, "1.fc_in")) == 4


def test_what_the_last_step_projected_is_not_projected_again(make: Make, train: Any) -> None:
    lm = make("opt")
    constraint = RankConstraint(lm, "1.fc_in@r4", every=2)
    train(lm, constraint, steps=4)
    assert constraint.removed["1.fc_in"] > 1e-4  # a second projection takes rounding errors alone


def test_steps_are_the_optimizers_not_those_of_single_batches(make: Make, train: Any) -> None:
    lm = make("opt")
    watch = Watch(lm, "1.fc_in")
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    train(lm, RankConstraint(lm, "1.fc_in@r4", every=2), watch, steps=3, **options)
    assert watch.ranks == [32, 4, 32]


def test_rank_zero_is_a_matrix_of_zeros_and_the_whole_of_it_untouched(make: Make, train: Any) -> None:
    lm, free = make("opt"), make("opt")
    constraint = RankConstraint(lm, "1.fc_in@0+2.fc_in@1")
    train(lm, constraint, steps=1)
    train(free, steps=1)
    assert torch.count_nonzero(weight(lm, "1.fc_in")) == 0
    assert torch.equal(weight(lm, "2.fc_in"), weight(free, "2.fc_in"))
    assert constraint.removed == {"1.fc_in": 1.0}


def test_a_matrix_of_zeros_stays_one_and_loses_nothing(make: Make, train: Any) -> None:
    lm = make("opt")
    with torch.no_grad():
        lm.model.get_parameter(matrix(lm, "1.fc_in").path).zero_()
    constraint = RankConstraint(lm, "1.fc_in@r4")
    train(lm, constraint, steps=1, **STILL)
    assert torch.count_nonzero(weight(lm, "1.fc_in")) == 0
    assert constraint.removed == {"1.fc_in": 0.0}


def test_the_optimizer_keeps_the_parameter_and_its_state(make: Make, train: Any) -> None:
    lm = make("opt")
    parameter = lm.model.get_parameter(matrix(lm, "1.fc_in").path)
    pointer = parameter.data_ptr()
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=1e-2)
    train(lm, RankConstraint(lm, "1.fc_in@r4"), steps=3, optimizer=optimizer)
    assert lm.model.get_parameter(matrix(lm, "1.fc_in").path) is parameter
    assert parameter.data_ptr() == pointer
    state = optimizer.state[parameter]
    assert state["step"] == 3
    assert rank(state["exp_avg"]) > 4  # of gradients, which are not projected


def test_tied_weights_are_held_once_and_stay_tied(make: Make, train: Any) -> None:
    lm = make("llama")
    layers = lm.model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    constraint = RankConstraint(lm, "all.fc_up@r4")
    train(lm, constraint)
    assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
    assert rank(weight(lm, "0.fc_up")) == rank(weight(lm, "2.fc_up")) == 4
    assert list(constraint.removed) == ["0.fc_up", "1.fc_up"]


def test_half_precision_weights_are_truncated_in_float32_and_written_in_their_dtype(make: Make, train: Any) -> None:
    lm = make("llama")
    lm.model.to(torch.bfloat16)
    original = weight(lm, "0.fc_out")
    train(lm, RankConstraint(lm, "0.fc_out@r5"), steps=1, **STILL)
    W = weight(lm, "0.fc_out")
    assert W.dtype == torch.bfloat16
    torch.testing.assert_close(W, truncated(original, 5).bfloat16(), atol=0, rtol=2**-7)
    S = singular_values(W)
    assert S[5] < 2**-7 * S[0]  # of that rank up to rounding to eight bits


def test_a_proximal_step_lowers_the_tail_by_rate_penalty_and_steps_and_leaves_the_top(make: Make, train: Any) -> None:
    free, held = make("gpt2"), make("gpt2")
    # Linear decay: at the end of this one step the rate of the next is zero, yet the step was taken at 0.01.
    options = {"steps": 1, "optim": "sgd", "lr_scheduler_type": "linear", "learning_rate": 0.01}
    train(free, **options)
    constraint = RankConstraint(held, "1.fc_in@r6", penalty=120)
    train(held, constraint, **options)
    W = weight(free, "1.fc_in")
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    lowered = torch.cat([S[:6], (S[6:] - 0.01 * 120).clamp_min(0)])
    assert 0 < int((lowered == 0).sum()) < 26  # some of the tail, not all, has come to zero
    torch.testing.assert_close(weight(held, "1.fc_in"), (U * lowered @ Vh).float(), atol=2e-6, rtol=0)
    torch.testing.assert_close(singular_values(weight(held, "1.fc_in")), lowered, atol=2e-6, rtol=0)
    share = 1 - float(lowered.square().sum() / S.square().sum())
    assert constraint.removed == {"1.fc_in": pytest.approx(share, rel=1e-4)}


def test_proximal_steps_further_apart_are_longer(make: Make, train: Any) -> None:
    lm = make("opt")
    S = singular_values(weight(lm, "1.fc_in"))
    seen: list[Tensor] = []

    class Spectra(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.append(singular_values(weight(lm, "1.fc_in")))

    # A gradient clipped to nothing leaves the weights to the penalty alone.
    options = {"steps": 3, "optim": "sgd", "max_grad_norm": 1e-12, "lr_scheduler_type": "constant", "learning_rate": 0.01}
    train(lm, RankConstraint(lm, "1.fc_in@r30", every=2, penalty=3), Spectra(), **options)
    tail = torch.cat([S[:30], (S[30:] - 2 * 0.01 * 3).clamp_min(0)])
    for result, expected in zip(seen, (S, tail, tail), strict=True):
        torch.testing.assert_close(result, expected, atol=2e-6, rtol=0)


def test_with_momentum_the_penalty_weighs_against_the_loss_as_without(llama: LanguageModel) -> None:
    # Of |W - A|^2 / 2 + penalty * (tail of W), the minimum has the tail of A lowered by the penalty.
    W = llama.model.get_parameter("model.layers.1.mlp.up_proj.weight")
    A = W.detach().clone()
    U, S, Vh = torch.linalg.svd(A.double(), full_matrices=False)
    penalty = float(S[-1]) / 2
    lowered = (U * torch.cat([S[:4], S[4:] - penalty]) @ Vh).float()
    constraint = RankConstraint(llama, "1.fc_up@r4", penalty=penalty)
    state, arguments = TrainerState(), TrainingArguments("unused", report_to="none")
    for momentum in (0.0, 0.9):
        with torch.no_grad():
            W.copy_(A)
        optimizer = torch.optim.SGD([W], lr=0.01, momentum=momentum)
        for _ in range(1500):
            W.grad = (W - A).detach()
            optimizer.step()
            constraint.on_optimizer_step(arguments, state, TrainerControl(), optimizer=optimizer)
        torch.testing.assert_close(W.detach(), lowered, atol=1e-4, rtol=0)


def test_a_large_penalty_is_a_projection(make: Make, train: Any) -> None:
    projected, penalised = make("opt"), make("opt")
    train(projected, RankConstraint(projected, "1.mlp@r4"), steps=3, lr_scheduler_type="constant")
    train(penalised, RankConstraint(penalised, "1.mlp@r4", penalty=1e9), steps=3, lr_scheduler_type="constant")
    assert rank(weight(penalised, "1.fc_out")) == 4
    assert all(torch.equal(a, b) for a, b in zip(projected.model.parameters(), penalised.model.parameters(), strict=True))


def test_a_penalty_of_nothing_and_an_empty_constraint_change_no_bit_of_the_training(make: Make, train: Any) -> None:
    free, light, empty = make("opt"), make("opt"), make("opt")
    constraint = RankConstraint(light, "all.all@0.1", penalty=0)
    train(free, steps=3)
    train(light, constraint, steps=3)
    train(empty, RankConstraint(empty, ""), steps=3)
    for other in (light, empty):
        assert all(torch.equal(a, b) for a, b in zip(free.model.parameters(), other.model.parameters(), strict=True))
    assert set(constraint.removed.values()) == {0.0}


def test_training_goes_on_with_a_fresh_record_of_the_model(make: Make, train: Any) -> None:
    lm = make("opt")
    before = lm.hash
    train(lm, RankConstraint(lm, "1.fc_in@r4"))
    trained = dataclasses.replace(lm)
    assert trained.hash != before
    assert not any(module.training for module in trained.model.modules())


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("1.fc_in@r4:bottom", SpecError, "write 1.fc_in@r4, without ':bottom'"),
        ("1.fc_in@0.5:reference", SpecError, "cannot constrain training"),
        ("1.fc_in@0.5:split4", SpecError, "largest singular values of complete matrices"),
        ("1.fc_in@r40", MatrixError, "32 at most"),
        ("7.fc_in@0.5", MatrixError, "no layer 7"),
    ],
)
def test_what_cannot_be_held_is_reported(text: str, error: type[Exception], message: str, make: Make) -> None:
    with pytest.raises(error, match=message):
        RankConstraint(make("opt"), text)


def test_steps_and_penalties_out_of_range_are_reported(make: Make) -> None:
    lm = make("opt")
    with pytest.raises(ValueError, match="every must be 1 or more, got 0"):
        RankConstraint(lm, "1.fc_in@r4", every=0)
    for penalty in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="penalty must be finite and 0 or more"):
            RankConstraint(lm, "1.fc_in@r4", penalty=penalty)


def test_another_model_a_frozen_matrix_and_an_applied_reduction_are_reported_before_any_step(make: Make, train: Any) -> None:
    lm, other = make("opt"), make("opt")
    before = parameters(lm)
    with pytest.raises(ModelError, match=r"OPTForCausalLM, is not the .* give the Trainer model=lm\.model"):
        train(lm, RankConstraint(other, "1.fc_in@r4"))
    with applied(lm, "0.fc_in@0.5"), pytest.raises(ModelError, match="leave the 'with applied' block"):
        train(lm, RankConstraint(lm, "1.fc_in@r4"))
    lm.model.get_parameter(matrix(lm, "1.fc_in").path).requires_grad_(False)
    with pytest.raises(ModelError, match=r"1\.fc_in \(.*fc1\.weight\) is frozen"):
        train(lm, RankConstraint(lm, "1.fc_in@r4"))
    assert all(torch.equal(p, before[name]) for name, p in lm.model.named_parameters())


def test_a_penalty_needs_an_optimizer_that_trains_the_matrix(make: Make, train: Any) -> None:
    lm = make("opt")
    optimizer = torch.optim.SGD([p for name, p in lm.model.named_parameters() if "fc1" not in name], lr=0.1)
    with pytest.raises(ModelError, match=r"does not train 1\.fc_in .* no learning rate"):
        train(lm, RankConstraint(lm, "1.fc_in@r4", penalty=1), optimizer=optimizer)


def test_weights_that_training_broke_are_reported(make: Make, train: Any) -> None:
    lm = make("opt")
    with pytest.raises(WeightError, match=r"cannot constrain 1\.fc_in .*NaN or inf"):
        train(lm, RankConstraint(lm, "1.fc_in@r4"), steps=1, learning_rate=float("inf"))
