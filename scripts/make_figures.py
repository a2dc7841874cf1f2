"""Draw the figures of docs/how-it-works.md from real runs of the bundled model, and print their numbers.

    OMP_NUM_THREADS=1 .venv/bin/python scripts/make_figures.py [frontier] [screen] [race] [winners-curse] [--store FILE.db]

Without names it draws them all. The searches are made where the store does not have them: the race takes about a minute,
the exhaustive search of the last five blocks about eight on one core. Without a store they are made anew each time.
``--data FILE`` (CounterFact) draws the winner's curse for that task too. Needs Chromium, and the extra ``test``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

import laserlm as laser
from laserlm.models import LanguageModel
from laserlm.scoring.evaluate import evaluate_rows
from laserlm.scoring.forward import run_rows
from laserlm.scoring.prefix_cache import PrefixCache
from laserlm.scoring.records import Evaluation
from laserlm.scoring.tokenize import encode
from laserlm.searching import Metric, SearchResult
from laserlm.store import Store
from laserlm.studies.figures import write_figure

IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"
FIGURES = ("frontier", "screen", "race", "winners-curse")
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#999999"
"""Told apart by colour-blind eyes (Okabe and Ito)."""

QUESTIONS, REPEATS, BATCH = 32, 5, 32
"""Of the frontier: those of a race's first rung, how often a block is timed, and rows in a pass."""
CHOSEN_ON, MEASURED_ON = 300, 1000
"""Questions of the race on worldfacts."""
SIZES = "0.9,0.8,0.6,0.4,0.2,0.1,0.05,0.01,0.005"
BLOCKS = {"worldfacts": "top5", "counterfact": "top2"}
POOL, DRAWN, TIMES = 400, 100, 2000
"""Of the winner's curse: questions that every candidate meets, those drawn from them to choose on, and how often."""


class Timed(NamedTuple):
    """Milliseconds of processor time for one candidate of a block."""

    layer: int
    whole: float
    short: list[float]
    """From the frontier, in each repeat."""
    laid_in: float
    """To put the reduced matrix in its place, its decomposition being on disk."""


class Leaving(NamedTuple):
    """One candidate of a race: its mean change of loss at the ends of the rungs that it was in."""

    intervention: str
    questions: list[int]
    changes: list[float]


@dataclass(frozen=True)
class Pool:
    """What every candidate of an exhaustive search did on the same questions.

    Args:
        texts: canonical text of each candidate.
        gains: (candidates, questions), 1 where it corrects, -1 where it breaks, else 0.
        changes: (candidates, questions), change of loss in nats per token.
        facts: by question, the fact that it asks for.
    """

    texts: list[str]
    gains: np.ndarray[Any, Any]
    changes: np.ndarray[Any, Any]
    facts: list[str]

    @classmethod
    def of(cls, base: Evaluation, others: Mapping[str, Evaluation], facts: Sequence[str]) -> Pool:
        """Compare every candidate with the unchanged model."""
        hit = np.array([s.correct for s in base.scores], dtype=np.int64)
        loss = np.array([s.loss for s in base.scores])
        gains = np.stack([np.array([s.correct for s in e.scores], dtype=np.int64) - hit for e in others.values()])
        changes = np.stack([np.array([s.loss for s in e.scores]) - loss for e in others.values()])
        return cls(list(others), gains, changes, list(facts))


class Cursed(NamedTuple):
    """The best of so many candidates, over all draws: its mean gain where it was chosen, and on the other questions."""

    candidates: int
    validation: float
    test: float
    worse: float
    """Share of the draws in which the test gain is below zero."""


def leavings(base: Evaluation, others: Mapping[str, Evaluation], rungs: Sequence[int]) -> list[Leaving]:
    """Return for each candidate its mean change of loss over the first questions, at each rung that it was scored in."""
    below = np.array([s.loss for s in base.scores])
    found = []
    for text, e in others.items():
        changes = np.array([s.loss for s in e.scores]) - below[: e.n]
        at = [n for n in rungs if n <= e.n]
        found.append(Leaving(text, at, [float(changes[:n].mean()) for n in at]))
    return found


