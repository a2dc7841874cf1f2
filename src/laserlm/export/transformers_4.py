"""Settings of a saved folder under the names that transformers 4 knows, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from laserlm.export.source_check import tokenizer_config_for_transformers_4

EXPERTS_RENAMED_IN_5 = {"qwen3_moe", "qwen3_omni_moe_text", "qwen3_vl_moe_text"}
"""Types whose config names the number of experts ``num_experts`` in transformers 4, and ``num_local_experts`` in 5."""
ROPE_TYPES_IN_4 = {"default", "linear", "dynamic", "yarn", "longrope", "llama3"}
"""Kinds of rotary positions of transformers 4.57; an image tower has others."""


def adapt_tokenizer(folder: Path) -> None:
    """Write what transformers 4 cannot read of a tokenizer's config under the names that both versions know."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}  # some tokenizers write no config
    adapted = tokenizer_config_for_transformers_4(config)
    if adapted != config:
        file.write_text(json.dumps(adapted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def config_for_transformers_4(config: Any) -> Any:
    """Return a config, and its nested configs, with some settings also under their names in transformers 4.

    transformers 4 ignores ``rope_parameters``. Without the old names it would use the defaults and raise no error.
    """
    if not isinstance(config, dict):
        return config
    config = {name: config_for_transformers_4(value) for name, value in config.items()}
    if config.get("model_type") in EXPERTS_RENAMED_IN_5 and "num_local_experts" in config:
        config = {"num_experts": config["num_local_experts"]} | config
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    of_type = {name: value for name, value in rope.items() if isinstance(value, dict) and "rope_theta" in value}
    main = of_type.get("full_attention", rope)
    if "rope_theta" not in main or main.get("rope_type", "default") not in ROPE_TYPES_IN_4:
        return config
    old_names = {name: main[name] for name in ("rope_theta", "partial_rotary_factor") if name in main}
    scaling = {name: value for name, value in main.items() if name not in old_names}
    if config.get("model_type") in ("gpt_neox", "gpt_neox_japanese"):
        old_names = {"rotary_emb_base": main["rope_theta"], "rotary_pct": main.get("partial_rotary_factor", 1.0)}
    if "sliding_attention" in of_type:  # Gemma 3's name and ModernBERT's
        local = of_type["sliding_attention"]["rope_theta"]
        old_names |= {"rope_local_base_freq": local, "local_rope_theta": local, "global_rope_theta": main["rope_theta"]}
    if scaling != {"rope_type": "default"}:
        old_names["rope_scaling"] = scaling
    return old_names | config
