"""The planned disk and memory of saving and compressing, against the files and the bytes of tensors."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_quantised import fp8_folder
from export.test_source import weights
from families import FAMILIES, random_model
from safetensors import safe_open
from searching.test_memory_plan import LiveBytes

from laserlm.errors import ExportError
from laserlm.export import compress, save
from laserlm.export.calibration_text import read_calibration_text
from laserlm.export.export_plan import pivoting_bytes, plan_compression, plan_save, whitening_bytes
from laserlm.export.fitting import compressible, fit_ranks
from laserlm.export.gradient_moments import gradient_moments
from laserlm.linalg.decomposition import decompose, whitened
from laserlm.linalg.pivots import Pivoted, pivot_rows, rank_within
from laserlm.models import LanguageModel, load
from laserlm.models.matrices import Matrix
from laserlm.scoring.evaluate import text_perplexity
from laserlm.searching.screen import sensitivities

Make = Callable[..., LanguageModel]


def tensor_bytes(folder: Path) -> int:
    """Return the bytes of all tensors in a folder, but for the order of the rows of low-rank layers, which is not planned."""
    return sum(tensor.nbytes for name, tensor in weights(folder).items() if not name.endswith(".order"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The capital of France is Paris and the capital of Italy is Rome in Italy or Oslo. " * 120)
    return file


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("form", ["dense", "factored", "adapter"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_saved_model_takes_the_planned_bytes(family: str, form: Any, dtype: str | None, make: Make, tmp_path: Path) -> None:
    lm = make(family)
    reduction = "1.fc_out@0.3" if family != "mixtral" else "1.q_proj@0.3"
    planned = plan_save(lm, reduction, form=form, dtype=dtype)
    saved = save(lm, reduction, tmp_path / "out", form=form, dtype=dtype)
    assert planned.folder_bytes == tensor_bytes(saved.folder)
    assert planned.temporary_bytes == 0


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_quantised_model_takes_the_planned_bytes(dtype: str | None, tmp_path: Path) -> None:
    lm = load(fp8_folder(tmp_path / "source")[0])
    planned = plan_save(lm, "1.fc_out@0.3+0.q_proj@0.2", dtype=dtype)
    out = save(lm, "1.fc_out@0.3+0.q_proj@0.2", tmp_path / "out", dtype=dtype).folder
    assert planned.folder_bytes == tensor_bytes(out)


@pytest.mark.parametrize("form", ["dense", "factored"])
def test_a_compressed_model_takes_the_planned_bytes(form: Any, llama: LanguageModel, text: Path, tmp_path: Path) -> None:
    planned = plan_compression(llama, ratio=0.6, calibration=text, tokens=500, form=form)
    saved = compress(llama, tmp_path / "out", ratio=0.6, calibration=text, tokens=500, form=form).saved
    written = tensor_bytes(saved.folder)
    assert written <= planned.folder_bytes <= 1.02 * written  # ranks are whole numbers, so that some of the budget stays
    assert list(planned.phases) == ["gradients", "decompositions", "perplexity", "writing"]


def test_matrices_that_stay_dense_are_planned_with_all_their_bytes(make: Make, text: Path, tmp_path: Path) -> None:
    """Experts of Mixtral are no linear layers: with all of them, three tenths of the parameters cannot be reached."""
    lm = make("mixtral")
    options: dict[str, Any] = {"calibration": text, "tokens": 300, "method": "plain"}
    planned = plan_compression(lm, ratio=0.9, **options)
    written = tensor_bytes(compress(lm, tmp_path / "out", ratio=0.9, **options).saved.folder)
    assert written <= planned.folder_bytes <= 1.02 * written
    with pytest.raises(ExportError, match="cannot be reached"):
        plan_compression(lm, ratio=0.3, **options)


def test_what_is_refused_is_not_planned(llama: LanguageModel, make: Make, text: Path, tmp_path: Path) -> None:
    half = make("llama")
    half.model.half()
    quantised = load(fp8_folder(tmp_path / "source")[0])
    with pytest.raises(ExportError, match="no small adapter"):
        plan_compression(llama, ratio=0.5, calibration=text, form="adapter")
    with pytest.raises(ExportError, match="is quantised by fp8"):
        plan_compression(quantised, ratio=0.5, calibration=text)
    with pytest.raises(ExportError, match="is quantised by fp8"):
        plan_save(quantised, "1.fc_out@0.3", form="factored")
    with pytest.raises(ExportError, match="float16 overflow"):
        plan_compression(half, ratio=0.5, calibration=text, refine=1)
    with pytest.raises(ExportError, match=r"share of 1\.2"):
        plan_compression(llama, ratio=0.5, calibration=text, dense_above=1.2)
    with pytest.raises(ExportError, match=r"--calibration FILE.*--quantised"):
        plan_compression(llama, ratio=0.5, method="plain", allocation="uniform", quantised=True)


def test_a_bound_of_memory_is_planned_and_kept_or_its_least_value_named(
    llama: LanguageModel,
    text: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bounds: list[float] = []

    def bounded(*args: Any, memory: float, **options: Any) -> Any:
        bounds.append(memory)
        return gradient_moments(*args, memory=memory, **options)

    monkeypatch.setattr("laserlm.export.fitting.gradient_moments", bounded)
    options: dict[str, Any] = {"calibration": text, "tokens": 1000}
    rows = read_calibration_text(llama, text, tokens=1000).calibration
    of_token, tokens = 4 * 32, 7 * 127  # of what goes into a block
    least = max(4 * 127, 2 * tokens) * of_token
    assert sum(len(row.ids) for row in rows) == tokens
    planned = {memory: plan_compression(llama, ratio=0.6, memory=memory, **options) for memory in (None, least, 1)}
    kept = [planned[memory].phases["gradients"].activations for memory in planned]
    assert kept == [4 * tokens * of_token, 3 * 4 * 127 * of_token, 4 * 127 * of_token]
    expected = compress(llama, tmp_path / "expected", ratio=0.6, **options)
    found = compress(llama, tmp_path / "found", ratio=0.6, memory=least, **options)
    assert "--memory" not in caplog.text
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
    compress(llama, tmp_path / "little", ratio=0.6, memory=least - 1, **options)
    assert "the least bound that it keeps is --memory 0.001" in caplog.text
    assert bounds == [math.inf, least, least - 1]


@pytest.mark.parametrize("method", ["plain", "scaled"])
def test_a_bound_of_memory_holds_for_sensitivities(
    method: Any, llama: LanguageModel, text: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep what goes into four blocks for a passage; moments of inputs keep what goes into two blocks for all of them."""
    read: list[str] = []

    def counted(lm: LanguageModel, rows: Any, matrices: Any, decomposed: Any, **options: Any) -> Any:
        return sensitivities(lm, rows, matrices, lambda m: read.append(m.id) or decomposed(m), **options)

    monkeypatch.setattr("laserlm.export.fitting.sensitivities", counted)
    rows = read_calibration_text(llama, text, tokens=1000).calibration
    least = 4 * 32 * (4 * 127 if method == "plain" else 2 * 7 * 127)
    expected = fit_ranks(llama, rows, method=method, allocation="sensitivity")
    at_once = read.copy()
    found = fit_ranks(llama, rows, method=method, allocation="sensitivity", memory=least)
    assert "--memory" not in caplog.text
    chunks = 7 if method == "plain" else 2  # of one passage, or of four at most
    assert len(read) == (1 + chunks) * len(at_once) == (1 + chunks) * len(expected.matrices)
    for name, losses in expected.losses.items():
        torch.testing.assert_close(found.losses[name], losses, atol=1e-5 * float(losses.max()), rtol=1e-3)
    fit_ranks(llama, rows, method=method, allocation="sensitivity", memory=least - 1)
    assert "the least bound that it keeps is --memory 0.001" in caplog.text