def draw(facts: Sequence[str], n: int, rng: np.random.Generator) -> tuple[list[int], list[int]]:
    """Return the places of ``n`` questions, and of all questions whose fact none of these asks for."""
    of: dict[str, list[int]] = {}
    for i, fact in enumerate(facts):
        of.setdefault(fact, []).append(i)
    names = list(of)
    flat = [i for f in rng.permutation(len(names)) for i in of[names[f]]]
    seen = {facts[i] for i in flat[:n]}
    return flat[:n], [i for i in flat[n:] if facts[i] not in seen]


def winner(pool: Pool, among: Sequence[int], questions: Sequence[int], metric: Metric) -> int | None:
    """Return the best of some candidates on some questions, or None where the unchanged model is not beaten.

    By accuracy, ties by lower loss; or by loss, ties by accuracy: as a search chooses.
    """
    gains, changes = pool.gains[among][:, questions].mean(1), pool.changes[among][:, questions].mean(1)
    keys = (changes, -gains) if metric == "accuracy" else (-gains, changes)
    best = int(np.lexsort(keys)[0])
    ahead = (gains[best], -changes[best]) if metric == "accuracy" else (-changes[best], gains[best])
    return int(among[best]) if ahead > (0, 0) else None


def curse(pool: Pool, sizes: Sequence[int], n: int, times: int, metric: Metric = "accuracy", seed: int = 0) -> list[Cursed]:
    """Choose the best of so many random candidates on ``n`` random questions, again and again, and measure it on the others."""
    rng = np.random.default_rng(seed)
    values = pool.gains if metric == "accuracy" else -pool.changes
    found = np.zeros((len(sizes), times, 2))
    for t in range(times):
        validation, test = draw(pool.facts, n, rng)
        order = rng.permutation(len(pool.texts))
        for s, size in enumerate(sizes):
            best = winner(pool, order[:size].tolist(), validation, metric)
            if best is not None:
                found[s, t] = values[best, validation].mean(), values[best, test].mean()
    return [
        Cursed(size, float(of[:, 0].mean()), float(of[:, 1].mean()), float((of[:, 1] < 0).mean()))
        for size, of in zip(sizes, found, strict=True)
    ]


def time_blocks(lm: LanguageModel) -> list[Timed]:
    """Time a candidate of each block from the frontier beside a whole pass on the same questions."""
    split = laser.task("worldfacts").validation.limit(QUESTIONS)
    rows = encode(lm, split.examples, "answer")
    frontier = PrefixCache(lm, rows, BATCH)
    found = []
    for layer in sorted({m.layer for m in lm.matrices}):
        frontier.move_to("", layer)
        times = [time.process_time()]
        with laser.applied(lm, f"{layer}.fc_in@0.1"):
            times.append(time.process_time())
            whole = evaluate_rows(lm, split, "answer", rows, lambda: run_rows(lm, rows, BATCH))
            times.append(time.process_time())
            for _ in range(REPEATS):
                short = evaluate_rows(lm, split, "answer", rows, frontier.run)
                times.append(time.process_time())
        if whole.scores != short.scores:
            raise SystemExit(f"block {layer}: scores from the frontier are not those of a whole pass")
        laid_in, passed, *again = (1000 * (b - a) for a, b in pairwise(times))
        found.append(Timed(layer, passed, again, laid_in))
    return found


def frontier_figure(timed: Sequence[Timed]) -> Any:
    """Return the cost of a candidate by its block, beside a whole pass and the share of the blocks that are left to run."""
    blocks = [t.layer for t in timed]
    whole = statistics.median(t.whole for t in timed)
    figure = go.Figure()
    figure.add_scatter(
        name="whole pass, measured",
        x=blocks,
        y=[t.whole for t in timed],
        mode="markers",
        marker={"color": ORANGE, "symbol": "square-open", "size": 8},
    )
    short = [statistics.median(t.short) for t in timed]
    quarters = [statistics.quantiles(t.short, n=4) for t in timed]
    figure.add_scatter(
        name="from the frontier, measured",
        x=blocks,
        y=short,
        error_y={
            "array": [q[2] - m for q, m in zip(quarters, short, strict=True)],
            "arrayminus": [m - q[0] for q, m in zip(quarters, short, strict=True)],
        },
        mode="markers",
        marker={"color": BLUE, "size": 8},
    )
    figure.add_scatter(
        name="blocks left, of all",
        x=blocks,
        y=[whole * (len(blocks) - b) / len(blocks) for b in blocks],
        mode="lines",
        line={"color": GREY, "dash": "dash"},
    )
    return laid_out(figure, "block of the reduced matrix", f"milliseconds for {QUESTIONS} questions", rangemode="tozero")


