"""Diagonals of the loss's Hessian with respect to the weights of linear layers, and their stand-ins.

Every estimator has one call, f(model, loss_fn, batches, targets, …) -> {name: Tensor}, so that each can be the
`curvature` of SensitivityLoRA. A tensor has the shape of the weight, (d_out, d_in); (d_in,) stands for a diagonal that
all rows share.
"""

from .estimate import Estimate
from .fisher import empirical_fisher
from .gauss_newton import gauss_newton
from .hessian import exact_hessian_diagonal, hessian_diagonal_reference
from .hutchinson import hutchinson_outputs, hutchinson_weights
from .input_moment import input_second_moment

__all__ = [
    "Estimate",
    "empirical_fisher",
    "exact_hessian_diagonal",
    "gauss_newton",
    "hessian_diagonal_reference",
    "hutchinson_outputs",
    "hutchinson_weights",
    "input_second_moment",
]
