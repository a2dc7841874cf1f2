"""``laser analyze components``: what the smallest singular values answer, and runs of the spectrum."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laserlm.cli.analyze.study import ModelPair, Output, StudyOptions
from laserlm.cli.options import with_options
from laserlm.cli.progress import progress_bar

if TYPE_CHECKING:
    from laserlm.studies.component_tokens import ComponentTokens
    from laserlm.studies.components import BottomResult, SpectrumRun
    from laserlm.tasks import Example


@with_options(study=StudyOptions, output=Output)
def components(
    study: StudyOptions,
    output: Output,
    fractions: Annotated[
        str | None,
        typer.Option(help="Fractions of the smallest singular values, by commas; default: fifteen from 0 to 1."),
    ] = None,
    corpus: Annotated[
        Path | None, typer.Option(help="Text whose frequent words count as generic; default: English stop words.")
    ] = None,
    chunk: Annotated[int, typer.Option(min=0, help="Singular values per run of the chunk map; 0: none.")] = 32,
) -> None:
    """Show what the smallest singular values answer alone, which runs are signal or noise, and what is read and written.

    The first part is over the examples that the reduction corrects, the second over all examples. The third names the tokens
    that the strongest changed components read and write, and the questions that want them gone or weaker. Reductions of single
    components, such as strengths, have the third part alone. A report of the run shows the third part from then on.

    Example: laser analyze components bundled --task worldfacts --reduce 28.fc_up@0.05 --limit 300
    """
    from laserlm.reductions import Intervention
    from laserlm.studies.components import FRACTIONS, bottom_components, chunk_map
    from laserlm.studies.figures import components_figure
    from laserlm.studies.rank_curve import sizes_of
    from laserlm.studies.removed_components import removed_components
    from laserlm.studies.words import Words
    from laserlm.tasks.files import local_file, read_text

    output.check()
    words = Words.english() if corpus is None else Words.of_text(read_text(local_file(corpus)), corpus.name)
    wanted = FRACTIONS if fractions is None else tuple(map(str, sizes_of(fractions.split(","))))  # before anything is scored
    bottom: list[BottomResult] = []
    chunks: list[SpectrumRun] = []
    with study.pair() as pair, pair.scorer() as scorer:
        corrected = _corrected(pair)
        is_cut = all(r.size.strengths is None for r in Intervention.parse(pair.intervention).reductions)
        is_scaled = any(any((r.size.strengths or {}).values()) for r in Intervention.parse(pair.intervention).reductions)
        removed = removed_components(scorer, pair.intervention, corrected)
        if corrected and is_cut:
            with progress_bar("keeping the smallest", unit="fractions") as advance:
                bottom = bottom_components(scorer, corrected, pair.intervention, words, fractions=wanted, on_fraction=advance)
        if chunk and is_cut:
            with progress_bar("taking runs out", unit="runs") as advance:
                chunks = chunk_map(pair.intervention, scorer, chunk=chunk, on_chunk=advance)
    titles_and_rows = (
        (f"only the smallest singular values, n {len(corrected)}", [_bottom_row(b, output.csv) for b in bottom]),
        (f"without a run of singular values, n {pair.base.n}", [_chunk_row(c) for c in chunks]),
        (
            "the components whose singular value changes most, and the tokens nearest to them",
            [_removed_row(c, "weaker" if is_scaled else "gone") for c in removed],
        ),
    )
    values = {"corrected": len(corrected), "words": words.source, "bottom": bottom, "chunks": chunks, "removed": removed}
    output.show(
        pair.description | values,
        {f"{pair.title}: {title}": rows for title, rows in titles_and_rows if rows},
        lines=_sentences(pair, len(corrected), words.source, chunks),
        figure=(lambda: components_figure(bottom, chunks, pair.title)) if bottom or chunks else None,
    )


def _sentences(pair: ModelPair, corrected: int, words: str, chunks: list[SpectrumRun]) -> list[str]:
    from laserlm.reductions import short_form
    from laserlm.studies.estimates import MIN_EXAMPLES

    lines = [
        f"{short_form(pair.intervention)} corrects {corrected} of {pair.base.n} examples"
        + (": too few to say anything." if corrected < MIN_EXAMPLES else "."),
        f"Generic words are {words}, and what holds no letter or digit.",
    ]
    if chunks:
        signal, noise = (sum(c.verdict == verdict for c in chunks) for verdict in ("signal", "noise"))
        lines.append(
            f"Of {len(chunks)} runs {signal} are signal and {noise} noise; by chance alone one in forty would be each."
        )
    return lines


def _corrected(pair: ModelPair) -> list[Example]:
    ids = {b.id for b, e in zip(pair.base.scores, pair.edited.scores, strict=True) if e.correct and not b.correct}
    return [e for e in pair.examples if e.id in ids]


def _bottom_row(b: BottomResult, wide: bool) -> dict[str, Any]:
    """Return a row of the table. Only CSV has the intervals of all shares."""
    return {
        "fraction": b.fraction,
        **{name: share if wide else share.value for name, share in b.classes.items()},
        "cosine": b.cosine,
        "probability": b.probability,
        "winners": ", ".join(f"{token!r} {count}" for token, count in b.winners[:3]),
    }


def _chunk_row(c: SpectrumRun) -> dict[str, Any]:
    return {
        "matrix": c.matrix,
        "values": f"{c.first}-{c.last}",
        "energy": c.energy,
        "gain": c.gain,
        "change of loss": c.loss_change,
        "verdict": c.verdict,
    }


def _removed_row(c: ComponentTokens, wish: str) -> dict[str, Any]:
    row = {"component": f"{c.matrix} {c.component}", "singular value": c.value}
    tokens = {name: " ".join(map(repr, getattr(c, name))) for name in ("reads", "writes")}
    return row | tokens | {f"wanted {wish} by": "; ".join(prompt for prompt, _ in c.questions)}
