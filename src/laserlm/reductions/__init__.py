"""Reductions, interventions and grids as text: parse, print, canonical form.

A reduction is ``[STACK.]LAYERS.MATRIX@SIZE[:bottom][:reference][:splitK]``:

- LAYERS: ``27``, ``20-27`` (both ends included), ``all``, ``top4`` (the last four blocks);
- MATRIX: ``q_proj k_proj v_proj out_proj fc_in fc_up fc_out``, a group ``attn mlp all``, or any name that
  ``laser matrices MODEL`` lists;
- SIZE: ``0.01`` (kept fraction rho of the singular values), ``r40`` (rank), ``drop0,3,17-20``: all components except
  these, or ``scale3=0.4,17-20=1.25``: factors of the singular values of these. Components are numbered from 0 by falling
  singular value;
- ``:bottom`` keeps the smallest singular values instead of the largest;
- ``:reference`` uses the randomised decomposition of the published code instead of the exact one;
- ``:split4`` cuts the rows into four equal blocks and reduces each block separately to SIZE;
- STACK: required only if the model has several stacks, as in ``encoder.3.fc_in@0.1``.

An intervention is a set of reductions joined by ``+``. The empty set is the unchanged model. A grid has the same form
with several sizes, ``27-29.mlp@0.05,0.5``, and stands for one candidate per matrix and size. ``@FILE`` stands for the
reductions in a JSON file where ``Intervention.read`` reads the text: on the command line and in ``applied`` and ``save``.
This package uses no model and does not import torch.
"""

from laserlm.reductions.grid import FINE_RHO, Grid, from_rate
from laserlm.reductions.parts import Components, Layers, Size, Strengths
from laserlm.reductions.reduction import GROUPS, Intervention, Keep, Method, Reduction, short_form

__all__ = [
    "FINE_RHO",
    "GROUPS",
    "Components",
    "Grid",
    "Intervention",
    "Keep",
    "Layers",
    "Method",
    "Reduction",
    "Size",
    "Strengths",
    "from_rate",
    "short_form",
]
