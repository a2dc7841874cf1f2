"""The command that tells whether a reduction makes the phrasings of a fact agree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from laserlm.cli.analyze.study import Output, StudyOptions
from laserlm.cli.options import with_options

if TYPE_CHECKING:
    from laserlm.studies.paraphrases import Paired, Paraphrases


@with_options(study=StudyOptions, output=Output)
def paraphrases(study: StudyOptions, output: Output) -> None:
    """Tell whether the phrasings of a fact come to agree, and whether what is right only grows. A run needs no model.

    Example: laser analyze paraphrases bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.studies.figures import bars
    from laserlm.studies.paraphrases import paraphrases as paraphrases_

    output.check()
    with study.pair() as pair:
        found = paraphrases_(pair.base, pair.edited, pair.examples)
    rows = _rows(found)
    tables = {
        f"{pair.title}: facts, n {found.facts}": [
            {"of facts": name, "before": of.before, "after": of.after, "change": of.change, "p": of.p}
            for name, of in rows.items()
        ],
        "what was right": _growth(found),
    }
    output.show(
        {**pair.about, **found.as_dict()},
        tables | _tables(found),
        lines=[
            f"{found.facts} facts with two phrasings or more ({found.single} with one left out)",
            f"{found.comparison}; as if phrasings were independent, which the table of facts does not take for granted",
        ],
        figure=lambda: bars(
            {side: [(name, getattr(of, side)) for name, of in rows.items()] for side in ("before", "after")},
            pair.title,
            "share of facts, or of pairs of phrasings",
        ),
    )


def _rows(found: Paraphrases) -> dict[str, Paired]:
    return {"all phrasings right": found.all_right, "any right": found.any_right, "phrasings agree": found.consistency}


def _growth(found: Paraphrases) -> list[dict[str, Any]]:
    return [
        {"of": name, "kept": of.kept, "gained": of.gained, "lost": of.lost, "share lost": of.share_lost}
        | {"only grows": "yes" if of.only_grows else "no"}
        for name, of in (("phrasings", found.examples), ("facts with all right", found.whole))
    ]


def _tables(found: Paraphrases) -> dict[str, list[dict[str, Any]]]:
    """Return for each number of phrasings the facts by how many of them are right."""
    return {
        f"facts of {t.phrasings} phrasings, by how many are right": [
            {"before": f"{i} right"} | {f"{j} after": n for j, n in enumerate(row)} for i, row in enumerate(t.counts)
        ]
        for t in found.tables
    }
