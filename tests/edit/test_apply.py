from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from laserlm.edit import DecompositionCache, applied, factored, removed_part, resolve
from laserlm.errors import MatrixError, SpecError, WeightError
from laserlm.models import LanguageModel, read_matrix
from laserlm.reductions import Intervention

Make = Callable[..., LanguageModel]


def snapshot(lm: LanguageModel) -> dict[str, tuple[int, Tensor]]:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in lm.model.named_parameters(remove_duplicate=False)}


def assert_same(lm: LanguageModel, before: dict[str, tuple[int, Tensor]]) -> None:
    now = dict(lm.model.named_parameters(remove_duplicate=False))
    assert now.keys() == before.keys()
    for name, (pointer, value) in before.items():
        assert now[name].data_ptr() == pointer, name
        assert torch.equal(now[name], value), name


def truncated(weight: Tensor, rank: int, keep: str = "top") -> np.ndarray:
    U, S, Vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    components = slice(0, rank) if keep == "top" else slice(len(S) - rank, None)
    return U[:, components] * S[components] @ Vh[components]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_matrix_becomes_its_truncation_and_comes_back(family: str, make: Make) -> None:
    lm = make(family)
    before = snapshot(lm)
    originals = {m.id: read_matrix(lm.model, m).clone() for m in lm.matrices}
    with applied(lm, "all.all@0.3"):
        for m in lm.matrices:
            if not m.parts:
                expected = truncated(originals[m.id], int(0.3 * m.max_rank))
                np.testing.assert_allclose(read_matrix(lm.model, m).numpy(), expected, atol=2e-6)
        changed = {m.path for m in lm.matrices}
        for name, parameter in lm.model.named_parameters():
            assert torch.equal(parameter, before[name][1]) == (name not in changed), name
    assert_same(lm, before)
    assert lm.active == []


def experts(lm: LanguageModel) -> Tensor:
    """Return the stacked weights (experts, out, in) of the inputs of block 1."""
    (path,) = {m.path for m in lm.matrices if m.id.startswith("1.experts.") and m.type == "fc_in"}
    return lm.model.get_parameter(path)


def test_one_expert_is_edited_where_it_is_and_the_others_are_not_copied(make: Make) -> None:
    lm = make("mixtral")
    before, stack, untouched_hash = snapshot(lm), experts(lm), lm.hash
    with CopiedBytes() as copied, applied(lm, "1.experts.1.fc_in@r4", cache=DecompositionCache()):
        assert experts(lm).data_ptr() == before["model.layers.1.mlp.experts.gate_up_proj"][0]
        assert not torch.equal(stack[1], before["model.layers.1.mlp.experts.gate_up_proj"][1][1])
        for e in (0, 2):
            assert torch.equal(stack[e], before["model.layers.1.mlp.experts.gate_up_proj"][1][e])
    assert copied.most < stack.nbytes
    assert_same(lm, before)
    assert lm.hash == untouched_hash
    with torch.no_grad():
        stack[1] *= 2
    assert lm.hash != untouched_hash


