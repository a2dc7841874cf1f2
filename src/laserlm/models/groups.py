"""Find the group (``attn``, ``mlp``) of a matrix that is named by its module path."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

Role = Literal["attn", "mlp", "mixer", "other", "unknown"]
"""What a matrix is part of.

``attn``: attention, also linear and cross-attention. ``mlp``: the MLP, also that of experts. ``mixer``: what takes the place of
attention without being attention, such as a state-space layer. ``other``: a router, or a small matrix next to the two.
"""

ROUTERS = re.compile(r"router(_\w+)?|(shared_expert_)?gate|gating")
"""A module that chooses experts, if the model has experts: in a model without them, ``gate`` is a part of the MLP."""
PATTERNS: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("other", re.compile(r"\w*norm|altup|laurel|per_layer_\w+|\w*adapter\w*")),
    ("attn", re.compile(r"\w*(attn|attention)\w*|\w+_att")),
    ("mlp", re.compile(r"\w*(mlp|ffn|feed_?forward|densereludense|experts?|moe)\w*|ff")),
    ("mixer", re.compile(r"\w*(mamba|ssm|conv|lstm|rwkv|rg_lru|recurrent|temporal|retention)\w*")),
)
"""The first component of a path that fits one of the patterns decides."""
DIRECT: tuple[tuple[Role, re.Pattern[str]], ...] = (
    ("attn", re.compile(r"([qkvo]|out)_(proj|lin)")),
    ("mlp", re.compile(r"(fc|lin|linear|linear_fc)_?[12]|(intermediate|output)\.dense")),
)
"""Paths of matrices that have no such component."""


def role_of(path: str, *, has_experts: bool) -> Role:
    """Return what a matrix is part of, by the path of its module below its block, such as ``linear_attn.in_proj_qkv``.

    Args:
        path: path of the module or parameter below the block.
        has_experts: whether a block of the model has experts.
    """
    components = path.lower().removesuffix(".weight").split(".")
    for i, component in enumerate(components):
        for role, pattern in PATTERNS:
            if pattern.fullmatch(component):
                is_router = has_experts and any(ROUTERS.fullmatch(c) for c in components[i:])
                return "other" if is_router else role
    return next((role for role, pattern in DIRECT if pattern.fullmatch(".".join(components))), "unknown")


def unclear(group: str, roles: Iterable[tuple[str, Role]]) -> list[str]:
    """Return the names of matrices that may belong to a group: it would leave them out, so it is not used.

    Args:
        group: ``attn`` or ``mlp``.
        roles: name and role of every matrix of the blocks.
    """
    doubtful = {"unknown", "mixer"} if group == "attn" else {"unknown"}
    return list(dict.fromkeys(name for name, role in roles if role in doubtful))