def test_progress_counts_the_gradients_of_all_chunks(llama: LanguageModel, text: Path) -> None:
    rows = read_calibration_text(llama, text, tokens=1000).calibration
    steps: list[tuple[str, int, int]] = []
    fit_ranks(llama, rows, memory=4 * 32 * 2 * 7 * 127, on_step=lambda *step: steps.append(step))
    done = [done for stage, done, _ in steps if stage == "gradients"]
    of_chunk = len(done) // 2  # chunks of four and of three passages
    assert (len(rows), of_chunk) == (7, 21)
    assert done == [21 * 4 * i // 147 for i in range(1, 22)] + [21 * (84 + 3 * i) // 147 for i in range(1, 22)]
    assert [step for step in steps if step[0] != "gradients"] == [("decompositions", 21 + i, 42) for i in range(1, 22)]


def test_every_ratio_and_rounding_is_planned(llama: LanguageModel, text: Path) -> None:
    options: dict[str, Any] = {"calibration": text, "tokens": 300, "refine": 1}
    one = plan_compression(llama, ratio=0.5, **options)
    more = plan_compression(llama, ratio=0.5, measure=[0.9], quantised=True, **options)
    assert more.phases.keys() - one.phases.keys() == {"quantised"}
    copies = sum(p.nbytes for p in llama.model.parameters())
    assert more.phases["quantised"].decompositions == copies
    size = sum(m.shape[0] * m.shape[1] for m in llama.matrices if m.part_of is None)
    without = plan_compression(llama, ratio=0.5, **options | {"refine": 0})
    ranks = [rank_within(m.shape, int(0.9 * m.shape[0] * m.shape[1])) for m in llama.matrices]
    factors = sum(4 * rank * (sum(m.shape) - rank) for m, rank in zip(llama.matrices, ranks, strict=True))
    grown = more.cache_bytes - without.cache_bytes - factors
    assert grown == pytest.approx(12 * size * (0.5 + 0.9 + 0.9), rel=1e-3)  # a file for each ratio, and one being written
    assert more.phases["perplexity"].decompositions > one.phases["perplexity"].decompositions


def test_training_the_factors_takes_what_is_planned(llama: LanguageModel, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": text, "tokens": 500}
    planned = plan_compression(llama, ratio=0.6, refine=3, **options)
    assert list(planned.phases) == ["gradients", "decompositions", "refinement", "perplexity", "writing"]
    without = plan_compression(llama, ratio=0.6, refine=0, **options)
    compression = fit_ranks(llama, (), method="plain", allocation="uniform")
    (tmp_path / "kept").mkdir()
    rows = read_calibration_text(llama, text, refine=3).refinement
    weights = list(llama.model.parameters())
    with LiveBytes(*weights) as live:
        trained = compression.refine(llama, 0.6, rows, tmp_path / "kept", steps=3, products="float32")
    on_disk = trained.refined[0.6].stat().st_size
    assert planned.cache_bytes - without.cache_bytes == pytest.approx(2 * on_disk, rel=0.1)  # an old file and a new one
    expected = planned.phases["refinement"]
    assert live.most == pytest.approx(expected.total, rel=0.35)


def test_moments_of_gradients_take_what_is_planned(make: Make, text: Path, tmp_path: Path) -> None:
    """No copy of them is made: in a model of 11008 features they are half a gigabyte for each of two matrices."""
    lm = make("llama")
    lm.model = random_model("causal", "llama", FAMILIES["llama"][1] | {"intermediate_size": 2048}).eval()
    rows = read_calibration_text(lm, text, tokens=127).calibration
    with LiveBytes(*lm.model.parameters()) as live:
        moments = gradient_moments(lm, rows, compressible(lm)[0], tmp_path)
    assert moments["1.fc_in"].shape == (2048, 2048)
    planned = plan_compression(lm, ratio=0.5, calibration=text, tokens=127).phases["gradients"]
    assert live.most == pytest.approx(planned.total, rel=0.15)


def test_sensitivities_take_what_is_planned(make: Make, text: Path) -> None:
    lm = make("llama")
    lm.model = random_model("causal", "llama", FAMILIES["llama"][1] | {"intermediate_size": 2048}).eval()
    rows = read_calibration_text(lm, text, tokens=127 * 9).calibration
    compression = fit_ranks(lm, (), method="plain", allocation="uniform")
    with LiveBytes(*lm.model.parameters()) as live:
        sensitivities(lm, rows, compression.matrices, lambda m: compression.decompositions[m.id])
    options: dict[str, Any] = {"calibration": text, "tokens": 127 * 9, "method": "plain", "allocation": "sensitivity"}
    planned = plan_compression(lm, ratio=0.5, **options).phases
    assert list(planned) == ["decompositions", "sensitivities", "perplexity", "writing"]
    assert live.most == pytest.approx(planned["sensitivities"].total, rel=0.15)
    bounded = plan_compression(lm, ratio=0.5, memory=2 * 4 * 4 * 32 * 127, **options).phases["sensitivities"]
    rank = sum(m.max_rank for m in compression.matrices)
    assert planned["sensitivities"].activations - bounded.activations == 7 * 4 * (4 * 32 * 127 + rank)  # of nine passages, two


@pytest.mark.parametrize(("m", "n", "rank"), [(800, 300, 200), (700, 300, 250), (400, 100, 60)])
def test_a_choice_of_pivots_takes_what_is_planned(m: int, n: int, rank: int) -> None:
    kept = decompose(torch.randn(m, n))
    tracemalloc.start()
    try:
        _, coefficients = pivot_rows(kept.left[:, :rank])
        of_numpy = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    planned = pivoting_bytes(Matrix("", 0, "fc_in", "", (m, n)), rank, 4)
    assert kept.bytes + of_numpy + coefficients.nbytes == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "rank"), [(300, 30_000, 200), (300, 3000, 200)])
