"""Load a saved model and print its outputs, computed in float32; run as a script in its own process.

A dense folder is loaded without laserlm, unless it holds a model of laserlm's lab. A factored folder is loaded after a plain
``import laserlm``. An adapter is loaded by peft on its base model, the second argument. This file imports nothing of laserlm
at its top, so that it loads the model as any user would.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

REPORTS = ("missing_keys", "unexpected_keys", "mismatched_keys")
N_TOKENS = 16
N_COLUMNS = 32


def fingerprint(model: Any) -> list[list[float]] | None:
    """Return some outputs of a model on a fixed sequence of tokens, (T, 32), or None if it takes no tokens.

    The outputs are the logits of evenly spaced tokens of the vocabulary, or hidden features of a model without a head.
    """
    if model.main_input_name != "input_ids":
        return None
    ids = torch.tensor([[(7919 * i + 13) % model.config.get_text_config().vocab_size for i in range(N_TOKENS)]])
    ids = ids.to(model.device)
    inputs = {"input_ids": ids}
    if type(model).__name__.endswith("ForSequenceClassification"):
        if model.config.is_encoder_decoder:  # it looks for the token that ends the text, once
            end = model.config.eos_token_id
            ids[ids == end] = 0 if end else 1
            ids[0, -1] = end
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, : N_TOKENS // 2]
    with torch.no_grad():
        out = model(**inputs)
    values = next(value for name, value in out.items() if name != "loss" and isinstance(value, torch.Tensor))
    values = values[None] if values.ndim == 2 else values  # one row of labels for the full text
    columns = torch.linspace(0, values.shape[-1] - 1, N_COLUMNS).long()
    sample: list[list[float]] = values[0, :, columns.to(values.device)].float().tolist()  # (T, 32)
    return sample


def compute_in_float32(model: Any, rounded: Mapping[str, torch.dtype] = {}) -> Callable[[], None]:
    """Make a model compute in float32 from now on, with the weights that it has.

    The weights of a block are in float32 only while the block runs, so that a large model needs little more memory.

    Args:
        model: the model.
        rounded: dtypes that some of its tensors are rounded to first, by their names.

    Returns:
        A function that puts the weights back as they were.
    """
    tensors = model.state_dict(keep_vars=True)
    dtypes = {id(tensors[name]): dtype for name, dtype in rounded.items() if tensors[name].dtype != dtype}
    blocks = [block for module in model.modules() if isinstance(module, torch.nn.ModuleList) for block in module]
    in_blocks = {id(tensor) for block in blocks for tensor in _narrow_tensors(block, dtypes)}
    before: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles: list[Any] = []
    for tensor in _narrow_tensors(model, dtypes):
        if id(tensor) not in in_blocks:
            _widen(tensor, dtypes, before)
    for block in dict.fromkeys(blocks):
        handles += _widen_while_it_runs(block, dtypes, before)

    def undo() -> None:
        for handle in handles:
            handle.remove()
        _put_back(before)

    return undo


def _narrow_tensors(module: torch.nn.Module, rounded: Mapping[int, torch.dtype]) -> list[torch.Tensor]:
    """Return the parameters and buffers of 16 bits, and those that are rounded."""
    tensors = (*module.parameters(), *module.buffers())
    return [t for t in tensors if t.dtype in (torch.float16, torch.bfloat16) or id(t) in rounded]


def _widen(tensor: torch.Tensor, rounded: Mapping[int, torch.dtype], before: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    before.append((tensor, tensor.data))
    values = tensor.data.to(rounded.get(id(tensor), tensor.dtype))
    tensor.data = values.to(torch.promote_types(tensor.dtype, torch.float32))


def _put_back(before: list[tuple[torch.Tensor, torch.Tensor]], until: int = 0) -> None:
    while len(before) > until:
        tensor, data = before.pop()
        tensor.data = data


def _widen_while_it_runs(
    block: torch.nn.Module, rounded: Mapping[int, torch.dtype], before: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[Any]:
    """Return the handles of hooks that widen a block before it runs, and put it back afterwards; blocks may be nested."""
    starts: list[int] = []

    def widen(*_: Any) -> None:
        starts.append(len(before))
        for tensor in _narrow_tensors(block, rounded):
            _widen(tensor, rounded, before)

    def put_back(*_: Any) -> None:
        _put_back(before, starts.pop())

    return [block.register_forward_pre_hook(widen), block.register_forward_hook(put_back)]


def _with_floats(model: Any, method: str) -> Any:
    """Return a model whose weights are floats, where transformers keeps them packed after loading."""
    if method == "bitsandbytes":
        is_packed = any(type(module).__module__.partition(".")[0] == method for module in model.modules())
        return model.dequantize() if is_packed else model  # transformers fails where it finds nothing to do
    for module in model.modules() if method == "torchao" else ():
        weight: Any = module._parameters.get("weight")
        is_packed = is_traceable_wrapper_subclass(weight)
        if is_packed:
            module.weight = torch.nn.Parameter(weight.dequantize().to(model.dtype), requires_grad=False)
    return model


def main() -> None:
    """Print the outputs and the loading report of the model in the folder named on the command line, as JSON.

    The second argument is the folder or hub id of an adapter's base model.
    """
    folder = Path(sys.argv[1])
    record = json.loads((folder / "laser.json").read_text(encoding="utf-8"))
    # Records of laserlm before "imports" existed are of models that transformers knows.
    module = record.get("imports", "laserlm" if record["form"] == "factored" else None)
    if module is not None:
        importlib.import_module(module)
    import transformers

    loader = getattr(transformers, record["loader"])
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, "dtype": "auto"}
    if record["form"] == "adapter":
        source = {"pretrained_model_name_or_path": sys.argv[2], "dtype": record["dtype"]["base"]}
        source["revision"] = record["base"]["revision"] or "main"
    source["trust_remote_code"] = "--allow-remote-code" in sys.argv
    config = transformers.AutoConfig.from_pretrained(**{name: source[name] for name in source if name != "dtype"})
    quantised = getattr(config, "quantization_config", None) or {}
    if quantised.get("quant_method") in ("fp8", "compressed-tensors"):  # the outputs are those of the weights as floats
        source["config"] = config
        quantised["dequantize"] = True
    model, info = loader.from_pretrained(**source, output_loading_info=True, use_safetensors=True)
    model = _with_floats(model, str(quantised.get("quant_method")))
    if record["form"] == "adapter":
        from peft import PeftModel

        warnings.filterwarnings("error", message="Found missing adapter keys")  # peft would go on with a part of it
        model = PeftModel.from_pretrained(model, folder).get_base_model()
    if "fingerprint_dtype" in record:  # laserlm 0.1.0 recorded outputs in the dtype of the model in memory
        compute_in_float32(model)
    report = {name: sorted(map(str, info[name])) for name in REPORTS}
    outputs = None if record["fingerprint"] is None else fingerprint(model.eval())
    print(json.dumps({"fingerprint": outputs, "imported": "laserlm" in sys.modules, **report}))


if __name__ == "__main__":
    main()
