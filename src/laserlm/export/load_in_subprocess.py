"""Load a saved model and print its outputs; run as a script in its own process.

A dense folder is loaded without laserlm, unless it holds a model of laserlm's lab. A factored folder is loaded after a plain
``import laserlm``. This file imports nothing of laserlm at its top, so that it loads the model as any user would.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

N_TOKENS = 16
N_COLUMNS = 32


def fingerprint(model: Any) -> list[list[float]] | None:
    """Return some outputs of a model on a fixed sequence of tokens, (T, 32), or None if it takes no tokens.

    The outputs are the logits of evenly spaced tokens of the vocabulary, or hidden features of a model without a head.
    """
    if model.main_input_name != "input_ids":
        return None
    ids = torch.tensor([[(7919 * i + 13) % model.config.get_text_config().vocab_size for i in range(N_TOKENS)]])
    ids = ids.to(model.device)
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids[:, : N_TOKENS // 2]} if model.config.is_encoder_decoder else {})
    with torch.inference_mode():
        out = model(**inputs)
    values = out.logits if "logits" in out else out.last_hidden_state
    columns = torch.linspace(0, values.shape[-1] - 1, N_COLUMNS).long()
    sample: list[list[float]] = values[0, :, columns.to(values.device)].float().tolist()  # (T, 32)
    return sample


def main() -> None:
    """Print the outputs and the loading report of the model in the folder named on the command line, as JSON."""
    folder = Path(sys.argv[1])
    record = json.loads((folder / "laser.json").read_text(encoding="utf-8"))
    # Records of laserlm before "imports" existed are of models that transformers knows.
    module = record.get("imports", "laserlm" if record["form"] == "factored" else None)
    if module is not None:
        importlib.import_module(module)
    import transformers

    loader = getattr(transformers, record["loader"])
    model, info = loader.from_pretrained(folder, dtype="auto", output_loading_info=True)
    report = {name: sorted(map(str, info[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    print(json.dumps({"fingerprint": fingerprint(model.eval()), "imported": "laserlm" in sys.modules, **report}))


if __name__ == "__main__":
    main()