def test_pivots_of_a_wide_matrix_take_what_is_planned(m: int, n: int, rank: int, dtype: torch.dtype) -> None:
    """In float64 they are made in parts: in one part, the wider one of these would take 96 MB where 64 are planned."""
    left, right = torch.randn(m, m), torch.randn(m, n)
    with LiveBytes(left, right) as live:
        Pivoted.of(left[:, :rank], right[:rank], dtype)
    planned = pivoting_bytes(Matrix("", 0, "fc_out", "", (m, n)), rank, dtype.itemsize)
    assert live.most == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("form", ["factored", "dense"])
@pytest.mark.parametrize("is_trained", [False, True])
def test_measuring_a_compressed_model_takes_what_is_planned(
    is_trained: bool, form: Any, make: Make, text: Path, tmp_path: Path
) -> None:
    """No decomposition is read again, no factor of another matrix stays in memory, and no product is in float64."""
    text.write_text(text.read_text()[:1000])  # most of the memory is then that of the weights
    lm = make("llama")
    lm.model = random_model("causal", "llama", FAMILIES["llama"][1] | {"intermediate_size": 4096}).eval()
    compression = fit_ranks(lm, (), method="plain", allocation="uniform")
    if is_trained:
        (tmp_path / "kept").mkdir()
        rows = read_calibration_text(lm, text, refine=1).refinement
        compression = compression.refine(lm, 0.8, rows, tmp_path / "kept", steps=1, products="float32")
    else:
        compression.layers(lm, 0.8)  # which makes the pivots
    held_out = read_calibration_text(lm, text, tokens=500).held_out
    text_perplexity(lm, held_out)
    with LiveBytes(*lm.model.parameters()) as live:
        before = live.now
        factors = sum(p.nbytes for layer in compression.layers(lm, 0.8).values() for p in layer.parameters())
    assert live.most - before < 1.4 * factors  # they are read one after the other
    with LiveBytes(*lm.model.parameters()) as live, compression.applied(lm, 0.8, form):
        text_perplexity(lm, held_out)
    options: dict[str, Any] = {"calibration": text, "tokens": 500, "refine": int(is_trained), "form": form}
    planned = plan_compression(lm, ratio=0.8, **options).phases["perplexity"]
    assert live.most == pytest.approx(planned.total - planned.kept, rel=0.15)


