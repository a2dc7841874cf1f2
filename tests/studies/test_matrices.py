from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from laserlm.edit import applied
from laserlm.errors import AnalysisError, WeightError
from laserlm.models import LanguageModel, Matrix, read_matrix
from laserlm.models.checkpoint_reader import CheckpointReader, open_checkpoint
from laserlm.scoring.evaluate import evaluate
from laserlm.studies import MatrixMetrics, best_of_each, correlations, gains, matrix_metrics
from laserlm.studies.figures import check_figure, matrices_figure, write_figure
from laserlm.tasks import Example, Task

Make = Callable[..., LanguageModel]


@pytest.fixture
def stored(llama: LanguageModel, tmp_path: Path) -> CheckpointReader:
    llama.model.save_pretrained(tmp_path / "model")
    return open_checkpoint(tmp_path / "model")


def test_metrics_are_those_of_numpys_singular_values(llama: LanguageModel, stored: CheckpointReader) -> None:
    metrics = {m.matrix: m for m in matrix_metrics(stored)}
    assert metrics.keys() == {m.id for m in llama.matrices}
    m = next(m for m in llama.matrices if m.id == "1.fc_up")
    S = np.linalg.svd(read_matrix(llama.model, m).double().numpy(), compute_uv=False)
    one = metrics["1.fc_up"]
    p = S / S.sum()
    assert one.shape == (48, 32)
    assert one.effective_rank == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert one.stable_rank == pytest.approx((S**2).sum() / S[0] ** 2, rel=1e-4)
    assert one.condition == pytest.approx(S[0] / S[-1], rel=1e-3)
    assert one.norm == pytest.approx(np.sqrt((S**2).sum()), rel=1e-5)
    assert one.nuclear["0.25"] == pytest.approx(S[:8].sum() / S.sum(), rel=1e-4)
    assert one.energy["0.25"] == pytest.approx((S[:8] ** 2).sum() / (S**2).sum(), rel=1e-4)
    assert one.noise == pytest.approx(0.15, rel=0.1)  # the tiny models' weights are such noise
    assert (one.rank_beyond, one.gavish_donoho) == (0, 0)


def test_what_layers_share_is_compared_with_the_layer_before(stored: CheckpointReader) -> None:
    metrics = {m.matrix: m for m in matrix_metrics(stored, types=["q_proj"], thresholds=[0.0, 0.06, 9.0])}
    assert metrics.keys() == {f"{i}.q_proj" for i in range(3)}
    assert metrics["0.q_proj"].shared == {}
    assert metrics["1.q_proj"].shared["0"] == 1
    assert metrics["1.q_proj"].shared["9"] == 0
    right, left = (
        next(m for m in matrix_metrics(stored, types=["k_proj"], thresholds=[0.0], side=side) if m.layer == 1)
        for side in ("right", "left")
    )
    # Keys have 16 outputs and 32 inputs: two bases of 16 span all 16 outputs once, and 32 inputs between them.
    assert (right.shared["0"], left.shared["0"]) == (1, 1)
    for side, axis in (("right", 2), ("left", 0)):
        one = next(m for m in matrix_metrics(stored, types=["k_proj"], thresholds=[0.25], side=side) if m.layer == 2)
        bases = []
        for layer in (1, 2):
            matrix = next(m for m in stored.matrices if m.id == f"{layer}.k_proj")
            factor = np.linalg.svd(stored.read(matrix).double().numpy(), full_matrices=False)[axis]
            V = factor.T if axis == 2 else factor
            bases.append(np.where(np.abs(V) < 0.25, 0, V))
        together = np.concatenate(bases, 1)
        assert one.shared["0.25"] == pytest.approx(np.linalg.matrix_rank(together) / min(together.shape), abs=0.04)


def test_what_cannot_be_looked_at_is_reported(stored: CheckpointReader) -> None:
    with pytest.raises(AnalysisError, match="this model has q_proj"):
        list(matrix_metrics(stored, types=["wheel"]))
    with pytest.raises(AnalysisError, match="no side"):
        list(matrix_metrics(stored, side="upper"))  # type: ignore[arg-type]


def metrics_of(**options: float) -> MatrixMetrics:
    shares = dict.fromkeys(("0.01", "0.05", "0.1", "0.25", "0.5"), 0.5)
    base = MatrixMetrics("0.fc_in", "", 0, "fc_in", "fc_in", (4, 4), 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, shares, shares, {})
    return replace(base, **options)  # type: ignore[arg-type]


