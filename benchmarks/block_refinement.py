"""Train the factors of one block after the other towards the block's own output, and print the perplexity of the whole model.

Each block of the bundled model gets what the compressed blocks below it give, and is trained to give what the unchanged block
gives in the unchanged model (mean square, no labels). ``laser compress --refine`` trains all factors at once towards the
unchanged model's predictions instead. The decompositions are those of moments that ``compression_moments.py sum`` has written.
The passages are those on which the command trains, one a step, with products in bfloat16.

Run: python benchmarks/block_refinement.py SUMS --text FILE [--ratio .8] [--passages 20] [--rates 1e-5,1e-4] [--together]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from compression_moments import HeldOut, bfloat16, fitted
from torch import Tensor

import laserlm as laser
from laserlm.edit.factors import replaced_modules
from laserlm.export.calibration_text import PASSAGE_TOKENS, read_calibration_text
from laserlm.export.refinement import BETAS, WARM_UP_STEPS
from laserlm.low_rank import LowRankLinear
from laserlm.models.language_model import LanguageModel

Run = Callable[[Tensor], Tensor]


def train_blocks(lm: LanguageModel, layers: Mapping[str, LowRankLinear], ids: Tensor, rate: float) -> None:
    """Train low-rank layers in place, block by block, on passages (N, T)."""
    model: Any = lm.model.base_model
    model.requires_grad_(False)
    with torch.no_grad():
        unchanged = compressed = model.embed_tokens(ids)  # what enters the block in either model
        positions = model.rotary_emb(unchanged[:1], torch.arange(ids.shape[1])[None])
    for i, block in enumerate(model.layers):
        of_block = {path: layer for path, layer in layers.items() if path.startswith(f"model.layers.{i}.")}

        def run(hidden: Tensor, block: Any = block) -> Tensor:
            with bfloat16():
                given: Tensor = block(hidden, position_embeddings=positions, attention_mask=None)
            return given

        unchanged = over_passages(run, unchanged)
        with replaced_modules(lm.model, of_block):
            if of_block:
                errors = train(run, of_block, compressed, unchanged, rate)
                print(f"block {i}: mean square {errors[0]:.3g} at first, {errors[-1]:.3g} at last", flush=True)
            compressed = over_passages(run, compressed)


@torch.no_grad()
def over_passages(run: Run, hidden: Tensor) -> Tensor:
    """Return what a block gives for each passage."""
    return torch.cat([run(passage) for passage in hidden.split(1)])


def train(run: Run, layers: Mapping[str, LowRankLinear], inputs: Tensor, outputs: Tensor, rate: float) -> list[float]:
    """Train the layers of one block, a step for each passage. Return the mean square error before each step."""
    factors = [p for layer in layers.values() for name, p in layer.named_parameters() if name != "bias"]
    optimiser = torch.optim.Adam([p.requires_grad_() for p in factors], betas=BETAS, eps=1e-16)  # the gradients are small
    errors, steps = [], len(inputs)
    for step, (x, y) in enumerate(zip(inputs.split(1), outputs.split(1), strict=True)):
        error = (run(x) - y).square().mean()
        error.backward()
        optimiser.param_groups[0]["lr"] = rate * min((step + 1) / WARM_UP_STEPS, (steps - step) / steps)
        optimiser.step()
        optimiser.zero_grad()
        errors.append(error.item())
    for p in factors:
        p.requires_grad_(False)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sums", type=Path, help="file of moments")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--ratio", type=float, default=0.8)
    parser.add_argument("--passages", type=int, default=20)
    parser.add_argument("--rates", default="1e-5,1e-4", help="largest learning rates, a row each")
    parser.add_argument("--together", action="store_true", help="train all factors at once too, as laser compress does")
    parser.add_argument("--held-out", type=int, default=24_576, help="characters of the last fifth of the text")
    given = parser.parse_args()
    lm = laser.load("bundled")
    text = read_calibration_text(lm, given.text, tokens=PASSAGE_TOKENS, refine=given.passages)
    ids = torch.tensor([row.ids for row in text.refinement])
    held_out = HeldOut(lm, text.held_out[: given.held_out])
    base = held_out.losses(lm)
    with tempfile.TemporaryDirectory() as temporary:
        compression = fitted(lm, given.sums, "two-sided", Path(temporary))
        with compression.applied(lm, given.ratio):
            untrained = held_out.losses(lm)
        print(f"untrained: {held_out.compared(base, untrained)}", flush=True)
        for rate in map(float, given.rates.split(",")):
            layers, start = compression.layers(lm, given.ratio), time.process_time()
            train_blocks(lm, layers, ids, rate)
            seconds = time.process_time() - start
            with replaced_modules(lm.model, layers):
                trained = held_out.losses(lm)
            in_pairs = held_out.compared(untrained, trained)
            print(f"blocks, {rate:g}: {held_out.compared(base, trained)}, in pairs {in_pairs}, {seconds:.0f} s", flush=True)
        if given.together:
            start, options = time.process_time(), {"steps": given.passages, "products": "bfloat16"}
            together = compression.refine(lm, given.ratio, text.refinement, Path(temporary), **options)
            seconds = time.process_time() - start
            with together.applied(lm, given.ratio):
                trained = held_out.losses(lm)
            in_pairs = held_out.compared(untrained, trained)
            print(f"together: {held_out.compared(base, trained)}, in pairs {in_pairs}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
