from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from laserlm.errors import ScoringError
from laserlm.export.gradient_moments import gradient_moments
from laserlm.export.moments import moments_by_block
from laserlm.models import LanguageModel
from laserlm.scoring.records import TokenSequence

Make = Callable[..., LanguageModel]


def sequences(*lengths: int) -> list[TokenSequence]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 400, (n,), generator=generator).tolist() for n in lengths]
    return [TokenSequence(i, tuple(x[:-1]), tuple(x[1:]), tuple(range(len(x) - 1))) for i, x in enumerate(ids)]


ROWS = sequences(9, 9, 9, 6)


def linear(lm: LanguageModel) -> list[str]:
    return list(dict.fromkeys(m.path.rpartition(".")[0] for m in lm.matrices))


def moments(lm: LanguageModel, rows: Sequence[TokenSequence] = ROWS, batch_size: int = 2) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for matrices, of_block in moments_by_block(lm, rows, lm.matrices, batch_size=batch_size):
        assert len({(m.stack, m.layer) for m in matrices}) == 1
        result |= of_block
    return result


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "opt"])
def test_moments_are_those_of_what_goes_into_each_layer(family: str, make: Make) -> None:
    lm = make(family)
    inputs: dict[str, list[Tensor]] = {path: [] for path in linear(lm)}
    hooks = [
        lm.model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, path=path: inputs[path].append(args[0].flatten(0, -2))
        )
        for path in inputs
    ]
    with torch.no_grad():
        for row in ROWS:
            lm.model(input_ids=torch.tensor([row.ids]))
    for hook in hooks:
        hook.remove()
    result = moments(lm)
    assert result.keys() == inputs.keys()
    for path, xs in inputs.items():
        X = torch.cat(xs).double()
        torch.testing.assert_close(result[path], X.T @ X / len(X), atol=1e-5, rtol=1e-4)


def without_room(lm: LanguageModel, layer: int, rows: int) -> Callable[[], None]:
    """Let memory run out in the last layer of a block, on batches of long sequences with at least so many rows."""

    def fail(_module: object, args: tuple[Tensor]) -> None:
        if len(args[0]) >= rows and args[0].shape[1] > 20:
            raise torch.OutOfMemoryError("no room")

    handle: RemovableHandle = lm.model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(fail)
    return handle.remove


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_rows_count_once_where_memory_runs_out(layer: int, llama: LanguageModel) -> None:
    rows = sequences(30, 30, 9, 9, 30)
    expected = moments(llama, rows)
    remove = without_room(llama, layer, 2)
    result = moments(llama, rows)
    remove()
    for path, value in expected.items():
        torch.testing.assert_close(result[path], value, atol=1e-6, rtol=1e-5)


def test_a_row_that_never_fits_is_an_error(llama: LanguageModel) -> None:
    without_room(llama, 1, 1)
    with pytest.raises(ScoringError, match="single row does not fit"):
        moments(llama, sequences(30, 30))


def test_the_moments_of_one_block_are_in_memory_at_a_time(llama: LanguageModel) -> None:
    earlier: list[weakref.ref[Tensor]] = []
    for _, of_block in moments_by_block(llama, ROWS, llama.matrices):
        assert [tensor for ref in earlier if (tensor := ref()) is not None] == []
        earlier = [weakref.ref(tensor) for tensor in of_block.values()]
        of_block.clear()


