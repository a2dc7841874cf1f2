"""Compare compressed models with quantised ones: bytes, resident memory, perplexity on a text, and speed, in one process.

The base model runs in PyTorch in float32 and in bfloat16. The folders of ``laser compress`` run in bfloat16. Both
also run with 8-bit weights of torchao, whose products are in bfloat16. llama.cpp times GGUF files of the base model; their
perplexity is that of their weights in PyTorch. Speeds are ratios to the base model's in bfloat16 in the same round, medians
over the rounds.
Resident memory is that of a new process that has loaded one model and read 512 tokens, less what it takes with libraries alone.

Needs llama.cpp and torchao: pip install --no-deps --target DIR xllamacpp torchao
Run: PYTHONPATH=DIR OMP_NUM_THREADS=1 python benchmarks/quantised.py --text FILE FOLDER...
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import xllamacpp
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from inference import READ_TOKENS, WRITTEN_TOKENS, median_ratio, timed
from k_quants import open_library, quantised, type_of
from torch import Tensor, nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import laserlm as laser
from laserlm.low_rank import LowRankLinear
from laserlm.out_of_memory import return_freed_memory
from laserlm.scoring.records import TokenSequence
from laserlm.scoring.tokenize import encode
from laserlm.tasks.perplexity import passages


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
    def read(self, ids: Tensor) -> None:
        """Read tokens (1, T)."""
        self.model(input_ids=ids, logits_to_keep=1)

    @torch.inference_mode()
    def seconds(self, ids: Tensor) -> tuple[float, float]:
        """Return the seconds of reading tokens (1, T), and of writing tokens after the first eight."""
        how = {"max_new_tokens": WRITTEN_TOKENS, "min_new_tokens": WRITTEN_TOKENS, "do_sample": False}
        start = ids[:, :8]
        reading = timed(self.read, ids)
        return reading, timed(self.model.generate, start, attention_mask=torch.ones_like(start), **how)


class LlamaModel:
    """A GGUF file in llama.cpp, on one thread."""

    def __init__(self, file: Path) -> None:
        settings = xllamacpp.CommonParams()
        settings.model.path = str(file)
        with socket.create_server(("127.0.0.1", 0)) as free:
            settings.port = free.getsockname()[1]
        settings.n_ctx, settings.n_parallel = 1024, 1
        settings.n_batch = settings.n_ubatch = READ_TOKENS
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(settings)

    def read(self, ids: Tensor) -> None:
        """Read tokens (1, T)."""
        self._timings(ids[0].tolist(), 1)

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


def quantise(source: Path, target: Path, kind: str) -> None:
    """Write the matrices of a GGUF file in q4_0 or q4_K_M, by the functions of llama.cpp, and the embedding in q8_0."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture")):
            value_type, *item_types = field.types
            writer.add_key_value(field.name, field.contents(), value_type, sub_type=item_types[-1] if item_types else None)
    library = open_library(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so"))
    blocks = 1 + max(int(tensor.name.split(".")[1]) for tensor in reader.tensors if tensor.name.startswith("blk."))
    for tensor in reader.tensors:
        if len(tensor.shape) < 2:
            writer.add_tensor(tensor.name, tensor.data)
            continue
        of_tensor = type_of(tensor.name, tensor.data.shape[1], blocks)
        if kind == "q4_0" and tensor.name.startswith("blk."):
            of_tensor = GGMLQuantizationType.Q4_0
        writer.add_tensor(tensor.name, quantised(library, tensor.data, of_tensor), raw_dtype=of_tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def with_8_bits(model: Any) -> None:
    """Quantise the linear layers and both factors of low-rank ones in place, by torchao: 8 bits, a scale for each row."""
    for layer in [module for module in model.modules() if isinstance(module, LowRankLinear)]:
        for name, factor in [(name, p) for name, p in layer.named_parameters() if name.startswith("up")]:
            holder = nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta")
            holder.weight = factor
            quantize_(holder, Int8WeightOnlyConfig())
            setattr(layer, name, holder.weight)
    quantize_(model, Int8WeightOnlyConfig())


def bytes_of_8_bits(model: Any) -> int:
    """Return the bytes of a model in bfloat16 whose linear layers take 8 bits and a scale a row; its embedding stays."""
    size: int = sum(2 * p.numel() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, nn.Linear):
            matrices = [p for p in module.parameters(recurse=False) if p.ndim == 2]
            is_embedding = module.weight is model.get_input_embeddings().weight  # the output layer no longer shares it
            size += sum(2 * len(p) + p.numel() * (1 if is_embedding else -1) for p in matrices)
        if isinstance(module, LowRankLinear):
            size += 4 * module.out_features  # order of rows
    return size


def loaded(form: str, source: str) -> TorchModel | LlamaModel:
    """Return a model: ``float32`` or ``bfloat16`` of PyTorch, ``8-bit`` of torchao, or ``gguf`` of llama.cpp."""
    if form == "gguf":
        return LlamaModel(Path(source))
    model = laser.load(source, dtype="bfloat16" if form == "8-bit" else form).model
    if form == "8-bit":
        with_8_bits(model)
        for parameter in model.parameters():
            if type(parameter.data) is Tensor:  # one that is still mapped from the file would keep all of the file in memory
                parameter.data = parameter.data.clone()
    return TorchModel(model)


def print_resident(form: str, source: str) -> None:
    """Print the bytes of memory that a model takes in this process after it has read 512 tokens."""
    process = psutil.Process()
    before = process.memory_info().rss
    model = loaded(form, source)
    model.read(random_tokens())
    return_freed_memory()
    print(process.memory_info().rss - before)
    sys.stdout.flush()


def resident(form: str, source: str) -> float:
    """Return what ``print_resident`` prints in a new process, in MiB."""
    command = [sys.executable, __file__, "--resident", form, source]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output.splitlines()[-1]) / 2**20


def random_tokens() -> Tensor:
    """Return 512 tokens (1, T) to read."""
    return torch.randint(100, 40000, (1, READ_TOKENS), generator=torch.Generator().manual_seed(0))


class Table:
    """The models with their bytes, resident memory, perplexities and speeds."""

    def __init__(self, rows: Sequence[TokenSequence]) -> None:
        self.rows = rows
        self.measured: dict[str, tuple[float, float, float]] = {}
        self.timed: dict[str, TorchModel | LlamaModel] = {}

    def add(self, name: str, form: str, source: str, size: float) -> None:
        """Load a model that takes so many bytes, and measure its memory and perplexity."""
        self.timed[name] = model = loaded(form, source)
        weights = model if isinstance(model, TorchModel) else TorchModel(laser.load(source, dtype="float32").model)
        self.measured[name] = size / 2**20, resident(form, source), weights.perplexity(self.rows)
        print(name, *(f"{value:.2f}" for value in self.measured[name]), flush=True)

    @torch.inference_mode()
    def print(self, rounds: int, base: str) -> None:
        """Time the models by turns, and print everything, with speeds as ratios to a base."""
        ids = random_tokens()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in self.timed}
        for r in range(rounds + 1):
            order = list(self.timed.items())
            for name, model in [*order[r % len(order) :], *order[: r % len(order)]]:
                times[name] += [model.seconds(ids)][: bool(r)]
        print("model|MiB|resident, MiB|perplexity|reading, times as fast|writing, times as fast|tokens a second read|written")
        for name, (size, memory, perplexity) in self.measured.items():
            columns = [([t[i] for t in times[base]], [t[i] for t in times[name]]) for i in (0, 1)]
            ratios = [f"{median_ratio(first, other):.2f}" for first, other in columns]
            reading, writing = (float(np.median(other)) for _, other in columns)
            speeds = [f"{READ_TOKENS / reading:.0f}", f"{WRITTEN_TOKENS / writing:.1f}"]
            print("|".join([name, f"{size:.0f}", f"{memory:.0f}", f"{perplexity:.2f}", *ratios, *speeds]))


