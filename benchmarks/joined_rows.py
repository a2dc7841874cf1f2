"""What it saves to run sequences that begin alike as one row, and by how much the scores differ from those of separate rows.

Both ways in turns, medians of the processor time. With ``--chat`` each prompt goes through the chat template.
Run: python benchmarks/joined_rows.py [--task counterfact --data FILE] [--examples 200] [--rounds 3] [--chat]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median
from typing import Any

import laserlm as laser
from laserlm.scoring.forward import batches, run_rows
from laserlm.scoring.records import TokenScores
from laserlm.scoring.tokenize import encode


def main() -> None:
    """Time both ways, and print tokens, seconds and differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="worldfacts")
    parser.add_argument("--data")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--chat", action="store_true")
    given = parser.parse_args()
    lm = laser.load("bundled")
    split = laser.task(given.task, data=given.data).test.limit(given.examples)
    examples = split.examples
    if given.chat:
        tokenizer: Any = lm.require_tokenizer()
        asked = [[{"role": "user", "content": e.prompt}] for e in examples]
        texts = [tokenizer.apply_chat_template(of, tokenize=False, add_generation_prompt=True) for of in asked]
        examples = tuple(replace(e, prompt=text, joint="") for e, text in zip(examples, texts, strict=True))
    rows = encode(lm, examples, split.scorer)
    run_rows(lm, rows[: 2 * given.batch_size], given.batch_size)
    if not lm.shares_prompts:
        raise SystemExit("no two of the sequences begin alike, or the model cannot run them as one row")
    seconds: dict[bool, list[float]] = {False: [], True: []}
    scores: dict[bool, list[TokenScores]] = {}
    tokens: dict[bool, int] = {}
    for _ in range(given.rounds):
        for joined in seconds:
            lm.shares_prompts = joined
            start = time.process_time()
            scores[joined] = run_rows(lm, rows, given.batch_size)
            seconds[joined].append(time.process_time() - start)
            todo = batches(lm, rows, given.batch_size, joined=joined)
            tokens[joined] = sum(batch.inputs["input_ids"].numel() for batch in todo)
    pairs = list(zip(scores[False], scores[True], strict=True))
    difference = max(abs(x - y) for a, b in pairs for x, y in zip(a.logprobs, b.logprobs, strict=True))
    separate, together = (median(seconds[joined]) for joined in (False, True))
    print(
        f"{given.task}{', chat' if given.chat else ''}: {len(rows)} sequences; tokens with padding {tokens[False]} and "
        f"{tokens[True]} ({tokens[True] / tokens[False]:.2f}); {separate:.2f} s and {together:.2f} s, "
        f"{separate / together:.2f} times less; log-probabilities differ by {difference:.1e} nats at most, "
        f"{sum(a.argmax != b.argmax for a, b in pairs)} sequences have another most likely token"
    )


if __name__ == "__main__":
    main()
