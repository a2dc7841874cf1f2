"""The model card of a saved model: what it is, what it gained, how it was made."""

from __future__ import annotations

from typing import Any

__all__ = ["card"]

TAGS = {"AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask"}
SHOWN = 40
"""Matrices that a card lists; the record has them all."""


def card(record: dict[str, Any]) -> str:
    """Return the text of ``README.md`` for what ``laser.json`` will hold."""
    base = record["base"]
    hub = base["hub"] or base["name"]
    name = hub if base["revision"] is None else f"{hub} at {base['revision']}"
    loader = record["loader"]
    head = ["---", *([f"base_model: {base['hub']}"] if base["hub"] else [])]
    head += ["library_name: transformers", "tags: [laserlm, low-rank]"]
    if loader in TAGS:
        head.append(f"pipeline_tag: {TAGS[loader]}")
    share = record["parameters"]["saved"] / record["parameters"]["base"]
    lines = [
        *head,
        "---",
        "",
        f"# {hub.rstrip('/').rpartition('/')[2]}, reduced",
        "",
        f"{name}, some of its weight matrices replaced by approximations of low rank, without training "
        "([LASER](https://arxiv.org/abs/2312.13558)), by laserlm.",
        "",
        *_loading(record, loader),
        "",
        "| | |",
        "|---|---|",
        f"| base model | {name} |",
        f"| sha256 of its weights | `{base['hash']}` |",
        *([f"| reductions | `{record['intervention'] or 'none'}` |"] if "intervention" in record else []),
        *([f"| compression | {_compression(record['compression'])} |"] if "compression" in record else []),
        f"| decomposition | {record['decomposition']['algorithm']}, seed {record['decomposition']['seed']} |",
        f"| parameters | {record['parameters']['saved']:,} of {record['parameters']['base']:,} ({share:.1%}) |",
        f"| weights | {record['weight_bytes'] / 2**20:.1f} MiB, {record['dtype']['saved']} |",
        "",
        *_evidence(record.get("found")),
        "## How it was made",
        "",
        "```sh",
        record["command"],
        "```",
        "",
        "`laser reproduce DIR` makes it again and compares; `laser load-check DIR` loads it in a fresh process and compares "
        "its logits with those recorded. Versions: "
        + ", ".join(f"{package} {version}" for package, version in record["provenance"]["versions"].items())
        + ".",
        "",
        "## Matrices",
        "",
        "| matrix | shape | rank | held as |",
        "|---|---|---|---|",
        *(
            f"| {m['matrix']} | {m['shape'][0]} x {m['shape'][1]} | {m['rank']} | {m['dense'] or 'two factors'} |"
            for m in record["matrices"][:SHOWN]
        ),
    ]
    if len(record["matrices"]) > SHOWN:
        lines.append(f"| and {len(record['matrices']) - SHOWN} more in `laser.json` | | | |")
    return "\n".join(lines) + "\n"


def _loading(record: dict[str, Any], loader: str) -> list[str]:
    if record["imports"] is None:
        return [f'Load it with `transformers.{loader}.from_pretrained("DIR")`; it needs nothing else.']
    return [
        "Its reduced matrices are held as two factors each. **Import laserlm first**; without it loading ends in an error."
        if record["form"] == "factored"
        else "It is a model of laserlm's lab. **Import it first**; without it loading ends in an error.",
        "",
        "```python",
        f"import {record['imports']}",
        f"from transformers import {loader}",
        "",
        f'model = {loader}.from_pretrained("DIR")',
        "```",
    ]


def _compression(how: dict[str, Any]) -> str:
    text = how.get("text")
    what = f"{how['method']} decomposition, {how['allocation']} ranks"
    what += f", {how['ratio']:.0%} of the parameters of the blocks' matrices"
    if text is not None and text["calibrated_on"]:
        what += f"; calibrated on {text['calibrated_on']:,} tokens of `{text['name']}`"
    if "perplexity" in how:
        p = how["perplexity"]
        what += f"; perplexity {p['base']:.2f} to {p['compressed']:.2f} on {p['held_out_tokens']:,} tokens held out from it"
    return what


def _evidence(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return ["Its gain on a task was not recorded when it was saved.", ""]
    settings = found["settings"]
    of_text = settings.get("scorer") == "perplexity"
    rows = []
    for label, c in (("validation (chosen on)", found["validation"]), ("test (held out)", found["test"])):
        low, high = c["interval"]
        accuracy = f"{c['base']:.1%} | {c['best']:.1%} | {c['gain']:+.1%} [{low:+.1%}, {high:+.1%}] | {c['mcnemar_p']:.2g}"
        loss = f"{c['base_loss']:.3f} to {c['best_loss']:.3f}"
        if c["loss_interval"] is not None:
            loss += f" [{c['loss_interval'][0]:+.3f}, {c['loss_interval'][1]:+.3f}]"
        rows.append(f"| {label} | {c['n']} | {'| | | ' if of_text else accuracy} | {loss} |")
    return [
        f"## Gain on {settings.get('task', 'the task')}",
        "",
        f"The best of {found['candidates']} candidates by {settings.get('metric', 'accuracy')}, "
        f"of which {found['scored']} were scored; run `{found['run']}`.",
        "",
        "| split | examples | base | reduced | gain, 95 % interval | McNemar p | loss, nats per token [change] |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
    ]
