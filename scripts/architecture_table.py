"""Build a tiny model of each of 22 families, run it through laserlm, and print the table of docs/architectures.md.

Each model is saved with a tokenizer, loaded, reduced and saved again, opened with transformers alone, and searched. ``--write``
puts the table into the page. ``--old`` opens the saved models with the older transformers too, which pip installs for it:

    .venv/bin/python scripts/architecture_table.py --old --write
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from families import (  # type: ignore[import-not-found]  # noqa: E402 - the folder of the tests is no package
    CAUSAL,
    GROUPED,
    HEADS,
    MASKED,
    SENTENCES,
    SEQ2SEQ,
    SIZES,
    TOKENIZERS,
    UNUSUAL,
    VOCAB,
    D,
    random_model,
)

from laserlm.edit import applied  # noqa: E402
from laserlm.errors import LaserError, MatrixError  # noqa: E402
from laserlm.export import save  # noqa: E402
from laserlm.export.source_check import differences  # noqa: E402
from laserlm.models import LanguageModel, load, select  # noqa: E402
from laserlm.models.matrices import default_matrices  # noqa: E402
from laserlm.reductions import Layers  # noqa: E402
from laserlm.searching import search  # noqa: E402
from laserlm.tasks import Example, Task  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
START, END = "<!-- made by scripts/architecture_table.py -->", "<!-- end of the table -->"
COLUMNS = ("type", "kind", "loads", "matrices", "`attn`", "`mlp`", "saves losslessly", "opens in 4.57", "searched")

MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
MASKED_TOKENS = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 3, "cls_token_id": 1, "sep_token_id": 3}
DISTILBERT = {"dim": D, "n_heads": HEADS, "n_layers": 3, "hidden_dim": 48, "vocab_size": VOCAB, "max_position_embeddings": 130}
BART_SIZES = {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
              (("layers", 3), ("attention_heads", HEADS), ("ffn_dim", 48))}  # fmt: skip
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("causal", GROUPED | {"head_dim": 8}),
    "qwen3_moe": ("causal", GROUPED | MOE),
    "gemma3_text": ("causal", GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "pad_token_id": 0}),
    "deepseek_v3": ("causal", SIZES | LATENT | DEEPSEEK | {"num_key_value_heads": HEADS, "first_k_dense_replace": 1}),
    "xlm-roberta": ("masked", SIZES | {"max_position_embeddings": 130, "pad_token_id": 1}),
    "distilbert": ("masked", DISTILBERT),
    "modernbert": ("masked", SIZES | MASKED_TOKENS | {"local_attention": 8, "max_position_embeddings": 128}),
    "bart": ("encoder-decoder", BART_SIZES | {"d_model": D, "vocab_size": VOCAB, "max_position_embeddings": 128}),
}
"""Kind and settings of types that the tests do not have, by type."""
FROM_TESTS = ("llama", "mistral", "mixtral", "qwen2", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "gpt_oss", "llama4", "bert",
              "roberta", "t5")  # fmt: skip
OLD = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
"""The older transformers, and what it needs in other versions than this one."""
# In 4.57, the default attention leaves out the soft cap of Gemma 2's logits.
OPEN_ELSEWHERE = """
import json, sys, torch, transformers

def logits(folder):
    name = json.load(open(folder + "/config.json"))["architectures"][0]
    model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.arange(5, 14)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits.flatten().tolist()

for folder in sys.argv[1:]:
    try:
        print(transformers.__version__, json.dumps({"logits": logits(folder)}))
    except Exception as error:
        print(transformers.__version__, json.dumps({"error": str(error).splitlines()[0]}))
"""


@dataclass(frozen=True)
class Family:
    """A type of models to run."""

    type: str
    kind: str
    settings: dict[str, Any] = field(repr=False)


def families() -> Iterator[Family]:
    """Yield the families of the table, in order."""
    for name in FROM_TESTS:
        model_type, settings = (CAUSAL | MASKED | SEQ2SEQ | UNUSUAL)[name][:2]
        yield Family(model_type, "masked" if name in MASKED else "encoder-decoder" if name in SEQ2SEQ else "causal", settings)
    for model_type, (kind, settings) in MORE.items():
        yield Family(model_type, kind, settings)


def row(family: Family, folder: Path, old: Path | None = None) -> dict[str, str]:
    """Return what laserlm does with a family, by column.

    ``folder`` is empty, and gets the models. ``old`` is the folder where the older transformers is installed.
    """
    model = save_source(family, folder)
    values = {"type": f"`{family.type}`", "kind": family.kind}
    try:
        lm = load(folder / "source", dtype=None)
    except LaserError as error:
        return values | {"loads": f"no: {error}"} | dict.fromkeys(COLUMNS[3:], "")
    values["loads"] = "yes" if not _state_differs(lm, model) else "no: other weights"
    values["matrices"] = _matrices(lm)
    for group in ("attn", "mlp"):
        values[f"`{group}`"] = _group(lm, group)
    reduction = f"{default_matrices(lm.matrices)[0].id}@r4"
    values["saves losslessly"] = _tried(lambda: _saved(lm, reduction, folder))
    values["opens in 4.57"] = "not tried"
    if old is not None:
        values["opens in 4.57"] = open_in_old({folder / "out": reduced_logits(lm, reduction)}, old)[0]
    values["searched"] = _tried(lambda: _searched(lm))
    return values


def save_source(family: Family, folder: Path) -> Any:
    """Save a random model of a family with its tokenizer in ``folder / "source"``, and return it."""
    model = random_model(family.kind, family.type, family.settings)
    model.save_pretrained(folder / "source")
    TOKENIZERS[family.kind]().save_pretrained(folder / "source")
    return model


def install_old(folder: Path) -> None:
    """Install the older transformers into a folder of its own."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--no-deps", "--target", str(folder), *OLD]
    subprocess.run(command, check=True)


