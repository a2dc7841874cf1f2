"""What single components contribute to a loss, against the gradient by a strength that each of them is multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import UNUSUAL
from searching.support import EVERY
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from laserlm.edit import applied
from laserlm.errors import WeightError
from laserlm.linalg import decompose
from laserlm.linalg.decomposition import Decomposition
from laserlm.models import LanguageModel
from laserlm.models.matrices import Matrix, read_matrix, view
from laserlm.reductions import Intervention
from laserlm.scoring.forward import batches
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.searching import expand
from laserlm.searching.components import separate_matrices
from laserlm.searching.scorer import EncodedSplit, PrefixScorer
from laserlm.searching.screen import sensitivities
from laserlm.searching.work import contribution_tasks
from laserlm.tasks import Example, Scorer, Split

Make = Callable[..., LanguageModel]
EXAMPLES = tuple(
    Example(str(i), "The city by " * (1 + i % 3) + "the river is", choices[0], choices)
    for i, choices in enumerate([("Paris", "a big city"), ("a big city", "Paris"), ("Oslo", "Rome in Italy", "Madrid")])
)
ONE_TOKEN = tuple(Example(str(i), f"The river {i} is", "true", ("true", "false")) for i in range(3))
"""Examples whose choices are told apart in one pass."""


def matrices_of(lm: LanguageModel) -> list[Matrix]:
    """Return matrices that share no weights: of the middle block, and of the last one of each stack."""
    every = separate_matrices(expand("all.all@0.5", lm.matrices))
    last = {m.stack: m.layer for m in every}
    return [m for m in every if m.layer in (1, last[m.stack])]


def losses(lm: LanguageModel, rows: Sequence[TokenSequence], n: int, weights: dict[str, Tensor], scorer: Scorer) -> Tensor:
    """Return the mean loss (n,) of each example, computed by hand; of choices, that of the right one among them."""
    of_rows: list[list[Tensor]] = [[] for _ in range(n)]
    for row in rows:
        inputs = {"input_ids": torch.tensor([row.ids])} | (
            {"decoder_input_ids": torch.tensor([row.decoder])} if row.decoder else {}
        )
        logits = torch.func.functional_call(lm.model, weights, kwargs=inputs).logits[0]
        logprobs = logits.log_softmax(-1)[list(row.positions)]
        if row.choice_tokens:
            of_rows[row.example] += list(logprobs[0, list(row.choice_tokens)])
        else:
            of_targets = logprobs[list(range(len(row.targets))), list(row.targets)]
            of_rows[row.example].append(of_targets.sum() if scorer == "choice" else of_targets.mean())
    # The right choice is the first one.
    return -torch.stack([torch.stack(of).log_softmax(0)[0] if scorer == "choice" else of[0] for of in of_rows])


def by_strength(
    lm: LanguageModel,
    rows: Sequence[TokenSequence],
    n: int,
    matrices: Sequence[Matrix],
    parts: dict[str, Decomposition],
    scorer: Scorer = "answer",
) -> dict[str, Tensor]:
    """Return the derivatives (n, k) by strengths s at 1: to the weight as it is, (s - 1) times each component is added."""
    strengths = {m.id: torch.ones(m.max_rank, requires_grad=True) for m in matrices}
    weights = {m.path: lm.model.get_parameter(m.path).detach().clone() for m in matrices}
    for m in matrices:
        here = view(weights[m.path], m)
        here += ((parts[m.id].left * (strengths[m.id] - 1)) @ parts[m.id].right).reshape(here.shape)
    of_examples = losses(lm, rows, n, weights, scorer)
    gradients = [
        torch.autograd.grad(loss, list(strengths.values()), retain_graph=True, materialize_grads=True) for loss in of_examples
    ]
    return {m.id: torch.stack([g[i] for g in gradients]) for i, m in enumerate(matrices)}


def check_both(lm: LanguageModel, examples: tuple[Example, ...] = EXAMPLES, scorer: Scorer = "answer") -> None:
    """Compare the contributions at the unchanged model and at an edited one."""
    rows = encode(lm, examples, scorer)
    matrices = matrices_of(lm)
    parts = {m.id: decompose(read_matrix(lm.model, m)) for m in matrices}
    state = PrefixScorer(lm, {"some": EncodedSplit(Split("example", "some", examples, scorer), rows, scorer)}, batch_size=2)
    changed = [matrices[0], *(m for m in matrices[1:] if m.name == matrices[-1].name)]
    drops = "+".join(f"{f'{m.stack}.' if m.stack else ''}{m.layer}.{m.name}@drop0,2-3" for m in changed)
    for text in ("", drops):
        result = state.contributions(
            "some", range(len(examples)), Intervention.parse(text), matrices, between_choices=scorer == "choice"
        )
        assert lm.intervention == ""
        with applied(lm, text):
            expected = by_strength(lm, rows, len(examples), matrices, parts, scorer)
        for m in matrices:
            values = result.get(m.id, torch.zeros_like(expected[m.id]))  # of an expert that no token comes to
            scale = float(expected[m.id].abs().max())
            torch.testing.assert_close(values, expected[m.id], rtol=1e-3, atol=1e-6 + 1e-4 * scale)
    assert all(float(expected[m.id].abs().max()) > 1e-4 for m in changed)


@pytest.mark.parametrize("family", [*EVERY, *(pytest.param(family, marks=pytest.mark.slow) for family in UNUSUAL)])
def test_contributions_are_the_gradient_by_the_strength_of_each_component(family: str, make: Make) -> None:
    check_both(make(family))


@pytest.mark.parametrize("squared", [False, True])
def test_contributions_in_float16_are_those_in_float32(squared: bool, make: Make) -> None:
    """The loss is scaled in float16, so that its gradients do not vanish. The scale, and its square, are taken out again."""
    results = []
    for dtype in (torch.float32, torch.float16):
        lm = make("llama")
        lm.model.to(dtype)
        encoded = EncodedSplit(Split("example", "some", EXAMPLES, "answer"), encode(lm, EXAMPLES, "answer"), "answer")
        state = PrefixScorer(lm, {"some": encoded}, batch_size=2)
        results.append(state.contributions("some", range(3), Intervention(), matrices_of(lm), squared=squared))
    for name, expected in results[0].items():
        assert (results[1][name] - expected).norm() < 0.05 * expected.norm()


class Caching(LlamaForCausalLM):
    """A model that keeps keys and values whatever it is asked for."""

    def forward(self, *args: Any, **inputs: Any) -> Any:
        return super().forward(*args, **inputs | {"use_cache": True})


def test_keys_and_values_that_a_model_keeps_do_not_hide_the_gradient_by_them(make: Make) -> None:
    lm = make("granitemoe")  # in the full tier its contributions are compared as those of every family
    (batch,) = batches(lm, encode(lm, EXAMPLES[:1], "answer"), 1)
    assert lm.model(**batch.inputs).past_key_values is None
    lm = make("llama")
    lm.model.__class__ = Caching
    check_both(lm)


def test_a_weight_that_blocks_share_contributes_in_all_of_them(make: Make) -> None:
    lm = make("llama")
    layers = lm.model.model.layers
    layers[2].mlp.up_proj.weight = layers[1].mlp.up_proj.weight
    lm = LanguageModel(lm.model, lm.tokenizer, "shared", "causal")
    assert [m.id for m in matrices_of(lm) if m.name == "fc_up"] == ["1.fc_up"]
    check_both(lm)


@pytest.mark.parametrize("examples", [EXAMPLES, ONE_TOKEN], ids=["several tokens", "one token"])
def test_contributions_to_a_choice_are_those_to_its_loss_among_the_choices(examples: tuple[Example, ...], make: Make) -> None:
    check_both(make("llama"), examples, "choice")


def test_contributions_are_of_the_examples_that_are_named(llama: LanguageModel) -> None:
    rows = encode(llama, EXAMPLES, "answer")
    state = PrefixScorer(llama, {"some": EncodedSplit(Split("example", "some", EXAMPLES, "answer"), rows, "answer")})
    every, some = (state.contributions("some", named, Intervention(), matrices_of(llama)) for named in ((0, 1, 2), (0, 2)))
    for name, values in some.items():
        torch.testing.assert_close(values, every[name][[0, 2]], rtol=1e-4, atol=1e-6)


def test_squares_are_summed_over_all_tokens(llama: LanguageModel) -> None:
    ids = torch.randint(5, 400, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [TokenSequence(i, tuple(x[:-1]), tuple(x[1:]), tuple(range(8))) for i, x in enumerate(ids)]
    texts = Split("example", "some", tuple(Example(str(i), "", f"{i}") for i in range(3)), "perplexity")
    matrices = matrices_of(llama)
    state = PrefixScorer(llama, {"some": EncodedSplit(texts, rows, "perplexity")}, batch_size=2)
    result = state.contributions("some", range(3), Intervention(), matrices, squared=True)
    parts = {m.id: decompose(read_matrix(llama.model, m)) for m in matrices}
    # Of the mean loss of a row: a square is divided by that of its 8 tokens, and the sum by 3 rows and by 2.
    of_means = sensitivities(llama, rows, matrices, lambda m: parts[m.id])
    for m in matrices:
        assert result[m.id].shape == (1, m.max_rank)
        torch.testing.assert_close(result[m.id][0] / 8**2 / 3 / 2, of_means[m.id], rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("workers", [1, 2, 3, 50])
def test_tasks_share_the_matrices_among_the_processes(workers: int, llama: LanguageModel) -> None:
    rows = encode(llama, EXAMPLES, "answer")
    state = PrefixScorer(llama, {"some": EncodedSplit(Split("example", "some", EXAMPLES, "answer"), rows, "answer")})
    matrices = matrices_of(llama)
    tasks = contribution_tasks("some", (0, 2), Intervention(), matrices, workers)
    assert len(tasks) == min(workers, len(matrices))
    assert sum(task.cost for task in tasks) == pytest.approx(3 * 2)
    full = state.contributions("some", (0, 2), Intervention(), matrices)
    shares = [task.execute(state) for task in tasks[:3]]
    assert sum(len(task.matrices) for task in tasks) == len({m.id for task in tasks for m in task.matrices}) == len(matrices)
    for name, values in (pair for share in shares for pair in share.items()):
        torch.testing.assert_close(values, full[name], rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_not_finite_is_reported(llama: LanguageModel) -> None:
    def spoil(_module: object, _args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda d: d * float("nan"))

    rows = encode(llama, EXAMPLES, "answer")
    state = PrefixScorer(llama, {"some": EncodedSplit(Split("example", "some", EXAMPLES, "answer"), rows, "answer")})
    llama.model.model.norm.register_forward_hook(spoil)
    with pytest.raises(WeightError, match=r"of 2\.\w+ is not finite: the model overflows float32, which ends at 3\.4e\+38"):
        state.contributions("some", range(3), Intervention.parse("1.fc_in@drop0"), matrices_of(llama))
    assert llama.intervention == ""


def test_both_are_what_single_gradients_return(llama: LanguageModel) -> None:
    """The derivatives are of the summed log-losses: of 8 tokens, 8 times those of their mean, exactly."""
    ids = torch.randint(5, 400, (3, 9), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [TokenSequence(i, tuple(x[:-1]), tuple(x[1:]), tuple(range(8))) for i, x in enumerate(ids)]
    texts = Split("example", "some", tuple(Example(str(i), "", f"{i}") for i in range(3)), "perplexity")
    state = PrefixScorer(llama, {"some": EncodedSplit(texts, rows, "perplexity")}, batch_size=2)

    def taken(**options: bool) -> dict[str, Tensor]:
        return state.contributions("some", range(3), Intervention(), matrices_of(llama), **options)

    both, plain, squares = taken(both=True), taken(), taken(squared=True)
    for m in matrices_of(llama):
        assert torch.equal(both[m.id], torch.cat([8 * plain[m.id], squares[m.id]]))


@pytest.mark.parametrize("family", ["mixtral", pytest.param("gemma3n", marks=pytest.mark.slow)])
def test_both_are_summed_wherever_a_matrix_is_used(family: str, make: Make) -> None:
    """In experts, whose tokens come one by one, and in the graph of a whole pass."""
    lm = make(family)
    rows = encode(lm, EXAMPLES, "answer")
    state = PrefixScorer(lm, {"some": EncodedSplit(Split("example", "some", EXAMPLES, "answer"), rows, "answer")}, batch_size=1)
    some = matrices_of(lm)[:8]
    both, squares = (state.contributions("some", (0, 1, 2), Intervention(), some, **{o: True}) for o in ("both", "squared"))
    plain = state.contributions("some", (0, 1, 2), Intervention(), some)
    lengths = torch.tensor([[float(len(row.targets))] for row in rows])
    for name in both:
        torch.testing.assert_close(both[name][:-1], lengths * plain[name], rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(both[name][-1:], squares[name], rtol=1e-4, atol=1e-9)
