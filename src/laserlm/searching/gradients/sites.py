"""Where a model uses the weights of matrices, and how their gradients are read there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from laserlm.models.language_model import LanguageModel
from laserlm.models.matrices import Matrix

Kind = Literal["linear", "experts", "other"]


@dataclass(frozen=True)
class Site:
    """A module that holds weights to watch: matrices by the name of the parameter, and how their gradients are read."""

    module: nn.Module
    by_parameter: Mapping[str, tuple[Matrix, ...]]
    kind: Kind

    @property
    def matrices(self) -> list[Matrix]:
        """The matrices that are read at the site."""
        return [m for of in self.by_parameter.values() for m in of]


def find_sites(lm: LanguageModel, matrices: Sequence[Matrix]) -> list[Site]:
    """Return all modules that hold the parameters of some matrices; several modules may share one."""
    by_id: dict[int, list[Matrix]] = {}
    for m in matrices:
        by_id.setdefault(id(lm.model.get_parameter(m.path)), []).append(m)
    sites: list[Site] = []
    for module in lm.model.modules():
        own = {name: tuple(by_id[id(p)]) for name, p in module.named_parameters(recurse=False) if id(p) in by_id}
        if own:
            sites.append(Site(module, own, _kind(module)))
    return _as_other(sites, [m for site in sites if site.kind == "other" for m in site.matrices])


def _kind(module: nn.Module) -> Kind:
    if type(module).forward in (nn.Linear.forward, Conv1D.forward):
        return "linear"
    # The names that transformers gives the properties of stacked experts which it can run in several ways.
    properties = ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate", "down_proj")
    return "experts" if all(hasattr(module, name) for name in properties) else "other"


def _as_other(sites: Sequence[Site], matrices: Sequence[Matrix]) -> list[Site]:
    """Return sites in which these matrices are read off their parameters' gradients, wherever they are used."""
    paths = {m.path for m in matrices}
    return [s if paths.isdisjoint(m.path for m in s.matrices) else Site(s.module, s.by_parameter, "other") for s in sites]


def without_uncalled(sites: Sequence[Site], called: set[int]) -> list[Site]:
    """Return sites in which no linear layer is expected to run that another module may use the weight of."""
    unused = [m for site in sites if site.kind == "linear" and id(site.module) not in called for m in site.matrices]
    return _as_other(sites, unused)


def sites_within(block: nn.Module, sites: Sequence[Site]) -> list[Site]:
    """Return the sites whose module is in a block."""
    modules = {id(module) for module in block.modules()}
    return [site for site in sites if id(site.module) in modules]
