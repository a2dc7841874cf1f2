"""The command ``laser reproduce``."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.load_check import Folder
from laserlm.cli.options import DataOptions, Json, LoadOptions, print_json, with_options
from laserlm.cli.progress import print_stderr, progress_bar

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.evaluate import Comparison

LOSS_TOLERANCE = 1e-3
"""Difference of two losses, in nats per token, that rounding on another machine explains."""


@with_options(load_options=LoadOptions, data_options=DataOptions)
def reproduce(
    folder: Folder,
    load_options: LoadOptions,
    data_options: DataOptions,
    base: Annotated[str | None, typer.Option(help="Path or id of the base model.", show_default="as recorded")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Path of the calibration text.", show_default="as recorded")] = None,
    task: Annotated[
        str | None, typer.Option(help="Task of the recorded search, such as jsonl:FILE.", show_default="as recorded")
    ] = None,
    score: Annotated[bool, typer.Option(help="Score the recorded search's test split again.")] = True,
    json: Json = False,
) -> None:
    """Check that a saved folder can be rebuilt: write it again from its base model, and compare weights and test scores.

    Example: laser reproduce smollm2-laser
    """
    from laserlm.errors import ExportError
    from laserlm.export.check import reproduce
    from laserlm.export.record import read_record
    from laserlm.models.adapter import LOCAL, is_gone

    record = read_record(folder)
    name = base or str(record["base"]["name"])
    if base is None and is_gone(record["base"]):
        raise ExportError(f"{folder} was saved from the local model {name!r}, which is not where it was; give --base PATH")
    load_options = replace(
        load_options,
        revision=load_options.revision or record["base"]["revision"],
        dtype=load_options.dtype or record["dtype"]["base"],
        kind=load_options.kind or record["base"]["kind"],
    )
    adapter = record["update"]["name"] if "update" in record else None
    if adapter is not None and not Path(adapter).is_absolute():
        raise ExportError(
            f"{folder} was made with the adapter {adapter!r}, which is not where it was; write where it is into "
            f'{folder / LOCAL}, as {{"adapter": "PATH"}}'
        )
    with progress_bar("rebuilding", unit="matrices"):
        lm = load_options.load_named(name, adapter)
        reproduction = reproduce(folder, lm, calibration=calibration)
    result = record.get("result", record.get("found")) or {}  # its name in records of laserlm 0.1.0
    is_tested = bool(result) and result["best"] == record["intervention"]  # another point was not
    test = _test_again(lm, result, record["decomposition"]["seed"], task, data_options) if score and is_tested else None
    if json:
        print_json(asdict(reproduction) | {"agrees": reproduction.agrees, "test": None if test is None else test.as_dict()})
    else:
        print(f"{folder}: {reproduction}")
    agrees = reproduction.agrees
    if test is not None:
        recorded = result["test"]
        if not json:
            line = "{base:.1%} -> {best:.1%}, {corrected} corrected, {broken} broken, loss {base_loss:.3f} -> {best_loss:.3f}"
            print(f"recorded: {line.format(**recorded)}")
            print(f"again: {line.format(**test.as_dict(), best=test.edited, best_loss=test.edited_loss)}")
        agrees = agrees and _same_scores(test, recorded)
    if not agrees:
        raise ExportError(
            f"the rebuilt model differs from {folder}; compare the versions in its laser.json with those installed here"
        )


def _test_again(
    lm: LanguageModel, result: dict[str, Any], seed: int, task: str | None, data_options: DataOptions
) -> Comparison | None:
    """Score the test split of a recorded search again, or print why this is not possible and return None."""
    from laserlm.edit import applied
    from laserlm.errors import TaskError
    from laserlm.scoring.evaluate import compare, evaluate

    settings = result["settings"]
    try:
        split = data_options.load_task(task or settings["task"]).test.limit(result["test"]["n"])
    except TaskError as error:
        print_stderr(f"The test scores are not compared, because the task's data is missing: {error}; see --task and --data")
        return None
    if split.hash != settings["test"]:
        print_stderr(
            f"The test scores are not compared: these are not the examples of {settings['task']} that were recorded; give "
            "--task, --data and the other task options of that search"
        )
        return None
    evaluations = []
    for intervention in ("", result["best"]):
        with applied(lm, intervention, seed=seed):
            evaluations.append(evaluate(lm, split, scorer=settings["scorer"], batch_size=data_options.batch_size))
    return compare(*evaluations)


def _same_scores(test: Comparison, recorded: dict[str, Any]) -> bool:
    losses = [(test.base_loss, recorded["base_loss"]), (test.edited_loss, recorded["best_loss"])]
    same_answers = (test.corrected, test.broken) == (recorded["corrected"], recorded["broken"])
    return same_answers and all(abs(new - old) <= LOSS_TOLERANCE for new, old in losses)
