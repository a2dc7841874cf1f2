"""``laser analyze matrices``: measure the spectrum of every matrix."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output
from laserlm.cli.options import STORE_DEFAULT, Cache, Store, with_options
from laserlm.cli.progress import print_stderr, progress_bar

if TYPE_CHECKING:
    from laserlm.studies import Correlation, MatrixMetrics


@with_options(output=Output)
def matrices(
    output: Output,
    model: Annotated[str, typer.Argument(help="Hub id, local folder with safetensors, or 'bundled'.")],
    types: Annotated[list[str] | None, typer.Option("--type", help="Only this type or name; may be repeated.")] = None,
    thresholds: Annotated[str, typer.Option(help="Magnitudes of entries that count as zero, by commas.")] = "0.03,0.06,0.12",
    side: Annotated[str, typer.Option(help="Singular vectors that layers share: right (inputs) or left (outputs).")] = "right",
    run: Annotated[str | None, typer.Option(help="Correlate every metric with the gains that this search measured.")] = None,
    metric: Annotated[str, typer.Option(help="Metric of the figure.")] = "effective_rank",
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")] = None,
    allow_remote_code: Annotated[bool, typer.Option("--allow-remote-code", help="Run code that comes with the model.")] = False,
    cache: Cache = None,
    store: Store = STORE_DEFAULT,
) -> None:
    """Measure the spectrum of every matrix: ranks, energy, noise, what layers share. The model is not built.

    Matrices are read and decomposed one at a time: about ten times the largest one's float32 bytes are in memory.

    Example: laser analyze matrices bundled --type fc_up
    """
    from laserlm.models.checkpoint_reader import open_checkpoint
    from laserlm.studies import correlations, matrix_metrics
    from laserlm.studies.figures import matrices_figure

    output.check()
    _check_drawn(metric)
    magnitudes = _magnitudes(thresholds)
    measured = _Measured() if run is None else _measured(run, model, store)
    source = open_checkpoint(model, revision=revision, cache=cache, allow_remote_code=allow_remote_code)
    metrics: list[MatrixMetrics] = []
    options: dict[str, Any] = {"side": side, "types": types or (), "thresholds": magnitudes}
    with progress_bar("decomposing", unit="matrices") as advance:
        for one in matrix_metrics(source, on_skip=lambda m, why: print_stderr(f"{m.id} is left out: {why}"), **options):
            metrics.append(one)
            advance(len(metrics), len(source.matrices))
    tables = {f"matrices of {model}": _flat(metrics)}
    values: Any = metrics
    if run is not None:
        rows = [_correlation(c) for c in correlations(metrics, measured.gains, screen=measured.screen)]
        tables[f"metrics of {model} and the gain that run {run} measured"] = rows
        values = {"matrices": values, "correlations": rows}
    output.show(values, tables, figure=(lambda: matrices_figure(metrics, metric)) if metrics else None)


def _check_drawn(metric: str) -> None:
    from dataclasses import fields

    from laserlm.errors import AnalysisError
    from laserlm.studies import MatrixMetrics

    drawn = [f.name for f in fields(MatrixMetrics) if f.type in ("float", "int") and f.name != "layer"]
    if metric not in drawn:
        raise AnalysisError(f"cannot draw metric {metric!r}; choose one of {', '.join(drawn)}")


def _magnitudes(thresholds: str) -> list[float]:
    from laserlm.errors import AnalysisError

    try:
        return [float(t) for t in thresholds.split(",")]
    except ValueError:
        raise AnalysisError(f"cannot read the thresholds {thresholds!r}; write numbers by commas, such as 0.03,0.06") from None


@dataclass(frozen=True)
class _Measured:
    """The gains that a search measured and expected for each matrix."""

    gains: dict[str, float] = field(default_factory=dict)
    screen: dict[str, float] = field(default_factory=dict)


def _measured(run: str, model: str, store: str) -> _Measured:
    from laserlm.errors import AnalysisError
    from laserlm.store import Store as Results
    from laserlm.studies import best_of_each, gains

    with Results.open(store, create=False) as results:
        info = results.find(run, kind="search")
        if info.model != model:
            raise AnalysisError(f"run {info.id} searched {info.model}, not {model}; study that model")
        if info.adapter is not None:
            raise AnalysisError(
                f"run {info.id} reduced the update of the adapter {info.adapter} (--adapter), and the spectra here are of "
                "weights; give a run of the model without --adapter"
            )
        trials = results.evaluations(info.id, "validation")
        if "" not in trials:
            raise AnalysisError(f"run {info.id} has not scored the unchanged model; finish it with the same 'laser search'")
    screened = (info.outcome or {}).get("screened") or {}
    screen = best_of_each({text: -change for text, change in screened.get("expected", {}).items()})
    return _Measured(gains(trials.pop(""), trials), screen)


def _correlation(c: Correlation) -> dict[str, Any]:
    return {"metric": c.metric, "spearman": c.rho, "low": c.low, "high": c.high, "matrices": c.n}


def _flat(metrics: list[MatrixMetrics]) -> list[dict[str, Any]]:
    """Return rows with the same keys. The first layer has no shared subspace."""
    from laserlm.jsonable import to_json

    rows = [to_json(m) for m in metrics]
    for row in rows:
        for name in ("nuclear", "energy", "shared"):
            row |= {f"{name}@{key}": value for key, value in row.pop(name).items()}
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [{key: row.get(key) for key in keys} for row in rows]
