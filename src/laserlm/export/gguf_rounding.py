"""Round the weights of a model as the types of a GGUF file do, to compare a compressed model with a quantised one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from laserlm.edit.apply import label_as_edited, replaced_parameters
from laserlm.models.language_model import LanguageModel

WEIGHTS_PER_SCALE = 32
"""Number of neighbouring weights of a row that share a scale."""
QUANTISED_TYPES = ("q8_0", "q4_0")
"""Types of GGUF files that the package gguf can write: 8 and 4 bits, with a scale of 16 bits for each block."""


@contextmanager
def rounded_to(lm: LanguageModel, kind: str) -> Iterator[int]:
    """Round all matrices of a model to a type of GGUF inside a ``with`` block, and yield the bytes that the weights take.

    Embedding and output layer are rounded to q8_0 at least. What has no rows of a multiple of 32 numbers stays as it is and
    counts with 4 bytes for a number. llama.cpp also rounds activations, which is not done here.

    Args:
        lm: the unchanged model.
        kind: ``q8_0`` or ``q4_0``.
    """
    modules = dict(lm.model.named_modules())
    ends = (lm.model.get_input_embeddings(), lm.model.get_output_embeddings())
    size = 0
    of_parameter: dict[str, str] = {}
    for path, parameter in lm.model.named_parameters():  # a tied parameter is listed once
        module = modules[path.rpartition(".")[0]]
        row = parameter.shape[0] if isinstance(module, Conv1D) else parameter.shape[-1]
        if parameter.ndim < 2 or row % WEIGHTS_PER_SCALE:
            size += 4 * parameter.numel()
            continue
        of_parameter[path] = "q8_0" if module in ends else kind
        block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[of_parameter[path].upper()]][1]
        size += parameter.numel() // WEIGHTS_PER_SCALE * block_bytes

    def make(path: str) -> Tensor:
        return _rounded(lm.model.get_parameter(path), modules[path.rpartition(".")[0]], of_parameter[path])

    with replaced_parameters(lm, of_parameter, make), label_as_edited(lm, kind):
        yield size


def _rounded(parameter: nn.Parameter, module: nn.Module, kind: str) -> Tensor:
    ggml_type = GGMLQuantizationType[kind.upper()]
    rows = parameter.data.T if isinstance(module, Conv1D) else parameter.data
    values = rows.float().cpu().contiguous().numpy()
    rounded = torch.from_numpy(quants.dequantize(quants.quantize(values, ggml_type), ggml_type)).to(parameter.data)
    return rounded.T.contiguous() if isinstance(module, Conv1D) else rounded
