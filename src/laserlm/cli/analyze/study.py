"""Input and output that the commands of ``laser analyze`` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import STORE_DEFAULT, DataOptions, Store, TableOptions, TaskOptions, UpdateOptions, print_json
from laserlm.reductions import short_form

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.records import Evaluation
    from laserlm.store import RunInfo
    from laserlm.store import Store as Results
    from laserlm.studies.scores import CachedScorer
    from laserlm.tasks import Example, Scorer, Split

OF_ANY_TASK = ("data_folder", "batch_size", "allow_code_execution", "allow_weak_sandbox")
"""Options that apply to every task."""
Tables = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows by the title of their table."""


@dataclass(frozen=True)
class Output(TableOptions):
    """How a study shows its result: tables, JSON or CSV, and a figure."""

    figure: Annotated[Path | None, typer.Option(help="Also draw it: .html, or .png, .svg, .pdf (with browser).")] = None

    def check(self) -> None:
        """Raise an error if the result cannot be shown this way, before it is computed."""
        from laserlm.studies.figures import check_figure

        if self.table + self.json + self.csv > 1:
            raise typer.BadParameter("--table, --json and --csv exclude each other")
        if self.figure is not None:
            check_figure(self.figure)

    def show(self, values: Any, tables: Tables, *, lines: Sequence[str] = (), figure: Callable[[], Any] | None = None) -> None:
        """Print the result, and draw the figure if a file is named.

        Args:
            values: all values, for ``to_json``.
            tables: rows by title; CSV holds the first table. A cell may be an estimate, which takes several columns in CSV.
            lines: sentences above the tables.
            figure: makes the plotly figure; None if there is nothing to draw.
        """
        from laserlm.errors import AnalysisError
        from laserlm.jsonable import to_json
        from laserlm.studies.figures import write_figure

        if self.json:
            print_json(to_json(values))
        elif self.csv:
            self.print([_flat(row) for row in next(iter(tables.values()), [])])
        else:
            for line in lines:
                print(line)
            for title, rows in tables.items():
                self.print([{k: str(v) if _estimated(v) else v for k, v in row.items()} for row in rows], title)
        if self.figure is not None:
            if figure is None:
                raise AnalysisError(f"there is nothing to draw in {self.figure}. Leave --figure out.")
            write_figure(figure(), self.figure)


def _estimated(value: Any) -> bool:
    from laserlm.studies.estimates import Estimate

    return isinstance(value, Estimate)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {}
    for name, value in row.items():
        cells |= value.as_row(name) if _estimated(value) else {name: value}
    if "n" in cells:  # one for all
        cells = {name: value for name, value in cells.items() if not name.endswith(" n")}
    return cells


@dataclass(frozen=True)
class ModelPair:
    """The unchanged and the reduced model on the same examples.

    Args:
        model: name of the model.
        intervention: text of the reduction.
        base: scores of the unchanged model.
        edited: scores of the reduced model.
        examples: the scored examples.
        results: the results database.
        batch_size: sequences in one forward pass.
        model_hash: sha256 of the weights.
        load_model: returns the model.
        load_split: returns the examples as a split of their task.
        seed: of ``:reference`` decompositions.
    """

    model: str
    intervention: str
    base: Evaluation
    edited: Evaluation
    examples: tuple[Example, ...]
    results: Results
    batch_size: int
    model_hash: str
    load_model: Callable[[], LanguageModel] = field(repr=False)
    load_split: Callable[[], Split] = field(repr=False)
    seed: int = 0

    @cached_property
    def lm(self) -> LanguageModel:
        """The model. It is loaded at the first use, because recorded scores need none."""
        return self.load_model()

    @cached_property
    def split(self) -> Split:
        """The examples as a split of their task."""
        return self.load_split()

    @property
    def description(self) -> dict[str, Any]:
        """Model, intervention, task, split and number of examples, as JSON values."""
        names = {"model": self.model, "intervention": self.intervention}
        return names | {"task": self.base.task, "split": self.base.split, "n": self.base.n}

    @property
    def title(self) -> str:
        """Title of a table or figure about these scores."""
        return f"{short_form(self.intervention)} on {self.base.task}, {self.base.split}"

    def scorer(self, split: Split | None = None, scorer: Scorer | None = None) -> AbstractContextManager[CachedScorer]:
        """Return a scorer of the model on these examples or on another split."""
        from laserlm.studies.scores import cached_scorer

        same = split is None and scorer in (None, self.base.scorer)
        return cached_scorer(
            self.lm,
            split or self.split,
            self.results,
            scorer=scorer,
            batch_size=self.batch_size,
            seed=self.seed,
            known={"": self.base, self.intervention: self.edited} if same else {},
        )

    def with_model(self, lm: LanguageModel) -> ModelPair:
        """Return the same scores with a loaded model for new scores.

        Raises:
            AnalysisError: if the scores are of other weights.
        """
        from laserlm.errors import AnalysisError

        if lm.hash != self.model_hash:
            raise AnalysisError(
                f"{short_form(self.intervention)} was scored on {self.model} with other weights or another dtype than "
                f"{lm.name} has here; compare runs of one model"
            )
        return replace(self, load_model=lambda: lm)


