from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from searching.support import EVERY

from laserlm.edit import applied
from laserlm.edit.decomposition_cache import DecompositionCache
from laserlm.linalg import decompose
from laserlm.models import LanguageModel
from laserlm.models.matrices import read_matrix, view
from laserlm.scoring.evaluate import evaluate
from laserlm.scoring.forward import batches
from laserlm.scoring.forward import forward_logits as read_off
from laserlm.scoring.tokenize import TokenSequence, encode
from laserlm.searching import expand
from laserlm.searching.moments import input_moments
from laserlm.searching.screen import Prediction, screen, sensitivities
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


def predict(
    lm: LanguageModel, grid: str, scorer: Scorer = "answer", batch_size: int = 2, **more: bool
) -> dict[str, Prediction]:
    rows = encode(lm, EXAMPLES, scorer)
    return screen(
        lm, EXAMPLES, rows, scorer, expand(grid, lm.matrices), cache=DecompositionCache(), batch_size=batch_size, **more
    )


def by_hand(lm: LanguageModel, grid: str) -> dict[str, tuple[float, float]]:
    """Return mean and standard error from the gradient of each example's loss by each whole matrix."""
    rows = encode(lm, EXAMPLES, "answer")
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


@pytest.mark.parametrize("family", EVERY)
def test_predictions_are_the_gradient_along_the_edit_example_by_example(family: str, make: Make) -> None:
    lm = make(family)
    grid = "all.all@0.5,0.1"
    expected = by_hand(lm, grid)
    found = predict(lm, grid)
    assert set(found) == set(expected)
    for text, (change, error) in expected.items():
        assert found[text].change == pytest.approx(change, abs=2e-5, rel=1e-3), text
        if found[text].error is None:
            assert "experts" in text
        else:
            assert found[text].error == pytest.approx(error, abs=2e-5, rel=1e-3), text


@pytest.mark.parametrize("family", ["llama", "roberta", "t5"])
def test_the_least_component_changes_the_loss_as_predicted(family: str, make: Make) -> None:
    lm = make(family)
    matrix = [m for m in lm.matrices if m.name == "fc_out"][-1]
    stack = f"{matrix.stack}." if matrix.stack else ""
    text = f"{stack}{matrix.layer}.fc_out@r{matrix.max_rank - 1}"
    split = Split("made", "validation", tuple(EXAMPLES), "answer")
    with applied(lm, text):
        edited = evaluate(lm, split)
    found = predict(lm, text)[text]
    assert found.change == pytest.approx(edited.loss - evaluate(lm, split).loss, rel=0.1, abs=2e-6)


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
    found = screen(lm, [e], rows, "perplexity", [candidate], cache=DecompositionCache(), batch_size=2)
    assert found["1.fc_in@0.6"].change == pytest.approx(change, rel=1e-3, abs=2e-6)


def test_the_two_ends_of_a_spectrum_add_up(make: Make) -> None:
    lm = make("llama")
    k = next(m.max_rank for m in lm.matrices if m.name == "fc_in")
    found = predict(lm, f"1.fc_in@0,r{k - 5}+1.fc_in@r5:bottom")
    nothing, top, bottom = (found[f"1.fc_in@{size}"].change for size in ("0", f"r{k - 5}", "r5:bottom"))
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


def test_a_matrix_that_cannot_be_decomposed_is_left_out(make: Make) -> None:
    lm = make("llama")
    with torch.no_grad():
        lm.model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    lm.model.model.layers[1].mlp.act_fn = torch.nn.Sigmoid()
    assert set(predict(lm, "1.mlp@0.5")) == {"1.fc_up@0.5", "1.fc_out@0.5"}


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
            given, out = seen[m.id]
            assert out.grad is not None
            D = out.grad.flatten(0, -2)
            per_token = (D @ parts[m.id].left) * (given @ parts[m.id].right.T)  # (T, k)
            expected[m.id] += per_token.square().sum(0) / 2 / len(ids)
        for hook in hooks:
            hook.remove()
    found = sensitivities(lm, rows, matrices, lambda m: parts[m.id], batch_size=2)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=2e-3, atol=1e-9 + 1e-4 * float(values.max()))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_input_moments_are_those_of_what_goes_into_each_layer(family: str, make: Make) -> None:
    lm = make(family)
    paths = list(dict.fromkeys(m.path.rpartition(".")[0] for m in lm.matrices))
    ids = [torch.randint(5, 400, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 9, 9, 6)]
    rows = [TokenSequence(i, tuple(x[:-1]), tuple(x[1:]), tuple(range(len(x) - 1))) for i, x in enumerate(ids)]
    seen: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    hooks = [
        lm.model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: seen[path].append(args[0].flatten(0, -2))
        )
        for path in paths
    ]
    with torch.no_grad():
        for x in ids:
            lm.model(input_ids=torch.tensor([x[:-1]]))
    for hook in hooks:
        hook.remove()
    found = input_moments(lm, rows, paths, batch_size=2)
    for path in paths:
        X = torch.cat(seen[path]).double()
        torch.testing.assert_close(found[path], X.T @ X / len(X), atol=1e-5, rtol=1e-4)
