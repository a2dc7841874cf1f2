"""Round the bundled model's weights as llama.cpp's q4_K_M does, with llama.cpp's own functions, and print size and perplexity.

The functions are those of the package xllamacpp (``pip install xllamacpp``, in another environment), which has no quantiser of
files. Types are chosen by the rules of llama.cpp's ``llama-quant.cpp`` for a Llama with tied embeddings: q4_K, or q6_K for
``v_proj`` and ``down_proj`` of the first and last eighth of the blocks and of every third between, and instead of them q5_0 and
q8_0 where a row has no multiple of 256 numbers. The embedding is q8_0.

Run: python benchmarks/k_quants.py --library .../xllamacpp/xllamacpp.abi3.so --text FILE [--held-out CHARACTERS]
"""

from __future__ import annotations

import argparse
import ctypes
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import Tensor

import laserlm as laser
from laserlm.export.calibration_text import PASSAGE_TOKENS, read_calibration_text
from laserlm.scoring.evaluate import text_perplexity

SUPER_BLOCK = 256
"""Numbers of a row that a K-quant stores together."""


def type_of(path: str, row: int, blocks: int) -> GGMLQuantizationType:
    """Return the type of a matrix by its name in PyTorch or in a GGUF file, the length of its rows and the number of blocks."""
    if (in_block := re.search(r"\b(?:layers|blk)\.(\d+)\.", path)) is None:
        return GGMLQuantizationType.Q8_0
    layer = int(in_block[1])
    has_more = layer < blocks // 8 or layer >= 7 * blocks // 8 or (layer - blocks // 8) % 3 == 2
    if has_more and re.search("v_proj|down_proj|attn_v|ffn_down", path):
        return GGMLQuantizationType.Q8_0 if row % SUPER_BLOCK else GGMLQuantizationType.Q6_K
    return GGMLQuantizationType.Q5_0 if row % SUPER_BLOCK else GGMLQuantizationType.Q4_K


def open_library(file: Path) -> ctypes.CDLL:
    """Return the shared library of xllamacpp, with the types of its function that quantises."""
    library = ctypes.CDLL(str(file))
    long, address = ctypes.c_int64, ctypes.c_void_p
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, address, address, long, long, long, address]
    return library


def quantised(library: ctypes.CDLL, weight: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """Return the bytes of a matrix (m, n) in a type of llama.cpp, row by row."""
    values = np.ascontiguousarray(weight.astype(np.float32))
    m, n = values.shape
    block, block_bytes = GGML_QUANT_SIZES[kind]
    stored = np.zeros((m, n // block * block_bytes), np.uint8)
    written = library.ggml_quantize_chunk(int(kind), values.ctypes.data, stored.ctypes.data, 0, m, n, None)
    if written != stored.nbytes:
        raise SystemExit(f"{kind.name} of {m} x {n} took {written} bytes instead of {stored.nbytes}")
    return stored


def rounded(library: ctypes.CDLL, weight: Tensor, kind: GGMLQuantizationType) -> tuple[Tensor, int]:
    """Return a matrix (m, n) after rounding, and the bytes that it takes."""
    stored = quantised(library, weight.float().numpy(), kind)
    return torch.from_numpy(quants.dequantize(stored, kind)), stored.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path, required=True, help="shared library of xllamacpp")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=8192, help="characters of the last fifth of the text")
    arguments = parser.parse_args()
    library = open_library(arguments.library)
    lm = laser.load("bundled")
    text = read_calibration_text(lm, arguments.text, tokens=PASSAGE_TOKENS).held_out[: arguments.held_out]
    unchanged = text_perplexity(lm, text).perplexity
    size, numbers = 0, Counter[str]()
    for path, parameter in lm.model.named_parameters():
        if parameter.ndim < 2:
            size += 4 * parameter.numel()
            continue
        kind = type_of(path, parameter.shape[1], lm.model.config.num_hidden_layers)
        parameter.data, taken = rounded(library, parameter.data, kind)
        size += taken
        numbers[kind.name] += parameter.numel()
    shares = ", ".join(f"{kind} {n / numbers.total():.0%}" for kind, n in numbers.most_common())
    evaluation = text_perplexity(lm, text)
    print(
        f"{size / 2**20:.1f} MiB ({shares}), perplexity {evaluation.perplexity:.2f}, x{evaluation.perplexity / unchanged:.3f}"
    )
    print(f"unchanged: {unchanged:.2f} on {evaluation.tokens} tokens")


if __name__ == "__main__":
    main()
