"""The table of tasks: the source, the size and the scorer of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path

from laserlm.tasks.datasets import (
    bigbench,
    bios,
    counterfact,
    fever,
    gsm8k,
    hotpotqa,
    humaneval,
    popqa,
    truthfulqa,
    web_of_lies,
    worldfacts,
)
from laserlm.tasks.example import Decoding, Example, Scorer, SplitBy
from laserlm.tasks.files import Record, read_records
from laserlm.tasks.hub import Hub


@dataclass(frozen=True)
class Definition:
    """A task that has a name of its own.

    Args:
        about: what the task asks.
        rows: number of rows in the complete data, as published if it was.
        licence: licence of the data.
        scorer: default scorer.
        examples: makes examples of the rows of each file or split. A task that comes with laserlm has no rows.
        split: default way to split.
        decoding: default way to generate text.
        files: name patterns of the files in the order in which they are read; ``|`` separates several patterns of one file.
        folders: folders in a data folder that may hold the files. They may also lie at its top.
        records: reads one file.
        hub: the data set on the hub with the same rows.
        url: the published file, for a task that is not read from the hub.
    """

    about: str
    rows: str
    licence: str
    scorer: Scorer
    examples: Callable[[Sequence[Sequence[Record]]], list[Example]]
    split: SplitBy = "paper"
    decoding: Decoding = field(default=Decoding())
    files: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    records: Callable[[Path], list[Record]] = read_records
    hub: Hub | None = None
    url: str = ""


def _flat(make: Callable[[Sequence[Record]], list[Example]]) -> Callable[[Sequence[Sequence[Record]]], list[Example]]:
    """Let a reader of rows read several files, one after another."""
    return lambda files: make(list(chain.from_iterable(files)))


def _bigbench(config: str) -> Hub:
    """Return the hub data set of a BIG-bench task, in the order of the published results."""
    files = {split: f"{config}/{split}/0000.parquet" for split in ("validation", "train")}
    return Hub("tasksource/bigbench", "a104c7e981d585893872e3bed1d0d91a543503be", tuple(files), files=files)


def _bios(make: Callable[[Sequence[Record]], list[Example]], about: str, rows: str) -> Definition:
    return Definition(
        about=about,
        rows=rows,
        licence="MIT",
        scorer="choice",
        examples=_flat(make),
        files=("dev.*|dev-*",),
        folders=("bios", "bias_in_bios"),
        hub=Hub("LabHC/bias_in_bios", "052f01de644dba841176e0449528b41f27d94a61", ("dev",)),
    )


FEVER = {"paper_dev": "v1.0/fever-paper_dev.parquet", "paper_test": "v1.0/fever-paper_test.parquet"}

DEFINITIONS: dict[str, Definition] = {
    "worldfacts": Definition(
        about="facts about countries, cities and elements, three phrasings each",
        rows="13,071 of 4,357 facts",
        licence="CC BY 4.0",
        scorer="answer",
        examples=lambda _: worldfacts.examples(),
        split="shuffled",
    ),
    "counterfact": Definition(
        about="the object of a fact, three phrasings each",
        rows="65,757 of 21,919 records",
        licence="MIT",
        scorer="next_token",
        examples=_flat(counterfact.examples),
        files=("counterfact*.json",),
        folders=("counterfact",),
        url="https://rome.baulab.info/data/dsets/counterfact.json",
    ),
    "hotpotqa": Definition(
        about="questions that need two facts, without the paragraphs",
        rows="14,810; 14,618 with answers of at most 15 tokens",
        licence="CC BY-SA 4.0",
        scorer="contains",
        examples=lambda files: hotpotqa.examples(hotpotqa.join_files(files)),
        decoding=Decoding(new_tokens=15),
        files=("hotpot_train*.json*", "hotpot_dev*.json*"),
        folders=("hotpotqa",),
        hub=Hub("hotpotqa/hotpot_qa", "1908d6afbbead072334abe2965f91bd2709910ab", ("train", "validation"), "fullwiki"),
    ),
    "fever": Definition(
        about="claims, true or false",
        rows="13,086 (6,510 of paper_dev)",
        licence="CC BY-SA 3.0",
        scorer="choice",
        examples=_flat(fever.examples),
        files=("paper_dev.jsonl", "paper_test.jsonl"),
        folders=("fever",),
        hub=Hub("fever/fever", "1c55aad95efe327fc6e71a5893d6040d93a8f98c", tuple(FEVER), files=FEVER),
    ),
    "bios-gender": _bios(bios.gender, "the gender of the person of a biography", "39,642"),
    "bios-profession": _bios(bios.profession, "the profession, of eight, of the person of a biography", "19,223"),
    "truthfulqa": Definition(
        about="answers to questions that mislead, true or false",
        rows="5,882 of 817 questions",
        licence="Apache-2.0",
        scorer="choice",
        examples=_flat(truthfulqa.examples),
        files=("mc_task.json",),
        folders=("truthfulqa",),
        hub=Hub("truthfulqa/truthful_qa", "741b8276f2d1982aa3d5b832d3ee81ed3b896490", ("validation",), "multiple_choice"),
    ),
    "epistemic-reasoning": Definition(
        about="what one sentence entails about what people believe",
        rows="2,000",
        licence="Apache-2.0",
        scorer="choice",
        examples=_flat(partial(bigbench.choices, ("entailment", "non-entailment"))),
        files=("task.json",),
        folders=("bigbench/epistemic_reasoning", "epistemic_reasoning"),
        records=bigbench.records,
        hub=_bigbench("epistemic_reasoning"),
    ),
    "wikidata-qa": Definition(
        about="the object of a fact of Wikidata",
        rows="20,321 with one answer (18,933 of task.json)",
        licence="Apache-2.0",
        scorer="contains",
        examples=_flat(bigbench.questions),
        decoding=Decoding(new_tokens=10),
        files=("task.json",),
        folders=("bigbench/qa_wikidata", "qa_wikidata"),
        records=bigbench.records,
        hub=_bigbench("qa_wikidata"),
    ),
    "causal-judgement": Definition(
        about="did this cause that, as a typical person would say",
        rows="190",
        licence="Apache-2.0",
        scorer="choice",
        examples=_flat(partial(bigbench.choices, ("Yes", "No"))),
        files=("task.json",),
        folders=("bigbench/causal_judgment", "causal_judgment"),
        records=bigbench.records,
        hub=_bigbench("causal_judgment"),
    ),
    "web-of-lies": Definition(
        about="who tells the truth, if each says that another lies; generated by laserlm",
        rows=f"{web_of_lies.N_EXAMPLES:,}",
        licence="MIT",
        scorer="choice",
        examples=lambda _: web_of_lies.examples(),
        split="shuffled",
    ),
    "popqa": Definition(
        about="questions about entities of known popularity",
        rows="14,267",
        licence="MIT",
        scorer="contains",
        examples=_flat(popqa.examples),
        split="shuffled",
        decoding=Decoding(new_tokens=15, stops=("\n",)),
        files=("popqa*.jsonl|popqa*.tsv|test.tsv",),
        folders=("popqa",),
        hub=Hub("akariasai/PopQA", "098765c79ea10a2cb19c828324e33281b8336ec0", ("test",)),
    ),
    "humaneval": Definition(
        about="functions to be written, run against their tests",
        rows="164",
        licence="MIT",
        scorer="program",
        examples=_flat(humaneval.examples),
        split="shuffled",
        decoding=Decoding(new_tokens=1024, stops=humaneval.STOP_STRINGS),
        files=("HumanEval*.jsonl*",),
        folders=("humaneval",),
        hub=Hub("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", ("test",)),
    ),
    "gsm8k": Definition(
        about="word problems with a number for an answer",
        rows="1,319",
        licence="MIT",
        scorer="number",
        examples=_flat(gsm8k.examples),
        split="shuffled",
        decoding=Decoding(new_tokens=256, stops=("Question:",)),
        files=("test.jsonl|gsm8k*.jsonl",),
        folders=("gsm8k",),
        hub=Hub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", ("test",), "main"),
    ),
}
