"""Groups of options that several commands share: one dataclass for each group."""

from __future__ import annotations

import csv
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console
from rich.table import Table

from laserlm.cli.progress import print_stderr
from laserlm.paths import default_store, similar_paths

if TYPE_CHECKING:
    from laserlm.models import LanguageModel
    from laserlm.tasks import Split, Task

MODEL_PANEL = "Model options"
TASK_PANEL = "Task options"

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that laserlm wrote before.")]

Json = Annotated[bool, typer.Option("--json", help="Output as JSON.")]
Store = Annotated[
    str,
    typer.Option(
        envvar="LASER_STORE",
        help="Results database: a file or postgresql://USER@HOST/DATABASE.",
        show_default="in the user's data folder",
    ),
]
STORE_DEFAULT = str(default_store())
Cache = Annotated[
    Path | None,
    typer.Option(
        envvar="LASER_CACHE",
        help="Folder for decompositions and converted models.",
        show_default="the user's cache folder",
        rich_help_panel=MODEL_PANEL,
    ),
]


def task_names() -> list[str]:
    """Return the values that the shell proposes for a task."""
    from laserlm.tasks.definitions import DEFINITIONS

    return [*sorted(DEFINITIONS), "hub:", "perplexity:", "lm-eval:"]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a model."""

    kind: Annotated[
        str | None,
        typer.Option(
            help="Head: causal, masked, encoder-decoder, classifier, reward, embedding or headless.",
            show_default="the checkpoint's",
            rich_help_panel=MODEL_PANEL,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option(help="Commit, tag or branch on the hub.", show_default="main", rich_help_panel=MODEL_PANEL),
    ] = None
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Weight dtype: float32, bfloat16 or float16.", show_default="the checkpoint's", rich_help_panel=MODEL_PANEL
        ),
    ] = None
    device: Annotated[
        str | None,
        typer.Option(
            help="Device of the model, such as cuda.", show_default="cuda if available, else cpu", rich_help_panel=MODEL_PANEL
        ),
    ] = None
    device_map: Annotated[
        str | None,
        typer.Option(help="Spread over devices, such as auto; excludes --device.", rich_help_panel=MODEL_PANEL),
    ] = None
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Also read pickled weights, which can run code.", rich_help_panel=MODEL_PANEL),
    ] = False
    allow_remote_code: Annotated[
        bool,
        typer.Option(
            "--allow-remote-code", help="Run modelling code that comes with the checkpoint.", rich_help_panel=MODEL_PANEL
        ),
    ] = False
    cache: Cache = None

    def load_named(self, name: str, adapter: str | Path | None = None) -> LanguageModel:
        """Load a model by name, and the update of an adapter with it."""
        from laserlm.models import load

        return load(name, adapter=adapter, **{f.name: getattr(self, f.name) for f in fields(LoadOptions)})


@dataclass(frozen=True, kw_only=True)
class UpdateOptions(LoadOptions):
    """How to load a model, and the adapter whose update is reduced."""

    adapter: Annotated[
        Path | None,
        typer.Option(help="Folder of a LoRA adapter whose update is reduced.", rich_help_panel=MODEL_PANEL),
    ] = None

    def load_named(self, name: str, adapter: str | Path | None = None) -> LanguageModel:
        """Load a model by name with the update of an adapter, by default that of the options."""
        return super().load_named(name, self.adapter if adapter is None else adapter)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(LoadOptions):
    """A model, and how to load it."""

    model: Annotated[
        str, typer.Argument(help="Hub id, local folder, .gguf file, or 'bundled'.", autocompletion=lambda: ["bundled"])
    ]

    def load(self) -> LanguageModel:
        """Load the model."""
        return self.load_named(self.model)


@dataclass(frozen=True, kw_only=True)
class UpdatedModelOptions(ModelOptions, UpdateOptions):
    """A model, how to load it, and the adapter whose update is reduced."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The data of a task, its splits and its scorer."""

    data: Annotated[
        str | None,
        typer.Option(
            help="Data file, folder or download URL.", show_default="LASER_DATA, else the hub", rich_help_panel=TASK_PANEL
        ),
    ] = None
    data_folder: Annotated[
        Path | None,
        typer.Option(envvar="LASER_DATA", help="Folder with data sets of several tasks.", rich_help_panel=TASK_PANEL),
    ] = None
    phrasings: Annotated[
        str, typer.Option(help="Phrasings of each fact: all, or rewrite (the first).", rich_help_panel=TASK_PANEL)
    ] = "all"
    split_by: Annotated[
        str | None,
        typer.Option(
            help="Split: paper (first fifth validates) or shuffled (by facts).",
            show_default="the task's",
            rich_help_panel=TASK_PANEL,
        ),
    ] = None
    split_seed: Annotated[int, typer.Option(help="Seed of the shuffled split.", rich_help_panel=TASK_PANEL)] = 0
    scorer: Annotated[
        str | None,
        typer.Option(
            help="Scorer, such as next_token, answer, choice or exact_match.",
            show_default="the task's",
            rich_help_panel=TASK_PANEL,
        ),
    ] = None
    new_tokens: Annotated[
        int | None,
        typer.Option(help="Maximum tokens to generate.", show_default="the task's", rich_help_panel=TASK_PANEL),
    ] = None
    samples: Annotated[
        int | None,
        typer.Option(help="Samples of each program.", show_default="one, greedy", rich_help_panel=TASK_PANEL),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(help="Sampling temperature for several samples.", show_default="0.8", rich_help_panel=TASK_PANEL),
    ] = None
    allow_code_execution: Annotated[
        bool,
        typer.Option("--allow-code-execution", help="Run generated programs, each in a sandbox.", rich_help_panel=TASK_PANEL),
    ] = False
    allow_weak_sandbox: Annotated[
        bool,
        typer.Option(
            "--allow-weak-sandbox", help="With --allow-code-execution: also without bubblewrap.", rich_help_panel=TASK_PANEL
        ),
    ] = False
    answer_tokenizer: Annotated[
        str | None,
        typer.Option(help="Tokenizer that drops hotpotqa answers over 15 tokens.", rich_help_panel=TASK_PANEL),
    ] = None
    prompt_column: Annotated[
        str | None,
        typer.Option(help="Column of the questions in a file.", show_default="its usual name", rich_help_panel=TASK_PANEL),
    ] = None
    answer_column: Annotated[
        str | None,
        typer.Option(help="Column of the answers in a file.", show_default="its usual name", rich_help_panel=TASK_PANEL),
    ] = None
    choices_column: Annotated[
        str | None,
        typer.Option(help="Column of the choices in a file.", show_default="its usual name", rich_help_panel=TASK_PANEL),
    ] = None
    group_column: Annotated[
        str | None,
        typer.Option(help="Column of the groups in a file.", show_default="its usual name", rich_help_panel=TASK_PANEL),
    ] = None
    hub_split: Annotated[
        str | None,
        typer.Option(help="Split of hub:ORG/NAME.", show_default="test, validation or train", rich_help_panel=TASK_PANEL),
    ] = None
    hub_config: Annotated[
        str | None, typer.Option(help="Configuration of hub:ORG/NAME.", show_default="its own", rich_help_panel=TASK_PANEL)
    ] = None
    hub_revision: Annotated[
        str | None,
        typer.Option(help="Commit, tag or branch of hub:ORG/NAME.", show_default="main", rich_help_panel=TASK_PANEL),
    ] = None
    max_rows: Annotated[
        int, typer.Option(help="Most rows of a file of questions; more are sampled.", min=1, rich_help_panel=TASK_PANEL)
    ] = 20_000
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask through the model's chat template.",
            show_default="for questions of a file, if the model has one",
            rich_help_panel=TASK_PANEL,
        ),
    ] = None
    system: Annotated[
        str | None,
        typer.Option(help="System text of the conversation.", show_default="the template's", rich_help_panel=TASK_PANEL),
    ] = None
    skip_unscorable: Annotated[
        bool,
        typer.Option(
            "--skip-unscorable", help="Leave out questions whose tokens cannot be scored.", rich_help_panel=TASK_PANEL
        ),
    ] = False
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.", min=1, rich_help_panel=TASK_PANEL)] = 32

    def load_task(self, name: str) -> Task:
        """Load a task's data and split it."""
        from laserlm.errors import TaskError
        from laserlm.tasks import files_in, task
        from laserlm.tasks.definitions import DEFINITIONS

        tokenizer = None
        if self.answer_tokenizer is not None:
            from transformers.models.auto.tokenization_auto import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(self.answer_tokenizer)
        data: str | Path | None = self.data
        if data is None and self.data_folder is not None and name in DEFINITIONS:
            folder = self.data_folder.expanduser()
            if DEFINITIONS[name].files and not folder.is_dir():
                near = ", ".join(map(str, similar_paths(folder)))
                raise TaskError(
                    f"there is no folder {folder} with data sets{f'; near it: {near}' if near else ''}; correct LASER_DATA or "
                    f"--data-folder, or leave it out to read {name} from the hub"
                )
            data = folder if files_in(folder, name, allow_top_level=False) else None
        decoding = {"new_tokens": self.new_tokens, "samples": self.samples, "temperature": self.temperature}
        columns = {kind: getattr(self, f"{kind}_column") for kind in ("prompt", "answer", "choices", "group")}
        hub = {"split": self.hub_split, "config": self.hub_config, "revision": self.hub_revision}
        result = task(
            name,
            data=data,
            split=self.split_by,  # type: ignore[arg-type]
            seed=self.split_seed,
            phrasings=self.phrasings,  # type: ignore[arg-type]
            scorer=self.scorer,  # type: ignore[arg-type]
            decoding={name: value for name, value in decoding.items() if value is not None},
            allow_code_execution=self.allow_code_execution and ("weakly" if self.allow_weak_sandbox else True),
            answer_tokenizer=tokenizer,
            columns={kind: name for kind, name in columns.items() if name is not None},
            hub={key: value for key, value in hub.items() if value is not None},
            max_rows=self.max_rows,
            chat=self.chat,
            system=self.system,
        )
        for note in result.notes:
            print_stderr(note)
        return result

    def for_model(self, lm: LanguageModel, split: Split) -> Split:
        """Return a split as it can be put to a model: without what cannot be scored, if that was asked for."""
        from laserlm.scoring.tokenize import scorable

        if not self.skip_unscorable:
            return split
        kept = scorable(lm, split, self.scorer)  # type: ignore[arg-type]
        if kept.skipped:
            print_stderr(f"{kept.skipped} of {len(split)} questions of {split.name} cannot be scored and are left out")
        return kept

    def announce(self, lm: LanguageModel, split: Split) -> None:
        """Print whether the questions are put to a model through its chat template.

        Raises:
            TokenizationError: if they need a template and the model has none.
        """
        from laserlm.scoring.chat import asked_in_chat

        if asked_in_chat(lm, split.examples):
            print_stderr(
                f"asked through the chat template of {lm.name}, scored by {self.scorer or split.scorer}; see --no-chat"
            )
        elif split.examples[:1] and split.examples[0].messages and lm.kind != "classifier":
            print_stderr(f"{lm.name} has no chat template, or the prompts have its text: they are read as plain text")


