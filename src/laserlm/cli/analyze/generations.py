"""``laser analyze generations``: count named entities in the texts of the models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.entities import Entities

SETS = {
    "A": "set A: the unchanged model wrong, the reduced one right",
    "B": "set B: the removed part alone wrong, the reduced model right",
}
FIGURES = {"entities": "entities", "with_answer": "with the answer's", "without": "with none"}
"""Fields of the counts, and the names of the published values."""


@with_options(study=StudyOptions, output=Output)
def generations(
    study: StudyOptions,
    output: Output,
    pipeline: Annotated[
        str | None, typer.Option(help="spaCy pipeline that finds entities: a package or folder; default: en_core_web_sm.")
    ] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a text; default: as the task is written, or 10.")] = None,
    shown: Annotated[int, typer.Option(min=0, help="Examples shown with all three texts.")] = 5,
) -> None:
    """Count named entities in the texts of the model: unchanged, reduced, and with the removed part alone.

    The output includes the values published for GPT-J on Wikidata QA.

    Example: laser analyze generations bundled --task worldfacts --reduce 29.v_proj@0.75 --limit 500
    """
    from laserlm.edit import removed_part
    from laserlm.studies.entities import MODELS, PUBLISHED, entities, sets_of
    from laserlm.studies.entities import pipeline as pipeline_
    from laserlm.studies.figures import entities_figure
    from laserlm.studies.writing import generated_texts

    output.check()
    find = pipeline_(pipeline)
    with study.pair() as pair, pair.scorer() as scorer, progress_bar("writing", unit="models") as advance:
        alone = str(removed_part(pair.lm.matrices, pair.intervention))
        sets = sets_of(pair.base, pair.edited, scorer(alone))
        chosen = [e for e in pair.examples if e.id in sets]
        wanted = dict(zip(MODELS, ("", pair.intervention, alone), strict=True))
        texts = generated_texts(scorer, pair.results, chosen, wanted, new_tokens=tokens, on_model=advance)
    counts, generated = entities(texts, chosen, sets, find)
    published = [
        {"set": name, "figure": figure, **values} for name, figures in PUBLISHED.items() for figure, values in figures.items()
    ]
    output.show(
        {
            **pair.description,
            "removed_part_alone": alone,
            "entities": counts,
            "published": published,
            "texts": generated,
        },
        {
            **{title: [_row(e) for e in counts if e.set == name] for name, title in SETS.items()},
            "published for GPT-J on Wikidata QA": published,
            f"some of {len(generated)} examples": [
                {"set": "".join(s.sets), "prompt": s.prompt, "answer": s.answer, **s.texts} for s in generated[:shown]
            ],
        },
        lines=[pair.title],
        figure=lambda: entities_figure(counts, pair.title),
    )


def _row(e: Entities) -> dict[str, Any]:
    return {"model": e.model, "n": e.entities.n, **{title: getattr(e, name) for name, title in FIGURES.items()}}
