from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export.test_source import weights
from families import CAUSAL
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from laserlm.errors import ExportError, WeightError
from laserlm.export import compress, reproduce
from laserlm.export.calibration_text import read_calibration_text
from laserlm.export.fitting import Allocation, fit_ranks, rank_step
from laserlm.export.load_in_subprocess import fingerprint
from laserlm.export.moments import moments_by_block
from laserlm.linalg import decompose
from laserlm.linalg.pivots import pivot_rows, rank_within
from laserlm.models import LanguageModel, load, read_matrix
from laserlm.scoring.evaluate import evaluate, text_perplexity
from laserlm.tasks import task

Make = Callable[..., LanguageModel]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    words = ["the", "capital", "of", "France", "is", "Paris", "and", "Rome", "city", "in", "Italy"]
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(words), (4000,), generator=generator).tolist()
    file = tmp_path / "text.txt"
    file.write_text(" ".join(words[i] for i in order))
    return file


def spent(lm: LanguageModel) -> int:
    return sum(p.numel() for p in lm.model.parameters())


def test_the_text_is_cut_into_passages_and_its_end_is_held_out(llama: LanguageModel, file: Path) -> None:
    text = read_calibration_text(llama, file, tokens=1000)
    window = 127  # the tiny tokenizer takes 128 tokens
    assert [len(row.targets) for row in text.calibration] == [window] * (1000 // window)
    content = file.read_text()
    assert content.startswith(llama.require_tokenizer().decode(text.calibration[0].targets))
    assert text.held_out == content[int(0.8 * len(content)) :]
    assert text.calibration[0].ids[1:] == text.calibration[0].targets[:-1]


@pytest.mark.parametrize("family", [f for f in CAUSAL if f != "mixtral"])
def test_every_family_keeps_its_budget_and_all_of_it_is_the_model_itself(family: str, make: Make, file: Path) -> None:
    lm = make(family)
    rows = read_calibration_text(lm, file, tokens=500).calibration
    ids = torch.tensor([rows[0].ids[:20]])
    with torch.no_grad():
        base = lm.model(input_ids=ids).logits
    before = spent(lm)
    for method in ("plain", "two-sided"):
        compression = fit_ranks(lm, rows, method=method)
        assert compression.parameters == sum(m.shape[0] * m.shape[1] for m in compression.matrices)
        for ratio in (0.5, 0.9):
            with compression.applied(lm, ratio), torch.no_grad():
                assert before - spent(lm) >= (1 - ratio) * compression.parameters - 1e-6
                assert before - spent(lm) <= (1 - ratio) * compression.parameters + 200  # one more rank of the largest matrix
                assert not torch.allclose(lm.model(input_ids=ids).logits, base, atol=1e-5)
        with compression.applied(lm, 1.0), torch.no_grad():
            torch.testing.assert_close(lm.model(input_ids=ids).logits, base, atol=1e-4, rtol=1e-3)
        assert spent(lm) == before
        assert lm.active == []


def test_the_dense_form_computes_what_the_factors_do(make: Make, file: Path) -> None:
    for family in ("llama", "gpt2"):
        lm = make(family)
        compression = fit_ranks(lm, read_calibration_text(lm, file, tokens=500).calibration)
        outputs = []
        for form in ("factored", "dense"):
            with compression.applied(lm, 0.5, form):
                outputs.append(torch.tensor(fingerprint(lm.model)))
        torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)


def test_whitened_decompositions_change_the_outputs_of_every_layer_less(llama: LanguageModel, file: Path) -> None:
    rows = read_calibration_text(llama, file, tokens=2000).calibration
    plain, white = (fit_ranks(llama, rows, method=method, allocation="uniform") for method in ("plain", "whitened"))
    moments: dict[str, torch.Tensor] = {}
    for _, of_block in moments_by_block(llama, rows, plain.matrices):
        moments |= of_block
    for m in plain.matrices:
        errors = []
        for compression in (plain, white):
            rank = compression.ranks(0.7)[m.id]
            assert rank is not None
            left = (read_matrix(llama.model, m) - compression.decompositions[m.id].truncate(rank)).double()
            errors.append(float((left @ moments[m.path.rpartition(".")[0]] @ left.T).trace()))
        assert errors[1] <= errors[0] * (1 + 1e-4), m.id


