"""What ``laser search --dry-run`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from laserlm.cli.options import print_json
from laserlm.cli.progress import say

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.searching import Ray
    from laserlm.searching.plan import Plan
    from laserlm.searching.simulation import CostModel, Simulation
    from laserlm.tasks import Task

__all__ = ["tell"]

WORKERS = (1, 2, 4, 8, 16, 32, 64)
UNIT_SECONDS = 0.005
"""Between two units of a worker on a Ray cluster; measured, see docs/benchmarks.md."""


def tell(lm: LanguageModel, task: Task, given: Mapping[str, Any], cluster: Ray | None, *, start: float, json: bool) -> None:
    """Plan a search, time a unit of it here, and show what it will take.

    Args:
        lm: the unchanged model.
        task: what is searched on.
        given: arguments of ``search`` that the work depends on.
        cluster: where it would be searched; its workers are taken to be as quick as this machine with their cores.
        start: seconds until this process had the model.
        json: print JSON.
    """
    import torch

    from laserlm.searching.plan import measure_cost, plan

    made = plan(lm, task, **given)
    say("timing one unit on this machine")
    here = worker = measure_cost(lm, made, task, batch_size=given["batch_size"])
    if cluster is not None and lm.device.type == "cpu":
        torch.set_num_threads(max(1, int(cluster.cpus)))
        worker = measure_cost(lm, made, task, batch_size=given["batch_size"])
    alone = made.simulate(1, here)
    remote = replace(worker, start=start, unit=UNIT_SECONDS)
    numbers = (cluster.workers,) if cluster is not None and cluster.workers else WORKERS
    on_cluster = {n: made.simulate(n, remote) for n in numbers}
    if json:
        print_json(_as_dict(made, here, alone, on_cluster))
    else:
        _print(made, here, alone, on_cluster)


def _as_dict(made: Plan, pace: CostModel, alone: Simulation, on_cluster: Mapping[int, Simulation]) -> dict[str, Any]:
    times = [
        {"workers": n, "seconds": found.seconds, "busy": found.busy, "driver": found.driver} for n, found in on_cluster.items()
    ]
    measured = {"seconds_per_pass": pace.work + pace.example, "seconds_to_record_an_example": pace.answer}
    return made.as_dict() | {"measured": measured, "seconds": alone.seconds, "on_ray": times}


def _print(made: Plan, pace: CostModel, alone: Simulation, on_cluster: Mapping[int, Simulation]) -> None:
    from rich.console import Console
    from rich.table import Table

    ways = {"race": "A race among", "exhaustive": "An exhaustive search of", "compose": "A composition of"}
    about = "about " if made.about else ""
    print(
        f"{ways[made.strategy]} {made.candidates:,} candidates in {len(made.matrices):,} matrices: {about}{made.pieces:,} "
        f"pieces, {made.passes:,.0f} passes of one example."
    )
    print(
        f"Floating-point operations: {made.flop:.2g}, of which passes {made.passes * made.pass_flop:.2g}, decompositions "
        f"{made.decomposition_flop:.2g}" + (f", the screen's sums {made.screen_flop:.2g}" if made.screen_flop else "") + "."
    )
    gib = {name: size / 2**30 for name, size in made.as_dict()["memory"].items()}
    print(
        f"Memory of a process, beside PyTorch's own: {gib['all']:.2f} GiB (weights {gib['weights']:.2f}, which processes "
        f"of one machine share on CPUs;\nboundaries {gib['boundary']:.2f}, decompositions {gib['decompositions']:.2f}, for a "
        f"moment {gib['moment']:.2f})."
    )
    stages = Table("stage", "pieces", "passes", "time here", title="What is done", title_justify="left")
    for name, (pieces, passes, seconds) in _by_name(made, alone).items():
        stages.add_row(name, f"{pieces:,}", f"{passes:,.0f}", _time(seconds))
    stages.add_row("all", f"{made.pieces:,}", f"{made.passes:,.0f}", _time(alone.seconds))
    Console().print(stages)
    print(
        f"An example's pass takes {1000 * (pace.work + pace.example):.1f} ms here, recording it {1000 * pace.answer:.2f} ms; "
        "nothing is decomposed yet, by assumption."
    )
    if made.writes:
        print("What the model writes under the finalists is not counted.")
    print("On a Ray cluster, with workers as quick as this process, and one cache of decompositions for all:")
    table = Table("workers", "time", "busy")
    for n, found in on_cluster.items():
        table.add_row(str(n), _time(found.seconds), f"{found.busy:.0%}")
    Console().print(table)


def _by_name(made: Plan, alone: Simulation) -> dict[str, tuple[int, float, float]]:
    """Return pieces, passes and seconds of each kind of stage."""
    found: dict[str, tuple[int, float, float]] = {}
    for stage, seconds in zip(made.stages, alone.stages, strict=True):
        pieces, passes, before = found.get(stage.name, (0, 0.0, 0.0))
        found[stage.name] = (pieces + len(stage.pieces), passes + stage.passes, before + seconds)
    return found


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
