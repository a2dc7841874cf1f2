"""Training the factors: its gradient, its effect, and that it goes on after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from laserlm.edit.factors import replaced_modules
from laserlm.errors import ExportError, WeightError
from laserlm.export import refinement
from laserlm.export.fitting import Compression, fit_ranks
from laserlm.export.refinement import refine
from laserlm.low_rank import LowRankLinear
from laserlm.models import LanguageModel
from laserlm.scoring.records import TokenSequence

Make = Callable[..., LanguageModel]


@pytest.fixture(autouse=True)
def rate(monkeypatch: pytest.MonkeyPatch) -> float:
    """A tiny model takes larger steps."""
    monkeypatch.setattr(refinement, "LEARNING_RATE", 1e-4)
    return 1e-4


@pytest.fixture
def rows(llama: LanguageModel) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, llama.model.config.vocab_size, (3, 20), generator=generator).tolist()
    return [TokenSequence(i, tuple(row[:-1]), tuple(row[1:]), tuple(range(19))) for i, row in enumerate(ids)]


@pytest.fixture
def compression(llama: LanguageModel) -> Compression:
    return fit_ranks(llama, (), method="plain", allocation="uniform")


@torch.no_grad()
def divergence(lm: LanguageModel, layers: dict[str, LowRankLinear], rows: Sequence[TokenSequence]) -> Tensor:
    """Return the mean Kullback-Leibler divergence over the rows' tokens, by its definition."""
    ids = torch.tensor([row.ids for row in rows])
    base = lm.model(input_ids=ids).logits.log_softmax(-1)
    with replaced_modules(lm.model, layers):
        small = lm.model(input_ids=ids).logits.log_softmax(-1)
    return (base.exp() * (base - small)).sum(-1).mean()


def state(layers: dict[str, LowRankLinear]) -> dict[str, Tensor]:
    return {f"{path}.{name}": t.clone() for path, layer in layers.items() for name, t in layer.state_dict().items()}


def test_training_lowers_the_divergence_from_the_unchanged_model_and_changes_nothing_else(
    llama: LanguageModel, rows: list[TokenSequence], compression: Compression, tmp_path: Path
) -> None:
    layers = compression.layers(llama, 0.5)
    before, weights = divergence(llama, layers, rows), llama.hash
    trainable = [p.requires_grad for p in llama.model.parameters()]
    refine(llama, rows, layers, tmp_path / "file", steps=60, products="float32")
    assert divergence(llama, layers, rows) < 0.9 * before
    llama.model.train().eval()
    assert llama.hash == weights
    assert [p.requires_grad for p in llama.model.parameters()] == trainable
    assert all(p.grad is None for p in llama.model.parameters())


def test_the_first_step_goes_against_the_sign_of_the_gradient(
    rate: float, llama: LanguageModel, rows: list[TokenSequence], compression: Compression, tmp_path: Path
) -> None:
    """Adam's first step is the learning rate times the sign of the gradient, which a difference quotient tells here."""
    layers = compression.layers(llama, 0.5)
    start = state(layers)
    refine(llama, rows[:1], layers, tmp_path / "file", steps=1, products="float32")
    path = next(iter(layers))
    layer = layers[path]
    moved = layer.weight.detach() - start[f"{path}.weight"]
    expected = rate / refinement.WARM_UP_STEPS
    torch.testing.assert_close(moved.abs().median(), torch.tensor(expected), rtol=1e-2, atol=0)
    with torch.no_grad():
        for name in start:
            at, _, tensor = name.rpartition(".")
            layers[at].state_dict()[tensor].copy_(start[name])
        largest = divergence(llama, layers, rows[:1])
        layer.weight += 10 * moved
        assert divergence(llama, layers, rows[:1]) < largest