def in_bfloat16(source: str | Path, folder: Path) -> None:
    """Save a model in bfloat16."""
    lm = laser.load(source, dtype="bfloat16")
    lm.model.save_pretrained(folder)
    lm.require_tokenizer().save_pretrained(folder)


def gguf_files(lm: laser.LanguageModel, folder: Path) -> dict[str, Path]:
    """Write GGUF files of a model, and return them by type."""
    saved = {kind: laser.save(lm, "", folder / kind, form="gguf", outtype=kind) for kind in ("f16", "q8_0")}
    files = {kind: each.folder / each.record["gguf"] for kind, each in saved.items()}
    for kind in ("q4_K_M", "q4_0"):
        files[kind] = folder / f"{kind}.gguf"
        quantise(files["f16"], files[kind], kind)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path, help="what laser compress wrote")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--held-out", type=int, default=8_192, help="characters of the last fifth to measure perplexity on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resident", nargs=2, metavar=("FORM", "SOURCE"), help="print the memory of one model alone")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    if arguments.resident:
        print_resident(*arguments.resident)
        return
    if arguments.text is None:
        parser.error("--text is missing")
    lm = laser.load("bundled")
    text = arguments.text.read_text(encoding="utf-8")
    text = text[int(0.8 * len(text)) :][: arguments.held_out]
    table = Table(encode(lm, tuple(passages(text)), "perplexity"))
    table.add("unchanged, float32", "float32", "bundled", 4 * sum(p.numel() for p in lm.model.parameters()))
    base = "bundled, bfloat16"
    with tempfile.TemporaryDirectory() as temporary:
        for source in ["bundled", *arguments.folders]:
            folder = Path(temporary) / Path(source).name
            in_bfloat16(source, folder)
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            table.add(f"{folder.name}, bfloat16", "bfloat16", str(folder), size)
            table.add(f"{folder.name}, 8 bits, torchao", "8-bit", str(folder), bytes_of_8_bits(laser.load(folder).model))
        for kind, file in gguf_files(lm, Path(temporary)).items():
            table.add(f"GGUF {kind}, llama.cpp", "gguf", str(file), file.stat().st_size)
        table.print(arguments.rounds, base)


if __name__ == "__main__":
    main()
