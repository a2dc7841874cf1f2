"""Write the model card of a saved model: its origin, its gain and how to rebuild it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from laserlm.export.card_metadata import metadata
from laserlm.reductions import short_form
from laserlm.scoring.statistics import in_points
from laserlm.searching.config import OF_COMPONENTS
from laserlm.searching.guard import Harm

MAX_MATRICES = 40
"""Number of matrices that a card lists; the record lists all."""


def card(record: dict[str, Any], folder: str, hub_id: str | None = None) -> str:
    """Return the text of ``README.md`` for a record (the content of ``laser.json``).

    Args:
        record: the record.
        folder: name of the folder, for the examples of the card.
        hub_id: repository that the folder will be uploaded to. transformers and peft load it by this id, and laserlm from a
            folder that it is downloaded to.
    """
    remote = hub_id or folder
    folder = folder if hub_id is None else hub_id.rpartition("/")[2]
    base = record["base"]
    hub = base["hub"] or base["name"]
    name = hub if base["revision"] is None else f"{hub} at {base['revision']}"
    loader = record["loader"]
    share = record["parameters"]["saved"] / record["parameters"]["base"]
    lines = [
        "---",
        metadata(record, folder).to_yaml(),
        "---",
        "",
        f"# {hub.rstrip('/').rpartition('/')[2]}, reduced",
        "",
        f"{_summary(record, name)} ([LASER](https://arxiv.org/abs/2312.13558)). Made with laserlm.",
        "",
        *_loading(record, loader, folder, remote),
        "",
        "| | |",
        "|---|---|",
        f"| base model | {name} |",
        f"| sha256 of its weights | `{base['hash']}` |",
        *([f"| adapter whose update is reduced | {record['update']['name']} |"] if "update" in record else []),
        *([f"| reductions | `{short_form(record['intervention']) or 'none'}` |"] if "intervention" in record else []),
        *([f"| compression | {_compression(record['compression'])} |"] if "compression" in record else []),
        *(f"| harm | {harm} |" for harm in _harms(record)),
        f"| decomposition | {record['decomposition']['algorithm']}, seed {record['decomposition']['seed']} |",
        f"| parameters | {record['parameters']['saved']:,} of {record['parameters']['base']:,} ({share:.1%}) |",
        f"| weights | {record['weight_bytes'] / 2**20:.1f} MiB, {record['dtype']['saved']} |",
        "",
        *_evidence(record.get("result"), _point(record), _harms(record)),
        "## How it was made",
        "",
        "```sh",
        record["command"],
        "```",
        "",
        *([f"Download it first: `{_download(hub_id)}`.", ""] if hub_id is not None else []),
        _checks(record, folder)
        + " Versions: "
        + ", ".join(f"{package} {version}" for package, version in record["provenance"]["versions"].items())
        + ".",
        "",
        "## Matrices",
        "",
        "| matrix | shape | rank | stored as |",
        "|---|---|---|---|",
        *(
            f"| {m['matrix']} | {m['shape'][0]} x {m['shape'][1]} | {m['rank']} | {m['dense'] or 'two factors'} |"
            for m in record["matrices"][:MAX_MATRICES]
        ),
    ]
    if len(record["matrices"]) > MAX_MATRICES:
        lines.append(f"| and {len(record['matrices']) - MAX_MATRICES} more in `laser.json` | | | |")
    return "\n".join(lines) + "\n"


def _summary(record: dict[str, Any], base: str) -> str:
    """Return in words what the folder holds."""
    scales = "@scale" in record.get("intervention", "")
    if record["form"] == "adapter":
        verb = "scales singular components" if scales else "takes singular components out"
        return f"An adapter that {verb} of some weight matrices of {base}, without training"
    change = "matrices of scaled singular values" if scales else "low-rank approximations"
    return f"{base} with {change} in place of some weight matrices, without training"


def _checks(record: dict[str, Any], folder: str) -> str:
    if record["form"] == "gguf":
        return f"`laser evaluate {folder}/{record['gguf']} --task TASK` measures the file."
    return (
        f"`laser reproduce {folder}` rebuilds it and compares the weights. `laser load-check {folder}` loads it in a fresh "
        "process and compares its logits with the recorded logits."
    )


def _download(hub_id: str) -> str:
    return f"hf download {hub_id} --local-dir {hub_id.rpartition('/')[2]}"


def _loading(record: dict[str, Any], loader: str, folder: str, remote: str) -> list[str]:
    if record["form"] == "adapter":
        return _loading_with_peft(record["base"], record["dtype"]["base"], loader, folder, remote)
    if record["form"] == "gguf":
        return [
            f"A GGUF file for llama.cpp, with weights in {record['dtype']['saved']}: `llama-server -m {record['gguf']}`. For "
            f"Ollama: `ollama create {folder.lower()} -f Modelfile`. laserlm and transformers read the file, too."
        ]
    if record["imports"] is None:
        return [f'Load it with `transformers.{loader}.from_pretrained("{remote}")`. It needs no other package.']
    return [
        "Its reduced matrices are stored as two factors each. **Import laserlm first.** Without laserlm, loading fails."
        if record["form"] == "factored"
        else "It is a model of laserlm's lab. **Import its module first.** Without the module, loading fails.",
        "",
        "```python",
        f"import {record['imports']}",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("{remote}")',
        "```",
    ]


def _loading_with_peft(base: dict[str, Any], dtype: str, loader: str, folder: str, remote: str) -> list[str]:
    name, commit = base["name"], base["revision"]
    revision = f', revision="{commit}"' if commit else ""
    is_plain = name != "bundled" and not name.endswith(".gguf")
    plain = f'{loader}.from_pretrained("{name}"{revision}, dtype="{dtype}")'
    model = plain if is_plain else f'laserlm.load("{name}").model'
    return [
        "It belongs to the unchanged base model. peft loads it, and `merge_and_unload()` gives the reduced model:",
        "",
        "```python",
        *([] if is_plain else ["import laserlm"]),
        "from peft import PeftModel",
        *([f"from transformers import {loader}"] if is_plain else []),
        "",
        f"base = {model}",
        f'model = PeftModel.from_pretrained(base, "{remote}")',
        "```",
        "",
        f'`laserlm.load("{folder}")` loads base and adapter together, merged'
        + ("." if remote == folder else f", after `{_download(remote)}`."),
    ]


def _compression(settings: dict[str, Any]) -> str:
    text = settings.get("text")
    line = f"{settings['method']} decomposition, {settings['allocation']} ranks"
    line += f", {settings['ratio']:.0%} of the parameters of the blocks' matrices"
    if text is not None and text["calibrated_on"]:
        origin = " (the base model wrote it)" if text.get("own") else ""
        line += f"; calibrated on {text['calibrated_on']:,} tokens of `{text['name']}`{origin}"
    if settings.get("refine"):
        line += f"; factors trained for {settings['refine']} steps towards the base model's predictions"
    if "perplexity" in settings:
        p = settings["perplexity"]
        line += f"; perplexity {p['base']:.2f} to {p['compressed']:.2f} on {p['held_out_tokens']:,} held-out tokens"
    return line


def _evidence(result: dict[str, Any] | None, point: dict[str, Any] | None, harms: Sequence[Harm]) -> list[str]:
    if result is None:
        return ["Its gain on a task and its harm to the model were not recorded when it was saved.", ""]
    settings = result["settings"]
    is_perplexity = settings.get("scorer") == "perplexity"
    splits = [("validation (chosen on)", result["validation"]), ("test (held out)", result["test"])]
    if point is not None:
        splits = [("validation (chosen on)", point["comparison"])]
    rows = []
    for label, c in splits:
        accuracy = f"{c['base']:.1%} | {c['best']:.1%} | {in_points(c['gain'], c['interval'])} | {c['mcnemar_p']:.2g}"
        if c.get("base_spearman") is not None:
            accuracy = f"Spearman {c['base_spearman']:.3f} | Spearman {c['best_spearman']:.3f} | | "
        loss = f"{c['base_loss']:.3f} to {c['best_loss']:.3f}"
        if c["loss_interval"] is not None:
            loss += f" [{c['loss_interval'][0]:+.3f}, {c['loss_interval'][1]:+.3f}]"
        n, facts = c["n"], c.get("facts")
        size = f"{n} of {facts} facts" if facts and facts < n else n
        rows.append(f"| {label} | {size} | {'| | | ' if is_perplexity else accuracy} | {loss} |")
    what = "components" if result["strategy"] in OF_COMPONENTS else "candidates"
    origin = f"The best of {result['candidates']} {what} by {settings.get('metric', 'accuracy')}, "
    origin += f"of which {result['scored']} were scored; run `{result['run']}`."
    if what == "components":
        origin = f"Chosen among {result['candidates']} components in {result['scored']} trials; run `{result['run']}`."
    if point is not None:
        origin = (
            f"**Not tested on held-out questions.** It is a point of the Pareto list of run `{result['run']}`, which chose "
            "another one. All figures are of the questions and the text that it was chosen on, so they are too good."
        )
    unclear = unclear_gain(result)
    is_gain = point is None and not unclear
    return [
        f"## {'Gain' if is_gain else 'Measured'} on {settings.get('task', 'the task')}, and harm",
        "",
        *([f"**No gain is claimed.** {unclear}", ""] if unclear and point is None else []),
        origin,
        "",
        "| split | examples | base | reduced | gain, 95 % interval | exact p | loss, nats per token [change] |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        *([f"Harm: {harm}." for harm in harms] or ["What it costs on other text was not measured."]),
        "",
    ]


def unclear_gain(result: dict[str, Any]) -> str:
    """Return why the test of a search shows no gain, or an empty text if it does: of accuracy, for a text of the loss."""
    test = result["test"]
    if result["settings"].get("scorer") == "perplexity":
        low, high = test["loss_interval"] or (-math.inf, math.inf)
        if high < 0:
            return ""
        change = (
            "rises" if low > 0 else f"may be unchanged: the interval of its change, {low:+.3f} to {high:+.3f}, includes zero"
        )
        return f"The loss on held-out text {change}."
    low, high = test["interval"]
    if low > 0:
        return ""
    interval = f"{100 * low:+.1f} to {100 * high:+.1f} points, {'lies below' if high < 0 else 'includes'} zero"
    return f"The interval of the gain on held-out questions, {interval}."


def _point(record: dict[str, Any]) -> dict[str, Any] | None:
    """Return the point that was saved in place of the best of its search."""
    points = record["result"].get("points", ()) if record.get("result") else ()
    chosen = record.get("intervention")
    return next((p for p in points if p["intervention"] == chosen != record["result"]["best"]), None)


def _harms(record: dict[str, Any]) -> list[Harm]:
    """Return what the saved model costs on the guards of its search."""
    return [Harm.from_dict(values) for values in (_point(record) or record.get("result") or {}).get("harms", ())]
