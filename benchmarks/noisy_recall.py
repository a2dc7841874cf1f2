"""Noisy recall in depth: other probabilities of noise, corrupted inputs, calibration, and the rank that serves all words best.

Run: python benchmarks/noisy_recall.py alpha|inputs|calibration|interior [--seeds 3] [--out noisy-recall-bench] [--figure FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from laserlm.edit import applied
from laserlm.lab.recall.language import QUESTION_SEED_OFFSET, TRIGGER, Language, RecallConfig, questions
from laserlm.lab.recall.model import load_or_train
from laserlm.lab.recall.study import RecallResult, run_study
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate
from laserlm.store import Store
from laserlm.studies.calibration import calibration, confidences
from laserlm.studies.estimates import Estimate, paired_estimates
from laserlm.studies.figures import curves, write_figure
from laserlm.tasks import Split, Task

ALPHAS = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8)
EDIT = "1.fc_in@0"
RATE_OF_ALL = 0.2
"""Learning rate where all words are learnt, of which those after a trigger are a fifth."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("alpha", "inputs", "calibration", "interior"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("noisy-recall-bench"))
    parser.add_argument("--figure", type=Path, help="of alpha and interior; an .html, .svg or .png file")
    given = parser.parse_args()
    parts = {"alpha": alpha, "inputs": inputs, "calibration": calibrated, "interior": interior}
    parts[given.part](given.seeds, given.out, given.figure)


def studied(config: RecallConfig, out: Path) -> tuple[LanguageModel, RecallResult]:
    """Train, unless it was done before, and search."""
    lm = load_or_train(config, out / f"{config.loss_on}-{config.alpha:g}-{config.learning_rate:g}-{config.seed}")
    return lm, run_study(lm, config, out / "runs.db")


def alpha(seeds: int, out: Path, figure: Path | None) -> None:
    """Print what is found at other probabilities of noise."""
    shares: dict[str, list[tuple[float, Estimate]]] = {"unchanged": [], "reduced": []}
    print("| alpha | seed | best | clean, before | after | gain | noisy loss, before | after |\n" + "|---" * 8 + "|")
    for value in ALPHAS:
        found = [studied(RecallConfig(alpha=value, seed=seed), out)[1] for seed in range(seeds)]
        for name, of in (("unchanged", [r.clean.base for r in found]), ("reduced", [r.clean.edited for r in found])):
            shares[name].append((value, Estimate.mean(of)))
        for seed, r in enumerate(found):
            c, low, high = r.clean, *r.clean.interval
            print(
                f"| {value:g} | {seed} | `{r.exhaustive.best or 'unchanged'}` | {c.base:.1%} | {c.edited:.1%} | "
                f"{c.gain:+.1%} [{low:+.1%}, {high:+.1%}] | {r.noisy.base_loss:.3f} | {r.noisy.edited_loss:.3f} |",
                flush=True,
            )
    if figure is not None:
        title = f"Noisy recall: clean questions answered rightly, mean of {seeds} models"
        write_figure(curves(shares, title, "probability of noise in training", "share"), figure)


def corrupted(config: RecallConfig) -> Iterator[tuple[str, Split]]:
    """Yield questions, answered by the output of the sequence, on inputs that are corrupted in some way."""
    language = Language(config)
    ways = [(f"noise {a:g}", {"alpha": a}) for a in (0.0, 0.35, 0.65, 0.9)]
    ways += [(f"{s:.0%} of the words swapped", {"alpha": 0.0, "swapped": s}) for s in (0.1, 0.3, 1.0)]
    for number, (name, how) in enumerate(ways):
        drawn = language.draw(2000, seed=(10 + number) * QUESTION_SEED_OFFSET + config.seed, **how)
        yield name, Task.of(name, questions(language, drawn, name)).every