@dataclass(frozen=True, kw_only=True)
class StudyOptions(UpdateOptions, TaskOptions):
    """A search's run, or a model with a task and a reduction."""

    run_or_model: Annotated[str, typer.Argument(help="Run of a search (id or 'last'), or a model.")]
    reduce: Annotated[list[str] | None, typer.Option(help="With a model: a reduction, as 27.fc_in@0.01; may be repeated.")] = (
        None
    )
    split_name: Annotated[str, typer.Option("--split", help="validation, test or all; of a run always test.")] = "test"
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the split.")] = None
    store: Store = STORE_DEFAULT

    def data_options(self) -> DataOptions:
        """Return the options for loading other tasks."""
        return DataOptions(**{name: getattr(self, name) for name in OF_ANY_TASK})

    @contextmanager
    def pair(self) -> Iterator[ModelPair]:
        """Yield the test scores of a search, or the scores of a model. Missing scores are computed."""
        from laserlm.errors import AnalysisError
        from laserlm.reductions import Intervention
        from laserlm.studies.scores import cached_scorer

        with self.open_store() as results:
            if not self.reduce:
                yield self.pair_of_run(results, self.find_run(results))
                return
            text = str(Intervention.read(self.reduce))
            if not text:
                raise AnalysisError("there is no reduction to study. Give --reduce SPEC, or the id of a search's run.")
            examples = self.split(self.split_name, self.limit)
            lm = self.load_named(self.run_or_model)
            with cached_scorer(lm, examples, results, batch_size=self.batch_size) as scorer:
                base, edited = scorer(""), scorer(text)
            of = (base, edited, examples.examples, results, self.batch_size, lm.hash)
            yield ModelPair(lm.name, text, *of, lambda: lm, lambda: examples)

    def open_store(self) -> Results:
        """Open the store. It is created only to keep the scores of a reduction."""
        from laserlm.errors import AnalysisError, StoreError
        from laserlm.store import Store as Results

        try:
            return Results.open(self.store, create=bool(self.reduce))
        except StoreError as error:
            if self.reduce:
                raise
            raise AnalysisError(f"{error}; or give --reduce SPEC, if {self.run_or_model!r} is a model") from None

    def find_run(self, results: Results) -> RunInfo:
        """Return the run to study.

        Raises:
            AnalysisError: if there is no such run, or an option contradicts the run.
        """
        from laserlm.errors import AnalysisError, StoreError

        ignored = [f.name for f in fields(TaskOptions) if f.name not in OF_ANY_TASK and getattr(self, f.name) != f.default]
        if self.split_name != "test":
            ignored.append("split")
        if self.adapter is not None:
            ignored.append("adapter")
        try:
            info = results.find(self.run_or_model, kind="search")
        except StoreError as error:
            raise AnalysisError(f"{error}; or give --reduce SPEC, if {self.run_or_model!r} is a model") from None
        if ignored:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in ignored)
            raise AnalysisError(
                f"run {info.id} is studied on its own test examples, which had no part in the choice; leave out {options}, or "
                "give a model and --reduce SPEC"
            )
        return info

    def load_model_of(self, info: RunInfo) -> LanguageModel:
        """Return the model of a search.

        Raises:
            AnalysisError: if it has other weights than those that were searched.
        """
        from laserlm.errors import AnalysisError

        dtype = self.dtype or str(info.settings["dtype"]).removeprefix("torch.")
        lm = replace(self, dtype=dtype).load_named(info.model, info.adapter)
        if lm.hash != info.settings["model_hash"]:
            raise AnalysisError(
                f"{info.full_model} in {dtype} has other weights than run {info.id} searched in {info.settings['dtype']}; "
                "leave --dtype out, and give its --revision or --kind"
            )
        return lm

    def pair_of_run(self, results: Results, info: RunInfo, *, needs_choice: bool = True) -> ModelPair:
        """Return the test scores of a search. If it kept the unchanged model, both are those of the unchanged model.

        Raises:
            AnalysisError: if the search is not finished, or kept the unchanged model and ``needs_choice`` is set.
        """
        from laserlm.errors import AnalysisError

        best = (info.outcome or {}).get("best")
        if best is None:
            raise AnalysisError(f"run {info.id} is not finished; finish it with the same 'laser search'")
        if not best and needs_choice:
            raise AnalysisError(f"run {info.id} found nothing better than the unchanged model; give a model and --reduce SPEC")
        base, edited = (results.evaluation(info.id, "test", text) for text in ("", best))
        if base is None or edited is None:
            raise AnalysisError(f"run {info.id} has no test scores of its best; run the same 'laser search' with --restart")
        base, edited = (replace(e, scores=e.scores[: self.limit]) for e in (base, edited))
        examples = results.examples(info.id, "test")[: self.limit]

        def load_split() -> Split:
            """Return the examples of the search's test split as they were scored."""
            from laserlm.tasks import Decoding, Split

            scorer: Any = base.scorer
            if scorer == "rollout":
                raise AnalysisError(f"{base.task} is played, which is not begun again from a search; see 'laser lab --help'")
            if scorer in ("lm_eval", "lm_eval_text"):
                raise AnalysisError(f"{base.task} is graded by its own library; give the model, --task and --reduce")
            how = dict(info.settings.get("decoding", {}))
            how |= {"stops": tuple(how.get("stops", ())), "run_programs": self.allow_code_execution}
            return Split(base.task, base.split, examples, scorer, Decoding(**how))

        seed, model_hash = int(info.settings.get("seed", 0)), str(info.settings["model_hash"])
        return ModelPair(
            info.model,
            best,
            base,
            edited,
            examples,
            results,
            self.batch_size,
            model_hash,
            lambda: self.load_model_of(info),
            load_split,
            seed,
        )
