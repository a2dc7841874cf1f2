"""Gain on held-out questions and harm on other text: component removal beside its rivals, side by side in one table.

    python benchmarks/gain_under_harm.py --task worldfacts --max-harm 0.05 --text wikitext2/test.txt
    python benchmarks/gain_under_harm.py --task counterfact --data DATA --only components,lora --seed 1

All rows choose on the same questions under the same bound of harm on text that the model wrote itself. The gain is measured
on other questions, the harm on other own text and on the passages of ``--text``, which no row chose on. The rows:

- race, compose: the best single reduction, and a composition of reductions;
- components: single components of all matrices;
- strengths: factors from 0 to 1 for the components of all matrices;
- random: the same strengths, or removals, for other components of the same matrices with nearly the same singular values;
- lora: a LoRA of rank 8 on all linear layers, trained on the same questions; the last quarter of an epoch within the bound,
  and the first one beyond it;
- both: the same LoRA, trained on the model without the components, or with the strengths;
- examples: four of the questions with their answers before each prompt, and no change of the model.
"""

from __future__ import annotations

import argparse
import copy
import itertools
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
from laserlm.reductions import Intervention, Size, Strengths
from laserlm.scoring.evaluate import evaluate_rows
from laserlm.scoring.forward import batches, forward_logits, run_rows
from laserlm.scoring.tokenize import encode
from laserlm.searching.guard import Guard, Harm, guards_of
from laserlm.searching.scorer import EncodedSplit

