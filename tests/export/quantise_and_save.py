"""Quantise a tiny model with a real package, reduce and save it, and print as JSON what transformers alone reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as T
from families import bpe

from laserlm.edit import applied
from laserlm.export import load_check, save
from laserlm.models import load
from laserlm.models.weight_files import stored_tensors

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
GPT2 = {"n_embd": 64, "n_head": 2, "n_layer": 2, "n_positions": 128, "vocab_size": 512, "bos_token_id": 2, "eos_token_id": 3}
LLAMA_LAYERS = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
GPT2_LAYERS = "transformer.h.1.attn.c_proj", "transformer.h.0.attn.c_proj"
BITS_AND_BYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
LIMITS = {"nf4": 0.05, "fp4": 0.05, "int8": 0.05, "pack-quantized": 1e-5, "int-quantized": 0.05, "int8-weights": 1e-5}
"""Largest difference of logits, as a share of the largest one: eight bits also round the inputs of layers, and bitsandbytes
computes four bits in bfloat16 on a CPU."""


def bits_and_bytes(dense: Path, folder: Path) -> Iterator[str]:
    """Write the model in three forms of bitsandbytes."""
    for name, settings in BITS_AND_BYTES.items():
        config = T.BitsAndBytesConfig(**settings)
        T.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(folder / name)
        yield name


def compressed_tensors(dense: Path, folder: Path) -> Iterator[str]:
    """Write the model in two forms of compressed-tensors."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    forms: dict[str, dict[str, Any]] = {
        "pack-quantized": {"weights": QuantizationArgs(num_bits=4, strategy="group", group_size=32)},
        "int-quantized": {
            "weights": QuantizationArgs(num_bits=8, strategy="channel"),
            "input_activations": QuantizationArgs(num_bits=8, strategy="token", dynamic=True),
        },
    }
    for name, scheme in forms.items():
        model = T.AutoModelForCausalLM.from_pretrained(dense)
        groups = {"group_0": QuantizationScheme(targets=["Linear"], **scheme)}
        config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format=name, quantization_status="frozen")
        apply_quantization_config(model, config)
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                rows = module.weight.data.unflatten(1, (module.weight_scale.shape[1], -1))
                module.weight_scale.data = rows.abs().amax(-1) / (2 ** (scheme["weights"].num_bits - 1) - 1)
        compressor = ModelCompressor.from_pretrained_model(model, quantization_format=name)
        compressor.compress_model(model)
        model.save_pretrained(folder / name)
        compressor.update_config(str(folder / name))
        yield name


def torchao(dense: Path, folder: Path) -> Iterator[str]:
    """Write the model with weights of eight bits."""
    from torchao.quantization import Int8WeightOnlyConfig

    config = T.TorchAoConfig(Int8WeightOnlyConfig(version=2))
    T.AutoModelForCausalLM.from_pretrained(dense, quantization_config=config).save_pretrained(folder / "int8-weights")
    yield "int8-weights"


def logits(model: Any) -> torch.Tensor:
    """Return logits of a fixed text, as a share of the largest."""
    with torch.no_grad():
        values: torch.Tensor = model.eval()(torch.arange(12)[None]).logits
    return values / values.abs().max()


def has_codes(folder: Path, layer: str) -> bool:
    """Return whether a checkpoint stores a layer in integers."""
    stored = stored_tensors(folder)
    return any(tensor.dtype[0] in "IU" for name, tensor in stored.items() if name.startswith(f"{layer}."))


def main() -> None:
    """Run the package named on the command line in the folder named there."""
    makers: dict[str, Callable[[Path, Path], Iterator[str]]] = {
        "bitsandbytes": bits_and_bytes,
        "compressed-tensors": compressed_tensors,
        "torchao": torchao,
    }
    package, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    T.LlamaForCausalLM(T.LlamaConfig(**SIZES, initializer_range=0.1)).save_pretrained(folder / "llama")
    cases = [("llama", "1.fc_up@r4", LLAMA_LAYERS), ("llama", "all.all@0.5", LLAMA_LAYERS)]
    if package == "bitsandbytes":  # it alone packs layers of GPT-2
        T.GPT2LMHeadModel(T.GPT2Config(**GPT2, initializer_range=0.1)).save_pretrained(folder / "gpt2")
        cases.append(("gpt2", "1.out_proj@r4", GPT2_LAYERS))
    for model in dict.fromkeys(model for model, _, _ in cases):
        for name in makers[package](folder / model, folder / "packed" / model):
            source = folder / "packed" / model / name
            bpe({"pad_token": "<pad>", "eos_token": "</s>"}).save_pretrained(source)
            for reduction, layers in [case[1:] for case in cases if case[0] == model]:
                out = folder / "reduced" / model / f"{name}-{reduction}"
                print(json.dumps({"form": name} | reduced(source, reduction, layers, out) | {"limit": LIMITS[name]}))


def reduced(source: Path, reduction: str, layers: Sequence[str], out: Path) -> dict[str, Any]:
    """Save a reduction, and return what transformers alone makes of it."""
    lm = load(source)
    with applied(lm, reduction):
        edited = logits(lm.model)
    base = logits(lm.model)
    saved = save(lm, reduction, out).folder
    opened = T.AutoModelForCausalLM.from_pretrained(saved)
    return {
        "reduction": reduction,
        "agrees": load_check(saved).agrees,
        "has_codes": [has_codes(saved, layer) for layer in layers],
        "layers": [type(opened.get_submodule(layer)).__name__ for layer in layers],
        "from_edited": float((logits(opened) - edited).abs().max()),
        "from_base": float((logits(opened) - base).abs().max()),
    }


if __name__ == "__main__":
    main()
