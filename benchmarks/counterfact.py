"""Score real CounterFact on the bundled model, beside a brute-force loop that shares no code with laserlm.

The loop runs one prompt at a time through plain transformers, edits the weight with ``torch.linalg.svd`` and looks at
the first answer token. Run: python benchmarks/counterfact.py COUNTERFACT.json [--records 400]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

import laserlm as laser
from laserlm.models import LanguageModel
from laserlm.tasks import Scorer

REDUCTION = "28.fc_up@0.05"


def brute_force(lm: LanguageModel, file: Path, records: int) -> tuple[float, float, float]:
    """Return first-token accuracy, loss (nats) and seconds of a plain loop over the rewrite prompts."""
    tokenizer = lm.require_tokenizer()
    hits, losses = 0, 0.0
    start = time.perf_counter()
    with torch.no_grad():
        for record in json.loads(file.read_text(encoding="utf-8"))[:records]:
            rewrite = record["requested_rewrite"]
            prompt = rewrite["prompt"].format(rewrite["subject"])
            target = tokenizer(" " + rewrite["target_true"]["str"]).input_ids[0]
            logprobs = lm.model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
            hits += int(logprobs.argmax()) == target
            losses -= float(logprobs[target])
    return hits / records, losses / records, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--records", type=int, default=400)
    given = parser.parse_args()
    lm = laser.load("bundled")
    rows = laser.task("counterfact", data=given.file, phrasings="rewrite").every.limit(given.records)
    every = laser.task("counterfact", data=given.file).every
    weight = lm.model.get_parameter("model.layers.28.mlp.up_proj.weight").data

    print(f"{'scored by':28} {'rows':>5} {'base':>22} {REDUCTION:>22} {'loss':>15} {'s / 1000 rows':>14}")
    original = weight.clone()
    plain = brute_force(lm, given.file, len(rows))
    U, S, Vh = torch.linalg.svd(original, full_matrices=False)
    rank = 576 * 5 // 100
    weight.copy_(U[:, :rank] * S[:rank] @ Vh[:rank])
    edited = brute_force(lm, given.file, len(rows))
    weight.copy_(original)
    slow = (plain[2] + edited[2]) / 2 / len(rows)
    print(
        f"{'brute force, first token':28} {len(rows):5} {plain[0]:22.2%} {edited[0]:22.2%} "
        f"{plain[1]:7.3f} {edited[1]:7.3f} {1000 * slow:14.1f}"
    )
    scorers: list[tuple[Scorer, laser.Split]] = [
        ("first_token", rows),
        ("next_token", rows),
        ("next_token", every),
        ("answer", every),
    ]
    for scorer, split in scorers:
        base = laser.evaluate(lm, split, scorer=scorer)
        with laser.applied(lm, REDUCTION):
            after = laser.evaluate(lm, split, scorer=scorer)
        seconds = (base.seconds + after.seconds) / 2 / len(split)
        shown = [f"{e.accuracy:.2%} [{e.accuracy_interval.low:.1%}, {e.accuracy_interval.high:.1%}]" for e in (base, after)]
        name = f"laserlm, {scorer}"
        print(
            f"{name:28} {len(split):5} {shown[0]:>22} {shown[1]:>22} {base.loss:7.3f} {after.loss:7.3f} {1000 * seconds:14.1f}"
        )
        print(f"{'':28} {laser.compare(base, after)}")
        if scorer == "first_token":
            print(f"{'':28} brute force takes {slow / seconds:.1f} times as long per row")


if __name__ == "__main__":
    main()
