"""Search a trained model for the reduction that makes it recall again, and say what that costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laserlm.edit import applied
from laserlm.lab.recall.language import DRAWN, Language, Recipe, questions, texts
from laserlm.models.language_model import LanguageModel
from laserlm.reductions import GROUPS, Intervention
from laserlm.scoring.evaluate import Comparison, compare, evaluate
from laserlm.searching import SearchProgress, SearchResult, search
from laserlm.store import Store
from laserlm.tasks import Split, Task

__all__ = ["GRID", "RecallResult", "study", "task_of"]

GRID = "all.all@0,0.02,0.05,0.1,0.2,0.4,0.6,0.8,0.9"
"""Every matrix, from nothing of it to nearly all."""
QUESTIONS = 2000
"""Clean questions; a fifth of them for validation."""


@dataclass(frozen=True)
class RecallResult:
    """What was found on one trained model.

    Args:
        recipe: how it was trained.
        found: of the exhaustive search.
        race: of the race among the same candidates.
        clean: test questions on clean sequences, before and after the best.
        first: what the screen expects most of.
        first_clean: the same questions before and after that.
        attention: of the reductions of attention matrices, the best on validation.
        attention_clean: the same questions before and after that.
        noisy: questions on noisy sequences, answered as the sequence goes on, before and after the best.
        text: all words of clean sequences, before and after the best.
    """

    recipe: Recipe
    found: SearchResult
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
        sides = {name: getattr(self, name).as_dict() for name in ("clean", "first_clean", "attention_clean", "noisy", "text")}
        return {
            "seed": self.recipe.seed,
            "alpha": self.recipe.alpha,
            "learnt": self.recipe.learnt,
            "run": self.found.run,
            "best": str(self.found.best),
            "race": str(self.race.best),
            "first": self.first,
            "correlation": None if self.race.screened is None else self.race.screened.correlation,
            "attention": self.attention,
            **sides,
        }


def task_of(recipe: Recipe) -> Task:
    """Return what a model is searched on: clean questions, or all words of clean sequences where it learnt them all."""
    language = Language(recipe)
    clean = language.draw(QUESTIONS, seed=DRAWN + recipe.seed, alpha=0.0)
    if recipe.learnt == "all":
        return Task.of("noisy-recall text", texts(language, clean, "clean"), scorer="perplexity")
    return Task.of("noisy-recall", questions(language, clean, "clean"))


def study(
    lm: LanguageModel,
    recipe: Recipe,
    store: str | Path,
    *,
    restart: bool = False,
    on_step: Callable[[SearchProgress], None] | None = None,
) -> RecallResult:
    """Try every matrix at every size on clean validation sequences, and measure the best once on others.

    Args:
        lm: the trained model.
        recipe: how it was trained.
        store: of the results.
        restart: search anew even where the store has these searches.
        on_step: called after each piece of work.
    """
    task = task_of(recipe)
    given: dict[str, Any] = {"grid": GRID, "store": store, "restart": restart, "on_step": on_step}
    found = search(lm, task, strategy="exhaustive", **given)
    race = search(lm, task, **given)
    expected = {} if race.screened is None else race.screened.expected
    first = min(expected, key=expected.__getitem__, default="")
    with Store.open(store) as results:
        trials = {t.intervention: t for t in results.trials(found.run) if t.split == "validation" and t.loss is not None}
    attention = min((t for t in trials if _of_attention(t)), key=lambda t: (-(trials[t].accuracy or 0.0), trials[t].loss))

    language = Language(recipe)
    clean = language.draw(QUESTIONS, seed=2 * DRAWN + recipe.seed, alpha=0.0)
    noisy = language.draw(QUESTIONS, seed=3 * DRAWN + recipe.seed)
    asked = Task.of("noisy-recall", questions(language, clean, "asked")).every
    mixed = Task.of("noisy-recall noisy", questions(language, noisy, "noisy", noisy=True)).every
    whole = Task.of("noisy-recall text", texts(language, clean, "asked"), scorer="perplexity").every
    best = found.best
    return RecallResult(
        recipe,
        found,
        race,
        _compared(lm, asked, best),
        first,
        _compared(lm, asked, first),
        attention,
        _compared(lm, asked, attention),
        _compared(lm, mixed, best),
        _compared(lm, whole, best),
    )


def _of_attention(text: str) -> bool:
    reductions = Intervention.parse(text).reductions
    return bool(reductions) and all(r.matrix in GROUPS["attn"] for r in reductions)


def _compared(lm: LanguageModel, split: Split, intervention: str | Intervention | Sequence[str]) -> Comparison:
    base = evaluate(lm, split)
    with applied(lm, intervention):
        return compare(base, evaluate(lm, split))
