"""The metadata of a model card in the hub's own schema: base model, licence, data sets, and metrics of the test split."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from laserlm.scoring.statistics import in_points
from laserlm.searching.guard import OWN_TEXT, Harm
from laserlm.tasks.definitions import DEFINITIONS

TAGS = {"AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask"}
HUB_PREFIX = "hub:"


def metadata(record: dict[str, Any], folder: str) -> ModelCardData:
    """Return the metadata of the card for a record (the content of ``laser.json``).

    Args:
        record: the record.
        folder: name of the folder, which the metrics name the model by.
    """
    base = record["base"]
    tags = ["laserlm", "low-rank"]
    library, relation = "transformers", None
    if record["form"] == "adapter":
        tags, library, relation = [*tags, "lora"], "peft", "adapter"
    elif record["form"] == "gguf":
        tags, library = [*tags, "gguf"], "gguf"
    results = _results(record)
    result = record.get("result")
    dataset = None if result is None else _dataset(result["settings"].get("task", ""))
    return ModelCardData(
        base_model=base["hub"],
        base_model_relation=relation,
        **base.get("licence", {}),
        library_name=library,
        pipeline_tag=TAGS.get(record["loader"]),
        tags=tags,
        datasets=[dataset["dataset_type"]] if dataset and dataset["dataset_type"] != dataset["dataset_name"] else None,
        metrics=sorted({r.metric_type for r in results}) or None,
        model_name=folder if results else None,
        eval_results=results or None,
    )


def result_on_test(record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the result of the search whose choice was saved. Points of its Pareto list have no test."""
    result = record.get("result")
    return result if result is not None and record.get("intervention") == result["best"] else None


def _results(record: dict[str, Any]) -> list[EvalResult]:
    """Return what was measured on held-out questions and texts: the score on the task, and on each guard."""
    result = result_on_test(record)
    if result is None:
        return []
    task = TAGS.get(record["loader"], "text2text-generation")
    settings, test = result["settings"], result["test"]
    scorer = settings.get("scorer", "")
    names = _dataset(settings.get("task") or "questions")
    common: dict[str, Any] = {"task_type": task, "dataset_split": "test", **names}
    if scorer == "perplexity":
        base, edited = math.exp(test["base_loss"]), math.exp(test["best_loss"])
        results = [_perplexity(edited, f"base model {base:.2f}", common)]
    elif test.get("best_spearman") is not None:
        about = f"Spearman correlation (base model {test['base_spearman']:.3f}, {test['n']} pairs)"
        results = [
            EvalResult(metric_type="spearmanr", metric_value=round(test["best_spearman"], 4), metric_name=about, **common)
        ]
    else:
        gain = in_points(test["gain"], test["interval"])
        results = [
            EvalResult(
                metric_type="accuracy",
                metric_value=round(test["best"], 4),
                metric_name=f"accuracy ({scorer}; base model {test['base']:.1%}, gain {gain}, {test['n']} questions)",
                **common,
            )
        ]
    return results + [_on_guard(Harm.from_dict(values), task) for values in result.get("harms", ())]


def _on_guard(harm: Harm, task: str) -> EvalResult:
    low, high = harm.interval
    name = "text that the base model wrote" if harm.guard == OWN_TEXT else harm.guard
    about = f"harm: x{harm.ratio:.3f} [{low:.3f}, {high:.3f}] of the base model's"
    common = {"task_type": task, "dataset_split": "held out", **_dataset(name)}
    if harm.measure != "perplexity":
        value = round(math.exp(harm.comparison.edited_loss), 4)
        return EvalResult(metric_type="exp_loss", metric_value=value, metric_name=f"{harm.measure} ({about})", **common)
    return _perplexity(math.exp(harm.comparison.edited_loss), about, common)


def _perplexity(value: float, about: str, common: dict[str, Any]) -> EvalResult:
    return EvalResult(metric_type="perplexity", metric_value=round(value, 4), metric_name=f"perplexity ({about})", **common)


def _dataset(task: str) -> dict[str, Any]:
    """Return id, name and revision of a task's data on the hub, or its own name for both if it is not there."""
    if task.startswith(HUB_PREFIX):
        return {"dataset_type": task.removeprefix(HUB_PREFIX), "dataset_name": task}
    hub = DEFINITIONS[task].hub if task in DEFINITIONS else None
    if hub is None:
        return {"dataset_type": task, "dataset_name": task}
    return {
        "dataset_type": hub.path,
        "dataset_name": task,
        "dataset_config": hub.name,
        "dataset_revision": hub.revision,
    }