@dataclass(frozen=True, kw_only=True)
class TaskOptions(DataOptions):
    """A task, its splits and its scorer."""

    task: Annotated[
        str,
        typer.Option(
            help="Name ('laser tasks'), file, hub:ORG/NAME, perplexity:FILE or lm-eval:NAME.",
            autocompletion=task_names,
        ),
    ] = "worldfacts"

    def load(self) -> Task:
        """Load the task's data and split it."""
        return self.load_task(self.task)

    def split(self, name: str, limit: int | None) -> Split:
        """Return the first ``limit`` examples of one split."""
        return self.load().split(name).limit(limit)


@dataclass(frozen=True)
class TableOptions:
    """The format of printed rows: a table, JSON or CSV."""

    table: Annotated[bool, typer.Option("--table", help="Output as a table (default).")] = False
    json: Annotated[bool, typer.Option("--json", help="Output as JSON.")] = False
    csv: Annotated[bool, typer.Option("--csv", help="Output as CSV.")] = False

    def print(self, rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
        """Print rows that have the same keys."""
        if self.table + self.json + self.csv > 1:
            raise typer.BadParameter("--table, --json and --csv exclude each other; give one of them")
        if self.json:
            print_json(list(rows))
        elif self.csv:
            out = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
            out.writeheader()
            out.writerows(rows)
        elif not rows:
            print(f"no {title or 'rows'}")
        else:
            table = Table(title=title or None, title_justify="left")
            for i, name in enumerate(rows[0]):
                table.add_column(name, no_wrap=i == 0, overflow="fold")  # an id must not be cut off
            for row in rows:
                table.add_row(*(_cell(v) for v in row.values()))
            Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    from laserlm.reductions import short_form

    if value is None:
        return ""
    if isinstance(value, str):
        return escape(short_form(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return escape(" x ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def with_options(**groups: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of the named groups; the command gets one dataclass instance for each group.

    ``@with_options(model=ModelOptions)`` on ``def command(model: ModelOptions)`` puts the fields of the dataclass into the
    command's signature, where Typer finds them, and packs their values into the dataclass.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        parameters: list[inspect.Parameter] = []
        for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
            if name not in groups:
                parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
                continue
            hints = get_type_hints(groups[name], include_extras=True)
            for f in fields(groups[name]):
                default = f.default if f.default is not f.default_factory else inspect.Parameter.empty
                parameters.append(
                    inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[f.name])
                )

        @wraps(command)
        def run(**options: Any) -> None:
            packed = {name: group(**{f.name: options.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
            command(**packed, **options)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
