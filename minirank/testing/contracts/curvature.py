"""The Hessian diagonal and its stand-ins: Gauss-Newton, the Fisher, the input second moment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ... import reference
from ..case import Arguments, Contract
from . import curvature_models as toys
from . import curvature_twins as twins
from .hutchinson import HUTCHINSON
from .input_moment import INPUT_MOMENT

HESSIAN = "∂²L/∂W_ij² of the mean loss over all samples"
GAUSS_NEWTON = "diag(Jᵀ H_y J)"
FISHER = "the mean over samples of (∂L_i/∂W)²"

# Of the Hessian, Gauss-Newton and the Fisher. The terms: rows · outputs, twice for two layers.
COMMON: dict[str, tuple[float, str, Callable[[], Arguments]]] = {
    "one weight": (4, "", toys.one_weight),
    "a linear classifier": (12, "", partial(toys.linear, 3)),
    "one sample": (8, "", partial(toys.linear, 1)),
    "no bias": (12, "", partial(toys.linear, 3, bias=False)),
    "two layers": (24, "", partial(toys.regression, 3)),
    "one target of two": (24, "targets", toys.one_of_two),
    "targets in another order": (24, "targets", toys.other_order),
    "rectified": (40, "", toys.rectified),
    "uneven batches": (40, "a mean over all samples", partial(toys.regression, 3, 1, 2)),
    "batches of one tensor": (40, "batches", toys.plain_tensor),
    "views and strides": (48, "any strides", toys.strided),
    "train mode": (32, toys.EVAL, partial(toys.train_mode, dropout=False)),
    "dropout and batch statistics": (32, toys.EVAL, partial(toys.train_mode, dropout=True)),
    "frozen parameters": (24, toys.UNTOUCHED, toys.frozen),
    "hooks": (24, toys.UNTOUCHED, toys.hooked),
    "output overwritten": (24, "any model", toys.overwritten),
    "names that begin alike": (88, "targets", toys.deep),
    "a layer called twice": (
        48,
        "each target called at least once",
        partial(toys.two_calls, False),
    ),
    "a layer on its own output": (
        48,
        "each target called at least once",
        partial(toys.two_calls, True),
    ),
    "positions": (64, "the terms between positions", toys.positions),
    "positions as rows": (64, "the terms between positions", partial(toys.positions, flat=True)),
    "attention": (96, "the terms between positions", toys.attention),
    "padding in the loss": (96, "dict batches", toys.padded),
    "many samples": (288, "a mean over all samples", toys.many_samples),
    "wider than a chunk": (60, "every entry", toys.wide),
    "no curvature": (12, "", toys.no_curvature),
}

CALLED_BY_NAME = {"a model that computes its loss": (24.0, "dict batches", toys.model_with_loss)}

OUTPUTS: dict[str, tuple[float, str, Callable[[], Arguments]]] = {
    f"{loss.__name__.replace('_', ' ')} of {labels}, {shape}": (
        48.0,
        "",
        partial(toys.of_outputs, loss, labels, *leading, d_out=C),
    )
    for loss, labels, C in (
        (toys.squared_error, "numbers", 3),
        (toys.cross_entropy, "classes", 4),
        (toys.cross_entropy, "probabilities", 3),
        (toys.binary_cross_entropy, "yes or no", 2),
        (toys.binary_cross_entropy, "yes or no", 1),
    )
    for leading, shape in (((3,), f"(n, {C})"), ((3, 2), f"(n, T, {C})"))
}


CONTRACTS = (
    INPUT_MOMENT,
    Contract(
        "hessian_diagonal",
        f"h = {HESSIAN}",
        reference.hessian_diagonal,
        toys.cases_of(HESSIAN, COMMON | CALLED_BY_NAME),
        twins.HESSIAN,
    ),
    Contract(
        "gauss_newton_diagonal",
        f"Schraudolph 2002; Martens, arXiv 1412.1193: h = {GAUSS_NEWTON}",
        reference.gauss_newton_diagonal,
        toys.cases_of(GAUSS_NEWTON, COMMON | OUTPUTS),
        twins.GAUSS_NEWTON,
    ),
    Contract(
        "empirical_fisher",
        f"Kunstner, Balles and Hennig, arXiv 1905.12558: h = {FISHER}",
        reference.empirical_fisher,
        toys.cases_of(FISHER, COMMON | CALLED_BY_NAME),
        twins.FISHER,
    ),
    HUTCHINSON,
)
