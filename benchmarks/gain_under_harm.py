"""Gain on held-out questions and harm on other text: component removal beside its rivals, side by side in one table.

    python benchmarks/gain_under_harm.py --task worldfacts --max-harm 0.05 --text wikitext2/test.txt
    python benchmarks/gain_under_harm.py --task counterfact --data DATA --only components,lora --seed 1

All rows choose on the same questions under the same bound of harm on text that the model wrote itself. The gain is measured
on other questions, the harm on other own text and on the passages of ``--text``, which no row chose on. The rows:

- race, compose: the best single reduction, and a composition of reductions;
- components: single components of all matrices;
- strengths: factors from 0 to 1 for the components of all matrices;
- random: for each removed component another one of the same matrix with nearly the same singular value;
- lora: a LoRA of rank 8 on all linear layers, trained on the same questions; the last epoch within the bound;
- both: the same LoRA, trained on the model without the components, or with the strengths;
- examples: four of the questions with their answers before each prompt, and no change of the model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import laserlm as laser
from laserlm.reductions import Components, Intervention, Size
from laserlm.scoring.evaluate import evaluate_rows
from laserlm.scoring.forward import batches, forward_logits, run_rows
from laserlm.scoring.tokenize import encode
from laserlm.searching.guard import Guard, Harm, guards_of

ROWS = ("race", "compose", "components", "strengths", "random", "lora", "both", "examples")
EPOCHS, RATE, BATCH, RANK = 5, 2e-4, 16, 8
"""Of the LoRA: epochs at most, step size, questions in a step, rank."""
SHOTS = 4
NEIGHBOURS = 20
"""Components of nearly the same singular value among which a random one is drawn."""


class Table:
    """Scores each row on the test questions and on both texts, and prints it.

    Args:
        lm: the unchanged model.
        test: held-out questions.
        guards: own text and the text of ``--text``.
    """

    def __init__(self, lm: laser.LanguageModel, test: laser.Split, guards: dict[str, Guard]) -> None:
        self.test, self.guards = test, guards
        self.base = laser.evaluate(lm, test)
        self.on_text = {name: self._score(lm, guard) for name, guard in guards.items()}
        self.rows: list[dict[str, Any]] = []
        print("| row | accuracy | gain, 95 % interval | corrected / broken | loss | " + " | ".join(guards) + " | s |")
        print("|---|---|---|---|---|" + "---|" * len(guards) + "---|")

    def _score(self, lm: laser.LanguageModel, guard: Guard) -> laser.Evaluation:
        part = guard.measuring
        return evaluate_rows(lm, part.split, part.scorer, part.sequences, lambda: run_rows(lm, part.sequences, 32))

    def add(
        self, row: str, lm: laser.LanguageModel, seconds: float, test: laser.Split | None = None, best: str | None = None
    ) -> None:
        """Measure a row; ``best`` is the text of its intervention."""
        edited = laser.evaluate(lm, test or self.test)
        c = laser.compare(self.base, edited if test is None else replace(edited, task=self.base.task))
        harms = {
            name: Harm(name, "text", laser.compare(self.on_text[name], self._score(lm, guard)))
            for name, guard in self.guards.items()
        }
        low, high = c.interval
        cells = [f"x{h.ratio:.3f} [{h.interval.low:.3f}, {h.interval.high:.3f}]" for h in harms.values()]
        print(
            f"| {row} | {c.base:.1%} -> {c.edited:.1%} | {100 * c.gain:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] | "
            f"{c.corrected} / {c.broken} | {c.base_loss:.3f} -> {c.edited_loss:.3f} | {' | '.join(cells)} | {seconds:.0f} |",
            flush=True,
        )
        self.rows.append(
            {
                "row": row,
                "comparison": c.as_dict(),
                "harms": {name: h.as_dict() for name, h in harms.items()},
                "seconds": seconds,
                "intervention": best,
            }
        )


def random_components(lm: laser.LanguageModel, chosen: Intervention, seed: int) -> Intervention:
    """Return as many components of the same matrices, drawn among those with nearly the same singular values."""
    draw, drawn = random.Random(seed), []
    widths = {(m.stack, m.layer, m.name): m.max_rank for m in lm.matrices}
    for r in chosen.reductions:
        removed = set(r.size.drop.numbers) if r.size.drop is not None else set()
        k, taken = widths[r.stack, r.layers.first or 0, r.matrix], set[int]()
        for i in sorted(removed):
            near = sorted(set(range(k)) - removed - taken, key=lambda j: abs(j - i))[:NEIGHBOURS]
            taken.add(draw.choice(near))
        drawn.append(replace(r, size=Size(drop=Components.of(taken))))
    return Intervention(tuple(drawn))


def lora_epochs(lm: laser.LanguageModel, split: laser.Split, seed: int) -> Iterator[laser.LanguageModel]:
    """Train a LoRA on the answers of a split, and yield the model after each epoch."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(lm.model), config)
    model: Any = adapted.base_model.model
    tuned = replace(lm, model=model, loaded=None)
    rows = encode(lm, split.examples, "answer")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    order = random.Random(seed)
    for _ in range(EPOCHS):
        order.shuffle(rows)
        for start in range(0, len(rows), BATCH):
            part = rows[start : start + BATCH]
            for batch in batches(tuned, part, BATCH):
                with torch.enable_grad():
                    logprobs = forward_logits(tuned, batch, scored_only=False).logprobs
                    weights = [1 / n / len(part) for n, _ in batch.counts for _ in range(n)]
                    (-(logprobs * torch.tensor(weights)).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield tuned


def add_lora(table: Table, lm: laser.LanguageModel, split: laser.Split, options: argparse.Namespace, name: str) -> None:
    """Train a LoRA, and add a row for each epoch up to the first one beyond the bound."""
    bound, start = math.log1p(options.max_harm), time.monotonic()
    for epoch, tuned in enumerate(lora_epochs(lm, split, options.seed), 1):
        change = table._score(tuned, table.guards["own text"]).loss - table.on_text["own text"].loss
        beyond = " (beyond the bound)" if change > bound else ""
        table.add(f"{name}, {epoch} epochs{beyond}", tuned, time.monotonic() - start)
        if beyond:
            break


def with_examples(split: laser.Split, from_: laser.Split) -> laser.Split:
    """Return questions with others and their answers before each of them."""
    shots = "".join(f"{e.prompt}{e.joint}{e.answer}\n" for e in from_.examples[:SHOTS])
    return replace(split, examples=tuple(replace(e, prompt=shots + e.prompt) for e in split.examples))


def main() -> None:
    """Read the arguments, and measure one row after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--task", default="worldfacts")
    parser.add_argument("--data")
    parser.add_argument("--scorer", help="none takes the scorer of the task")
    parser.add_argument("--split-by", help="paper or shuffled; none takes the way of the task")
    parser.add_argument("--metric", default="loss", help="accuracy or loss: what the choice goes by")
    parser.add_argument("--questions", type=int, default=300, help="questions to choose on")
    parser.add_argument("--test", type=int, default=1200, help="held-out questions")
    parser.add_argument("--max-harm", type=float, default=0.05)
    parser.add_argument("--text", help="text that no row chooses on")
    parser.add_argument("--seed", type=int, default=0, help="of the split and of everything random")
    parser.add_argument("--reduce", default="", help="what an earlier search chose, or its @FILE, for random and both")
    parser.add_argument("--only", default=",".join(ROWS), help="rows, separated by commas")
    parser.add_argument("--json", type=Path, help="write the results there too")
    options = parser.parse_args()
    chosen = options.only.split(",")
    lm = laser.load(options.model)
    task = laser.task(options.task, data=options.data, seed=options.seed, scorer=options.scorer, split=options.split_by)
    task = replace(task, validation=task.validation.limit(options.questions), test=task.test.limit(options.test))
    (own,) = guards_of(lm, ["self"], seed=options.seed)
    guards = {"own text": own} | (
        {Path(options.text).parent.name or options.text: guards_of(lm, [options.text])[0]} if options.text else {}
    )
    table = Table(lm, task.test, guards)
    components = Intervention.read(options.reduce or "")
    for strategy in [row for row in chosen if row in ("race", "compose", "components", "strengths")]:
        start = time.monotonic()
        result = laser.search(
            lm, task, strategy=strategy, metric=options.metric, max_harm=options.max_harm, guards=("self",), seed=options.seed
        )
        seconds = time.monotonic() - start
        with laser.applied(lm, result.best):
            table.add(strategy if result.best else f"{strategy}: keeps the model", lm, seconds, best=str(result.best))
        if strategy == "components":
            components = result.best
    if "random" in chosen and components:
        with laser.applied(lm, random_components(lm, components, options.seed)):
            table.add("random", lm, 0.0)
    if "lora" in chosen:
        add_lora(table, lm, task.validation, options, "lora")
    if "both" in chosen and components:
        with laser.applied(lm, components):
            add_lora(table, lm, task.validation, options, "both")
    if "examples" in chosen:
        table.add("examples", lm, 0.0, with_examples(task.test, task.validation))
    if options.json:
        options.json.write_text(json.dumps(table.rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
