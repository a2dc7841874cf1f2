"""What the commands that study a reduction share: the scores that they are about, and how they show what they find."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.options import STORE_DEFAULT, DataOptions, Listing, LoadOptions, Store, TaskOptions, print_json

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.scoring.records import Evaluation
    from laserlm.store import RunInfo
    from laserlm.store import Store as Results
    from laserlm.studies.scores import CachedScorer
    from laserlm.tasks import Example, Scorer, Split

__all__ = ["Output", "Pair", "StudyOptions"]

OF_ANY_TASK = ("data_folder", "batch_size", "allow_code_execution")
"""Options of a task that mean the same for any."""
Tables = Mapping[str, Sequence[Mapping[str, Any]]]
"""Rows by the title of their table."""


@dataclass(frozen=True)
class Output(Listing):
    """How a study shows what it found: tables unless told otherwise, and a figure."""

    figure: Annotated[
        Path | None, typer.Option(help="Also draw it: .html (self-contained), .png, .svg or .pdf (with a browser).")
    ] = None

    def check(self) -> None:
        """Raise an error where what is found could not be shown so, before it is computed."""
        from laserlm.studies.figures import check_figure

        if self.table + self.json + self.csv > 1:
            raise typer.BadParameter("--table, --json and --csv exclude each other")
        if self.figure is not None:
            check_figure(self.figure)

    def show(self, values: Any, tables: Tables, *, lines: Sequence[str] = (), figure: Callable[[], Any] | None = None) -> None:
        """Print what was found, and draw it where that was asked for.

        Args:
            values: everything, as plain JSON values.
            tables: the first is what CSV holds. Cells may be estimates, which have a column for each of their ends there.
            lines: sentences that stand above the tables.
            figure: makes the plotly figure; None where there is nothing to draw.
        """
        from laserlm.errors import AnalysisError
        from laserlm.studies.figures import write_figure

        if self.json:
            print_json(values)
        elif self.csv:
            self.print([_flat(row) for row in next(iter(tables.values()), [])])
        else:
            for line in lines:
                print(line)
            for title, rows in tables.items():
                self.print([{k: str(v) if _estimated(v) else v for k, v in row.items()} for row in rows], title)
        if self.figure is not None:
            if figure is None:
                raise AnalysisError(f"there is nothing to draw in {self.figure}; leave --figure out")
            write_figure(figure(), self.figure)


def _estimated(value: Any) -> bool:
    from laserlm.studies.estimates import Estimate

    return isinstance(value, Estimate)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        found |= value.as_row(name) if _estimated(value) else {name: value}
    if "n" in found:  # one for all
        found = {name: value for name, value in found.items() if not name.endswith(" n")}
    return found


@dataclass(frozen=True)
class Pair:
    """The unchanged and the reduced model on the same examples.

    Args:
        model: the model's name.
        intervention: text of the reduction.
        base: scores of the unchanged model.
        edited: scores of the reduced one.
        examples: those that were scored.
        results: the results database.
        batch_size: sequences in one forward pass.
        model_hash: sha256 of the model's weights.
        load: returns the model.
        made: returns the examples as a split of their task.
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
    load: Callable[[], LanguageModel] = field(repr=False)
    made: Callable[[], Split] = field(repr=False)
    seed: int = 0

    @cached_property
    def lm(self) -> LanguageModel:
        """The model, loaded when it is first asked for: what was recorded needs none."""
        return self.load()

    @cached_property
    def split(self) -> Split:
        """The examples as a split of their task."""
        return self.made()

    @property
    def about(self) -> dict[str, Any]:
        """What the scores are of, as plain JSON values."""
        names = {"model": self.model, "intervention": self.intervention}
        return names | {"task": self.base.task, "split": self.base.split, "n": self.base.n}

    @property
    def title(self) -> str:
        """What the scores are of, for the title of a table."""
        return f"{self.intervention} on {self.base.task}, {self.base.split}"

    def book(self, split: Split | None = None, scorer: Scorer | None = None) -> AbstractContextManager[CachedScorer]:
        """Return the scores of the model on these examples, or on others, to which new ones can be added."""
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

    def on(self, lm: LanguageModel) -> Pair:
        """Return the same scores, with a model that is loaded already for those to come.

        Raises:
            AnalysisError: if they are of another one.
        """
        from laserlm.errors import AnalysisError

        if lm.hash != self.model_hash:
            raise AnalysisError(
                f"{self.intervention} was scored on {self.model} with other weights or another dtype than {lm.name} has here; "
                "compare runs of one model"
            )
        return replace(self, load=lambda: lm)


