"""What ``laser search --dry-run`` shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from laserlm.cli.options import print_json
from laserlm.cli.progress import print_stderr

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.searching import Ray, SearchConfig
    from laserlm.searching.plan import Plan
    from laserlm.searching.simulation import CostModel, Simulation
    from laserlm.tasks import Task

WORKERS = (1, 2, 4, 8, 16, 32, 64)
UNIT_SECONDS = 0.005
"""Between two units of a worker on a Ray cluster; measured, see docs/benchmarks.md."""


def print_dry_run(
    lm: LanguageModel, task: Task, config: SearchConfig, cluster: Ray | None, *, start: float, json: bool
) -> None:
    """Plan a search, time a work item here, and print what the search will take.

    Args:
        lm: the unchanged model.
        task: as for ``search``.
        config: as for ``search``.
        cluster: where the search would run; its workers are assumed to be as fast as this machine with their cores.
        start: seconds until this process had the model.
        json: print JSON.
    """
    import torch

    from laserlm.searching.measured_cost import measure_cost
    from laserlm.searching.plan import plan

    planned = plan(lm, task, config)
    print_stderr("timing one work item on this machine")
    local_costs = worker_costs = measure_cost(lm, planned, task, config)
    if cluster is not None and lm.device.type == "cpu":
        torch.set_num_threads(max(1, int(cluster.cpus)))
        worker_costs = measure_cost(lm, planned, task, config)
    alone = planned.simulate(1, local_costs)
    remote = replace(worker_costs, start=start, unit=UNIT_SECONDS)
    numbers = (cluster.workers,) if cluster is not None and cluster.workers else WORKERS
    on_cluster = {n: planned.simulate(n, remote) for n in numbers}
    if json:
        print_json(_as_dict(planned, local_costs, alone, on_cluster))
    else:
        _print(planned, local_costs, alone, on_cluster)


def _as_dict(planned: Plan, costs: CostModel, alone: Simulation, on_cluster: Mapping[int, Simulation]) -> dict[str, Any]:
    times = [{"workers": n, "seconds": run.seconds, "busy": run.busy, "driver": run.driver} for n, run in on_cluster.items()]
    measured = {
        "seconds_per_pass": costs.work + costs.example,
        "seconds_to_record_an_example": costs.answer,
        "seconds_per_text": costs.write,
    }
    return planned.as_dict() | {"measured": measured, "seconds": alone.seconds, "on_ray": times}


def _print(planned: Plan, costs: CostModel, alone: Simulation, on_cluster: Mapping[int, Simulation]) -> None:
    from rich.console import Console
    from rich.table import Table

    candidates = f"{planned.candidates:,} candidates in {len(planned.matrices):,} matrices"
    ways = {
        "components": f"A choice of single components of {len(planned.matrices):,} matrices",
        "strengths": f"A choice of strengths of all components of {len(planned.matrices):,} matrices",
        "race": f"A race among {candidates}",
        "exhaustive": f"An exhaustive search of {candidates}",
        "compose": f"A composition of {candidates}",
    }
    about = "about " if planned.is_estimate else ""
    print(f"{ways[planned.strategy]}: {about}{planned.n_items:,} work items, {planned.passes:,.0f} passes of one example.")
    print(
        f"Floating-point operations: {planned.flop:.2g}, of which passes {planned.passes * planned.pass_flop:.2g}, "
        f"decompositions {planned.decomposition_flop:.2g}"
        + (f", sums of the screen {planned.screen_flop:.2g}" if planned.screen_flop else "")
        + "."
    )
    gib = {name: size / 2**30 for name, size in planned.as_dict()["memory"].items()}
    print(
        f"Memory of a process, without PyTorch's own: {gib['all']:.2f} GiB (weights {gib['weights']:.2f}, which processes "
        f"of one machine share on CPUs;\ncached activations {gib['boundary']:.2f}, decompositions "
        f"{gib['decompositions']:.2f}, at the peak {gib['moment']:.2f}, freed but not yet returned {gib['kept']:.2f})."
    )
    phases = ", ".join(f"{name} {phase.total / 2**30:.2f} GiB" for name, phase in planned.phases.items())
    print(f"Peak of each phase: {phases}.")
    print(f"Decompositions take up to {planned.disk / 2**30:.2f} GiB of the cache folder.")
    stages = Table("stage", "items", "passes", "time here", title="What is done", title_justify="left")
    for name, (items, passes, seconds) in _by_name(planned, alone).items():
        stages.add_row(name, f"{items:,}", f"{passes:,.0f}", _time(seconds))
    stages.add_row("all", f"{planned.n_items:,}", f"{planned.passes:,.0f}", _time(alone.seconds))
    Console().print(stages)
    print(
        f"The pass of an example takes {1000 * (costs.work + costs.example):.1f} ms here, its recording "
        f"{1000 * costs.answer:.2f} ms; nothing is decomposed yet, by assumption."
    )
    if planned.strategy == "components":
        print("As many steps as --steps allows are counted; the search ends earlier where no step gains.")
    print("The time to write a guard's text once is not counted.")
    if planned.generates:
        print(
            f"The text of an answer takes {1000 * costs.write:.0f} ms here, as the unchanged model writes the first ones; its "
            "operations are not counted."
        )
    print("On a Ray cluster, with workers as fast as this process, and one cache of decompositions for all:")
    table = Table("workers", "time", "busy")
    for n, run in on_cluster.items():
        table.add_row(str(n), _time(run.seconds), f"{run.busy:.0%}")
    Console().print(table)


def _by_name(planned: Plan, alone: Simulation) -> dict[str, tuple[int, float, float]]:
    """Return work items, passes and seconds of each kind of stage."""
    totals: dict[str, tuple[int, float, float]] = {}
    for stage, seconds in zip(planned.stages, alone.stages, strict=True):
        items, passes, before = totals.get(stage.name, (0, 0.0, 0.0))
        totals[stage.name] = (items + len(stage.items), passes + stage.passes, before + seconds)
    return totals


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