class CopiedBytes(TorchDispatchMode):
    """Notes the size of the largest copy of a tensor that is made inside a ``with`` block."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.clone.default:
            self.most = max(self.most, result.nbytes)
        return result


def test_edits_of_one_expert_nest_and_come_back_after_an_exception(make: Make) -> None:
    lm = make("mixtral")
    before = snapshot(lm)
    m = next(m for m in lm.matrices if m.id == "1.experts.1.fc_in")
    original = read_matrix(lm.model, m).clone()

    def fail() -> None:
        with applied(lm, "1.experts.1.fc_in@drop0+1.experts.1.fc_up@r3+1.experts.2.fc_in@r2"):
            outer = snapshot(lm)
            with applied(lm, "1.experts.1.fc_in@drop0"):
                expected = without(original, [0, 1])
                np.testing.assert_allclose(read_matrix(lm.model, m).numpy(), expected, atol=2e-6)
            assert_same(lm, outer)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_same(lm, before)
    with torch.no_grad():
        experts(lm)[2, 0, 0] = float("nan")
    with pytest.raises(WeightError, match=r"1\.experts\.2\.fc_in"), applied(lm, "1.experts.1.fc_in@r2+1.experts.2.fc_in@r2"):
        pass
    assert torch.equal(read_matrix(lm.model, m), original)


def test_experts_in_shared_memory_are_not_written_for_other_processes_to_see(make: Make) -> None:
    lm = make("mixtral")
    lm.model.share_memory()
    before = snapshot(lm)
    pointer, original = before["model.layers.1.mlp.experts.gate_up_proj"]
    shared = experts(lm).data
    with applied(lm, "1.experts.1.fc_in@r4"):
        assert experts(lm).data_ptr() != pointer
        assert torch.equal(shared, original)
    assert_same(lm, before)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bloom", "phi3", "decision_transformer"])
def test_a_fused_matrix_reduced_whole_differs_from_its_parts(family: str, make: Make) -> None:
    lm = make(family)
    fused = next(m for m in lm.matrices if m.id == "1.qkv")
    original = read_matrix(lm.model, fused).clone()
    with applied(lm, "1.qkv@r4"):
        full = read_matrix(lm.model, fused).clone()
    with applied(lm, "1.q_proj@r4+1.k_proj@r4+1.v_proj@r4"):
        parts = read_matrix(lm.model, fused).clone()
    np.testing.assert_allclose(full.numpy(), truncated(original, 4), atol=2e-6)
    assert torch.linalg.matrix_rank(full) == 4
    assert torch.linalg.matrix_rank(parts) == 12


def test_one_part_of_a_fused_matrix_leaves_the_others_alone(make: Make) -> None:
    lm = make("gpt_neox")
    q, k, v = (next(m for m in lm.matrices if m.id == f"2.{n}") for n in ("q_proj", "k_proj", "v_proj"))
    originals = [read_matrix(lm.model, m).clone() for m in (q, k, v)]
    with applied(lm, "2.k_proj@r1"):
        assert torch.equal(read_matrix(lm.model, q), originals[0])
        assert torch.equal(read_matrix(lm.model, v), originals[2])
        np.testing.assert_allclose(read_matrix(lm.model, k).numpy(), truncated(originals[1], 1), atol=2e-6)


def test_the_weights_come_back_after_an_exception(llama: LanguageModel) -> None:
    before = snapshot(llama)

    def fail() -> None:
        with applied(llama, "all.all@0.1"):
            assert llama.intervention == "all.all@0.1"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_same(llama, before)
    assert llama.intervention == ""


def test_blocks_nest_and_each_takes_back_its_own(llama: LanguageModel) -> None:
    before = snapshot(llama)
    with applied(llama, "1.mlp@0.5"):
        outer = snapshot(llama)
        with applied(llama, "1.fc_in@r3+2.q_proj@0"):
            assert llama.intervention == "1.mlp@0.5+1.fc_in@r3+2.q_proj@0"
            with applied(llama, ""):
                assert llama.active == ["1.mlp@0.5", "1.fc_in@r3+2.q_proj@0"]
        assert_same(llama, outer)
    assert_same(llama, before)


def test_tied_weights_change_together_and_come_back(make: Make) -> None:
    lm = make("llama")
    layers = lm.model.model.layers
    layers[2].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    before = snapshot(lm)
    with applied(lm, "2.fc_up@r2"):
        assert layers[0].mlp.up_proj.weight is layers[2].mlp.up_proj.weight
        assert torch.linalg.matrix_rank(layers[0].mlp.up_proj.weight.detach()) == 2
    assert_same(lm, before)
    assert lm.model.lm_head.weight is lm.model.model.embed_tokens.weight


def test_blocks_that_are_one_module_are_edited_once(make: Make) -> None:
    lm = make("llama")
    lm.model.model.layers[2] = lm.model.model.layers[1]
    before = snapshot(lm)
    edits = resolve(lm.matrices, "all.mlp@0.5")
    assert [e.matrix.id for e in edits] == [f"{layer}.{name}" for layer in (0, 1) for name in ("fc_in", "fc_up", "fc_out")]
    with applied(lm, "all.mlp@0.5"):
        assert torch.linalg.matrix_rank(lm.model.model.layers[2].mlp.up_proj.weight.detach()) == 16
    assert_same(lm, before)
    with pytest.raises(MatrixError, match="are the same weights"):
        resolve(lm.matrices, "1.fc_in@0.5+2.fc_in@0.4")


def test_rho_one_is_the_untouched_tensor_and_rank_zero_is_zero(llama: LanguageModel) -> None:
    weight = llama.model.model.layers[1].mlp.gate_proj.weight
    pointer = weight.data_ptr()
    with applied(llama, "1.fc_in@1"):
        assert weight.data_ptr() == pointer
    with applied(llama, "1.fc_in@1:bottom"):
        assert weight.data_ptr() == pointer
    with applied(llama, "1.fc_in@0"):
        assert torch.count_nonzero(weight) == 0
    with applied(llama, "1.fc_in@0.0001"):
        assert torch.count_nonzero(weight) == 0


def test_weights_keep_their_dtype_and_are_truncated_in_float32(make: Make) -> None:
    lm = make("llama")
    lm.model.to(torch.bfloat16)
    weight = lm.model.model.layers[0].mlp.down_proj.weight
    expected = torch.from_numpy(truncated(weight.detach().float(), 5)).float().bfloat16()
    with applied(lm, "0.fc_out@r5"):
        assert weight.dtype == torch.bfloat16
        torch.testing.assert_close(weight.detach(), expected, atol=0, rtol=2**-7)


def test_what_top_and_bottom_keep_adds_up_to_the_matrix(make: Make) -> None:
    lm = make("gpt_neox")
    text = "1.fc_in@0.3+0-2.q_proj@r3"
    other = removed_part(lm.matrices, text)
    assert str(other) == "0.q_proj@r29:bottom+1.fc_in@r23:bottom+1.q_proj@r29:bottom+2.q_proj@r29:bottom"
    for id in ("1.fc_in", "0.q_proj", "2.q_proj"):
        m = next(m for m in lm.matrices if m.id == id)
        full = read_matrix(lm.model, m).clone()
        with applied(lm, text):
            top = read_matrix(lm.model, m).clone()
        with applied(lm, other):
            bottom = read_matrix(lm.model, m).clone()
        torch.testing.assert_close(top + bottom, full, atol=1e-5, rtol=0)
    assert [e.rank for e in resolve(lm.matrices, removed_part(lm.matrices, other))] == [3, 9, 3, 3]


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_reference_uses_the_iterations_of_the_published_code(family: str, make: Make) -> None:
    lm = make(family)
    m = next(m for m in lm.matrices if m.id == "1.fc_in")
    torch.manual_seed(7)
    U, S, V = torch.svd_lowrank(read_matrix(lm.model, m).clone(), q=6, niter=20 if family == "roberta" else 2)
    with applied(lm, "1.fc_in@r6:reference", seed=7):
        torch.testing.assert_close(read_matrix(lm.model, m), U * S @ V.T)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("1.fc_in@0.5+1.mlp@0.2", MatrixError, "are the same weights; reduce a matrix once"),
        ("1.fc_in@r40", MatrixError, "asks for rank 40; the selected matrices have 32 at most"),
        ("1.fc_in@1.5", SpecError, "out of range"),
        ("7.fc_in@0.5", MatrixError, "no layer 7"),
    ],
)
def test_an_intervention_that_cannot_be_applied_changes_nothing(
    text: str, error: type[Exception], message: str, llama: LanguageModel
) -> None:
    before = snapshot(llama)
    with pytest.raises(error, match=message), applied(llama, text):
        pass
    assert_same(llama, before)


def test_a_fused_matrix_and_its_part_exclude_each_other_but_two_parts_do_not(make: Make) -> None:
    lm = make("gpt2")
    with pytest.raises(MatrixError, match="are the same weights"):
        resolve(lm.matrices, "0.qkv@0.5+0.k_proj@0.5")
    assert len(resolve(lm.matrices, "0.q_proj@0.5+0.k_proj@0.5")) == 2
    assert len(resolve(lm.matrices, "0.qkv@0.5+1.k_proj@0.5")) == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_weights_are_reported_and_what_was_edited_before_comes_back(bad: float, llama: LanguageModel) -> None:
    with torch.no_grad():
        llama.model.model.layers[2].mlp.up_proj.weight[3, 4] = bad
    pointers = {name: p.data_ptr() for name, p in llama.model.named_parameters()}
    with (
        pytest.raises(WeightError, match=r"cannot reduce 2\.fc_up .*1 values that are NaN or inf"),
        applied(llama, "0-2.fc_up@0.5"),
    ):
        pass
    assert {name: p.data_ptr() for name, p in llama.model.named_parameters()} == pointers
    assert llama.active == []


def test_the_hash_of_a_model_is_that_of_its_unchanged_weights(make: Make) -> None:
    from laserlm.errors import ModelError

    lm, same, other = make("llama"), make("llama"), make("llama", seed=1)
    with applied(lm, "1.fc_in@0.5"), pytest.raises(ModelError, match="leave the 'with applied' block"):
        _ = lm.hash
    assert lm.hash == same.hash != other.hash
    with applied(lm, "1.fc_in@0.5"), pytest.raises(ModelError, match=r"changed by 1\.fc_in@0\.5"):
        _ = lm.hash


def test_logits_are_those_of_a_model_with_the_truncated_weights_written_in(make: Make) -> None:
    lm, copy = make("gptj"), make("gptj")
    with torch.no_grad():
        weight = copy.model.transformer.h[1].mlp.fc_in.weight
        weight.copy_(torch.from_numpy(truncated(weight, 6)))
        ids = torch.tensor([[1, 50, 99, 7]])
        with applied(lm, Intervention.parse("1.fc_in@r6"), cache=DecompositionCache()):
            torch.testing.assert_close(lm.model(ids).logits, copy.model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("keep", ["top", "bottom"])
def test_blocks_of_rows_are_reduced_each_by_itself(keep: str, make: Make) -> None:
    lm = make("llama")
    before = snapshot(lm)
    m = next(m for m in lm.matrices if m.id == "1.fc_in")  # 48 x 32
    original = read_matrix(lm.model, m).clone()
    suffix = ":bottom" if keep == "bottom" else ""
    with applied(lm, f"1.fc_in@0.25{suffix}:split4"):
        actual = read_matrix(lm.model, m).numpy()
    # Four blocks of 12 rows and 12 singular values, of which a quarter, 3, is kept.
    expected = np.concatenate([truncated(original[i : i + 12], 3, keep) for i in (0, 12, 24, 36)])
    np.testing.assert_allclose(actual, expected, atol=2e-6)
    assert_same(lm, before)
    (edit,) = resolve(lm.matrices, "1.fc_in@0.25:split4")
    assert (edit.rank, edit.max_rank, edit.is_identity) == (3, 12, False)
    assert resolve(lm.matrices, "1.fc_in@1:split4")[0].is_identity


def test_an_edit_and_its_complement_add_up_block_by_block(make: Make) -> None:
    lm = make("llama")
    m = next(m for m in lm.matrices if m.id == "1.fc_in")
    original = read_matrix(lm.model, m).clone()
    other = removed_part(lm.matrices, "1.fc_in@0.25:split4")
    assert str(other) == "1.fc_in@r9:bottom:split4"
    halves = []
    for text in ("1.fc_in@0.25:split4", other):
        with applied(lm, text):
            halves.append(read_matrix(lm.model, m).clone())
    torch.testing.assert_close(halves[0] + halves[1], original, atol=1e-5, rtol=1e-4)


def test_rows_that_cannot_be_cut_into_equal_blocks_are_reported(make: Make) -> None:
    with pytest.raises(MatrixError, match=r"48 rows of 1\.fc_in cannot be cut into 5 equal blocks"):
        resolve(make("llama").matrices, "1.fc_in@0.25:split5")


def test_an_edit_inside_of_a_factored_model_is_refused(make: Make) -> None:
    lm = make("llama")
    with factored(lm, "1.fc_in@0.2"), pytest.raises(WeightError, match="two factors"), applied(lm, "1.fc_in@0.1"):
        pass


def without(weight: Tensor, components: list[int]) -> np.ndarray:
    """Return a matrix without some components, from NumPy's own decomposition."""
    U, S, Vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return weight.double().numpy() - U[:, components] * S[components] @ Vh[components]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_matrix_loses_the_named_components_and_comes_back(family: str, make: Make) -> None:
    lm = make(family)
    before = snapshot(lm)
    originals = {m.id: read_matrix(lm.model, m).clone() for m in lm.matrices}
    with applied(lm, "all.all@drop0,3,9-11"):
        for m in lm.matrices:
            if not m.parts:
                expected = without(originals[m.id], [0, 3, 9, 10, 11])
                np.testing.assert_allclose(read_matrix(lm.model, m).numpy(), expected, atol=2e-6)
    assert_same(lm, before)


