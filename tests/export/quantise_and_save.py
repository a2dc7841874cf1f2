"""Quantise a tiny model with a real package, reduce and save it, and print as JSON what transformers alone reads."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers as T
from families import bpe

from laserlm.edit import applied
from laserlm.export import load_check, save
from laserlm.models import load

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
LAYER, OTHER = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
BITS_AND_BYTES: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
}
LIMITS = {"nf4": 0.05, "fp4": 0.05, "int8": 0.05, "pack-quantized": 1e-5, "int-quantized": 0.05}
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


def logits(model: Any) -> torch.Tensor:
    """Return logits of a fixed text, as a share of the largest."""
    with torch.no_grad():
        values: torch.Tensor = model.eval()(torch.arange(12)[None]).logits
    return values / values.abs().max()


def main() -> None:
    """Run the package named on the command line in the folder named there."""
    makers: dict[str, Callable[[Path, Path], Iterator[str]]] = {
        "bitsandbytes": bits_and_bytes,
        "compressed-tensors": compressed_tensors,
    }
    package, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(0)
    torch.set_num_threads(1)
    T.LlamaForCausalLM(T.LlamaConfig(**SIZES, initializer_range=0.1)).save_pretrained(folder / "dense")
    for name in makers[package](folder / "dense", folder):
        bpe({"pad_token": "<pad>", "eos_token": "</s>"}).save_pretrained(folder / name)
        lm = load(folder / name)
        saved = save(lm, "1.fc_up@r4", folder / f"{name}-reduced").folder
        opened = T.AutoModelForCausalLM.from_pretrained(saved)
        with applied(lm, "1.fc_up@r4"):
            edited = logits(lm.model)
        answer = {
            "form": name,
            "agrees": load_check(saved).agrees,
            "packed": type(T.AutoModelForCausalLM.from_pretrained(folder / name).get_submodule(OTHER)).__name__,
            "layers": [type(opened.get_submodule(path)).__name__ for path in (LAYER, OTHER)],
            "from_edited": float((logits(opened) - edited).abs().max()),
            "from_base": float((logits(opened) - logits(lm.model)).abs().max()),
            "limit": LIMITS[name],
        }
        print(json.dumps(answer))


if __name__ == "__main__":
    main()
