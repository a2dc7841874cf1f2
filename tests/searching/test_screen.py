from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import UNUSUAL
from searching.support import EVERY

from laserlm.edit import applied
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.linalg import decompose
from laserlm.linalg.decomposition import Decomposition
from laserlm.models import LanguageModel
from laserlm.models.matrices import read_matrix, view
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.forward import batches
from laserlm.scoring.forward import forward_logits as read_off
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.statistics import dense_ranks, spearman
from laserlm.scoring.tokenize import encode
from laserlm.searching import expand
from laserlm.searching.gradients.blocks import BatchPass, backward
from laserlm.searching.screen import HALF_PRECISION_SCALES, OUT_OF_TIME, Prediction, Screening, screen, sensitivities
from laserlm.tasks import Example, Scorer, Split

Make = Callable[..., LanguageModel]
EXAMPLES = [
    Example(str(i), "The city by " * (1 + i % 3) + "the river is", answer, choices)
    for i, (answer, choices) in enumerate(
        [
            ("Paris", ("Paris", "a big city")),
            ("a big city", ("Paris", "a big city")),
            ("Rome", ("Rome", "the capital", "Oslo")),
            ("Oslo", ("Rome in Italy", "Oslo")),
            ("Rome", ("Rome", "Oslo is far")),
        ]
    )
]


def screened(lm: LanguageModel, grid: str, scorer: Scorer = "answer", batch_size: int = 2, **more: Any) -> Screening:
    rows = encode(lm, EXAMPLES, scorer)
    return screen(
        lm, EXAMPLES, rows, scorer, expand(grid, lm.matrices), cache=DecompositionCache(), batch_size=batch_size, **more
    )


def predict(lm: LanguageModel, grid: str, scorer: Scorer = "answer", batch_size: int = 2, **more: Any) -> dict[str, Prediction]:
    return screened(lm, grid, scorer, batch_size, **more).predictions


def by_hand(lm: LanguageModel, grid: str, examples: Sequence[Example] = EXAMPLES) -> dict[str, tuple[float, float]]:
    """Return mean and standard error from the gradient of each example's loss by each whole matrix."""
    rows = encode(lm, examples, "answer")
    changes: dict[str, list[float]] = {}
    lm.model.requires_grad_(True)
    for row in rows:
        lm.model.zero_grad()
        (batch,) = batches(lm, [row], 1)
        (-read_off(lm, batch, scored_only=False).logprobs.mean()).backward()
        for candidate in expand(grid, lm.matrices):
            m = candidate.matrix
            gradient = lm.model.get_parameter(m.path).grad
            G = torch.zeros(m.shape) if gradient is None else view(gradient, m).reshape(m.shape)
            text = str(candidate.intervention)
            with applied(lm, text):
                after = read_matrix(lm.model, m).clone()
            # Only what the kept and the dropped part do along the singular directions counts, and it is all there is.
            changes.setdefault(text, []).append(float((G * (after - read_matrix(lm.model, m))).sum()))
    lm.model.requires_grad_(False)
    n = len(rows)
    return {t: (float(torch.tensor(c).mean()), float(torch.tensor(c).std() / n**0.5)) for t, c in changes.items()}


def check(results: dict[str, Prediction], expected: dict[str, tuple[float, float]]) -> None:
    """See that predictions are the gradient along the edit, example by example."""
    assert set(results) == set(expected)
    for text, (change, error) in expected.items():
        assert results[text].change == pytest.approx(change, abs=2e-5, rel=1e-3), text
        assert results[text].error == pytest.approx(error, abs=2e-5, rel=1e-3), text


@pytest.mark.parametrize("family", [*EVERY, *UNUSUAL])
def test_predictions_are_the_gradient_along_the_edit_example_by_example(family: str, make: Make) -> None:
    lm = make(family)
    grid = "all.all@0.5,0.1"
    check(predict(lm, grid), by_hand(lm, grid))


