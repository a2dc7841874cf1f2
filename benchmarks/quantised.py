"""Compare compressed models with quantised ones: bytes on disk, perplexity on a text, and speed, in one process.

The base model, and the folders of ``laser compress``, run in PyTorch in float32. PyTorch also runs the base model with 8-bit
linear layers. llama.cpp times GGUF files of the base model; their perplexity is that of their weights in PyTorch. Speeds are
ratios to the base model's in PyTorch in the same round, medians over the rounds.

Needs llama.cpp: pip install --no-deps --target DIR xllamacpp
Run: PYTHONPATH=DIR OMP_NUM_THREADS=1 python benchmarks/quantised.py --text FILE FOLDER...
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from inference import READ_TOKENS, WRITTEN_TOKENS, median_ratio, timed
from torch import Tensor, nn
from torch.ao.quantization import default_dynamic_qconfig, per_channel_dynamic_qconfig, quantize_dynamic

import laserlm as laser
from laserlm.low_rank import LowRankLinear
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.tasks.perplexity import passages

PORT = 18_080
"""Port of the first server of llama.cpp."""


class TorchModel:
    """A model of PyTorch."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()

    @torch.inference_mode()
    def perplexity(self, rows: Sequence[TokenSequence]) -> float:
        """Return the perplexity of the rows' targets."""
        total = 0.0
        for row in rows:
            logits = self.model(input_ids=torch.tensor([row.ids])).logits[0, list(row.positions)]
            total += float(logits.double().log_softmax(1).gather(1, torch.tensor(row.targets)[:, None]).sum())
        return float(np.exp(-total / sum(len(row.targets) for row in rows)))

    @torch.inference_mode()
    def seconds(self, ids: Tensor) -> tuple[float, float]:
        """Return the seconds of reading tokens (1, T), and of writing tokens after the first eight."""
        how = {"max_new_tokens": WRITTEN_TOKENS, "min_new_tokens": WRITTEN_TOKENS, "do_sample": False}
        start = ids[:, :8]
        reading = timed(self.model, input_ids=ids, logits_to_keep=1)
        return reading, timed(self.model.generate, start, attention_mask=torch.ones_like(start), **how)


class LlamaModel:
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file: Path, port: int) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        settings.n_ctx, settings.n_parallel, settings.port = 1024, 1, port
        settings.n_batch = settings.n_ubatch = READ_TOKENS
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(settings)

    def seconds(self, ids: Tensor) -> tuple[float, float]:
        """Return the seconds of reading tokens (1, T), and of writing tokens after the first eight."""
        tokens = ids[0].tolist()
        reading = self._timings(tokens, 1)["prompt_ms"]
        writing = self._timings(tokens[:8], WRITTEN_TOKENS)
        return reading / 1e3, (writing["prompt_ms"] + writing["predicted_ms"]) / 1e3

    def _timings(self, tokens: list[int], n: int) -> dict[str, float]:
        options = {"n_predict": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
        result: dict[str, dict[str, float]] = self.server.handle_completions({"prompt": tokens, **options})
        return result["timings"]


def quantise(source: Path, target: Path) -> None:
    """Write the matrices of a GGUF file as q4_0, the embedding as q8_0, by the quantiser of llama.cpp's package gguf."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            value_type, *item_types = field.types
            writer.add_key_value(field.name, field.contents(), value_type, sub_type=item_types[-1] if item_types else None)
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        kind = GGMLQuantizationType.Q8_0 if "embd" in tensor.name else GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, quants.quantize(tensor.data.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def round_to_8_bits(model: nn.Module) -> int:
    """Round all matrices of a model in place as GGUF's q8_0 does, and return the bytes that the model would take."""
    size = sum(4 * module.out_features for module in model.modules() if isinstance(module, LowRankLinear))  # order of rows
    for parameter in model.parameters():
        if parameter.ndim != 2:
            size += 4 * parameter.numel()
            continue
        padded = nn.functional.pad(parameter.data, (0, -parameter.shape[1] % 32))
        blocks = quants.quantize(padded.numpy(), GGMLQuantizationType.Q8_0)
        size += blocks.nbytes
        values = torch.from_numpy(quants.dequantize(blocks, GGMLQuantizationType.Q8_0))
        parameter.data = values[:, : parameter.shape[1]].contiguous()
    return size


class Table:
    """The models with their sizes and perplexities."""

    def __init__(self, rows: Sequence[TokenSequence]) -> None:
        self.rows = rows
        self.measured: dict[str, tuple[float, float]] = {}
        self.timed: dict[str, TorchModel | LlamaModel] = {}

    def add(self, name: str, size: float, model: TorchModel) -> None:
        """Measure the perplexity of a model that takes so many bytes."""
        self.measured[name] = size / 2**20, model.perplexity(self.rows)
        print(name, *(f"{value:.2f}" for value in self.measured[name]), flush=True)

    @torch.inference_mode()
    def print(self, rounds: int) -> None:
        """Time the models by turns, and print everything."""
        ids = torch.randint(100, 40000, (1, READ_TOKENS), generator=torch.Generator().manual_seed(0))
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in self.timed}
        for r in range(rounds + 1):
            order = list(self.timed.items())
            for name, model in [*order[r % len(order) :], *order[: r % len(order)]]:
                times[name] += [model.seconds(ids)][: bool(r)]
        first = next(iter(times))
        print("model|MiB|perplexity|reading, times as fast|writing, times as fast")
        for name, (size, perplexity) in self.measured.items():
            columns = [([t[i] for t in times[first]], [t[i] for t in times.get(name, [])]) for i in (0, 1)]
            ratios = [f"{median_ratio(base, other):.2f}" if other else "" for base, other in columns]
            print("|".join([name, f"{size:.0f}", f"{perplexity:.2f}", *ratios]))
        reading, writing = (float(np.median([pair[i] for pair in times[first]])) for i in (0, 1))
        print(f"{first}: {READ_TOKENS / reading:.0f} tokens a second read, {WRITTEN_TOKENS / writing:.1f} written")