def test_a_compression_keeps_on_the_disk_what_is_planned(llama: LanguageModel, text: Path, tmp_path: Path) -> None:
    """Uniform ranks are those of the plan."""
    on_disk: list[int] = []

    def look(stage: str, *_: int) -> None:
        if stage == "writing":
            files = [file for file in (llama.cache / "compressions").rglob("*.safetensors") if "order" not in file.name]
            for file in files:
                with safe_open(file, "pt") as opened:
                    on_disk.append(sum(opened.get_tensor(name).nbytes for name in opened.keys()))  # noqa: SIM118

    options: dict[str, Any] = {"measure": [0.8], "calibration": text, "tokens": 500, "allocation": "uniform"}
    planned = plan_compression(llama, ratio=0.6, **options)
    compress(llama, tmp_path / "out", ratio=0.6, on_step=look, **options)
    assert sum(on_disk) == planned.cache_bytes


@pytest.mark.parametrize(("m", "n"), [(512, 192), (192, 512), (192, 192)])
@pytest.mark.parametrize("is_two_sided", [True, False])
def test_a_decomposition_for_moments_takes_what_is_planned(m: int, n: int, is_two_sided: bool) -> None:
    weight, x, g = torch.randn(m, n).bfloat16(), torch.randn(600, n).double(), torch.randn(600, m)
    M, G = x.T @ x / 600, g.T @ g / 600
    with LiveBytes(weight, M) as live:
        kept = whitened(weight, M, G.clone() if is_two_sided else None)
    assert kept.max_rank == min(m, n)
    planned = whitening_bytes(Matrix("", 0, "fc_in", "", (m, n)), is_two_sided=is_two_sided)
    assert live.most - weight.nbytes - M.nbytes == pytest.approx(planned, rel=0.1)


def test_a_disk_without_room_is_reported(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    planned = plan_save(llama, "1.fc_out@0.3")
    for share, is_warned in ((1.05, True), (1.15, False)):
        caplog.clear()
        usage = type("Usage", (), {"free": int(share * planned.folder_bytes)})
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        planned.warn_of_full_disks(Path("out"), Path("cache"))
        assert ("another folder with --out" in caplog.text) == is_warned
