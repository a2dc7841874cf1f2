from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from laserlm.edit import applied, removed_part
from laserlm.errors import AnalysisError
from laserlm.models import LanguageModel, read_matrix
from laserlm.reductions import Intervention
from laserlm.scoring.evaluate import compare, evaluate
from laserlm.store import Store
from laserlm.studies import cached_scorer
from laserlm.studies.controls import CONTROLS, changed, controls, kind_of
from laserlm.tasks import Example, Split, Task

Make = Callable[..., LanguageModel]
TEXT = "1.fc_in@0.25"


@pytest.fixture
def split() -> Split:
    pairs = zip("abcdefgh", ["Paris", "Rome"] * 4, strict=True)
    return Task.of("t", [Example(c, f"The capital of {c} is", a) for c, a in pairs]).every


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_each_control_changes_the_matrix_by_as_much_and_nothing_else(family: str, make: Make) -> None:
    lm = make(family)
    before = {name: p.detach().clone() for name, p in lm.model.named_parameters()}
    matrix = next(m for m in lm.matrices if m.id == "1.fc_in")
    W = read_matrix(lm.model, matrix).clone()
    with applied(lm, TEXT):
        kept = read_matrix(lm.model, matrix).clone()
    with applied(lm, removed_part(lm.matrices, TEXT)):
        removed = read_matrix(lm.model, matrix).clone()
    size = float((W - kept).norm())
    by_name = {}
    for name in CONTROLS:
        sizes: list[float] = []
        with changed(lm, TEXT, name, 0, sizes):
            by_name[name] = read_matrix(lm.model, matrix).clone()
            others = [n for n, p in lm.model.named_parameters() if not torch.equal(p, before[n])]
        assert others == [matrix.path]
        assert sizes[0] == pytest.approx(float((W - by_name[name]).norm() / W.norm()), rel=1e-5)
    assert all(torch.equal(p, before[n]) for n, p in lm.model.named_parameters())
    torch.testing.assert_close(by_name["the reduction"], kept)
    torch.testing.assert_close(by_name["removed part alone"], removed, atol=1e-5, rtol=1e-4)
    largest = float(W.abs().max())
    for name in ("smallest entries zero", "random entries zero", "Gaussian noise"):
        assert float((W - by_name[name]).norm()) == pytest.approx(size, abs=largest), name
    for name in ("smallest entries zero", "random entries zero"):
        changed_entries = by_name[name] != W
        assert (by_name[name][changed_entries] == 0).all()
    gone = by_name["smallest entries zero"] == 0
    assert W[gone].abs().max() <= W[~gone].abs().min()
    assert int(torch.linalg.matrix_rank(by_name["random subspace"])) == int(0.25 * matrix.max_rank)
    assert not by_name["all zero"].any()
    with changed(lm, TEXT, "Gaussian noise", 1):
        assert not torch.equal(read_matrix(lm.model, matrix), by_name["Gaussian noise"])


def test_the_table_is_over_examples_and_seeds(llama: LanguageModel, split: Split, tmp_path: Path) -> None:
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as score:
        by_control = {c.control: c for c in controls(llama, TEXT, score, draws=2)}
        calls = []

        def counted(name: str, change: object = None, matrices_of: str = "") -> object:
            calls.append(name)
            return score(name, change, matrices_of=matrices_of) if change else score(name)

        again = controls(llama, TEXT, counted, draws=2)  # type: ignore[arg-type]
    assert again == list(by_control.values())
    assert len(calls) == 1 + 4 + 3 * 2
    names = {name: 2 if random else 1 for name, (random, _) in CONTROLS.items()}
    assert {name: c.draws for name, c in by_control.items()} == {"low rank": names.pop("the reduction")} | names
    base = evaluate(llama, split)
    with applied(llama, TEXT):
        edited = evaluate(llama, split)
    c = compare(base, edited)
    one = by_control["low rank"]
    assert (one.gain, one.accuracy) == (c.gain, c.edited)
    assert one.loss == pytest.approx(c.edited_loss)
    assert one.loss_interval == pytest.approx(c.loss_interval)
    assert (one.interval, one.deficit, one.draws) == (c.interval, 0, 1)
    noisy = []
    for seed in range(2):
        with changed(llama, TEXT, "Gaussian noise", seed):
            noisy.append(evaluate(llama, split))
    two = by_control["Gaussian noise"]
    assert two.accuracy == pytest.approx(sum(e.accuracy for e in noisy) / 2)
    assert two.loss_change == pytest.approx(sum(e.loss for e in noisy) / 2 - base.loss)
    assert two.min_gain <= two.gain <= two.max_gain
    pairs = [compare(e, edited) for e in noisy]
    assert two.deficit == pytest.approx(sum(p.gain for p in pairs) / 2)
    assert two.deficit_interval.low == pytest.approx(sum(p.interval.low for p in pairs) / 2)


def test_a_reduction_that_changes_nothing_has_no_controls(llama: LanguageModel, split: Split, tmp_path: Path) -> None:
    with (
        Store.open(tmp_path / "runs.db") as store,
        cached_scorer(llama, split, store) as score,
        pytest.raises(AnalysisError, match="changes nothing"),
    ):
        controls(llama, "1.fc_in@1", score)


def test_a_random_subspace_is_of_the_shorter_side_and_of_all_ranks_kept(llama: LanguageModel) -> None:
    for text, rank in (("1.k_proj@0.25", 4), ("1.fc_in@0.25:split4", 12)):  # 16 x 32, and 4 blocks of 12 x 32
        matrix = next(m for m in llama.matrices if text.startswith(m.id + "@"))
        W = read_matrix(llama.model, matrix).clone()
        with changed(llama, text, "random subspace", 0):
            weight = read_matrix(llama.model, matrix).clone()
        assert int(torch.linalg.matrix_rank(weight)) == rank
        # A projection changes nothing of what it keeps: the change is orthogonal to what is left.
        assert float(((W - weight) * weight).sum().abs()) < 1e-4 * float(W.square().sum())


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("1.fc_in@0.25", "low rank"),
        ("1.fc_in@0.25:bottom+2.fc_in@r3", "low rank"),
        ("1.fc_in@drop0-2", "components removed"),
        ("1.fc_in@scale0-2=0.5,3=0", "strengths"),
        ("1.fc_in@drop0-2+2.fc_in@scale0=0.5", "strengths"),
        ("1.fc_in@0.25+2.fc_in@drop0", "the reduction"),
    ],
)
def test_the_reduction_is_called_what_it_is(text: str, kind: str) -> None:
    assert kind_of(Intervention.parse(text)) == kind


def test_strengths_have_no_random_subspace_which_would_change_nothing(
    llama: LanguageModel, split: Split, tmp_path: Path
) -> None:
    with Store.open(tmp_path / "runs.db") as store, cached_scorer(llama, split, store) as score:
        rows = controls(llama, "1.fc_in@scale0-2=0.5", score, draws=1)
    assert [c.control for c in rows] == ["strengths", *(n for n in CONTROLS if n not in ("the reduction", "random subspace"))]
    assert all(c.size > 0.01 for c in rows)
