"""A search on several workers: measured on this machine, and simulated beyond it.

    python benchmarks/scaling.py efficiency   exhaustive search: one worker of one core, two of them, and what the cores allow
    python benchmarks/scaling.py race         a race on two workers, with and without beginning the next rung early
    python benchmarks/scaling.py overhead     what a unit costs that does nothing
    python benchmarks/scaling.py plan         what --dry-run expects, and what the search then takes
    python benchmarks/scaling.py simulation   1 to 1,024 workers, with and without workers that end
    python benchmarks/scaling.py models       GPT-J, Llama-2-7B and a model of 70B: work, memory, what moves

The bundled model on worldfacts. Each way is timed in turns; medians are printed.
"""

from __future__ import annotations

import multiprocessing
import pickle
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from transformers import GPTJConfig, GPTJForCausalLM, LlamaConfig, LlamaForCausalLM

import laserlm as laser
from laserlm.models import LanguageModel
from laserlm.reductions import Intervention
from laserlm.searching import SearchConfig
from laserlm.searching.cluster import on_ray
from laserlm.searching.driver import VALIDATION, encode_splits
from laserlm.searching.executors import LocalExecutor
from laserlm.searching.measured_cost import measure_cost
from laserlm.searching.plan import Plan, plan
from laserlm.searching.schedule import Schedule
from laserlm.searching.scorer import PrefixScorer
from laserlm.searching.simulation import CostModel
from laserlm.searching.work import ScoreTask
from laserlm.tasks import Task

TURNS = 3
GRID = "all.mlp@0.5,0.1"
RECORD = 0.00007
"""Seconds to record the score of an example; measured on SQLite, see docs/benchmarks.md."""
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def task(validation: int, test: int = 32) -> Task:
    whole = laser.task("worldfacts")
    return replace(whole, validation=whole.validation.limit(validation), test=whole.test.limit(test))


class Clock:
    """When the first and the last work of a search was done, by stage, and who had nothing to do meanwhile."""

    def __init__(self) -> None:
        self.stages: dict[str, list[float]] = defaultdict(list)
        self.begun = time.perf_counter()

    def __call__(self, step: Any) -> None:
        self.stages[step.stage].append(time.perf_counter())

    @property
    def searching(self) -> float:
        """Seconds from the first answer to the last: what starting the workers takes is left out."""
        times = [t for stage in self.stages.values() for t in stage]
        return max(times) - min(times)


def searched(workers: int, made: Task, **given: Any) -> tuple[float, float, laser.SearchResult]:
    """Return the seconds of a search without and with the start of its workers, and what it found."""
    clock = Clock()
    found = laser.search(
        laser.load("bundled"), made, metric="loss", executor=laser.Ray(workers=workers), on_step=clock, **given
    )
    return clock.searching, time.perf_counter() - clock.begun, found


def scoring(barrier: Any, seconds: Any) -> None:
    """Score in one thread, as a worker does, once the others are ready too."""
    torch.set_num_threads(1)
    lm = laser.load("bundled")
    made = task(64)
    scorer = PrefixScorer(lm, encode_splits(lm, made, SearchConfig()))
    item = ScoreTask(VALIDATION, 0, 64, Intervention())
    item.execute(scorer)
    barrier.wait()
    begun = time.perf_counter()
    for _ in range(6):
        item.execute(scorer)
    seconds.put(time.perf_counter() - begun)


def together(processes: int) -> float:
    """Return the median seconds of the same scoring in so many processes that know nothing of each other."""
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(processes), context.Queue()
    running = [context.Process(target=scoring, args=(barrier, seconds)) for _ in range(processes)]
    for process in running:
        process.start()
    times: list[float] = [seconds.get() for _ in running]
    for process in running:
        process.join()
    return statistics.median(times)


def efficiency() -> None:
    made = task(64)
    searched(2, made, strategy="exhaustive", grid=GRID)  # decompositions are on disk from here on
    times: dict[str, list[float]] = defaultdict(list)
    for _ in range(TURNS):
        alone, both = together(1), together(2)
        times["ceiling"].append(alone / both)
        one, two = searched(1, made, strategy="exhaustive", grid=GRID), searched(2, made, strategy="exhaustive", grid=GRID)
        assert one[2].best == two[2].best
        times["one"].append(one[0])
        times["two"].append(two[0])
        times["efficiency"].append(one[0] / two[0] / 2)
        times["whole"].append(one[1] / two[1] / 2)
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values):.3f} of {', '.join(f'{v:.3f}' for v in values)}")