def test_blocks_that_cannot_run_alone_have_the_same_moments(llama: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = moments(llama)
    model = llama.model.model
    block, forward = model.layers[1], model.layers[1].forward
    monkeypatch.setattr(block, "forward", lambda *args, **kwargs: forward(*args, **kwargs) + 0 * model.layers[0].outputs)
    model.layers[0].register_forward_hook(lambda module, _args, output: setattr(module, "outputs", output))
    result = moments(llama)
    for path, value in expected.items():
        torch.testing.assert_close(result[path], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_moments_of_gradients_are_those_of_the_summed_loss_by_the_outputs_of_each_layer(
    family: str, make: Make, tmp_path: Path
) -> None:
    lm = make(family)
    rows = sequences(9, 9, 9)
    outputs: dict[str, list[Tensor]] = {path: [] for path in linear(lm)}
    hooks = [
        lm.model.get_submodule(path).register_forward_hook(
            lambda _m, _args, output, path=path: (output.retain_grad(), outputs[path].append(output))[1]
        )
        for path in outputs
    ]
    for row in rows:
        logits = lm.model(input_ids=torch.tensor([row.ids])).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.tensor(row.targets), reduction="sum").backward()
    for hook in hooks:
        hook.remove()
    matrices = [m for m in lm.matrices if m.part_of is None]
    result = gradient_moments(lm, rows, matrices, tmp_path, batch_size=2)
    for m in matrices:
        D = torch.cat([y.grad.flatten(0, -2) for y in outputs[m.path.rpartition(".")[0]]]).double()
        expected = D.T @ D / len(D)
        torch.testing.assert_close(result[m.id].double(), expected, atol=1e-5 * float(expected.max()), rtol=1e-3)


def test_a_gradient_that_only_rows_of_a_later_chunk_have_counts_once(llama: LanguageModel, tmp_path: Path) -> None:
    """Memory runs out below a block that only short rows pass, and the long row alone is done again."""
    rows = sequences(30, 9)
    blocks = llama.model.model.layers
    blocks[2].mlp.register_forward_hook(lambda _module, _args, output: output * (output.shape[1] < 20))
    expected = gradient_moments(llama, rows, llama.matrices, tmp_path / "at once", batch_size=1)
    failed: list[Path] = []

    def fail(*_: object) -> None:
        written = list((tmp_path / "in chunks").rglob("2.fc_out.safetensors"))
        if written and not failed:
            failed.extend(written)
            raise torch.OutOfMemoryError("no room")

    blocks[1].register_forward_pre_hook(fail)
    result = gradient_moments(llama, rows, llama.matrices, tmp_path / "in chunks", batch_size=1)
    assert failed
    assert result.keys() == expected.keys() == {m.id for m in llama.matrices}
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, atol=1e-5 * float(value.max()), rtol=1e-3)


def test_moments_are_those_of_a_model_at_full_precision(llama: LanguageModel, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the caller's context is, as the gradients of the same text are. The blocks run alone there too."""
    expected = moments(llama)
    with torch.autocast("cpu", torch.bfloat16):
        result = moments(llama)
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[path], value) for path, value in expected.items())
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == []


@pytest.mark.parametrize(("tokens", "chunks"), [(80, 2), (40, 4), (1, 6)])
def test_moments_of_gradients_are_the_same_under_every_bound_of_memory(
    tokens: int, chunks: int, llama: LanguageModel, tmp_path: Path
) -> None:
    """The last bound has room for no row, and one is taken all the same."""
    rows = sequences(40, 30, 20, 20, 20, 20)
    matrices = [m for m in llama.matrices if m.part_of is None]
    of_token = 4 * 4 * 32  # four boundaries between three blocks, of 32 numbers in float32
    expected = gradient_moments(llama, rows, matrices, tmp_path / "at once")
    taken: list[tuple[int, int]] = []
    result = gradient_moments(
        llama, rows, matrices, tmp_path / "bounded", memory=of_token * tokens, on_matrix=lambda *share: taken.append(share)
    )
    assert len(taken) == chunks * len(matrices)
    assert taken == sorted(taken)
    total = len(rows) * len(matrices)
    assert (taken[-1], {of for _, of in taken}) == ((total, total), {total})
    assert taken[len(matrices) - 1][0] < total
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, atol=1e-5 * float(value.max()), rtol=1e-3)


def test_gradients_count_once_where_memory_runs_out(llama: LanguageModel, tmp_path: Path) -> None:
    rows = sequences(30, 30, 9, 9, 30)
    expected = gradient_moments(llama, rows, llama.matrices, tmp_path / "at once")
    remove = without_room(llama, 1, 2)
    result = gradient_moments(llama, rows, llama.matrices, tmp_path / "in chunks")
    remove()
    assert result.keys() == expected.keys() == {m.id for m in llama.matrices}
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, atol=1e-5 * float(value.max()), rtol=1e-3)