def test_inputs_are_scaled_by_their_root_mean_square(llama: LanguageModel, file: Path) -> None:
    """With s the root mean squares, the truncation is that of the singular value decomposition of W diag(s), over s."""
    rows = read_calibration_text(llama, file, tokens=1000).calibration
    compression = fit_ranks(llama, rows, method="scaled", allocation="uniform")
    inputs: list[torch.Tensor] = []
    layer = llama.model.model.layers[0].mlp.gate_proj
    hook = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1).double()))
    with torch.no_grad():
        for row in rows:
            llama.model(input_ids=torch.tensor([row.ids]))
    hook.remove()
    s = torch.cat(inputs).square().mean(0).sqrt()
    U, S, Vh = torch.linalg.svd(layer.weight.detach().double() * s, full_matrices=False)
    (m,) = [m for m in compression.matrices if m.path == "model.layers.0.mlp.gate_proj.weight"]
    expected = (U[:, :9] * S[:9]) @ Vh[:9] / s
    torch.testing.assert_close(compression.decompositions[m.id].truncate(9).double(), expected, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("allocation", ["sensitivity", "curvature"])
def test_allocation_expects_less_loss_than_uniform_ranks_of_the_same_budget(
    allocation: Allocation, llama: LanguageModel, file: Path
) -> None:
    compression = fit_ranks(llama, read_calibration_text(llama, file, tokens=1000).calibration, allocation=allocation)
    even = replace(compression, allocation="uniform").ranks(0.7)

    def expected(ranks: dict[str, int | None]) -> float:
        return sum(float(compression.losses[name][rank:].sum()) for name, rank in ranks.items() if rank is not None)

    assert expected(compression.ranks(0.7)) < 0.9 * expected(even)


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_a_compressed_model_is_saved_reported_and_rebuilt(form: str, llama: LanguageModel, file: Path, tmp_path: Path) -> None:
    result = compress(llama, tmp_path / "out", ratio=0.6, calibration=file, tokens=1000, form=form)
    assert result.perplexity is not None
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(read_calibration_text(llama, file).held_out)
    assert result.base_perplexity == text_perplexity(llama, held_out.read_text()).perplexity
    evaluation = evaluate(load(result.saved.folder), task(f"perplexity:{held_out}").every)
    assert result.perplexity == pytest.approx(evaluation.perplexity, rel=1e-6)
    assert result.tokens == evaluation.tokens
    model = AutoModelForCausalLM.from_pretrained(result.saved.folder)
    torch.testing.assert_close(
        torch.tensor(fingerprint(model.eval())), torch.tensor(result.saved.record["fingerprint"]), atol=1e-4, rtol=1e-3
    )
    record = json.loads((tmp_path / "out" / "laser.json").read_text())
    assert record["compression"]["perplexity"]["compressed"] == result.perplexity
    assert "laser compress llama --dtype float32 --ratio 0.6 --method two-sided" in record["command"]
    assert record["compression"]["text"]["calibrated_on"] == 1000 // 127 * 127
    assert "60% of the parameters" in (tmp_path / "out" / "README.md").read_text()
    assert reproduce(result.saved.folder, llama).agrees
    moved = file.rename(tmp_path / "moved.txt")
    with pytest.raises(ExportError, match="give --calibration"):
        reproduce(result.saved.folder, llama)
    assert reproduce(result.saved.folder, llama, calibration=moved).agrees


def test_plain_and_uniform_needs_no_text(llama: LanguageModel, tmp_path: Path) -> None:
    result = compress(llama, tmp_path / "out", ratio=0.5, method="plain", allocation="uniform")
    assert result.perplexity is None
    assert {h.rank for h in result.saved.matrices if h.matrix.endswith("fc_in")} == {11}  # 11 x 69 = 759 < 768 < 12 x 68
    assert reproduce(result.saved.folder, llama).identical


def test_what_cannot_be_compressed_is_reported(llama: LanguageModel, make: Make, file: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="causal"):
        compress(make("bert"), tmp_path / "out", ratio=0.5)
    llama.require_tokenizer().bos_token = llama.require_tokenizer().eos_token = None
    with pytest.raises(ExportError, match=r"no token that starts a text.*--calibration FILE"):
        compress(llama, tmp_path / "out", ratio=0.5)
    with pytest.raises(ExportError, match="above 0 and at most 1"):
        compress(llama, tmp_path / "out", ratio=1.5, calibration=file)
    with pytest.raises(ExportError, match="no method 'clever'"):
        compress(llama, tmp_path / "out", ratio=0.5, calibration=file, method="clever")
    with pytest.raises(ExportError, match="causal"):
        compress(make("bert"), tmp_path / "out", ratio=0.5, calibration=file)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ExportError, match="no passage of 127 tokens"):
        compress(llama, tmp_path / "out", ratio=0.5, calibration=tmp_path / "short.txt")
    with pytest.raises(ExportError, match="cannot read"):
        compress(llama, tmp_path / "out", ratio=0.5, calibration=tmp_path / "none.txt")
    assert not (tmp_path / "out").exists()


