"""The options of a search, and how it takes them to the library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from laserlm.cli.options import DataOptions

if TYPE_CHECKING:
    from laserlm.searching import Ray, SearchConfig
    from laserlm.tasks import Task

SEARCH_PANEL = "Search options"
CLUSTER_PANEL = "Cluster options"

Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Search anew; earlier scores are dropped, the unchanged model's too.",
        rich_help_panel=SEARCH_PANEL,
    ),
]


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """The settings of a search; the effort sets the rest."""

    effort: Annotated[str, typer.Option(help="Effort: quick, normal or thorough.")] = "normal"
    metric: Annotated[
        str | None, typer.Option(help="Metric of the choice: accuracy or loss.", show_default="accuracy; loss for perplexity")
    ] = None
    grid: Annotated[str, typer.Option(help="Grid: paper, mlp, fine, or text such as 27-29.mlp@0.05,0.5.")] = "fine"
    limit: Annotated[int | None, typer.Option(min=1, help="Most questions of each split.", show_default="all")] = None
    strategy: Annotated[
        str | None,
        typer.Option(
            help="Strategy: strengths, components, race, exhaustive or compose.",
            show_default="strengths; race for another grid",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None
    max_harm: Annotated[
        float | None,
        typer.Option(
            help="Largest rise of perplexity on the guards.",
            show_default="0.05 for strengths and components, else none",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None
    guard: Annotated[
        list[str] | None,
        typer.Option(
            help="Text file or task to keep, or self; repeatable.",
            show_default="self, the model's own text",
            rich_help_panel=SEARCH_PANEL,
        ),
    ] = None
    mode: Annotated[
        str,
        typer.Option(help="Order of compose: joint (screen) or greedy (last block first).", rich_help_panel=SEARCH_PANEL),
    ] = "joint"
    candidates: Annotated[
        int | None,
        typer.Option(
            "--candidates", "--width", min=1, help="Candidates in the race.", show_default="48", rich_help_panel=SEARCH_PANEL
        ),
    ] = None
    keep: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share kept after each rung.", show_default="0.34", rich_help_panel=SEARCH_PANEL),
    ] = None
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of components at most.", show_default="12", rich_help_panel=SEARCH_PANEL),
    ] = None
    delta: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Error probability of accepted choices and of eliminations.", rich_help_panel=SEARCH_PANEL
        ),
    ] = 0.05
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="Minutes until the search ends.", show_default="none", rich_help_panel=SEARCH_PANEL),
    ] = None
    memory: Annotated[
        float, typer.Option(min=0, help="GiB for cached activations and decompositions together.", rich_help_panel=SEARCH_PANEL)
    ] = 1.0
    seed: Annotated[
        int, typer.Option(help="Seed of the order of questions and random candidates.", rich_help_panel=SEARCH_PANEL)
    ] = 0
    # Settings of the library that are seldom needed; the help does not list them, a configuration may hold them.
    sizes_per_matrix: Annotated[int | None, typer.Option(min=1, hidden=True)] = None
    random_candidates: Annotated[int | None, typer.Option(min=0, hidden=True)] = None
    screen_examples: Annotated[int | None, typer.Option(min=1, hidden=True)] = None
    first_rung: Annotated[int | None, typer.Option(min=1, hidden=True)] = None
    gradient_examples: Annotated[int | None, typer.Option(min=1, hidden=True)] = None

    def config(self, batch_size: int) -> SearchConfig:
        """Return the settings for the library, without the guards, whose data ``load_guards`` reads."""
        from laserlm.reductions import Grid
        from laserlm.searching import SearchConfig
        from laserlm.searching.config import setting_of_another

        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("effort", "limit", "guard")}
        settings = {name: value for name, value in values.items() if value is not None}
        if wrong := setting_of_another(settings):
            name, owner, chosen = wrong
            raise typer.BadParameter(
                f"--{name.replace('_', '-')} is a setting of the strategy {owner}, and {chosen} has none; leave it out, or "
                f"choose with --strategy {owner}"
            )
        settings |= {"grid": Grid.parse(self.grid), "memory": self.memory * 2**30, "batch_size": batch_size}
        return SearchConfig.of(self.effort, **settings)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where a search runs."""

    executor: Annotated[
        str, typer.Option(help="Executor: local (this process) or ray (a cluster).", rich_help_panel=CLUSTER_PANEL)
    ] = "local"
    address: Annotated[
        str | None,
        typer.Option(
            help="Address of the cluster: auto or HOST:PORT.", show_default="start one", rich_help_panel=CLUSTER_PANEL
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that hold the model.", show_default="all that fit", rich_help_panel=CLUSTER_PANEL),
    ] = None
    cpus_per_worker: Annotated[float, typer.Option(min=0, help="CPU cores of each worker.", rich_help_panel=CLUSTER_PANEL)] = (
        1.0
    )
    gpus_per_worker: Annotated[
        float | None,
        typer.Option(
            min=0, help="GPUs of each worker.", show_default="1 if there are GPUs, else 0", rich_help_panel=CLUSTER_PANEL
        ),
    ] = None

    def cluster(self, device: str | None) -> Ray | None:
        """Return the cluster, or None for this process.

        Raises:
            typer.BadParameter: if options do not go together.
        """
        from laserlm.searching import Ray

        if self.executor not in ("local", "ray"):
            raise typer.BadParameter(f"no executor {self.executor!r}; there are local and ray")
        if self.executor == "local":
            if self.address is not None or self.workers is not None or self.gpus_per_worker:
                raise typer.BadParameter("--address, --workers and --gpus-per-worker are for a cluster; add --executor ray")
            return None
        if not self.gpus_per_worker and (device or "cpu") != "cpu":
            raise typer.BadParameter(f"--device {device} is for this process; give workers GPUs with --gpus-per-worker")
        gpus = 0.0 if self.gpus_per_worker is None and device == "cpu" else self.gpus_per_worker
        return Ray(self.address, self.workers, self.cpus_per_worker, gpus)


def load_guards(names: Sequence[str], data_folder: Path | None) -> tuple[str | Task, ...]:
    """Return guards as the library takes them: texts by their names, tasks with their data."""
    from laserlm.searching.guard import is_text

    options = DataOptions(data_folder=data_folder)
    return tuple(name if is_text(name) else options.load_task(name) for name in names)