def test_the_first_and_the_last_components_are_those_of_bottom_and_top(make: Make) -> None:
    lm = make("phi3")
    cases = [("drop0-3", "r28:bottom"), ("drop4-31", "r4"), ("drop0-31", "r0"), ("drop0-7:split2", "r16:bottom:split2")]
    for dropped, kept in cases:
        values = []
        for size in (dropped, kept):
            with applied(lm, f"1.fc_in@{size}+1.q_proj@{size.replace('r16', 'r8')}"):
                values.append([read_matrix(lm.model, m).clone() for m in lm.matrices if m.id in ("1.fc_in", "1.q_proj")])
        torch.testing.assert_close(values[0], values[1], atol=2e-6, rtol=0)


def test_components_of_blocks_of_rows_are_those_of_each_block(llama: LanguageModel) -> None:
    m = next(m for m in llama.matrices if m.id == "1.fc_in")  # 48 x 32
    original = read_matrix(llama.model, m).clone()
    with applied(llama, "1.fc_in@drop1,5:split4"):
        actual = read_matrix(llama.model, m).numpy()
    np.testing.assert_allclose(actual, np.concatenate([without(block, [1, 5]) for block in original.chunk(4)]), atol=2e-6)


def test_the_complement_of_components_drops_the_others(llama: LanguageModel) -> None:
    m = next(m for m in llama.matrices if m.id == "1.fc_in")
    original = read_matrix(llama.model, m).clone()
    other = removed_part(llama.matrices, "1.fc_in@drop0,3,17-20")
    assert str(other) == "1.fc_in@drop1-2,4-16,21-31"
    with applied(llama, other):
        np.testing.assert_allclose(
            read_matrix(llama.model, m).numpy(), original.numpy() - without(original, [0, 3, 17, 18, 19, 20]), atol=2e-6
        )
    assert removed_part(llama.matrices, other) == Intervention.parse("1.fc_in@drop0,3,17-20")
    assert resolve(llama.matrices, removed_part(llama.matrices, "1.fc_in@drop0-31"))[0].is_identity