def screen_figure(found: SearchResult) -> Any:
    """Return what the screen expected against what the first rung measured, the random controls marked."""
    screened = found.screened
    if screened is None:
        raise SystemExit("the search had no screen")
    sent = list(screened.expected)
    figure = go.Figure()
    for name, texts, colour, symbol in (
        ("sent by the screen", sent[: screened.chosen], BLUE, "circle"),
        ("drawn at random", sent[screened.chosen :], ORANGE, "diamond"),
    ):
        both = [t for t in texts if t in screened.measured]
        figure.add_scatter(
            name=name,
            x=[screened.expected[t] for t in both],
            y=[screened.measured[t] for t in both],
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 9, "opacity": 0.8},
        )
    ends = [min(screened.expected.values()), max(screened.expected.values())]
    figure.add_scatter(name="as expected", x=ends, y=ends, mode="lines", line={"color": GREY, "dash": "dash"})
    return laid_out(figure, "change of loss that the screen expects, nats", "measured on the first rung, nats")


def race_figure(found: SearchResult, lines: Sequence[Leaving]) -> Any:
    """Return a line for each candidate from rung to rung; it ends where the candidate left."""
    best = str(found.best)
    stops = list(dict.fromkeys(r.examples for r in found.rungs))
    places = {n: i for i, n in enumerate(stops)}
    figure = go.Figure()
    named: set[str] = set()
    for line in sorted(lines, key=lambda line: (line.intervention == best, len(line.questions))):
        if line.intervention == best:
            name, style = f"winner, {best}", {"color": BLUE, "width": 4}
        elif line.questions[-1] == stops[-1]:
            name, style = "met all questions", {"color": GREEN, "width": 2}
        else:
            name, style = "left earlier", {"color": GREY, "width": 1}
        figure.add_scatter(
            name=name,
            showlegend=name not in named,
            x=[places[n] for n in line.questions],
            y=line.changes,
            mode="lines+markers",
            line=style,
            marker={"size": 7 if style["color"] == BLUE else 5},
        )
        named.add(name)
    figure.add_hline(y=0, line={"color": "black", "width": 1}, annotation_text="the unchanged model")
    laid_out(figure, "questions met", "mean change of loss, nats")
    highest = sorted(c for line in lines for c in line.changes)[-1]
    figure.update_yaxes(range=[1.15 * min(c for line in lines for c in line.changes), min(highest, SHOWN) * 1.05])
    return figure.update_xaxes(tickvals=list(places.values()), ticktext=list(map(str, stops)))


SHOWN = 0.3
"""Changes of loss above this are off the race's figure, so that the rest can be told apart."""