def gguf_files(lm: laser.LanguageModel, folder: Path) -> dict[str, Path]:
    """Write GGUF files of a model, and return them by type."""
    saved = {kind: laser.save(lm, "", folder / kind, form="gguf", outtype=kind) for kind in ("f16", "q8_0")}
    files = {kind: each.folder / each.record["gguf"] for kind, each in saved.items()}
    quantise(files["f16"], folder / "q4_0.gguf")
    return files | {"q4_0": folder / "q4_0.gguf"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="what laser compress wrote, with --save-dtype float16")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--held-out", type=int, default=8_192, help="characters of the last fifth to measure perplexity on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip-quantised", action="store_true")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    lm = laser.load("bundled")
    text = arguments.text.read_text(encoding="utf-8")
    text = text[int(0.8 * len(text)) :][: arguments.held_out]
    table = Table(encode(lm, tuple(passages(text)), "perplexity"))
    model: Any = lm.model
    parameters = sum(p.numel() for p in model.parameters())
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    table.timed["unchanged, PyTorch"] = TorchModel(model)
    table.add("unchanged, PyTorch", 2 * parameters, TorchModel(model))
    for folder in arguments.folders:
        name, size = f"{folder.name}, PyTorch", sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        table.timed[name] = small = TorchModel(laser.load(folder, dtype="float32").model)
        table.add(name, size, small)
        rounded = laser.load(folder, dtype="float32").model
        table.add(f"{folder.name} of 8 bits", round_to_8_bits(rounded), TorchModel(rounded))
    size = linear + 2 * (parameters - linear + model.get_output_embeddings().weight.numel())  # the embedding keeps 16 bits
    scales = {"a matrix": default_dynamic_qconfig, "a row": per_channel_dynamic_qconfig}
    for name, config in ({} if arguments.skip_quantised else scales).items():
        eight = TorchModel(quantize_dynamic(model, {nn.Linear: config}))
        table.timed[f"8 bits, a scale for {name}, PyTorch"] = eight
        table.add(f"8 bits, a scale for {name}, PyTorch", size, eight)
    with tempfile.TemporaryDirectory() as temporary:
        for i, (kind, file) in enumerate([] if arguments.skip_quantised else gguf_files(lm, Path(temporary)).items()):
            table.timed[f"GGUF {kind}, llama.cpp"] = LlamaModel(file, PORT + i)
            table.add(f"GGUF {kind}, llama.cpp", file.stat().st_size, TorchModel(laser.load(file, dtype="float32").model))
        table.print(arguments.rounds)


if __name__ == "__main__":
    main()