@dataclass(frozen=True)
class Nothing:
    """A work item without work."""

    number: int
    affinity: str = "all"
    cost: float = 1.0

    @property
    def batch_key(self) -> Hashable:
        return self.number

    def execute(self, scorer: PrefixScorer) -> int:
        return self.number


def overhead() -> None:
    lm = laser.load("bundled")
    made = task(300)
    splits = encode_splits(lm, made, SearchConfig())
    scores = ScoreTask(VALIDATION, 0, 300, Intervention()).execute(PrefixScorer(lm, splits))
    print(f"scores of 300 examples: {len(pickle.dumps(scores)) / 300:.0f} bytes an example")
    print(f"the tokens of 300 + 32 examples, sent once: {len(pickle.dumps(splits)) / 2**20:.2f} MiB")
    for workers in (1, 2):
        begun = time.perf_counter()
        with on_ray(laser.Ray(workers=workers), lm, splits, SearchConfig()) as executor:
            executor.block_order(VALIDATION)
            print(f"{workers} workers: {time.perf_counter() - begun:.1f} s until the first has the model and answers")
            for unit in (1, 16):
                pieces = [_Grouped(i, unit) for i in range(1000)]
                list(executor.run(pieces[:50], is_cancelled=lambda _: False))
                begun = time.perf_counter()
                assert len(list(executor.run(pieces, is_cancelled=lambda _: False))) == 1000
                print(f"{workers} workers, groups of {unit}: {time.perf_counter() - begun:.3f} s for 1,000 pieces")
    begun = time.perf_counter()
    assert (
        len(list(LocalExecutor(PrefixScorer(lm, splits)).run([Nothing(i) for i in range(1000)], is_cancelled=lambda _: False)))
        == 1000
    )
    print(f"this process: {1e6 * (time.perf_counter() - begun) / 1000:.1f} microseconds a piece")


@dataclass(frozen=True)
class _Grouped(Nothing):
    size: int = 1

    def __init__(self, number: int, size: int) -> None:
        object.__setattr__(self, "number", number)
        object.__setattr__(self, "size", size)

    @property
    def batch_key(self) -> Hashable:
        return self.number // self.size


class Watched(Schedule):
    """A schedule that notes how long workers had nothing to do."""

    idle_seconds = 0.0
    since: dict[Hashable, float]

    def take(self, worker: Hashable, now: float, *rest: Any, **more: Any) -> Any:
        unit = super().take(worker, now, *rest, **more)
        waited = self.__dict__.setdefault("since", {})
        if unit and worker in waited:
            Watched.idle_seconds += now - waited.pop(worker)
        elif not unit:
            waited.setdefault(worker, now)
        return unit


def race() -> None:
    made = task(300, 300)
    times: dict[str, list[float]] = defaultdict(list)
    searched(2, made, strategy="race")
    for _ in range(TURNS):
        for name, ahead in (("as it is", True), ("without beginning early", False)):
            Watched.idle_seconds = 0.0
            nothing = partial(lambda *_: [])
            with mock.patch("laserlm.searching.cluster.Schedule", Watched):
                if ahead:
                    seconds, _, found = searched(2, made, strategy="race")
                else:
                    with mock.patch("laserlm.searching.race._likely_next", nothing):
                        seconds, _, found = searched(2, made, strategy="race")
            times[name].append(seconds)
            times[f"{name}, share of time without work"].append(Watched.idle_seconds / 2 / seconds)
        times["one worker"].append(searched(1, made, strategy="race")[0])
        print(found.best, flush=True)
    for name, values in times.items():
        print(f"{name}: median {statistics.median(values):.3f} of {', '.join(f'{v:.3f}' for v in values)}")