def curse_figure(pool: Pool, cursed: Sequence[Cursed]) -> Any:
    """Return one draw, each candidate's gain where the choice is made against that on the others; and the mean over draws."""
    figure = make_subplots(
        cols=2, subplot_titles=("one draw: every candidate", f"mean of {TIMES:,} draws"), horizontal_spacing=0.12
    )
    validation, test, best = one_draw(pool)
    counts: dict[tuple[float, float], int] = {}
    for v, t in zip(validation, test, strict=True):
        counts[v, t] = counts.get((v, t), 0) + 1
    figure.add_scatter(
        name="candidates",
        x=[v for v, _ in counts],
        y=[t for _, t in counts],
        mode="markers",
        marker={"color": GREY, "size": [4 + 2 * c**0.5 for c in counts.values()], "opacity": 0.7, "line": {"width": 0}},
        showlegend=False,
        row=1,
        col=1,
    )
    ends = [min(validation), max(validation)]
    figure.add_scatter(
        x=ends, y=ends, mode="lines", line={"color": "black", "dash": "dot", "width": 1}, showlegend=False, row=1, col=1
    )
    figure.add_scatter(
        x=[validation[best]],
        y=[test[best]],
        mode="markers+text",
        text=["winner"],
        textposition="bottom center",
        marker={"color": ORANGE, "size": 12, "symbol": "diamond"},
        showlegend=False,
        row=1,
        col=1,
    )
    for name, values, colour, dash in (
        (f"where it was chosen ({DRAWN} questions)", [c.validation for c in cursed], ORANGE, "solid"),
        ("on the other questions", [c.test for c in cursed], BLUE, "dash"),
    ):
        figure.add_scatter(
            name=name,
            x=[c.candidates for c in cursed],
            y=[100 * v for v in values],
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            row=1,
            col=2,
        )
    laid_out(figure, "", "")
    figure.update_xaxes(title="gain on the questions chosen on, points", row=1, col=1)
    figure.update_yaxes(title="gain on the others, points", row=1, col=1)
    figure.update_xaxes(title="best of so many candidates", type="log", tickvals=[c.candidates for c in cursed], row=1, col=2)
    figure.update_yaxes(title="gain, points", rangemode="tozero", row=1, col=2)
    return figure.update_layout(width=900)


def one_draw(pool: Pool, seed: int = 0) -> tuple[list[float], list[float], int]:
    """Return all candidates' gains in points on drawn questions and on the others, and the place of the winner."""
    chosen, others = draw(pool.facts, DRAWN, np.random.default_rng(seed))
    best = winner(pool, range(len(pool.texts)), chosen, "accuracy")
    both = [(100 * pool.gains[:, q].mean(1)).round(3).tolist() for q in (chosen, others)]
    return both[0], both[1], best or 0


def laid_out(figure: Any, x: str, y: str, **axis: Any) -> Any:
    """Give a figure its size, its axes' names, and the legend above."""
    figure.update_layout(
        template="plotly_white",
        width=760,
        height=420,
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        legend={"orientation": "h", "y": 1.16, "x": 0},
        xaxis_title=x,
        yaxis_title=y,
    )
    return figure.update_yaxes(**axis)


def race_of(lm: LanguageModel, store: Path) -> SearchResult:
    """Return the race on worldfacts, and run it where the store does not have it."""
    task = laser.task("worldfacts")
    short = replace(task, validation=task.validation.limit(CHOSEN_ON), test=task.test.limit(MEASURED_ON))
    return laser.search(lm, short, strategy="race", metric="loss", store=store)


def pool_of(lm: LanguageModel, store: Path, name: str, data: str | None) -> Pool:
    """Score every candidate of the last blocks on the same questions, where the store does not have it."""
    task = laser.task(name, data=data)
    short = replace(task, validation=task.validation.limit(POOL), test=task.test.limit(10))
    found = laser.search(lm, short, strategy="exhaustive", grid=f"{BLOCKS[name]}.all@{SIZES}", metric="accuracy", store=store)
    with Store.open(store) as results:
        scores = results.evaluations(found.run, "validation")
        examples = results.examples(found.run, "validation")
    base = scores.pop("")
    return Pool.of(base, {t: e for t, e in scores.items() if e.n == base.n}, [e.fact or e.id for e in examples])


def draw_frontier(lm: LanguageModel) -> None:
    """Time the blocks and draw them."""
    timed = time_blocks(lm)
    write_figure(frontier_figure(timed), IMAGES / "how-frontier.svg")
    whole = statistics.median(t.whole for t in timed)
    laid = statistics.median(t.laid_in for t in timed)
    short = [statistics.median(t.short) for t in timed]
    slope, top = np.polyfit([len(timed) - t.layer for t in timed], short, 1)
    print(f"frontier: {QUESTIONS} questions, {REPEATS} repeats; whole {whole:.0f} ms; to lay a reduction in {laid:.1f} ms")
    print("  " + ", ".join(f"{t.layer}: {s:.0f}" for t, s in zip(timed, short, strict=True)))
    print(f"  mean {statistics.mean(short):.0f} ms, of the last ten blocks {statistics.mean(short[-10:]):.0f} ms")
    print(f"  line through them: {slope:.1f} ms for each block left, and {top:.1f} ms besides")


