"""The command search."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import STORE_DEFAULT, Json, Store, TaskOptions, UpdatedModelOptions, print_json, with_options
from laserlm.cli.print_search import DONE_EARLIER, print_end, print_result
from laserlm.cli.progress import print_stderr, search_progress_bar
from laserlm.cli.search_options import SEARCH_PANEL, ClusterOptions, Restart, SearchOptions, load_guards
from laserlm.provenance import mask_credentials

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.searching import Ray, SearchConfig, SearchProgress, SearchResult
    from laserlm.tasks import Task

NOT_CONFIGURED = frozenset({"config_file", "save_config", "restart", "dry_run", "json"})
"""Options that a configuration does not hold, because they concern one command and not the search."""


def _use_configuration(context: typer.Context, file: Path | None) -> Path | None:
    """Take the options of a configuration for those that the command line leaves out."""
    if file is not None and not context.resilient_parsing:  # else the shell completes a word
        from laserlm.cli.config_file import option_types, read_configuration

        context.default_map = read_configuration(file, option_types(search, NOT_CONFIGURED))
    return file


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file of options; the command line wins.", callback=_use_configuration, is_eager=True),
]
SaveConfig = Annotated[Path | None, typer.Option(help="Write the options to this file.")]
Track = Annotated[
    str | None,
    typer.Option(help="Report to trackio, wandb, mlflow or tensorboard.", show_default="none", rich_help_panel=SEARCH_PANEL),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the work, memory and time; search nothing.", rich_help_panel=SEARCH_PANEL)
]


@with_options(
    model_options=UpdatedModelOptions, task_options=TaskOptions, options=SearchOptions, cluster_options=ClusterOptions
)
def search(
    model_options: UpdatedModelOptions,
    task_options: TaskOptions,
    options: SearchOptions,
    cluster_options: ClusterOptions,
    store: Store = STORE_DEFAULT,
    config_file: ConfigFile = None,
    save_config: SaveConfig = None,
    track: Track = None,
    restart: Restart = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Find the best intervention on validation questions, and measure it once on test questions.

    The same command continues an interrupted search.

    Example: laser search bundled --task worldfacts --limit 300
    """
    start = time.monotonic()
    print_stderr(f"reading the questions of {task_options.task}")  # PyTorch, which the next line imports, takes seconds
    from laserlm.cli.config_file import as_configuration, write_configuration
    from laserlm.cli.tracking import tracker

    reports_to = tracker(track) if track else None
    groups = (options, task_options, model_options, cluster_options)
    configuration = as_configuration(*groups, model=model_options.model, task=task_options.task, track=track)
    cluster = cluster_options.cluster(model_options.device)
    config = options.config(task_options.batch_size)  # wrong settings are reported before the model is loaded
    if save_config is not None:
        where = {} if store == STORE_DEFAULT else {"store": store}
        write_configuration(save_config, configuration | as_configuration(**where))
    task = task_options.load()
    if options.guard:
        config = replace(config, guards=load_guards(options.guard, task_options.data_folder))
    task = replace(task, validation=task.validation.limit(options.limit), test=task.test.limit(options.limit))
    print_stderr(f"loading {model_options.model}")
    lm = _on_driver(model_options, cluster, dry_run=dry_run).load()
    task_options.announce(lm, task.validation)
    validation, test = (task_options.for_model(lm, split) for split in (task.validation, task.test))
    task = replace(task, validation=validation, test=test)
    if dry_run:
        from laserlm.cli.dry_run import print_dry_run

        print_dry_run(lm, task, config, cluster, start=time.monotonic() - start, json=json)
        return
    print_stderr(f"results are kept in {mask_credentials(store)}")
    result = _search(lm, task, config, cluster, reports_to, configuration, store=store, restart=restart)
    _print(result, task, model_options, store, time.monotonic() - start, json=json)


def _search(
    lm: LanguageModel,
    task: Task,
    config: SearchConfig,
    cluster: Ray | None,
    reports_to: Any,
    configuration: Mapping[str, Any],
    *,
    store: str,
    restart: bool,
) -> SearchResult:
    """Search with a progress bar, and report to a tracker."""
    from laserlm.cli.tracking import tracked_search
    from laserlm.scoring.scorers import GENERATING
    from laserlm.searching import search as search_

    by_loss = task.validation.scorer in GENERATING
    with tracked_search(reports_to, configuration, by_loss=by_loss) as tracked, search_progress_bar(by_loss=by_loss) as show:

        def on_step(step: SearchProgress) -> None:
            show(step)
            tracked.on_step(step)

        result = search_(
            lm,
            task,
            config,
            store=store,
            restart=restart,
            executor=cluster,
            on_step=on_step,
            on_stage=show,
            options=configuration,
        )
        tracked.finish(result)
    return result


def _print(result: SearchResult, task: Task, options: UpdatedModelOptions, store: str, seconds: float, *, json: bool) -> None:
    if json:
        if result.done_earlier:
            print_stderr(DONE_EARLIER)
        print_json(result.as_dict())
        return
    print_result(result, is_perplexity=task.validation.scorer == "perplexity")
    print_end(result, options.model, store, seconds)


def _on_driver(options: UpdatedModelOptions, cluster: Ray | None, *, dry_run: bool) -> UpdatedModelOptions:
    """Return how this process loads the model: on the CPU where only workers run it."""
    only_workers_run_it = cluster is not None and not (dry_run and cluster.gpus != 0)
    if only_workers_run_it and not (options.device or options.device_map):
        return replace(options, device="cpu")
    return options
