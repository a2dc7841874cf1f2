"""``laser analyze terms``: words that mark prompts and generated texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import ModelPair, Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.terms import GroupTerms

UNCHANGED, REDUCED = "what the unchanged model writes", "what the reduced model writes"


@with_options(study=StudyOptions, output=Output)
def terms(
    study: StudyOptions,
    output: Output,
    top: Annotated[int, typer.Option(min=1, help="Words of each group.")] = 8,
    labels: Annotated[int, typer.Option(min=0, help="Most frequent answers that are groups of their own.")] = 8,
    generations: Annotated[bool, typer.Option(help="Also weigh what the models write for every example.")] = True,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a text; default: as the task is written, or 10.")] = None,
) -> None:
    """Show the words that mark prompts and generated texts, by answer and by flip (TF-IDF).

    Example: laser analyze terms bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.studies.figures import terms_figure
    from laserlm.studies.terms import terms as terms_
    from laserlm.studies.writing import generated_texts

    output.check()
    with study.pair() as pair:
        texts: dict[str, Sequence[str]] = {"prompts": [e.prompt for e in pair.examples]}
        if generations:
            wanted = {UNCHANGED: "", REDUCED: pair.intervention}
            with pair.scorer() as scorer, progress_bar("writing", unit="models") as advance:
                texts |= generated_texts(scorer, pair.results, pair.examples, wanted, new_tokens=tokens, on_model=advance)
    groups = _groups(pair, labels)
    wordless = [name for name, of in texts.items() if not any(c.isalnum() for t in of for c in t)]
    by_text = {name: terms_(of, groups, top=top) for name, of in texts.items() if name not in wordless}
    small = sorted({f"{g.group} ({g.n})" for of in by_text.values() for g in of if g.is_small})
    rows = [_row(name, g) for name, of in by_text.items() for g in of if not g.is_small]
    output.show(
        {**pair.description, "terms": by_text},
        {
            "every word": [row for name, of in by_text.items() for g in of for row in _words(name, g)],
        }
        if output.csv
        else {f"{pair.title}: words whose TF-IDF is ahead of that in all other examples": rows},
        lines=[
            f"Too small to say anything, and left out: {', '.join(small) or 'no group'}.",
            *(f"No word at all is in {name}." for name in wordless),
            "Of many words some are ahead by chance; the intervals are for each by itself.",
        ],
        figure=(lambda: terms_figure(by_text, pair.title)) if rows else None,
    )


def _groups(pair: ModelPair, labels: int) -> Mapping[str, Sequence[int]]:
    """Return the indices of the examples of each kind of flip and of each frequent answer."""
    from laserlm.studies.flipping import flips

    by_text = flips(pair.base, pair.edited, pair.examples)
    groups: dict[str, list[int]] = {name: [] for name in ("corrected", "broken", "right", "wrong")}
    frequent = [label.label for label in by_text.labels if label.answers][:labels]
    groups |= {f"answer {label}": [] for label in frequent}
    for i, flip in enumerate(by_text.flips):
        groups[flip.change].append(i)
        if flip.answer.lower() in frequent:
            groups[f"answer {flip.answer.lower()}"].append(i)
    return groups


def _row(name: str, g: GroupTerms) -> dict[str, Any]:
    words = ", ".join(f"{t.term} {t.lift.value:+.2f} ({t.texts})" for t in g.terms)
    return {"of": name, "group": g.group, "n": g.n, "words ahead (in so many texts)": words or "none beyond its interval"}


def _words(name: str, g: GroupTerms) -> list[dict[str, Any]]:
    start = {"of": name, "group": g.group, "n": g.n, "few": g.is_small}
    return [start | {"term": t.term, "weight": t.weight, "ahead": t.lift, "texts": t.texts} for t in g.terms]