def draw_race(lm: LanguageModel, store: Path, wanted: Sequence[str]) -> None:
    """Draw the screen and the race of one search."""
    found = race_of(lm, store)
    s = found.screened
    print(f"race {found.run}: best of {found.candidates} {found.best}, {found.scored} scored, {found.seconds:.0f} s")
    if "screen" in wanted and s is not None:
        write_figure(screen_figure(found), IMAGES / "how-screen.svg")
        print(f"  screen over {s.examples}: {s.chosen} + {s.controls}, rho {s.correlation:.2f}, ahead {s.controls_ahead:.1%}")
        for text in list(s.expected)[s.chosen :]:
            print(f"    control {text}: expected {s.expected[text]:+.3f}, measured {s.measured[text]:+.3f}")
        print(f"  {sum(s.measured[t] < 0 for t in list(s.expected)[: s.chosen])} of those sent lower the loss")
    if "race" in wanted:
        with Store.open(store) as results:
            scores = results.evaluations(found.run, "validation")
        base = scores.pop("")
        lines = leavings(base, scores, list(dict.fromkeys(r.examples for r in found.rungs)))
        write_figure(race_figure(found, lines), IMAGES / "how-race.svg")
        print(f"  off the figure: {sum(line.changes[0] > SHOWN for line in lines)} of {len(lines)}")
        for r in found.rungs:
            print(f"    {r}")
        for line in lines:
            if len(line.questions) > 2 or line.intervention == str(found.best):
                print(f"    {line.intervention}: " + ", ".join(f"{c:+.3f}" for c in line.changes))
        print(f"  validation {found.validation}\n  test {found.test}")


def draw_curse(lm: LanguageModel, store: Path, name: str, data: str | None) -> None:
    """Draw the winner's curse for a task."""
    pool = pool_of(lm, store, name, data)
    every = len(pool.texts)
    sizes = [*(s for s in (1, 2, 5, 10, 20, 50, 100, 200) if 1.5 * s < every), every]
    cursed = curse(pool, sizes, DRAWN, TIMES)
    end = "" if name == "worldfacts" else f"-{name}"
    write_figure(curse_figure(pool, cursed), IMAGES / f"how-winners-curse{end}.svg")
    facts = len(set(pool.facts))
    print(f"winner's curse, {name}: {every} candidates, {len(pool.facts)} questions of {facts} facts, {TIMES} draws")
    for n in (50, DRAWN, 200):
        for c in cursed if n == DRAWN else curse(pool, [every], n, TIMES):
            print(f"  {n} questions: {c.candidates} {100 * c.validation:+.2f} {100 * c.test:+.2f}, worse in {c.worse:.1%}")
        (c,) = curse(pool, [every], n, TIMES, "loss")
        print(f"  {n} questions, by loss: {c.candidates} {-c.validation:+.3f} {-c.test:+.3f} nats, worse in {c.worse:.1%}")
    validation, test, best = one_draw(pool)
    rank = 1 + sum(t > test[best] for t in test)
    print(f"  one draw: {pool.texts[best]} {validation[best]:+.1f} {test[best]:+.1f} points, place {rank} on the others")


def main() -> None:
    """Write the figures to ``docs/images`` and print what they show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="*", help=f"of {', '.join(FIGURES)}; all by default")
    parser.add_argument("--store", type=Path, help="results database to keep the searches in")
    parser.add_argument("--data", help="file of CounterFact")
    given = parser.parse_args()
    wanted = given.figures or FIGURES
    if unknown := set(wanted) - set(FIGURES):
        parser.error(f"no figure {', '.join(sorted(unknown))}; there are {', '.join(FIGURES)}")
    torch.set_num_threads(1)
    lm = laser.load("bundled")
    with ExitStack() as stack:
        store = given.store or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "runs.db"
        if "frontier" in wanted:
            draw_frontier(lm)
        if "screen" in wanted or "race" in wanted:
            draw_race(lm, store, wanted)
        if "winners-curse" in wanted:
            draw_curse(lm, store, "worldfacts", None)
            if given.data:
                draw_curse(lm, store, "counterfact", given.data)


if __name__ == "__main__":
    main()
