"""Search a trained model for the reduction that restores recall, and measure what the reduction costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laserlm.edit import applied
from laserlm.lab.recall.language import QUESTION_SEED_OFFSET, Language, RecallConfig, questions, texts
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import GROUPS, Intervention
from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.searching import SearchProgress, SearchResult, search
from laserlm.store import Store
from laserlm.tasks import Split, Task

GRID = "all.all@0,0.02,0.05,0.1,0.2,0.4,0.6,0.8,0.9"
"""Every matrix at nine kept fractions."""
N_SEQUENCES = 2000
"""Number of sequences; a fifth of their questions is for validation."""


@dataclass(frozen=True)
class RecallResult:
    """Results of one trained model. The comparisons are on test sequences.

    Args:
        config: the language and the training.
        exhaustive: result of the exhaustive search.
        race: result of the race over the same candidates.
        clean: the best reduction on clean sequences.
        first: the candidate that the screen ranks first.
        first_clean: ``first`` on clean sequences.
        attention: the best reduction of an attention matrix on validation.
        attention_clean: ``attention`` on clean sequences.
        noisy: the best reduction on noisy sequences; the answers are the sequences' next words.
        text: the best reduction over all words of clean sequences.
    """

    config: RecallConfig
    exhaustive: SearchResult
    race: SearchResult
    clean: Comparison
    first: str
    first_clean: Comparison
    attention: str
    attention_clean: Comparison
    noisy: Comparison
    text: Comparison

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        comparisons = {
            name: getattr(self, name).as_dict() for name in ("clean", "first_clean", "attention_clean", "noisy", "text")
        }
        return {
            "seed": self.config.seed,
            "alpha": self.config.alpha,
            "learnt": self.config.loss_on,
            "run": self.exhaustive.run,
            "best": str(self.exhaustive.best),
            "race": str(self.race.best),
            "first": self.first,
            "correlation": None if self.race.screened is None else self.race.screened.correlation,
            "attention": self.attention,
            **comparisons,
        }


def recall_task(config: RecallConfig) -> Task:
    """Return the task of the search: clean questions, or full clean sequences if the training loss is over all words."""
    language = Language(config)
    clean = language.draw(N_SEQUENCES, seed=QUESTION_SEED_OFFSET + config.seed, alpha=0.0)
    if config.loss_on == "all":
        return Task.of("noisy-recall text", texts(language, clean, "clean"), scorer="perplexity")
    return Task.of("noisy-recall", questions(language, clean, "clean"))


def run_study(
    lm: LanguageModel,
    config: RecallConfig,
    store: str | Path,
    *,
    restart: bool = False,
    on_step: Callable[[SearchProgress], None] | None = None,
) -> RecallResult:
    """Search every matrix at every size on clean validation sequences, and measure the best on test sequences.

    Args:
        lm: the trained model.
        config: the configuration of its training.
        store: the results database.
        restart: search again even if the store has these searches.
        on_step: called after each work item of the searches.
    """
    task = recall_task(config)
    exhaustive = search(lm, task, strategy="exhaustive", grid=GRID, store=store, restart=restart, on_step=on_step)
    race = search(lm, task, grid=GRID, store=store, restart=restart, on_step=on_step)
    expected = {} if race.screened is None else race.screened.expected
    first = min(expected, key=expected.__getitem__, default="")
    attention = _best_of_attention(store, exhaustive.run)

    language = Language(config)
    clean = language.draw(N_SEQUENCES, seed=2 * QUESTION_SEED_OFFSET + config.seed, alpha=0.0)
    noisy = language.draw(N_SEQUENCES, seed=3 * QUESTION_SEED_OFFSET + config.seed)
    on_clean = Task.of("noisy-recall", questions(language, clean, "asked")).every
    on_noisy = Task.of("noisy-recall noisy", questions(language, noisy, "noisy", noisy=True)).every
    on_text = Task.of("noisy-recall text", texts(language, clean, "asked"), scorer="perplexity").every
    return RecallResult(
        config=config,
        exhaustive=exhaustive,
        race=race,
        clean=_compare(lm, on_clean, exhaustive.best),
        first=first,
        first_clean=_compare(lm, on_clean, first),
        attention=attention,
        attention_clean=_compare(lm, on_clean, attention),
        noisy=_compare(lm, on_noisy, exhaustive.best),
        text=_compare(lm, on_text, exhaustive.best),
    )


def _best_of_attention(store: str | Path, run: str) -> str:
    """Return the reduction of an attention matrix with the best validation accuracy, then the lowest loss."""
    with Store.open(store) as results:
        trials = [t for t in results.trials(run) if t.split == "validation" and t.loss is not None]
    trials = [t for t in trials if _is_of_attention(t.intervention)]
    return min(trials, key=lambda t: (-(t.accuracy or 0.0), t.loss)).intervention


def _is_of_attention(text: str) -> bool:
    reductions = Intervention.parse(text).reductions
    return bool(reductions) and all(r.matrix in GROUPS["attn"] for r in reductions)


def _compare(lm: LanguageModel, split: Split, intervention: str | Intervention) -> Comparison:
    base = evaluate(lm, split)
    with applied(lm, intervention):
        return compare(base, evaluate(lm, split))
