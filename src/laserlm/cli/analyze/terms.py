"""The command that weighs the words of prompts and of what the models write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import Output, Pair, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import bar

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
    """Tell which words mark the prompts, and what is written, by answer and by what the reduction did (TF-IDF).

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
            with pair.book() as book, bar("writing", unit="models") as advance:
                texts |= generated_texts(book, pair.results, pair.examples, wanted, new_tokens=tokens, on_model=advance)
    groups = _groups(pair, labels)
    wordless = [name for name, of in texts.items() if not any(c.isalnum() for t in of for c in t)]
    found = {name: terms_(of, groups, top=top) for name, of in texts.items() if name not in wordless}
    small = sorted({f"{g.group} ({g.n})" for of in found.values() for g in of if g.few})
    rows = [_row(name, g) for name, of in found.items() for g in of if not g.few]
    output.show(
        {**pair.about, "terms": {name: [g.as_dict() for g in of] for name, of in found.items()}},
        {
            "every word": [row for name, of in found.items() for g in of for row in _words(name, g)],
        }
        if output.csv
        else {f"{pair.title}: words whose TF-IDF is ahead of that in all other examples": rows},
        lines=[
            f"Too small to say anything, and left out: {', '.join(small) or 'no group'}.",
            *(f"No word at all is in {name}." for name in wordless),
            "Of many words some are ahead by chance; the intervals are for each by itself.",
        ],
        figure=(lambda: terms_figure(found, pair.title)) if rows else None,
    )


def _groups(pair: Pair, labels: int) -> Mapping[str, Sequence[int]]:
    """Return the indices of the examples of each flip group and of the most frequent answers."""
    from laserlm.studies.flipping import flips

    found = flips(pair.base, pair.edited, pair.examples)
    groups: dict[str, list[int]] = {name: [] for name in ("corrected", "broken", "right", "wrong")}
    frequent = [label.label for label in found.labels if label.answers][:labels]
    groups |= {f"answer {label}": [] for label in frequent}
    for i, flip in enumerate(found.flips):
        groups[flip.change].append(i)
        if flip.answer.lower() in frequent:
            groups[f"answer {flip.answer.lower()}"].append(i)
    return groups


def _row(name: str, g: GroupTerms) -> dict[str, Any]:
    words = ", ".join(f"{t.term} {t.ahead.value:+.2f} ({t.texts})" for t in g.terms)
    return {"of": name, "group": g.group, "n": g.n, "words ahead (in so many texts)": words or "none beyond its interval"}


def _words(name: str, g: GroupTerms) -> list[dict[str, Any]]:
    start = {"of": name, "group": g.group, "n": g.n, "few": g.few}
    return [start | {"term": t.term, "weight": t.weight, "ahead": t.ahead, "texts": t.texts} for t in g.terms]