def reduced_logits(lm: LanguageModel, reduction: str) -> torch.Tensor:
    """Return the logits of the reduced model in memory, flat."""
    with applied(lm, reduction):
        return _logits(lm.model).flatten()


def open_in_old(expected: dict[Path, torch.Tensor], old: Path) -> list[str]:
    """Open saved models with the older transformers, and say for each whether its logits are the expected ones.

    Args:
        expected: flat logits by folder.
        old: where ``install_old`` has put it.
    """
    command = [sys.executable, "-c", OPEN_ELSEWHERE, *map(str, expected)]
    environment = os.environ | {"PYTHONPATH": str(old)}
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    answers = []
    for line, logits in zip(ran.stdout.strip().splitlines(), expected.values(), strict=True):
        version, _, text = line.partition(" ")
        answer = json.loads(text)
        if "error" in answer:
            answers.append(f"no: {answer['error']}")
            continue
        difference = float((logits - torch.tensor(answer["logits"])).abs().max())
        answers.append(f"yes ({version})" if difference < 1e-4 else f"no: logits differ by {difference:.1g}")
    return answers


def _tried(run: Callable[[], str]) -> str:
    try:
        return run()
    except LaserError as error:
        return f"no: {error}"


def _state_differs(lm: LanguageModel, model: Any) -> bool:
    ours, theirs = lm.model.state_dict(), model.state_dict()
    return ours.keys() != theirs.keys() or any(not torch.equal(ours[name], theirs[name]) for name in ours)


def _matrices(lm: LanguageModel) -> str:
    """Return how many matrices the model has, and whether they are named by the family or by module path."""
    named = "named by path" if any(m.role for m in lm.matrices) else "named"
    return f"{sum(not m.part_of for m in lm.matrices)}, {named}"


def _group(lm: LanguageModel, group: str) -> str:
    """Return the number of matrices in a group, or that it is refused."""
    try:
        return str(len(select(lm.matrices, Layers.parse("all"), group)))
    except MatrixError:
        return "refused"


def _saved(lm: LanguageModel, reduction: str, folder: Path) -> str:
    """Save a reduced model, hold it against its source, and compare its logits with those of the reduced model in memory."""
    saved = save(lm, reduction, folder / "out")
    lost = differences(folder / "source", saved.folder, saved.record["source"])
    if lost:
        return f"no: {lost[0]}"
    name = json.loads((saved.folder / "config.json").read_text())["architectures"][0]
    opened = getattr(transformers, name).from_pretrained(saved.folder).eval()
    with applied(lm, reduction):
        return "yes" if torch.equal(_logits(opened), _logits(lm.model)) else "no: other logits"


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    ids = torch.arange(5, 14)[None]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    logits: torch.Tensor = model(input_ids=ids, **more).logits
    return logits


def _searched(lm: LanguageModel) -> str:
    """Search the whole grid by loss, and return how many candidates there were."""
    answers = ("Paris", "Rome", "Oslo", "Lisbon")
    rows = [Example(str(i), SENTENCES[i % 4].split(" is ")[0] + " is", answers[i % 4], fact=str(i)) for i in range(20)]
    task = Task.of("capitals", rows, scorer="first_token")
    result = search(lm, task, metric="loss", grid="all.all@0.5", candidates=4, first_rung=2, random_candidates=1)
    if result.failed:
        return f"no: {next(iter(result.failed.values()))}"
    return f"yes, {result.candidates} candidates"


def table(rows: list[dict[str, str]]) -> str:
    """Return a Markdown table."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([row[c] for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def page_with(text: str, page: str) -> str:
    """Return a page with another table between the two marks."""
    before, rest = page.split(START)
    return f"{before}{START}\n\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Print the table, or put it into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", action="store_true", help="Install transformers 4.57 for it, and open the models with it.")
    parser.add_argument("--write", action="store_true", help=f"Put the table into {PAGE.name}.")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as library:
        if options.old:
            install_old(Path(library))
        for family in families():
            with tempfile.TemporaryDirectory() as folder:
                rows.append(row(family, Path(folder), Path(library) if options.old else None))
            print(" | ".join(rows[-1].values()), file=sys.stderr)
    text = table(rows)
    print(text)
    if options.write:
        PAGE.write_text(page_with(text, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