def planned() -> None:
    lm = laser.load("bundled")
    for strategy, made in (("race", task(300, 1000)), ("exhaustive", task(64))):
        given: dict[str, Any] = {"strategy": strategy, "grid": "fine" if strategy == "race" else GRID}
        ahead = plan(lm, made, SearchConfig(**given))
        warm = replace(measure_cost(lm, ahead, made, SearchConfig(**given)), decompose=0.0)
        expected = ahead.simulate(1, warm).seconds
        laser.search(lm, made, metric="loss", **given)
        begun = time.perf_counter()
        laser.search(lm, made, metric="loss", **given)
        print(
            f"{strategy}: expected {expected:.0f} s, took {time.perf_counter() - begun:.0f} s, decompositions on disk",
            flush=True,
        )


def simulation() -> None:
    lm = laser.load("bundled")
    made = task(300, 1000)
    torch.set_num_threads(1)
    for strategy in ("exhaustive", "race"):
        config = SearchConfig(strategy=strategy)
        ahead = plan(lm, made, config)
        pace = replace(measure_cost(lm, ahead, made, config), start=15.0, unit=0.005)
        print(f"{strategy}, {ahead.n_items} pieces, {ahead.passes:.0f} passes, {pace}")
        _table(ahead, pace)


def _table(made: Plan, pace: CostModel, numbers: Sequence[int] = WORKERS) -> None:
    alone = made.simulate(1, pace).seconds
    for workers in numbers:
        shown = [f"{workers:5}"]
        for failures in (0.0, 1.0, 10.0):
            found = made.simulate(workers, pace, failures=failures)
            shown.append(
                f"{found.seconds:9.0f} s, efficiency {alone / workers / found.seconds:4.0%}, driver {found.driver:4.0%}, "
                f"{found.lost} lost, {found.gave_up} given up"
            )
        print(" | ".join(shown), flush=True)


def models() -> None:
    tokenizer = laser.load("bundled").tokenizer
    llama = partial(LlamaConfig, vocab_size=32000)
    shapes: dict[str, Callable[[], Any]] = {
        "GPT-J 6B": lambda: GPTJForCausalLM(GPTJConfig()),
        "Llama-2 7B": lambda: LlamaForCausalLM(llama()),
        "Llama-2 70B": lambda: LlamaForCausalLM(
            llama(
                hidden_size=8192,
                intermediate_size=28672,
                num_hidden_layers=80,
                num_attention_heads=64,
                num_key_value_heads=8,
            )
        ),
    }
    # The paper's CounterFact: 65,757 questions, a fifth of them to choose on. Made of the bundled questions, over and over.
    whole = laser.task("worldfacts")
    many = {name: _repeated(getattr(whole, name), n) for name, n in (("validation", 13151), ("test", 52606))}
    made = replace(whole, **many)
    rate, decompose = 1e14, 1e12
    for name, build in shapes.items():
        with torch.device("meta"):
            model = build().to(torch.float16)
        lm = LanguageModel(model, tokenizer, name, "causal")
        for strategy, grid in (("exhaustive", "paper"), ("race", "fine")):
            ahead = plan(lm, made, SearchConfig(strategy=strategy, grid=grid, memory=8 * 2**30))  # type: ignore[arg-type]
            pace = CostModel(work=ahead.pass_flop / rate, decompose=1 / decompose, start=120, unit=0.005, answer=RECORD)
            found = {k: v for k, v in ahead.as_dict().items() if k not in ("stages",)}
            print(name, strategy, found)
            bases = sum(4 * min(m.shape) ** 2 for m in ahead.matrices)
            hours = ahead.simulate(1, pace).seconds / 3600
            print(f"   bases of the decompositions {bases / 2**30:.1f} GiB; {hours:.1f} GPU-hours")
            _table(ahead, pace, (1, 8, 64, 256, 1024))


def _repeated(split: Any, n: int) -> Any:
    rows = [replace(split.examples[i % len(split)], id=f"{split.name} {i}") for i in range(n)]
    return replace(split, examples=tuple(rows))


if __name__ == "__main__":
    ways: dict[str, Callable[[], None]] = {
        "efficiency": efficiency,
        "race": race,
        "overhead": overhead,
        "plan": planned,
        "simulation": simulation,
        "models": models,
    }
    if sys.argv[1:] and sys.argv[1] in ways:
        ways[sys.argv[1]]()
    else:
        sys.exit(__doc__)
