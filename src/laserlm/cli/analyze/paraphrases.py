"""``laser analyze paraphrases``: whether a reduction makes the phrasings of a fact agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options

if TYPE_CHECKING:
    from laserlm.studies.paraphrases import Paired, Paraphrases


@with_options(study=StudyOptions, output=Output)
def paraphrases(study: StudyOptions, output: Output) -> None:
    """Show whether the phrasings of a fact agree more, and whether right facts are lost. A run needs no model.

    Example: laser analyze paraphrases bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.jsonable import to_json
    from laserlm.studies.figures import bars
    from laserlm.studies.paraphrases import paraphrases as paraphrases_

    output.check()
    with study.pair() as pair:
        result = paraphrases_(pair.base, pair.edited, pair.examples)
    rows = _rows(result)
    tables = {
        f"{pair.title}: facts, n {result.facts}": [
            {"of facts": name, "before": of.base, "after": of.edited, "change": of.change, "p": of.p}
            for name, of in rows.items()
        ],
        "what was right": _growth(result),
    }
    output.show(
        {**pair.description, **to_json(result)},
        tables | _tables(result),
        lines=[
            f"{result.facts} facts with two phrasings or more ({result.single} with one left out)",
            f"{result.comparison}; as if phrasings were independent, which the table of facts does not take for granted",
        ],
        figure=lambda: bars(
            {
                title: [(name, getattr(of, side)) for name, of in rows.items()]
                for title, side in (("before", "base"), ("after", "edited"))
            },
            pair.title,
            "share of facts, or of pairs of phrasings",
        ),
    )


def _rows(result: Paraphrases) -> dict[str, Paired]:
    return {"all phrasings right": result.all_right, "any right": result.any_right, "phrasings agree": result.consistency}


def _growth(result: Paraphrases) -> list[dict[str, Any]]:
    return [
        {"of": name, "kept": of.kept, "gained": of.gained, "lost": of.lost, "share lost": of.share_lost}
        | {"only grows": "yes" if of.only_grows else "no"}
        for name, of in (("phrasings", result.examples), ("facts with all right", result.complete_facts))
    ]


def _tables(result: Paraphrases) -> dict[str, list[dict[str, Any]]]:
    """Return a table for each number of phrasings: the facts by their number of right phrasings."""
    return {
        f"facts of {t.phrasings} phrasings, by how many are right": [
            {"before": f"{i} right"} | {f"{j} after": n for j, n in enumerate(row)} for i, row in enumerate(t.counts)
        ]
        for t in result.tables
    }
