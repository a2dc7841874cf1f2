"""Compress the bundled model in every way from moments that are summed once, and print its perplexity on held-out text.

``laser compress`` takes the moments of one block at a time, for one method. Here the moments of all matrices are summed in one
pass, with products in bfloat16, for several lengths of the calibration text at once. They take 1.1 GB for each length. The
perplexity is that of windows of 2,048 tokens that do not overlap, also in bfloat16, with the factors multiplied out. So figures
are to be compared with each other and not with those of ``laser compress``.

Run: python benchmarks/compression_moments.py sum --text FILE --lengths 16384,65536 --keep FOLDER [--sampled]
     python benchmarks/compression_moments.py compare --text FILE --lengths 16384,65536 --keep FOLDER [--ratios .8,.6]
         [--methods plain,two-sided] [--ranks uniform,curvature] [--dense-above 1,.9] [--rank-multiple 1,32]
         [--held-out CHARACTERS] [--sampled]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import laserlm as laser
from laserlm.export.calibration_text import PASSAGE_TOKENS, read_calibration_text
from laserlm.export.fitting import Compression, compressible
from laserlm.export.tensor_folder import DecompositionFolder, TensorFolder
from laserlm.linalg.decomposition import Decomposition, component_losses, decompose, whitened
from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import read_matrix
from laserlm.scoring.tokenize import start_token
from laserlm.tasks.perplexity import passages

WINDOW_TOKENS = 2048


def bfloat16() -> torch.autocast:
    """Return a context with products in bfloat16."""
    return torch.autocast("cpu", torch.bfloat16)


class Sums:
    """Sums of x x^T over the inputs of linear layers and of g g^T over the gradients of their outputs, by path."""

    def __init__(self, lm: LanguageModel, paths: list[str], kept: Mapping[str, Tensor]) -> None:
        self.of: dict[str, Tensor] = dict(kept)
        self._input: Tensor | None = None
        for path in paths:
            layer = lm.model.get_submodule(path)
            layer.register_forward_pre_hook(self._adds_inputs(path))
            layer.register_forward_hook(self._adds_gradients(path))

    def _add(self, name: str, rows: Tensor, square: Callable[[Tensor], Tensor]) -> None:
        size = rows.shape[-1]
        total = self.of.setdefault(name, torch.zeros(size, size))
        total += square(rows.detach().flatten(0, -2))

    def _adds_inputs(self, path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_module: nn.Module, args: Any) -> None:
            if args[0] is not self._input:  # query, key and value have one input; it is kept by the first of them
                self._input = args[0]
                self._add(f"x.{path}", args[0].float(), lambda x: x.T @ x)

        return hook

    def _adds_gradients(self, path: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            output.register_hook(lambda d: self._add(f"g.{path}", d.bfloat16(), lambda g: (g.T @ g).float()))

        return hook


def sum_moments(lm: LanguageModel, text: Path, lengths: list[int], folder: Path, *, sampled: bool) -> None:
    """Write the sums over the first tokens of a text, for every length; those of an earlier call are continued.

    The gradients are those of the text's next tokens, or of tokens that are drawn from the model's probabilities.
    """
    generator = torch.Generator().manual_seed(0)
    rows = read_calibration_text(lm, text, tokens=max(lengths)).calibration
    files = {length: sums_file(folder, length, sampled=sampled) for length in lengths}
    done = max((length for length, file in files.items() if file.exists()), default=0)
    sums = Sums(lm, [m.path.rpartition(".")[0] for m in compressible(lm)[0]], load_file(files[done]) if done else {})
    lm.model.requires_grad_(False)
    for i, row in enumerate(rows[done // PASSAGE_TOKENS :], done // PASSAGE_TOKENS + 1):
        start = time.process_time()
        embedded = lm.model.get_input_embeddings()(torch.tensor([row.ids])).requires_grad_()
        with bfloat16():
            logits = lm.model(inputs_embeds=embedded).logits[0].float()
        targets = torch.tensor(row.targets)
        if sampled:
            targets = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        F.cross_entropy(logits, targets, reduction="sum").backward()
        print(f"passage {i} of {len(rows)}: {time.process_time() - start:.1f} s of processor time", flush=True)
        if (length := i * PASSAGE_TOKENS) in files:
            save_file(sums.of, files[length], metadata={"tokens": str(length)})


def sums_file(folder: Path, length: int, *, sampled: bool) -> Path:
    """Return the file of the sums over a number of tokens; gradients of drawn tokens have files of their own."""
    return folder / f"{'sampled-' * sampled}at-{length // PASSAGE_TOKENS}.safetensors"


def fitted(lm: LanguageModel, file: Path, method: str, folder: Path) -> Compression:
    """Return what ``fit_ranks`` returns, with ranks by curvature, from moments in a file."""
    matrices, left_out = compressible(lm)
    decompositions, losses = DecompositionFolder(folder / "decompositions"), TensorFolder(folder / "losses")
    with safe_open(file, "pt") as opened:
        names, tokens, inputs = set(opened.keys()), int(opened.metadata()["tokens"]), ""
        for m in matrices:
            path = m.path.rpartition(".")[0]
            inputs = f"x.{path}" if f"x.{path}" in names else inputs
            M, G = (opened.get_tensor(name).double() / tokens for name in (inputs, f"g.{path}"))
            decomposition = decomposed(read_matrix(lm.model, m), M, G, method)
            decompositions.add(m.id, decomposition)
            losses.add(m.id, component_losses(decomposition, M, G))
    return Compression("two-sided", "curvature", matrices, left_out, decompositions, losses, TensorFolder(folder / "pivots"))


def decomposed(weight: Tensor, M: Tensor, G: Tensor, method: str) -> Decomposition:
    """Return a decomposition as that of ``fit_ranks`` by the same method; ``outputs`` weighs the outputs alone."""
    if method == "plain":
        return decompose(weight)
    if method == "outputs":
        return whitened(weight, torch.eye(weight.shape[1]), G)
    return whitened(weight, M.diagonal().diag() if method == "scaled" else M, G if method == "two-sided" else None)


@contextmanager
def multiplied_out(lm: LanguageModel, compression: Compression, ratio: float) -> Iterator[None]:
    """Replace the matrices by their products of the ranks at a ratio; no pivots are chosen."""
    before = {m.path: lm.model.get_parameter(m.path).data for m in compression.matrices}
    for m in compression.matrices:
        if (rank := compression.ranks(ratio)[m.id]) is not None:
            lm.model.get_parameter(m.path).data = compression.decompositions[m.id].truncate(rank)
    yield
    for path, weight in before.items():
        lm.model.get_parameter(path).data = weight


class HeldOut:
    """A text, read in windows that do not overlap and cut into passages as ``laser evaluate`` cuts it."""

    def __init__(self, lm: LanguageModel, text: str) -> None:
        tokenizer = lm.require_tokenizer()
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [int(passage.id.partition("-")[0]) for passage in passages(text)]
        self.ids = torch.tensor([*start_token(tokenizer), *encoded.input_ids])
        self.passage = np.searchsorted(starts, [start for start, _ in encoded.offset_mapping], side="right") - 1
        self.tokens = np.bincount(self.passage)

    @torch.no_grad()
    def losses(self, lm: LanguageModel) -> np.ndarray[Any, Any]:
        """Return the summed loss of each passage, in nats."""
        with bfloat16():
            windows = self.ids[:-1].split(WINDOW_TOKENS)
            hidden = torch.cat([lm.model.base_model(input_ids=ids[None]).last_hidden_state[0] for ids in windows])
            head = lm.model.get_output_embeddings()
            pairs = zip(hidden.split(512), self.ids[1:].split(512), strict=True)
            of_tokens = [F.cross_entropy(head(h).float(), targets, reduction="none") for h, targets in pairs]
        return np.bincount(self.passage, torch.cat(of_tokens).double().numpy())

    def compared(self, base: np.ndarray[Any, Any], small: np.ndarray[Any, Any]) -> str:
        """Return the ratio of two perplexities, and the standard error of its logarithm over passages."""
        n, lost = len(base), small - base
        mean = lost.sum() / self.tokens.sum()
        error = math.sqrt(((lost - mean * self.tokens) ** 2).sum() * n / (n - 1)) / self.tokens.sum()
        return f"x{math.exp(mean):.3f} ({error:.3f})" if mean < 5 else f"x{math.exp(mean):.1e} ({error:.2f})"


def compare(lm: LanguageModel, text: str, arguments: argparse.Namespace) -> None:
    """Print the ratio of every perplexity to the unchanged model's, and to that of the first row of the same decomposition."""
    held_out, ratios = HeldOut(lm, text), [float(ratio) for ratio in arguments.ratios.split(",")]
    base = held_out.losses(lm)
    unchanged = math.exp(base.sum() / held_out.tokens.sum())
    print(f"unchanged model: {unchanged:.2f} on {held_out.tokens.sum()} tokens in {len(base)} passages", flush=True)
    columns = ["decomposition", "ranks", "tokens", "dense above", "multiples of"]
    print("|".join([*columns, *(f"{ratio:g}" for ratio in ratios), "against the first row"]))
    first: dict[tuple[str, str], list[np.ndarray[Any, Any]]] = {}
    for method, length in product(arguments.methods.split(","), arguments.lengths):
        with tempfile.TemporaryDirectory() as temporary:
            file = sums_file(arguments.keep, length, sampled=arguments.sampled)
            compression = fitted(lm, file, method, Path(temporary))
            shapes = product(arguments.ranks.split(","), arguments.dense_above, arguments.rank_multiple)
            for ranks, share, multiple in shapes:
                small = replace(compression, allocation=ranks, dense_above=share, rank_multiple=multiple)
                losses = []
                for ratio in ratios:
                    with multiplied_out(lm, small, ratio):
                        losses.append(held_out.losses(lm))
                earlier = first.setdefault((method, ranks), losses)
                row = [held_out.compared(base, of_ratio) for of_ratio in losses]
                paired = ", ".join(held_out.compared(a, b) for a, b in zip(earlier, losses, strict=True))
                settings = [method, ranks, str(length), f"{share:g}", str(multiple)]
                print("|".join([*settings, *row, "" if earlier is losses else paired]), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["sum", "compare"])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--lengths", type=lambda words: sorted(map(int, words.split(","))), default=[16_384])
    parser.add_argument("--keep", type=Path, required=True, help="folder of the sums")
    parser.add_argument("--sampled", action="store_true", help="gradients of tokens that are drawn from the model")
    parser.add_argument("--ratios", default=".8,.6")
    parser.add_argument("--methods", default="plain,scaled,whitened,outputs,two-sided")
    parser.add_argument("--ranks", default="uniform,curvature")
    parser.add_argument("--dense-above", type=lambda words: [float(word) for word in words.split(",")], default=[1.0])
    parser.add_argument("--rank-multiple", type=lambda words: [int(word) for word in words.split(",")], default=[1])
    parser.add_argument("--held-out", type=int, default=24_576, help="characters of the last fifth of the text")
    arguments = parser.parse_args()
    arguments.keep.mkdir(parents=True, exist_ok=True)
    if any(length % PASSAGE_TOKENS for length in arguments.lengths):
        parser.error(f"lengths are multiples of {PASSAGE_TOKENS} tokens, the length of a passage")
    lm = laser.load("bundled")
    if arguments.what == "sum":
        sum_moments(lm, arguments.text, arguments.lengths, arguments.keep, sampled=arguments.sampled)
    else:
        compare(lm, read_calibration_text(lm, arguments.text, tokens=PASSAGE_TOKENS).held_out[: arguments.held_out], arguments)


if __name__ == "__main__":
    main()