@pytest.mark.parametrize("killed_after", [4, 7])
def test_training_that_was_interrupted_ends_in_the_same_factors(
    killed_after: int,
    llama: LanguageModel,
    rows: list[TokenSequence],
    compression: Compression,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refinement, "STEPS_BETWEEN_FILES", 3)

    class Killed(BaseException):
        pass

    def kill(done: int, total: int) -> None:
        if done == killed_after:
            raise Killed

    whole = compression.refine(llama, 0.5, rows, tmp_path / "whole", steps=9, products="float32")
    with pytest.raises(Killed):
        compression.refine(llama, 0.5, rows, tmp_path / "part", steps=9, products="float32", on_step=kill)
    steps: list[int] = []
    part = compression.refine(
        llama, 0.5, rows, tmp_path / "part", steps=9, products="float32", on_step=lambda done, _: steps.append(done)
    )
    assert steps == list(range(killed_after // 3 * 3 + 1, 10))
    expected, found = state(whole.layers(llama, 0.5)), state(part.layers(llama, 0.5))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not all(torch.equal(found[name], t) for name, t in state(compression.layers(llama, 0.5)).items())


def test_small_steps_are_not_lost_in_bfloat16(make: Make, tmp_path: Path) -> None:
    """A step of 1e-5 is below half a unit in the last place of most weights in bfloat16, and many steps are not."""
    lm = make("llama")
    lm.model.bfloat16()
    row = TokenSequence(0, tuple(range(5, 24)), tuple(range(6, 25)), tuple(range(19)))
    compression = fit_ranks(lm, (), method="plain", allocation="uniform")
    layers = compression.layers(lm, 0.5)
    before = state(layers)
    refine(lm, [row], layers, tmp_path / "file", steps=40, products="bfloat16")
    assert layers[next(iter(layers))].weight.dtype == torch.bfloat16
    weights = [name for name in before if not name.endswith("order")]
    changed = sum(int((before[n] != t).sum()) for n, t in state(layers).items() if n in weights)
    assert changed > 0.5 * sum(before[n].numel() for n in weights)


def test_gradients_that_would_overflow_are_refused_with_the_way_out(make: Make, tmp_path: Path) -> None:
    lm = make("llama")
    compression = fit_ranks(lm, (), method="plain", allocation="uniform")
    row = TokenSequence(0, (5, 6, 7), (6, 7, 8), (0, 1, 2))
    with torch.no_grad():
        lm.model.lm_head.weight[9] = torch.inf
    with pytest.raises(WeightError, match=r"factor .* is not finite.*--refine 0"):
        refine(lm, [row], compression.layers(lm, 0.5), tmp_path / "file", steps=1, products="float32")
    lm.model.half()
    with pytest.raises(ExportError, match=r"float16 overflow.*--dtype.*--refine 0"):
        refine(lm, [row], {}, tmp_path / "file", steps=1, products="float32")


def test_a_factor_that_no_gradient_reaches_stays_as_it_is(
    llama: LanguageModel, rows: list[TokenSequence], compression: Compression, tmp_path: Path
) -> None:
    """As the layers of an expert to which no token of a row is routed."""
    layers = compression.layers(llama, 0.5)
    start = state(layers)
    llama.model.model.layers[1].mlp.forward = lambda x: x
    refine(llama, rows, layers, tmp_path / "file", steps=3, products="float32")
    changed = {name for name, t in state(layers).items() if not torch.equal(t, start[name])}
    assert not [name for name in changed if name.startswith("model.layers.1.mlp.")]
    assert "model.layers.0.mlp.up_proj.weight" in changed


@pytest.mark.parametrize("products", ["bfloat16", "float32"])
def test_products_are_in_the_dtype_that_is_asked_for(
    products: str, llama: LanguageModel, rows: list[TokenSequence], compression: Compression, tmp_path: Path
) -> None:
    seen: list[bool] = []
    llama.model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    refine(llama, rows, compression.layers(llama, 0.5), tmp_path / "file", steps=2, products=products)
    assert sum(seen) == (4 if products == "bfloat16" else 0)  # two passes in each step