def inputs(seeds: int, out: Path, _: Path | None) -> None:
    """Print how often the output is named where the sequence before it is corrupted."""
    print(f"| input | seed | output shown before | unchanged | `{EDIT}` |\n" + "|---" * 5 + "|")
    for seed in range(seeds):
        lm = load_or_train(RecallConfig(seed=seed), out / f"outputs-0.65-0.05-{seed}")
        for name, split in corrupted(RecallConfig(seed=seed)):
            base = evaluate(lm, split)
            with applied(lm, EDIT):
                edited = evaluate(lm, split)
            shown = sum(f"{TRIGGER} {e.answer} " in e.prompt for e in split) / len(split)  # none can know it otherwise
            print(f"| {name} | {seed} | {shown:.1%} | {base.accuracy:.1%} | {edited.accuracy:.1%} |", flush=True)


def calibrated(seeds: int, out: Path, _: Path | None) -> None:
    """Print calibration on clean questions and on noisy ones, answered as the sequence goes on."""
    print(
        "| questions | seed | ECE, before | after | Brier, before | after | confidence, before | after |\n" + "|---" * 8 + "|"
    )
    for seed in range(seeds):
        config = RecallConfig(seed=seed)
        lm, language = load_or_train(config, out / f"outputs-0.65-0.05-{seed}"), Language(config)
        for name, a, noisy in (("clean", 0.0, False), ("noisy", None, True)):
            drawn = language.draw(2000, seed=20 * QUESTION_SEED_OFFSET + seed, alpha=a)
            split = Task.of(name, questions(language, drawn, name, noisy=noisy)).every
            before = confidences(lm, split)
            with applied(lm, EDIT):
                found = calibration(before, confidences(lm, split))
            b, a_ = found.base, found.edited
            print(
                f"| {name} | {seed} | {b.ece} | {a_.ece} | {b.brier.value:.3f} | {a_.brier.value:.3f} | "
                f"{b.confidence.value:.3f} | {a_.confidence.value:.3f} |",
                flush=True,
            )


def interior(seeds: int, out: Path, figure: Path | None) -> None:
    """Print what every size of the last MLP does where all words were learnt: to all words, and to the questions."""
    series: dict[str, list[tuple[float, Estimate]]] = {}
    for seed in range(seeds):
        config = RecallConfig(loss_on="all", learning_rate=RATE_OF_ALL, seed=seed)
        lm, r = studied(config, out)
        language = Language(config)
        drawn = language.draw(1000, seed=30 * QUESTION_SEED_OFFSET + seed, alpha=0.0)
        asked = Task.of("asked", questions(language, drawn, "asked")).every
        base = evaluate(lm, asked)
        with Store.open(out / "runs.db") as results:
            trials = results.evaluations(r.exhaustive.run, "validation")
        print(f"seed {seed}: unchanged {trials[''].loss:.4f} nats per word, {base.accuracy:.1%} of {base.n} questions")
        print("| reduction | all words, change of loss | questions | change of loss |\n" + "|---" * 4 + "|")
        for matrix in ("1.fc_in", "1.fc_out"):
            points = [(1.0, Estimate.mean([0.0] * base.n))]
            for text in sorted((t for t in trials if t.startswith(f"{matrix}@")), key=lambda t: float(t.partition("@")[2])):
                with applied(lm, text):
                    edited = evaluate(lm, asked)
                gain, change = paired_estimates(base, edited)
                points.append((float(text.partition("@")[2]), change))
                words = paired_estimates(trials[""], trials[text])[1]
                print(f"| `{text}` | {words} | {edited.accuracy:.1%} ({gain.value:+.1%}) | {change} |", flush=True)
            series[f"seed {seed}, {matrix}"] = sorted(points)
        t = r.exhaustive.test
        low, high = t.loss_interval
        print(
            f"seed {seed}: best for all words {r.exhaustive.best or 'unchanged'}, "
            f"test {t.base_loss:.4f} -> {t.edited_loss:.4f} "
            f"({t.edited_loss - t.base_loss:+.4f} [{low:+.4f}, {high:+.4f}]), "
            f"questions {r.clean.base:.1%} -> {r.clean.edited:.1%}",
            flush=True,
        )
    if figure is not None:
        title = "All words learnt: change of loss on clean questions"
        write_figure(curves(series, title, "kept share of the singular values", "nats"), figure)


if __name__ == "__main__":
    main()