def test_matrices_stay_dense_where_factors_would_take_nearly_as_much(llama: LanguageModel, file: Path) -> None:
    rows = read_calibration_text(llama, file, tokens=500).calibration
    compression = fit_ranks(llama, rows, dense_above=0.7)
    with compression.applied(llama, 0.8) as stored:
        shares = [m.parameters / (m.shape[0] * m.shape[1]) for m in stored if not m.reason_kept_dense]
        assert max(shares) <= 0.7
        assert sum(m.parameters for m in stored) <= 0.8 * compression.parameters
        assert any(m.reason_kept_dense for m in stored)
    every = fit_ranks(llama, rows).ranks(0.8)
    assert sum(rank is None for rank in every.values()) < sum(rank is None for rank in compression.ranks(0.8).values())
    with pytest.raises(ExportError, match=r"share of 1\.2"):
        fit_ranks(llama, rows, dense_above=1.2)


@pytest.mark.parametrize(
    ("shape", "multiple", "step"),
    [
        ((576, 1536), 32, 32),
        ((192, 576), 32, 32),
        ((191, 576), 32, 16),
        ((32, 64), 32, 4),
        ((5, 9), 32, 1),
        ((4096, 4096), 1, 1),
        ((60, 60), 7, 7),
        ((41, 60), 7, 4),
    ],
)
def test_the_step_of_ranks_is_smaller_in_small_matrices(shape: tuple[int, int], multiple: int, step: int) -> None:
    assert rank_step(shape, multiple) == step


def test_ranks_are_multiples_unless_they_are_uniform(llama: LanguageModel, file: Path) -> None:
    compression = fit_ranks(llama, read_calibration_text(llama, file, tokens=500).calibration)
    ranks = compression.ranks(0.6)
    assert all((ranks[m.id] or 0) % rank_step(m.shape, 32) == 0 for m in compression.matrices)
    assert len(set(ranks.values())) < len(set(replace(compression, rank_multiple=1).ranks(0.6).values()))
    uniform = replace(compression, allocation="uniform").ranks(0.6)
    assert [*uniform.values()] == [rank_within(m.shape, int(0.6 * m.shape[0] * m.shape[1])) for m in compression.matrices]