def test_strengths_scale_the_components_of_each_matrix(make: Make) -> None:
    lm = make("phi3")  # a fused matrix too
    before = snapshot(lm)
    originals = {m.id: read_matrix(lm.model, m).clone() for m in lm.matrices}
    with applied(lm, "1.fc_in@scale0=0.5,3=0,9-11=-2+1.q_proj@scale2=1.5"):
        for id, strengths in (("1.fc_in", {0: 0.5, 3: 0, 9: -2, 10: -2, 11: -2}), ("1.q_proj", {2: 1.5})):
            U, S, Vh = np.linalg.svd(originals[id].double().numpy(), full_matrices=False)
            S *= [strengths.get(i, 1) for i in range(len(S))]
            m = next(m for m in lm.matrices if m.id == id)
            np.testing.assert_allclose(read_matrix(lm.model, m).numpy(), U * S @ Vh, atol=2e-6)
    assert_same(lm, before)


def test_the_complement_of_strengths_is_what_they_take_away(llama: LanguageModel) -> None:
    m = next(m for m in llama.matrices if m.id == "1.fc_in")
    original = read_matrix(llama.model, m).clone()
    text = "1.fc_in@scale0=0.25,3=0,5-30=1.5"
    other = removed_part(llama.matrices, text)
    assert str(other) == "1.fc_in@scale0=0.75,1-2=0,4=0,5-30=-0.5,31=0"  # the strength of 3 is 1
    parts = []
    for one in (text, other):
        with applied(llama, one):
            parts.append(read_matrix(llama.model, m).clone())
    torch.testing.assert_close(parts[0] + parts[1], original, atol=2e-6, rtol=0)


def test_a_component_that_a_matrix_lacks_is_named_with_those_it_has(llama: LanguageModel) -> None:
    with pytest.raises(MatrixError, match=r"0\.k_proj has no component 20; its components are 0 to 15"):
        resolve(llama.matrices, "0.attn@drop3,20")
    with pytest.raises(MatrixError, match=r"0\.k_proj has no component 20; its components are 0 to 15"):
        resolve(llama.matrices, "0.attn@scale20=2")
    with pytest.raises(MatrixError, match="are the same weights; reduce a matrix once"):
        resolve(llama.matrices, "1.fc_in@drop3+1.fc_in@drop4")


def test_reductions_are_read_from_a_file(llama: LanguageModel, tmp_path: Path) -> None:
    intervention = Intervention.parse("1.fc_in@drop0,3+2.fc_up@r4")
    intervention.write(tmp_path / "edit.json")
    with applied(llama, [f"@{tmp_path / 'edit.json'}", "0.fc_in@0.5"]):
        assert llama.intervention == f"0.fc_in@0.5+{intervention}"
    with factored(llama, f"@{tmp_path / 'edit.json'}") as stored:
        assert [m.matrix for m in stored] == ["1.fc_in", "2.fc_up"]
