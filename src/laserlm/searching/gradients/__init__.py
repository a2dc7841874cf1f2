"""The gradient of a loss along the singular components of weight matrices, row by row.

With W = left @ right over k components, X what goes into the matrix and D the gradient of the loss by what comes out, the
share of component i in W's gradient is c_i = sum over tokens of (D left)_i (X right^T)_i, which is sigma_i times the
derivative of the loss by sigma_i. No gradient of a whole matrix is made where the matrix belongs to a linear layer.

The model is run once, keeping what goes into each block. Then, from the last block to the first, each is run again with
its gradient (``blocks.py``). What is in memory at a time is the boundaries between the blocks, for a chunk of rows, and one
block's activations, gradients and decompositions. A model whose blocks hand on more than their outputs, such as keys and
values that later blocks share, is run with its whole graph instead. Which of the two is right is read off the graph of one
row (``inspection.py``).
"""

from laserlm.searching.gradients.components import Coefficients, ComponentGradients, Decomposed

__all__ = ["Coefficients", "ComponentGradients", "Decomposed"]
