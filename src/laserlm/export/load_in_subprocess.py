"""Load a saved model and print what it computes, with transformers alone: run as a script in a process of its own.

A dense folder is loaded without laserlm, unless the model is one of its lab; a factored one after ``import laserlm`` and in
no other way. Nothing of laserlm is imported at the head of this file, so that running it proves what a stranger would find.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

TOKENS = 16
COLUMNS = 32


def fingerprint(model: Any) -> list[list[float]] | None:
    """Return some outputs of a model on a fixed sequence of tokens, (T, 32), or None where it takes no tokens.

    They are logits over evenly spaced tokens of the vocabulary, or hidden features where the model has no head.
    """
    if model.main_input_name != "input_ids":
        return None
    ids = torch.tensor([[(7919 * i + 13) % model.config.get_text_config().vocab_size for i in range(TOKENS)]])
    ids = ids.to(model.device)
    given = {"input_ids": ids} | ({"decoder_input_ids": ids[:, : TOKENS // 2]} if model.config.is_encoder_decoder else {})
    with torch.inference_mode():
        out = model(**given)
    values = out.logits if "logits" in out else out.last_hidden_state
    columns = torch.linspace(0, values.shape[-1] - 1, COLUMNS).long()
    found: list[list[float]] = values[0, :, columns.to(values.device)].float().tolist()  # (T, 32)
    return found


def main() -> None:
    """Print what the model in the folder named on the command line computes, and what its loading told."""
    folder = Path(sys.argv[1])
    record = json.loads((folder / "laser.json").read_text(encoding="utf-8"))
    # Records written before "imports" was kept are of models that transformers knows.
    needed = record.get("imports", "laserlm" if record["form"] == "factored" else None)
    if needed is not None:
        importlib.import_module(needed)
    import transformers

    loader = getattr(transformers, record["loader"])
    model, info = loader.from_pretrained(folder, dtype="auto", output_loading_info=True)
    told = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    print(json.dumps({"fingerprint": fingerprint(model.eval()), "imported": "laserlm" in sys.modules, **told}))


if __name__ == "__main__":
    main()