def test_a_folder_without_a_multiple_of_ranks_is_rebuilt_with_ranks_of_any_size(
    llama: LanguageModel, file: Path, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"calibration": file, "tokens": 300, "dense_above": 1, "rank_multiple": 1}
    folder = compress(llama, tmp_path / "made", ratio=0.6, **options).saved.folder
    record = json.loads((folder / "laser.json").read_text())
    assert record["compression"].pop("rank_multiple") == 1
    del record["compression"]["dense_above"]
    (folder / "laser.json").write_text(json.dumps(record))
    assert reproduce(folder, llama).agrees


def test_experts_are_left_out_with_the_reason(make: Make, file: Path) -> None:
    lm = make("mixtral")
    compression = fit_ranks(lm, read_calibration_text(lm, file, tokens=500).calibration, method="plain")
    assert set(compression.left_out.values()) == {"not the weight of a linear layer"}
    assert {m.type for m in compression.left_out} == {"gate_up", "fc_out"}
    fixed = sum(m.shape[0] * m.shape[1] for m in compression.left_out)
    total = compression.parameters + fixed
    before = spent(lm)
    with compression.applied(lm, 0.9) as stored:
        assert before - spent(lm) >= 0.1 * total - 1
        assert {h.reason_kept_dense for h in stored if "experts" in h.matrix} == {"not the weight of a linear layer"}
    with pytest.raises(ExportError, match="cannot be reached"):
        compression.ranks(0.3)
    assert {m.name for m in compression.matrices} == {"q_proj", "k_proj", "v_proj", "out_proj"}


def test_matrices_without_a_gradient_are_left_out_with_the_reason(llama: LanguageModel, file: Path) -> None:
    with torch.no_grad():
        llama.model.model.layers[0].self_attn.o_proj.weight.zero_()  # nothing of the block's attention reaches the loss
    rows = read_calibration_text(llama, file, tokens=500).calibration
    compression = fit_ranks(llama, rows)
    reason = "no gradient of the loss of the text reaches it"
    assert {m.id: why for m, why in compression.left_out.items()} == dict.fromkeys(("0.q_proj", "0.k_proj", "0.v_proj"), reason)


@pytest.mark.parametrize("form", ["factored", "dense"])
def test_factors_of_very_different_scales_are_saved_in_float16(
    form: str, llama: LanguageModel, file: Path, tmp_path: Path
) -> None:
    with torch.no_grad():
        scale = llama.model.model.layers[1].post_attention_layernorm.weight
        scale.mul_(1e-4)
        scale[:8] *= 1e-4  # directions with hardly any input, by which a whitened decomposition divides
    compression = fit_ranks(llama, read_calibration_text(llama, file, tokens=500).calibration, allocation="uniform")
    assert compression.decompositions["1.fc_in"].right.abs().max() > torch.finfo(torch.float16).max
    options: dict[str, Any] = {"calibration": file, "tokens": 500, "allocation": "uniform"}
    result = compress(llama, tmp_path / "out", ratio=0.9, form=form, dtype="float16", **options)
    model = AutoModelForCausalLM.from_pretrained(result.saved.folder, dtype="auto")
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    again = text_perplexity(load(result.saved.folder, dtype="float32"), file.read_text()[-4000:])
    with compression.applied(llama, 0.9, form):
        expected = text_perplexity(llama, file.read_text()[-4000:])
    assert again.perplexity == pytest.approx(expected.perplexity, rel=1e-2)