def test_a_weight_that_blocks_share_is_screened_in_all_of_them(make: Make) -> None:
    lm = make("llama")
    layers = lm.model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight  # of two modules
    layers[2].self_attn.o_proj = layers[1].self_attn.o_proj  # one module
    lm = LanguageModel(lm.model, lm.tokenizer, "shared", "causal")
    expected = by_hand(lm, "all.all@0.5")
    assert len(expected) == 19
    check(predict(lm, "all.all@0.5"), expected)


class HeadWithWeightOfBlock(torch.nn.Module):
    """A layer outside of the blocks that uses a weight of one of them."""

    def __init__(self, norm: torch.nn.Module, weight: torch.nn.Parameter) -> None:
        super().__init__()
        self.norm, self.weight = norm, weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(x)
        return normed + torch.nn.functional.linear(normed, self.weight)


def test_a_weight_that_is_used_outside_of_its_module_is_screened(make: Make) -> None:
    lm = make("llama")
    lm.model.model.norm = HeadWithWeightOfBlock(lm.model.model.norm, lm.model.model.layers[1].self_attn.o_proj.weight).eval()
    check(predict(lm, "all.attn@0.5"), by_hand(lm, "all.attn@0.5"))


class Counting(torch.nn.Module):
    """A layer that gives out more whenever it is called again in one pass of the model."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm, self.calls = norm, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        normed: torch.Tensor = self.norm(x)
        return normed * self.calls


def test_a_block_that_gives_out_something_else_when_it_is_run_again_is_screened(make: Make) -> None:
    lm = make("llama")
    layer = lm.model.model.layers[1]
    layer.input_layernorm = counting = Counting(layer.input_layernorm).eval()
    lm.model.register_forward_pre_hook(lambda _module, _args: setattr(counting, "calls", 0))
    check(predict(lm, "all.all@0.5"), by_hand(lm, "all.all@0.5"))


def test_a_linear_layer_that_is_never_called_is_screened(make: Make) -> None:
    lm = make("gpt2")
    mlp = lm.model.transformer.h[1].mlp
    mlp.forward = lambda x: torch.addmm(mlp.c_proj.bias, mlp.act(mlp.c_fc(x)).flatten(0, 1), mlp.c_proj.weight).view(x.shape)
    check(predict(lm, "all.mlp@0.5"), by_hand(lm, "all.mlp@0.5"))


@pytest.mark.parametrize("family", ["llama", "mixtral", "t5", "gemma3n"])
def test_little_memory_gives_the_same_predictions_in_more_passes(family: str, make: Make) -> None:
    lm = make(family)
    passes: list[int] = []

    def count(_module: object, _args: object, inputs: dict[str, torch.Tensor]) -> None:
        passes.append(len(inputs["input_ids"]))

    expected = predict(lm, "all.all@0.5", batch_size=5)
    with lm.model.register_forward_pre_hook(count, with_kwargs=True):
        result = predict(lm, "all.all@0.5", batch_size=5, memory=1)
    assert passes[-5:] == [1] * 5
    assert result.keys() == expected.keys()
    for text, prediction in expected.items():
        assert result[text].change == pytest.approx(prediction.change, rel=1e-4, abs=1e-6)
        assert result[text].deviation == pytest.approx(prediction.deviation, rel=1e-4, abs=1e-6)


def test_memory_bounds_what_is_held_between_blocks(make: Make) -> None:
    lm = make("llama")
    tokens: list[int] = []
    lengths = sorted((len(row.ids) for row in encode(lm, EXAMPLES, "answer")), reverse=True)

    def count(_module: object, args: tuple[torch.Tensor]) -> None:
        if torch.is_grad_enabled():
            tokens.append(args[0].shape[:2].numel())

    room = 2 * 3 * 32 * 4 * lengths[0]  # two of the longest rows, each with the outputs of three blocks
    with lm.model.model.layers[0].register_forward_pre_hook(count):
        predict(lm, "all.all@0.5", batch_size=5, memory=room)
    assert len(tokens) >= 3
    assert max(tokens) <= 2 * lengths[0]


def test_no_block_below_the_candidates_is_run_again(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    indices: list[int] = []

    def noted(one: BatchPass, index: int) -> None:
        indices.append(index)
        backward(one, index)

    monkeypatch.setattr("laserlm.searching.gradients.components.backward", noted)
    check(predict(lm, "1-2.mlp@0.5"), by_hand(lm, "1-2.mlp@0.5"))
    assert set(indices) == {1, 2}


def small_mistral(make: Make, dtype: torch.dtype) -> LanguageModel:
    """Hidden states so small that their normalisation multiplies gradients beyond the range of float16."""
    lm = make("mistral")
    with torch.no_grad():
        lm.model.model.embed_tokens.weight.mul_(1e-3)
        for layer in lm.model.model.layers:
            layer.mlp.down_proj.weight.mul_(1e-3)
            layer.self_attn.o_proj.weight.mul_(1e-3)
    lm.model.to(dtype)
    return lm


def test_a_gradient_beyond_float16_is_taken_again_at_a_smaller_scale(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = small_mistral(make, torch.float16)
    with monkeypatch.context() as patch:
        patch.setattr("laserlm.searching.screen.HALF_PRECISION_SCALES", HALF_PRECISION_SCALES[:1])
        assert screened(lm, "all.all@0.5,0.1").unranked
    result = screened(lm, "all.all@0.5,0.1")
    assert result.unranked == {}
    expected = predict(small_mistral(make, torch.float32), "all.all@0.5,0.1")
    assert result.predictions.keys() == expected.keys()
    assert {p.examples for p in result.predictions.values()} == {5}
    both = [[p[text].change for text in expected] for p in (expected, result.predictions)]
    assert spearman(*map(dense_ranks, both)) > 0.98


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_example_whose_gradient_is_not_finite_is_left_out_alone(family: str, make: Make) -> None:
    lm = make(family)
    longest = max(len(row.ids) for row in encode(lm, EXAMPLES, "answer"))
    others = [e for e, row in zip(EXAMPLES, encode(lm, EXAMPLES, "answer"), strict=True) if len(row.ids) < longest]

    def overflow(_module: object, _args: object, output: torch.Tensor) -> None:
        if output.requires_grad and output.shape[1] == longest:
            output.register_hook(lambda d: d * float("inf"))

    expected, without = by_hand(lm, "all.all@0.5"), by_hand(lm, "all.all@0.5", others)
    with lm.model.model.layers[1].mlp.register_forward_hook(overflow):
        result = screened(lm, "all.all@0.5", batch_size=1)
    assert result.unranked == {}
    above = {t for t in expected if t.startswith("2.")} | {"1.fc_out@0.5"}
    check(result.predictions, {t: expected[t] if t in above else without[t] for t in expected})
    assert result.predictions["2.q_proj@0.5"].examples == 5
    assert result.predictions["0.q_proj@0.5"].examples == len(others)


def test_nothing_that_kernels_leave_at_padded_positions_enters_the_sums(make: Make) -> None:
    lm = make("llama")
    expected = by_hand(lm, "all.all@0.5")
    padding: list[torch.Tensor] = []
    lm.model.register_forward_pre_hook(
        lambda _module, _args, inputs: padding.append(inputs["attention_mask"] == 0), with_kwargs=True
    )
    spoilt: list[int] = []

    def spoil(_module: object, _args: object, output: torch.Tensor) -> None:
        mask = padding[-1]
        if output.requires_grad and mask.shape == output.shape[:2] and mask.any():
            spoilt.append(int(mask.sum()))
            output.register_hook(lambda d: d.masked_fill(mask[..., None], float("nan")))

    lm.model.model.layers[1].self_attn.q_proj.register_forward_hook(spoil)
    result = predict(lm, "all.all@0.5", batch_size=5)
    assert spoilt
    assert len([mask for mask in padding if len(mask) == 5]) == 1  # at once, and not again row by row
    check(result, expected)


def test_what_padding_spoils_is_taken_again_without_it(make: Make) -> None:
    lm = make("llama")
    expected = by_hand(lm, "all.all@0.5")

    def spoil(_module: object, _args: object, output: torch.Tensor) -> None:
        if output.requires_grad and len(output) > 1:
            output.register_hook(lambda d: d * float("nan"))

    with lm.model.model.layers[1].self_attn.o_proj.register_forward_hook(spoil):
        check(predict(lm, "all.all@0.5", batch_size=5), expected)


def test_what_is_not_ranked_has_a_reason(make: Make) -> None:
    lm = make("llama")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    lm.model.model.layers[1].mlp.act_fn = torch.nn.Sigmoid().eval()
    result = screened(lm, "0-1.mlp@0.5")
    assert set(result.predictions) == {"1.fc_up@0.5", "1.fc_out@0.5"}
    assert "NaN or inf" in result.unranked.pop("1.fc_in@0.5")
    assert result.unranked == dict.fromkeys(
        ["0.fc_in@0.5", "0.fc_up@0.5", "0.fc_out@0.5"], "its gradient is not finite in float32"
    )


def test_at_the_deadline_what_is_done_is_ranked(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    expected = predict(lm, "all.all@0.5")
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])

    class Slow(DecompositionCache):
        def get(self, weight: torch.Tensor) -> Decomposition:
            clock[0] += 1
            return super().get(weight)

    rows = encode(lm, EXAMPLES, "answer")
    candidates = expand("all.all@0.5", lm.matrices)
    result = screen(lm, EXAMPLES, rows, "answer", candidates, cache=Slow(), deadline=9)
    assert set(result.predictions) == {text for text in expected if text.startswith("2.")}
    for text, prediction in result.predictions.items():
        assert prediction.change == pytest.approx(expected[text].change, rel=1e-4, abs=1e-6)
    assert set(result.unranked.values()) == {OUT_OF_TIME}
    assert len(result.unranked) == 14


@pytest.mark.parametrize("family", ["llama", "roberta", "t5"])
def test_the_least_component_changes_the_loss_as_predicted(family: str, make: Make) -> None:
    lm = make(family)
    matrix = [m for m in lm.matrices if m.name == "fc_out"][-1]
    stack = f"{matrix.stack}." if matrix.stack else ""
    text = f"{stack}{matrix.layer}.fc_out@r{matrix.max_rank - 1}"
    split = Split("example", "validation", tuple(EXAMPLES), "answer")
    with applied(lm, text):
        edited = evaluate(lm, split)
    result = predict(lm, text)[text]
    assert result.change == pytest.approx(edited.loss - evaluate(lm, split).loss, rel=0.1, abs=2e-6)


@pytest.mark.parametrize("between", [True, False])
def test_choices_of_one_token_or_several_are_screened_by_their_loss(between: bool, make: Make) -> None:
    lm = make("llama")
    text = "1.fc_in@0.6"
    rows = encode(lm, EXAMPLES, "choice")

    def loss() -> torch.Tensor:
        losses = []
        for i, e in enumerate(EXAMPLES):
            of = [row for row in rows if row.example == i]
            totals = []
            for row in of:
                (batch,) = batches(lm, [row], 1)
                reading = read_off(lm, batch, scored_only=False)
                totals += [reading.choice_logprobs[0, c] for c in range(len(row.choice_tokens))] or [reading.logprobs.sum()]
            right = e.choices.index(e.answer)
            tokens = 1 if len(of) == 1 else len(of[right].targets)
            losses.append(-torch.stack(totals).log_softmax(0)[right] if between else -totals[right] / tokens)
        return torch.stack(losses).mean()

    lm.model.requires_grad_(True)
    parameter = lm.model.get_parameter("model.layers.1.mlp.gate_proj.weight")
    (G,) = torch.autograd.grad(loss(), parameter)
    lm.model.requires_grad_(False)
    before = parameter.detach().clone()
    with applied(lm, text):
        change = float((G * (parameter.detach() - before)).sum())
    assert predict(lm, text, "choice", between_choices=between)[text].change == pytest.approx(change, rel=1e-3, abs=2e-6)


def test_windows_of_a_text_are_screened_by_their_tokens(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laserlm.scoring.tokenize.WINDOW_TOKENS", 16)
    monkeypatch.setattr("laserlm.scoring.tokenize.STRIDE_TOKENS", 8)
    lm = make("llama")
    e = Example("a", "", "The capital of France is Paris and the capital of Spain is Madrid and Rome is a city in Italy.")
    rows = encode(lm, [e], "perplexity")
    assert len({len(row.targets) for row in rows}) > 1
    lm.model.requires_grad_(True)
    parameter = lm.model.get_parameter("model.layers.1.mlp.gate_proj.weight")
    every = torch.cat([read_off(lm, *batches(lm, [row], 1), scored_only=False).logprobs for row in rows])
    loss = -every.mean()
    (G,) = torch.autograd.grad(loss, parameter)
    lm.model.requires_grad_(False)
    assert loss.item() == pytest.approx(evaluate(lm, Split("t", "all", (e,), "perplexity")).loss, abs=1e-5)
    before = parameter.detach().clone()
    with applied(lm, "1.fc_in@0.6"):
        change = float((G * (parameter.detach() - before)).sum())
    (candidate,) = expand("1.fc_in@0.6", lm.matrices)
    result = screen(lm, [e], rows, "perplexity", [candidate], cache=DecompositionCache(), batch_size=2)
    assert result.predictions["1.fc_in@0.6"].change == pytest.approx(change, rel=1e-3, abs=2e-6)


def test_the_two_ends_of_a_spectrum_add_up(make: Make) -> None:
    lm = make("llama")
    k = next(m.max_rank for m in lm.matrices if m.name == "fc_in")
    result = predict(lm, f"1.fc_in@0,r{k - 5}+1.fc_in@r5:bottom")
    nothing, top, bottom = (result[f"1.fc_in@{size}"].change for size in ("0", f"r{k - 5}", "r5:bottom"))
    assert top + bottom == pytest.approx(nothing, abs=1e-6)


def test_the_model_is_left_as_it_was(make: Make) -> None:
    lm = make("mixtral")
    lm.model.requires_grad_(True)
    path = next(m.path for m in lm.matrices if "experts" in m.name)
    held = lm.model.get_parameter(path).grad = torch.ones_like(lm.model.get_parameter(path))
    before = predict(lm, "all.all@0.5")
    assert predict(lm, "all.all@0.5") == before
    assert lm.model.get_parameter(path).grad is held
    assert bool((held == 1).all())
    assert all(p.requires_grad for p in lm.model.parameters())
    assert all(p.grad is None for name, p in lm.model.named_parameters() if name != path)
    assert not any("forward" in module.__dict__ for module in lm.model.modules())


def keeping(seen: dict[str, tuple[torch.Tensor, torch.Tensor]], name: str) -> Callable[..., None]:
    def hook(_: object, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        seen[name] = (args[0].detach().flatten(0, -2), out)
        out.retain_grad()

    return hook


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt"])
def test_sensitivities_are_half_the_sum_of_squared_token_gradients(family: str, make: Make) -> None:
    lm = make(family)
    lm.model.requires_grad_(True)
    matrices = [m for m in lm.matrices if m.part_of is None]
    parts = {m.id: decompose(read_matrix(lm.model, m)) for m in matrices}
    ids = torch.randint(5, 400, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [TokenSequence(i, tuple(x[:-1]), tuple(x[1:]), tuple(range(8))) for i, x in enumerate(ids)]
    expected = {m.id: torch.zeros(m.max_rank) for m in matrices}
    for x in ids:
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        paths = {m.id: m.path.rpartition(".")[0] for m in matrices}
        hooks = [lm.model.get_submodule(path).register_forward_hook(keeping(seen, name)) for name, path in paths.items()]
        lm.model(input_ids=torch.tensor([x]), labels=torch.tensor([x])).loss.backward()
        for m in matrices:
            options, out = seen[m.id]
            assert out.grad is not None
            D = out.grad.flatten(0, -2)
            per_token = (D @ parts[m.id].left) * (options @ parts[m.id].right.T)  # (T, k)
            expected[m.id] += per_token.square().sum(0) / 2 / len(ids)
        for hook in hooks:
            hook.remove()
    result = sensitivities(lm, rows, matrices, lambda m: parts[m.id], batch_size=2)
    assert result.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(result[name], values, rtol=2e-3, atol=1e-9 + 1e-4 * float(values.max()))