ROWS = ("race", "compose", "components", "strengths", "random", "lora", "both", "examples")
EPOCHS, QUARTERS, RATE, BATCH, RANK = 5, 4, 2e-4, 16, 8
"""Of the LoRA: epochs at most, looks at the harm in each, step size, questions in a step, rank."""
SHOTS = 4
NEIGHBOURS = 20
"""Components of nearly the same singular values, among which the strengths are drawn anew."""


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
        self.on_text = {name: self._score(lm, guard.measuring) for name, guard in guards.items()}
        self.on_choosing = self._score(lm, guards["own text"].choosing)
        self.rows: list[dict[str, Any]] = []
        self.scores: dict[str, laser.Evaluation] = {}
        print("| row | accuracy | gain, 95 % interval | corrected / broken | loss | " + " | ".join(guards) + " | s |")
        print("|---|---|---|---|---|" + "---|" * len(guards) + "---|")

    def harm_used(self, lm: laser.LanguageModel) -> float:
        """Return the harm on own text that a choice may look at, and one standard error more, as a search does."""
        harm = Harm("own text", "text", laser.compare(self.on_choosing, self._score(lm, self.guards["own text"].choosing)))
        return harm.change + harm.error

    def _score(self, lm: laser.LanguageModel, part: EncodedSplit) -> laser.Evaluation:
        return evaluate_rows(lm, part.split, part.scorer, part.sequences, lambda: run_rows(lm, part.sequences, 32))

    def add(
        self, row: str, lm: laser.LanguageModel, seconds: float, test: laser.Split | None = None, best: str | None = None
    ) -> None:
        """Measure a row; ``best`` is the text of its intervention."""
        edited = laser.evaluate(lm, test or self.test)
        self.scores[row] = edited if test is None else replace(edited, task=self.base.task)
        c = laser.compare(self.base, self.scores[row])
        harms = {
            name: Harm(name, "text", laser.compare(self.on_text[name], self._score(lm, guard.measuring)))
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

    def print_pairs(self) -> None:
        """Print by how much each row is ahead of each other one on the same questions."""
        for first, second in itertools.combinations(self.scores, 2):
            c = laser.compare(self.scores[second], self.scores[first])
            low, high = c.interval
            print(
                f"{first} against {second}: {100 * c.gain:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}], "
                f"right alone {c.corrected} / {c.broken}, loss {c.edited_loss - c.base_loss:+.3f}"
            )


def random_components(lm: laser.LanguageModel, chosen: Intervention, seed: int) -> Intervention:
    """Return the same strengths in another order: neighbours by singular value, in one matrix, change them by chance.

    A component may keep its strength by chance, and where all neighbours have one strength, none changes.
    """
    draw, drawn = random.Random(seed), []
    widths = {(m.stack, m.layer, m.name): m.max_rank for m in lm.matrices}
    for r in chosen.reductions:
        if r.size.strengths is None:
            raise SystemExit(f"{r} keeps a rank; random rows are drawn for removed or weakened components alone")
        of_matrix = r.size.strengths
        strengths = [of_matrix.get(i, 1.0) for i in range(widths[r.stack, r.layers.first or 0, r.matrix])]
        for start in range(0, len(strengths), NEIGHBOURS):
            part = strengths[start : start + NEIGHBOURS]
            draw.shuffle(part)
            strengths[start : start + NEIGHBOURS] = part
        drawn.append(replace(r, size=Size(scale=Strengths.of(dict(enumerate(strengths))))))
    return Intervention(tuple(drawn))


def lora_quarters(lm: laser.LanguageModel, split: laser.Split, seed: int) -> Iterator[tuple[float, laser.LanguageModel]]:
    """Train a LoRA on the answers of a split, and yield epochs and model after about each quarter of an epoch."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(lm.model), config)
    model: Any = adapted.base_model.model
    tuned = replace(lm, model=model, loaded=None)
    rows = encode(lm, split.examples, "answer")
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    order = random.Random(seed)
    for epoch in range(EPOCHS):
        order.shuffle(rows)
        starts = range(0, len(rows), BATCH)
        looks = {starts[len(starts) * quarter // QUARTERS - 1] for quarter in range(1, QUARTERS + 1)}
        for start in starts:
            part = rows[start : start + BATCH]
            for batch in batches(tuned, part, BATCH):
                with torch.enable_grad():
                    logprobs = forward_logits(tuned, batch, scored_only=False).logprobs
                    weights = [1 / n / len(part) for n, _ in batch.counts for _ in range(n)]
                    (-(logprobs * torch.tensor(weights)).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if start in looks:
                yield epoch + (start // BATCH + 1) / len(starts), tuned


def add_lora(table: Table, lm: laser.LanguageModel, split: laser.Split, options: argparse.Namespace, name: str) -> None:
    """Train a LoRA, and add a row for the last quarter of an epoch within the bound and for the first one beyond it."""
    bound, start, within = math.log1p(options.max_harm), time.monotonic(), dict[str, torch.Tensor]()
    done = 0.0
    for epochs, tuned in lora_quarters(lm, split, options.seed):
        trained = {n: p for n, p in tuned.model.named_parameters() if p.requires_grad}
        if table.harm_used(tuned) > bound:
            table.add(f"{name}, {epochs:.2g} epochs (beyond the bound)", tuned, time.monotonic() - start)
            break
        done, within = epochs, {n: p.detach().clone() for n, p in trained.items()}
    if within:
        with torch.no_grad():
            for n, p in trained.items():
                p.copy_(within[n])
        table.add(f"{name}, {done:.2g} epochs", tuned, time.monotonic() - start)


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
    parser.add_argument("--guard", action="append", default=[], help="a task that a search keeps within the bound too")
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
    guards |= {name: guards_of(lm, [name])[0] for name in options.guard}
    table = Table(lm, task.test, guards)
    components = Intervention.read(options.reduce or "")
    for strategy in [row for row in chosen if row in ("race", "compose", "components", "strengths")]:
        start = time.monotonic()
        result = laser.search(
            *(lm, task),
            strategy=strategy,
            metric=options.metric,
            max_harm=options.max_harm,
            guards=("self", *options.guard),
            seed=options.seed,
        )
        seconds = time.monotonic() - start
        with laser.applied(lm, result.best):
            table.add(strategy if result.best else f"{strategy}: keeps the model", lm, seconds, best=str(result.best))
        if strategy in ("components", "strengths"):
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
    table.print_pairs()
    if options.json:
        options.json.write_text(json.dumps(table.rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
