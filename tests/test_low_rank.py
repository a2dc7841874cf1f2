"""The low-rank layer, and checkpoints of it in transformers' own hands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from laserlm.errors import ModelError
from laserlm.export import save
from laserlm.export.load_in_subprocess import fingerprint
from laserlm.linalg import decompose
from laserlm.low_rank import LowRankConfig, LowRankLinear, Part
from laserlm.models import LanguageModel

Make = Callable[..., LanguageModel]


@pytest.fixture
def folder(llama: LanguageModel, tmp_path: Path) -> Path:
    return save(llama, "all.all@0.2", tmp_path / "factored", form="factored", shard_size="60KB").folder


def outputs(model: nn.Module) -> Tensor:
    return torch.tensor(fingerprint(model.eval()))


def filled(layer: LowRankLinear) -> LowRankLinear:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def test_a_single_pair_is_two_products_and_the_bias() -> None:
    layer = filled(LowRankLinear(5, 7, [Part(7, 2)], bias=True))
    x = torch.randn(3, 4, 5)
    expected = x @ layer.weight.T @ layer.up0.T + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters()) == 2 * (5 + 7) + 7


@pytest.mark.parametrize("groups", [1, 3])
def test_parts_lie_in_the_rows_group_by_group(groups: int) -> None:
    parts = [Part(6, 2), Part(3), Part(3, 1), Part(9)]
    layer = filled(LowRankLinear(4, 21, parts, groups=groups, bias=True))
    down = layer.weight.split([2, 3, 1, 9])
    blocks = [layer.up0 @ down[0], down[1], layer.up2 @ down[2], down[3]]
    rows = []
    for g in range(groups):  # every part has its share of each group's rows, in order
        rows += [b[g * len(b) // groups : (g + 1) * len(b) // groups] for b in blocks]
    weight = torch.cat(rows)
    torch.testing.assert_close(layer.dense(), weight)
    x = torch.randn(2, 4)
    torch.testing.assert_close(layer(x), x @ weight.T + layer.bias)


@pytest.mark.parametrize("bias", [False, True])
def test_pivots_and_coefficients_give_the_rows_in_their_order(bias: bool) -> None:
    layer = filled(LowRankLinear(5, 9, [Part(4, 2, pivoted=True), Part(2), Part(3, 1, pivoted=True)], bias=bias))
    layer.order = torch.tensor([4, 0, 8, 1, 2, 7, 3, 6, 5], dtype=torch.int32)
    pivots, dense, pivot = layer.weight.split([2, 2, 1])
    stack = torch.cat([pivots, layer.up0 @ pivots, dense, pivot, layer.up2 @ pivot])
    weight = stack[layer.order.long()]
    torch.testing.assert_close(layer.dense(), weight)
    x = torch.randn(3, 4, 5)
    for tokens in (x, x[:1, :1], x[0, 0]):  # a single token has a path of its own
        torch.testing.assert_close(layer(tokens), tokens @ weight.T + (0 if layer.bias is None else layer.bias))
    assert layer.up0.shape == (2, 2)
    assert layer.up2.shape == (2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x).float(), layer(x.bfloat16()).float())


class Uncastable(Tensor):
    """A weight that cannot be cast, as those of torchao in 8 bits."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse a cast, and run everything else."""
        if func is Tensor.to:
            raise NotImplementedError("no cast")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_factors_that_cannot_be_cast_are_multiplied_as_they_are() -> None:
    layer = filled(LowRankLinear(6, 5, [Part(5, 2)]))
    x = torch.randn(3, 6)
    expected = layer(x)
    layer.up0 = nn.Parameter(layer.up0.detach().as_subclass(Uncastable), requires_grad=False)
    torch.testing.assert_close(layer(x).as_subclass(Tensor), expected)


def test_rank_zero_gives_the_bias_alone() -> None:
    layer = filled(LowRankLinear(5, 7, [Part(7, 0)], bias=True))
    torch.testing.assert_close(layer(torch.randn(2, 5)), layer.bias.expand(2, 7))


@pytest.mark.parametrize(("rows", "groups"), [(6, 1), (8, 1), (7, 2)])
def test_parts_must_make_up_the_rows(rows: int, groups: int) -> None:
    with pytest.raises(ValueError, match="do not sum to"):
        LowRankLinear(5, 7, [Part(rows, 2)], groups=groups)


def test_dense_rows_alone_are_no_low_rank_layer() -> None:
    with pytest.raises(ValueError, match="plain linear layer"):
        LowRankLinear(5, 7, [Part(7)])


def test_a_checkpoint_of_a_newer_form_is_refused() -> None:
    with pytest.raises(ModelError, match="format 99"):
        LowRankConfig({}, format=99)


def test_a_folder_of_laserlm_0_1_0_still_loads(llama: LanguageModel, tmp_path: Path) -> None:
    model = llama.model
    path = "model.layers.1.mlp.up_proj"
    old = model.get_submodule(path)
    pair = decompose(old.weight).factors(7)
    layer = LowRankLinear(32, 48, [Part(48, 7)])
    layer.up0.data, layer.weight.data = (factor.contiguous() for factor in pair)
    model.set_submodule(path, layer)
    try:
        expected = outputs(model)
        model.config.quantization_config = {
            "quant_method": "laserlm",
            "format": 1,
            "modules": {path: {"parts": [[48, 7]], "groups": 1}},
        }
        model.save_pretrained(tmp_path / "old")
    finally:
        model.set_submodule(path, old)
        del model.config.quantization_config
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "old")
    assert loaded.get_submodule(path).order is None
    torch.testing.assert_close(outputs(loaded), expected)


def test_it_loads_sharded_and_is_saved_again(folder: Path, tmp_path: Path) -> None:
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.model.layers[1].mlp.up_proj, LowRankLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(outputs(again), outputs(model))


def test_it_loads_without_its_head_in_another_dtype_and_spread_over_devices(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(AutoModel.from_pretrained(folder).layers[0].self_attn.q_proj, LowRankLinear)
    half = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(outputs(half), outputs(model), atol=0.15, rtol=0.05)
    devices = dict.fromkeys(("model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb", "model.layers.0"), "cpu")
    devices |= {"model.layers.1": "disk", "model.layers.2": "cpu"}
    spread = AutoModelForCausalLM.from_pretrained(folder, device_map=devices, offload_folder=tmp_path / "offload")
    assert torch.equal(outputs(spread), outputs(model))
    assert model.half().dtype == torch.float16  # which transformers forbids for weights that are truly quantised


def test_a_head_of_another_kind_of_model_learns_what_is_missing(folder: Path, make: Make, tmp_path: Path) -> None:
    other = make("gptj").model
    other.config.quantization_config = {"quant_method": "laserlm", "modules": {"model.layers.0.mlp.up_proj": {}}}
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="has no such layer"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "other")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks transformers by a name that is going
def test_a_lora_on_top_takes_a_step_and_is_saved(folder: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    trained = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    ids = torch.arange(20, 36)[None]
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    tuned.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        written = tuned.eval()(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(folder)
        assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())
        assert not torch.allclose(base(input_ids=ids).logits, written)
        read = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(read(input_ids=ids).logits, written)


def test_the_factors_themselves_can_be_trained(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    ids = torch.arange(20, 36)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.grad.abs().sum() > 0
    assert layer.up0.grad.abs().sum() > 0