def test_pivots_are_chosen_once_for_each_matrix_and_rank(
    llama: LanguageModel, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ratio is trained, measured and written with the same pivots; the last of them is read by a second process."""
    chosen: list[tuple[int, ...]] = []
    monkeypatch.setattr("laserlm.linalg.pivots.pivot_rows", lambda left: chosen.append(left.shape) or pivot_rows(left))
    options: dict[str, Any] = {"calibration": file, "tokens": 500, "refine": 2, "measure": [0.8]}

    def kill(at: str, *_: int) -> None:
        if at == "writing":
            raise Killed

    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", ratio=0.5, on_step=kill, **options)
    n = len(chosen)
    assert 0 < n <= 2 * 21
    result = compress(llama, tmp_path / "out", ratio=0.5, **options)
    assert len(chosen) == n
    monkeypatch.undo()
    expected = compress(llama, tmp_path / "expected", ratio=0.5, **options)
    found = weights(result.saved.folder)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights(expected.saved.folder).items())


def test_factors_that_are_too_large_are_not_made(llama: LanguageModel, file: Path) -> None:
    with torch.no_grad():
        llama.model.model.layers[1].mlp.up_proj.weight.mul_(1e12)
    compression = fit_ranks(llama, (), method="plain", allocation="uniform")
    llama.model.half()
    with pytest.raises(WeightError, match=r"the factors of 1\.fc_up .*float16.*bfloat16"), compression.applied(llama, 0.5):
        pass


def test_decompositions_are_in_a_folder_as_long_as_they_are_used(llama: LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    llama.cache = tmp_path / "file"
    with pytest.raises(ExportError, match=r"cannot keep the decompositions in .*file: .*--cache"):
        fit_ranks(llama, (), method="plain", allocation="uniform")
    llama.cache = tmp_path / "cache"
    compression = fit_ranks(llama, (), method="plain", allocation="uniform")
    for m in compression.matrices:
        expected = decompose(read_matrix(llama.model, m))
        assert torch.equal(compression.decompositions[m.id].left, expected.left)
        assert torch.equal(compression.decompositions[m.id].right, expected.right)
    del compression
    assert list((tmp_path / "cache" / "compressions").iterdir()) == []


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["gradients", "decompositions"])
def test_what_was_interrupted_goes_on_where_it_was(stage: str, llama: LanguageModel, file: Path, tmp_path: Path) -> None:
    def kill(at: str, done: int, total: int) -> None:
        assert done <= total
        if at == stage and done % 21 == 18:  # of 21 gradients, or of as many decompositions
            raise Killed

    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", ratio=0.5, calibration=file, tokens=500, products="float32", on_step=kill)
    (folder,) = (llama.cache / "compressions").iterdir()
    rows = read_calibration_text(llama, file, tokens=500).calibration
    stages: list[str] = []
    result = fit_ranks(llama, rows, folder=folder, on_step=lambda at, *_: stages.append(at))
    decompositions = 21 if stage == "gradients" else 3  # 18 of 21 are there
    assert stages == ["gradients"] * (decompositions == 21) * 21 + ["decompositions"] * decompositions
    expected = fit_ranks(llama, rows)
    assert result.ranks(0.7) == expected.ranks(0.7)
    for name, decomposition in expected.decompositions.items():
        assert torch.equal(result.decompositions[name].left, decomposition.left)


def test_what_was_interrupted_with_other_products_begins_again(llama: LanguageModel, file: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def kill(at: str, *_: int) -> None:
        stages.append(at)
        if at == "decompositions":
            raise Killed

    for products in ("float32", "bfloat16", "float32"):
        with pytest.raises(Killed):
            compress(llama, tmp_path / "out", ratio=0.5, calibration=file, tokens=500, products=products, on_step=kill)
    assert stages.count("gradients") == 2 * 21  # of both dtypes once


def test_unfinished_gradients_of_a_killed_process_do_not_stay_on_the_disk(
    llama: LanguageModel, file: Path, tmp_path: Path
) -> None:
    """Python removes its temporary folders, but not where the process is killed."""
    unfinished = tmp_path / "gradients-0123" / "1-0"
    unfinished.mkdir(parents=True)
    (unfinished / "0.q_proj.safetensors").write_bytes(b"part")
    fit_ranks(llama, read_calibration_text(llama, file, tokens=500).calibration, folder=tmp_path)
    assert [folder.name for folder in tmp_path.glob("gradients*")] == ["gradients"]


@pytest.mark.parametrize("stage", ["refinement at 0.5", "refinement at 0.7", "perplexity", "writing"])
def test_trained_factors_are_kept_until_the_model_is_saved(
    stage: str, llama: LanguageModel, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laserlm.export.refinement.STEPS_BETWEEN_FILES", 2)
    options: dict[str, Any] = {"ratio": 0.5, "measure": [0.7], "calibration": file, "tokens": 500, "refine": 5}
    expected = compress(llama, tmp_path / "expected", **options).as_dict()

    def kill(at: str, done: int, _: int) -> None:
        if at == stage and done in (0, 3):
            raise Killed

    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", on_step=kill, **options)
    again: list[tuple[str, int]] = []
    result = compress(llama, tmp_path / "out", on_step=lambda at, done, _: again.append((at, done)), **options)
    trained = [(f"refinement at {ratio}", step) for ratio in (0.5, 0.7) for step in range(1, 6)]
    done = {"refinement at 0.5": 2, "refinement at 0.7": 7}.get(stage, 10)
    assert [step for step in again if step[0].startswith("refinement")] == trained[done:]
    assert result.as_dict() | {"folder": ""} == expected | {"folder": ""}
    saved, fresh = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    assert saved == fresh


def test_perplexities_are_measured_once(
    llama: LanguageModel, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed command goes on with those of its own ratios, form and dtype; those of the unchanged model stay the same."""
    options: dict[str, Any] = {"ratio": 0.5, "measure": [0.7], "calibration": file, "tokens": 500, "quantised": True}
    expected = compress(llama, tmp_path / "expected", **options).as_dict()
    measured: list[str] = []

    def measure(lm: LanguageModel, text: str) -> Any:
        measured.append("+".join(lm.active) or "unchanged")
        return text_perplexity(lm, text)

    monkeypatch.setattr("laserlm.export.compression.text_perplexity", measure)

    def kill(at: str, *_: int) -> None:
        if at == "writing":
            raise Killed

    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", on_step=kill, **options)
    first = ["two-sided/curvature@0.5", "two-sided/curvature@0.7", "unchanged", "q8_0", "q4_0"]
    assert measured == first
    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", on_step=kill, **options | {"ratio": 0.8, "form": "dense"})
    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", on_step=kill, **options | {"rank_multiple": 1})
    others = ["two-sided/curvature@0.8", "two-sided/curvature@0.7", "two-sided/curvature@0.5", "two-sided/curvature@0.7"]
    assert measured == [*first, *others]
    assert compress(llama, tmp_path / "out", **options).as_dict() | {"folder": ""} == expected | {"folder": ""}
    assert measured == [*first, *others]


def test_a_damaged_perplexity_is_measured_again(
    llama: LanguageModel, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options: dict[str, Any] = {"ratio": 0.5, "calibration": file, "tokens": 500}
    expected = compress(llama, tmp_path / "expected", **options).as_dict()
    damaged: list[Path] = []

    def kill(at: str, *_: int) -> None:
        if at == "writing":
            damaged.extend(llama.cache.rglob("perplexity-*.json"))
            raise Killed

    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", on_step=kill, **options)
    damaged[0].write_text('{"perplex')
    damaged[1].write_bytes(b"\xff\xfe")
    assert len(damaged) == 2
    assert compress(llama, tmp_path / "out", **options).as_dict() | {"folder": ""} == expected | {"folder": ""}
    assert all(f"{path} is damaged" in caplog.text for path in damaged)


def test_factors_for_other_ranks_are_trained_again(llama: LanguageModel, file: Path, tmp_path: Path) -> None:
    text = read_calibration_text(llama, file, tokens=300, refine=1)
    compression = fit_ranks(llama, text.calibration)
    made: list[str] = []

    def train(*, dense_above: float = 0.9, rank_multiple: int = 32) -> None:
        shaped = replace(compression, dense_above=dense_above, rank_multiple=rank_multiple)
        options: dict[str, Any] = {"steps": 1, "products": "float32"}
        shaped.refine(llama, 0.5, text.refinement, tmp_path, **options, on_step=lambda done, _: made.append(f"{done}"))

    for shapes in ({}, {}, {"rank_multiple": 1}, {"dense_above": 0.7}):
        train(**shapes)
    assert made.count("1") >= 3
    assert len(list(tmp_path.glob("refined-*.safetensors"))) == 3


def test_factors_are_trained_on_a_passage_of_the_text_for_each_step(llama: LanguageModel, file: Path) -> None:
    text = read_calibration_text(llama, file, tokens=300, refine=5)
    assert [len(row.targets) for row in text.refinement] == [127] * 5
    assert text.refinement[:2] == text.calibration
    assert len({row.ids for row in text.refinement}) == 5


def test_passages_of_training_are_longer_than_those_of_the_calibration_where_the_text_has_room(
    llama: LanguageModel, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laserlm.export.calibration_text.PASSAGE_TOKENS", 16)
    long = read_calibration_text(llama, file, tokens=300, refine=2)
    assert {len(row.targets) for row in long.calibration} == {16}
    assert {len(row.targets) for row in long.refinement} == {127}
    file.write_text(file.read_text()[:500])
    short = read_calibration_text(llama, file, tokens=300, refine=2)
    assert len(short.calibration) > 1
    assert short.refinement == short.calibration


@pytest.mark.parametrize(("here", "refine"), [("avx512_bf16", 3), ("none", 3), ("avx512_bf16", 0)])
def test_another_processor_makes_a_compressed_model_again_as_it_was(
    here: str, refine: int, llama: LanguageModel, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {here: True}, raising=False)
    made = compress(llama, tmp_path / "made", ratio=0.6, calibration=file, tokens=500, refine=refine)
    expected = "float32" if here == "none" else "bfloat16"
    assert made.saved.record["compression"]["products"] == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": here == "none"}, raising=False)
    assert reproduce(tmp_path / "made", llama).identical


def test_a_record_without_the_dtype_of_products_has_that_of_the_model(
    llama: LanguageModel, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 0.1.0 had no other."""
    compress(llama, tmp_path / "made", ratio=0.6, calibration=file, tokens=500, products="float32")
    record = tmp_path / "made" / "laser.json"
    content = json.loads(record.read_text())
    del content["compression"]["products"]
    record.write_text(json.dumps(content))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert reproduce(tmp_path / "made", llama).identical


def test_training_is_a_choice(llama: LanguageModel, file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 0.6, "calibration": file, "tokens": 500}
    trained = compress(llama, tmp_path / "trained", refine=3, **options)
    untrained = compress(llama, tmp_path / "untrained", **options)
    assert [r.saved.record["compression"]["refine"] for r in (trained, untrained)] == [3, 0]
    assert trained.perplexity != untrained.perplexity
    assert "trained for 3 steps" in (tmp_path / "trained" / "README.md").read_text()
    assert reproduce(tmp_path / "trained", llama).agrees
    with pytest.raises(ExportError, match="refine is -1"):
        compress(llama, tmp_path / "out", refine=-1, **options)


def test_what_cannot_be_done_is_refused_before_the_text_is_read(make: Make, file: Path, tmp_path: Path) -> None:
    lm, half = make("llama"), make("llama")
    half.model.half()
    text: dict[str, Any] = {"calibration": file}
    no_text: dict[str, Any] = {"method": "plain", "allocation": "uniform"}
    cases: list[tuple[LanguageModel, dict[str, Any], str]] = [
        (half, text | {"refine": 1}, "float16 overflow.*--refine 0"),
        (lm, text | {"dense_above": 1.2}, r"share of 1\.2"),
        (lm, text | {"dense_above": 0.9, "allocation": "uniform"}, "--dense-above 0.9 has no effect"),
        (lm, text | {"rank_multiple": 8, "allocation": "uniform"}, "--rank-multiple 8 has no effect"),
        (lm, text | {"rank_multiple": 0}, "multiples of 0"),
        (lm, no_text | {"quantised": True}, "--calibration FILE.*--quantised"),
        (lm, no_text | {"measure": [0.7]}, "--calibration FILE.*--measure"),
    ]
    for model, options, error in cases:
        stages: list[str] = []
        with pytest.raises(ExportError, match=error):
            compress(model, tmp_path / "out", ratio=0.5, on_step=lambda stage, *_, to=stages: to.append(stage), **options)
        assert stages == []


def test_every_perplexity_that_is_measured_is_in_the_result(llama: LanguageModel, file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": file, "tokens": 300, "method": "plain", "allocation": "uniform"}
    result = compress(llama, tmp_path / "out", ratio=0.5, measure=[0.7], quantised=True, dtype="bfloat16", **options)
    recorded = result.saved.record["compression"]["perplexity"]
    assert result.at == {0.5: result.perplexity, 0.7: recorded["at"]["0.7"]}
    assert result.quantised == recorded["quantised"]
    assert result.quantised.keys() == {"q8_0", "q4_0"}
    assert result.as_dict()["at"] == recorded["at"]
    saved = weights(result.saved.folder)
    assert recorded["bytes"]["0.5"] == sum(tensor.nbytes for tensor in saved.values())
    assert recorded["bytes"]["base"] == sum(p.numel() * 2 for p in llama.model.parameters())


def test_a_text_with_fewer_tokens_than_a_matrix_has_inputs_is_warned_of(
    make: Make, file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lm = make("llama")
    widest = max(m.shape[1] for m in lm.matrices)
    assert widest > 32
    config: dict[str, Any] = {"ratio": 0.6, "calibration": file, "overwrite": True}
    compress(lm, tmp_path / "out", tokens=500, **config)
    assert "likely to break" not in caplog.text
    lm.model.config.max_position_embeddings = 17  # passages of 16 tokens
    compress(lm, tmp_path / "out", tokens=32, **config)
    warning = f"the text has 32 tokens for calibration, and matrices have up to {widest} inputs"
    assert warning in caplog.text
    for allocation, is_warned in (("sensitivity", False), ("curvature", True)):  # which looks at the moments of inputs
        caplog.clear()
        compress(lm, tmp_path / "out", tokens=32, method="plain", allocation=allocation, **config)
        assert (warning in caplog.text) == is_warned


def test_one_process_at_a_time_compresses_a_model_on_a_text(llama: LanguageModel, file: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ratio": 0.5, "calibration": file, "tokens": 500}

    def again(*_: object) -> None:
        with pytest.raises(ExportError, match=r"another process compresses llama on this text, in .*; wait"):
            compress(llama, tmp_path / "again", **options)
        raise Killed

    def kill(*step: object) -> None:
        if step[0] == "gradients":
            raise Killed

    with pytest.raises(Killed):
        compress(llama, tmp_path / "out", on_step=lambda at, *_: at == "gradients" and again(), **options)
    with pytest.raises(Killed):
        compress(llama, tmp_path / "other", on_step=kill, **options | {"tokens": 300})
    assert len(list((llama.cache / "compressions").iterdir())) == 2


def test_without_a_text_the_model_writes_it(llama: LanguageModel, tmp_path: Path) -> None:
    result = compress(llama, tmp_path / "out", ratio=0.5, measure=[0.8], tokens=250)
    text = (tmp_path / "out" / "calibration.txt").read_bytes()
    settings = result.saved.record["compression"]
    assert settings["text"]["sha256"] == hashlib.sha256(text).hexdigest()
    assert settings["text"]["calibrated_on"] == 250 // 127 * 127
    assert settings["perplexity"]["at"].keys() == {"0.5", "0.8"}
    assert settings["perplexity"]["at"]["0.5"] == result.perplexity
    assert "--calibration calibration.txt --tokens 250 --measure 0.8" in result.saved.record["command"]
    assert "127 tokens of `calibration.txt` (the base model wrote it)" in (tmp_path / "out" / "README.md").read_text()
    assert list((llama.cache / "compressions").iterdir()) == []
    assert reproduce(result.saved.folder, llama).agrees