def test_a_metric_that_orders_the_gains_comes_first_with_its_interval() -> None:
    rng = np.random.default_rng(0)
    gain = {f"{i}.fc_in": float(g) for i, g in enumerate(rng.standard_normal(30))}
    metrics = [metrics_of(matrix=name, stable_rank=-math.exp(g), norm=float(rng.standard_normal())) for name, g in gain.items()]
    screen = {name: g + 0.5 * float(rng.standard_normal()) for name, g in gain.items()}
    result = correlations(metrics, gain, screen=screen)
    assert [c.metric for c in result][:2] == ["stable_rank", "screen"]
    assert result[0].rho == pytest.approx(-1)
    assert (result[0].low, result[0].high) == pytest.approx((-1, -1))
    noise = next(c for c in result if c.metric == "norm")
    assert noise.rho == pytest.approx(stats.spearmanr([m.norm for m in metrics], list(gain.values())).statistic)
    assert noise.low < noise.rho < noise.high
    assert all(c.metric != "edge" for c in result)  # it is constant here
    with pytest.raises(AnalysisError, match="needs 5"):
        correlations(metrics[:4], gain)


def test_gains_are_over_the_examples_that_all_trials_have(llama: LanguageModel) -> None:
    pairs = zip("abcdef", ["Paris", "Rome"] * 3, strict=True)
    split = Task.of("t", [Example(c, f"The capital of {c} is", a) for c, a in pairs]).every
    base = evaluate(llama, split)
    trials = {}
    for text, n in (("1.fc_in@0.1", 6), ("1.fc_in@0.5", 4), ("2.q_proj@0.5", 6), ("1.fc_in@0.1+2.q_proj@0.5", 6)):
        with applied(llama, text):
            trials[text] = evaluate(llama, split.limit(n))
    result = gains(base, trials)
    assert result.keys() == {"1.fc_in", "2.q_proj"}
    falls = [
        sum(b.loss - e.loss for b, e in zip(base.scores[:4], trials[t].scores[:4], strict=True)) / 4
        for t in ("1.fc_in@0.1", "1.fc_in@0.5")
    ]
    assert result["1.fc_in"] == pytest.approx(max(falls))
    assert best_of_each({"1.fc_in@0.1": -1.0, "1.fc_in@0.5": 2.0}) == {"1.fc_in": 2.0}


def test_the_figure_is_one_file_that_needs_nothing_else(stored: CheckpointReader, tmp_path: Path) -> None:
    metrics = list(matrix_metrics(stored))
    figure = matrices_figure(metrics, "effective_rank")
    assert list(figure.data[0].x) == ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_up", "fc_out"]
    assert figure.data[0].z[1][5] == next(m.effective_rank for m in metrics if m.matrix == "1.fc_up")
    write_figure(figure, tmp_path / "f.html")
    text = (tmp_path / "f.html").read_text()
    assert "Plotly.newPlot" in text
    assert "<script src=" not in text
    with pytest.raises(AnalysisError, match=r"end its name in \.html"):
        write_figure(figure, tmp_path / "f.gif")
    with pytest.raises(AnalysisError, match="no folder"):
        check_figure(tmp_path / "none" / "f.html")


@pytest.mark.parametrize(
    ("family", "wanted"),
    [("t5", {"encoder.q_proj", "decoder.q_proj", "decoder.cross_q_proj"}), ("mixtral", {"experts.0.fc_in", "experts.2.fc_in"})],
)
def test_two_stacks_and_experts_are_columns_of_their_own(family: str, wanted: set[str], make: Make) -> None:
    figure = matrices_figure(list(matrix_metrics(Loaded(make(family)))), "norm")
    assert wanted <= set(figure.data[0].x)


class Loaded:
    """A loaded model as a source of matrices."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.lm.matrices

    def read(self, matrix: Matrix) -> torch.Tensor:
        return read_matrix(self.lm.model, matrix)


def test_a_matrix_that_cannot_be_read_is_left_out_and_reported(make: Make, tmp_path: Path) -> None:
    make("mixtral").model.save_pretrained(tmp_path)
    source = open_checkpoint(tmp_path)
    messages: list[str] = []
    metrics = list(matrix_metrics(source, on_skip=lambda m, why: messages.append(f"{m.id}: {why}")))
    assert {m.type for m in metrics} == {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert all("another layout" in line for line in messages)
    assert len(messages) == 27  # three layers, three experts, three matrices
    with pytest.raises(WeightError, match="another layout"):
        list(matrix_metrics(source))


@pytest.mark.bundled
def test_a_trained_matrix_stands_out_from_noise(bundled: LanguageModel) -> None:
    (one,) = [m for m in matrix_metrics(open_checkpoint("bundled", cache=bundled.cache), types=["q_proj"]) if m.layer == 10]
    assert one.rank_beyond > 20
    assert torch.isfinite(torch.tensor(one.signal_to_noise))