@dataclass(frozen=True, kw_only=True)
class StudyOptions(LoadOptions, TaskOptions):
    """A search's run, or a model with a task and a reduction."""

    what: Annotated[str, typer.Argument(help="A search's run (an id, the start of one, or 'last'), or a model.")]
    reduce: Annotated[
        list[str] | None, typer.Option(help="A reduction such as 27.fc_in@0.01, where a model is given; may be repeated.")
    ] = None
    split_name: Annotated[
        str, typer.Option("--split", help="validation, test or all; of a run always the test split, which was not chosen on.")
    ] = "test"
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows of the split.")] = None
    store: Store = STORE_DEFAULT

    def of_other_tasks(self) -> DataOptions:
        """Return the options for reading tasks beside the one that is studied."""
        return DataOptions(**{name: getattr(self, name) for name in OF_ANY_TASK})

    @contextmanager
    def pair(self) -> Iterator[Pair]:
        """Yield the scores that a search recorded on its test split, or those of a model, made only where they are missing."""
        from laserlm.errors import AnalysisError
        from laserlm.reductions import Intervention
        from laserlm.store import Store as Results
        from laserlm.studies.scores import cached_scorer

        with Results.open(self.store) as results:
            if not self.reduce:
                yield self._of_run(results, self.find(results))
                return
            text = str(Intervention.parse(self.reduce))
            if not text:
                raise AnalysisError("no reduction to study: give --reduce SPEC, or the id of a search's run")
            examples = self.split(self.split_name, self.limit)
            lm = self.load_named(self.what)
            with cached_scorer(lm, examples, results, batch_size=self.batch_size) as score:
                base, edited = score(""), score(text)
            of = (base, edited, examples.examples, results, self.batch_size, lm.hash)
            yield Pair(lm.name, text, *of, lambda: lm, lambda: examples)

    def find(self, results: Results) -> RunInfo:
        """Return the run that is to be studied.

        Raises:
            AnalysisError: if there is none, or options are given that a run decides for itself.
        """
        from laserlm.errors import AnalysisError, StoreError

        own = [f.name for f in fields(TaskOptions) if f.name not in OF_ANY_TASK and getattr(self, f.name) != f.default]
        if self.split_name != "test":
            own.append("split")
        try:
            info = results.find(self.what, kind="search")
        except StoreError as error:
            raise AnalysisError(f"{error}; or give --reduce SPEC, if {self.what!r} is a model") from None
        if own:
            given = ", ".join(f"--{name.replace('_', '-')}" for name in own)
            raise AnalysisError(
                f"run {info.id} is studied on its own test examples, which had no part in the choice; leave out {given}, or "
                "give a model and --reduce SPEC"
            )
        return info

    def _of_run(self, results: Results, info: RunInfo) -> Pair:
        from laserlm.errors import AnalysisError

        best = (info.outcome or {}).get("best")
        if best is None:
            raise AnalysisError(f"run {info.id} is not finished; finish it with the same 'laser search'")
        if not best:
            raise AnalysisError(f"run {info.id} found nothing better than the unchanged model; give a model and --reduce SPEC")
        base, edited = (results.evaluation(info.id, "test", text) for text in ("", best))
        if base is None or edited is None:
            raise AnalysisError(f"run {info.id} has no test scores of its best; run the same 'laser search' with --restart")
        base, edited = (replace(e, scores=e.scores[: self.limit]) for e in (base, edited))
        examples = results.examples(info.id, "test")[: self.limit]

        def load() -> LanguageModel:
            dtype = self.dtype or str(info.settings["dtype"]).removeprefix("torch.")
            lm = replace(self, dtype=dtype).load_named(info.model)
            if lm.hash != info.settings["model_hash"]:
                raise AnalysisError(
                    f"{info.model} in {dtype} has other weights than run {info.id} searched in {info.settings['dtype']}; leave "
                    "--dtype out, and give its --revision or --kind"
                )
            return lm

        def made() -> Split:
            """Return the examples of the search's test split as they were scored."""
            from laserlm.tasks import Decoding, Split

            scorer: Any = base.scorer
            if scorer == "rollout":
                raise AnalysisError(f"{base.task} is played, which is not begun again from a search; see 'laser lab --help'")
            if scorer in ("lm_eval", "lm_eval_text"):
                raise AnalysisError(f"{base.task} is judged by its own library; give the model, --task and --reduce")
            how = dict(info.settings.get("decoding", {}))
            how |= {"stops": tuple(how.get("stops", ())), "run_programs": self.allow_code_execution}
            return Split(base.task, base.split, examples, scorer, Decoding(**how))

        seed, model_hash = int(info.settings.get("seed", 0)), str(info.settings["model_hash"])
        return Pair(info.model, best, base, edited, examples, results, self.batch_size, model_hash, load, made, seed)
