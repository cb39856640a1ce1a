"""The Gauss-Newton diagonal: a stand-in for the Hessian's that is never negative, from first
derivatives of the network.

With y the model's output, J = ∂y/∂W and H_y the Hessian of the loss over y, the Gauss-Newton matrix
Jᵀ H_y J is the Hessian without the curvature of the network itself (Schraudolph 2002). For a
cross-entropy or a squared error it is the Fisher matrix (Martens 2020). With H_y = S Sᵀ
(output_hessian.py), its diagonal is the sum of the squares of the gradients Jᵀ s over the columns s
of S. It is also the mean of the squares of Jᵀ S ξ over random vectors ξ of independent signs.

In this file, "vector" means such a ξ, and "sample" a sample of the data. (The argument `samples`
counts vectors.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..layers.hints import did_you_mean
from ..layers.names import named_modules, plain_name
from ..layers.targets import Targets
from ..measure import LossFn, batch_length
from .averaging import check_tolerance
from .diagnostics import IndependenceCheck, check_independent, several_samples
from .estimate import Estimate
from .layer_outputs import (
    Calls,
    all_shifts,
    by_layer,
    shifted_outputs,
    stack_positions,
    stacked_inputs,
    vector_jacobian_products,
)
from .objective import (
    BatchDiagonals,
    Objective,
    check_chunk_size,
    curvature_targets,
    mean_over_batches,
)
from .outer_products import outer_products
from .output_hessian import HalfHessian, half_hessian, shifted_output
from .sampling import ProbedDiagonal, check_sampling, mean_over_probes, random_signs


def gauss_newton(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    targets: Targets = None,
    *,
    output: str = "",
    samples: int | None = None,
    generator: torch.Generator | None = None,
    tolerance: float | None = None,
    chunk_size: int = 10,
    batch_weight: Callable[[Any], float] = batch_length,
    independent: bool = True,
) -> Estimate:
    """The diagonal of the generalised Gauss-Newton matrix, exact or by random signs.

    Target: diag(Jᵀ H_y J) on `batches`.
    Bias: as a stand-in for the Hessian diagonal, the network's own curvature is missing. It shrinks
    with the residuals, and is zero for a network that is linear in W. Entries are never negative.
    Variance: none if exact. With random vectors ξ, the estimate is unbiased for the target.
    Cost: for each batch a forward pass and four products with H_y; and one backward pass for each
    entry of a sample's output (positions · C), or for each vector. One more backward pass, in the
    first pass over the batches, sees that samples do not interact (two if exact, and for the first
    batch). One vector took 1.8 training passes over 12 batches, see the folder's docstring. Memory:
    `chunk_size` times one backward pass.

    Args:
        model, loss_fn, batches, targets, batch_weight, independent: as for
            `exact_hessian_diagonal`.
        output: the name of the module whose output tensor, (…, C), is y; "" is the model itself.
            For a transformers model that computes the loss itself, name its head, such as
            "classifier" or "lm_head". The loss must be convex in y and a sum over its rows.
            Cross-entropies with softmax, squared errors and binary cross-entropies are recognised,
            at any C; another loss may have up to 512 columns.
        samples: None: exact. Otherwise the number of random vectors per batch, at most; they need
            `generator`.
        generator: draws the signs, as for `hutchinson_outputs`.
        tolerance: with random vectors, as for `hutchinson_outputs`. If exact, stop before the end
            of the batches, as for `empirical_fisher`.
        chunk_size: backward passes taken at once, and vectors per pass over the batches. 1 takes
            them one by one, for models that torch.vmap cannot handle.

    Returns: {name: (d_out, d_in)}, with standard errors over batches if exact, and otherwise over
    the vectors, which an `Estimate` calls "probes".

    Raises:
        ValueError: as for `exact_hessian_diagonal`; or y is not a tensor or comes more than once in
            a loss; or the loss is not convex in y, mixes its rows, or depends on a layer by another
            way than y.
        TypeError: `samples` is given without a torch.Generator.

    Source: Schraudolph 2002; Martens 2020 (arXiv 1412.1193).

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
    >>> x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> h = gauss_newton(model, lambda model, x: model(x).square().mean(), [x])
    >>> h["0"].tolist()  # the model is linear in W: the Hessian diagonal itself
    [[10.0, 20.0]]
    """
    check_chunk_size(chunk_size)
    layers = curvature_targets(model, targets, second_derivatives=False)
    check_tolerance(tolerance)
    head = _output_module(model, output)
    objective = Objective(model, loss_fn, batches, layers, batch_weight)

    def exact_diagonals(batch: Any) -> BatchDiagonals:
        forward = _forward(objective, head, output, batch, independent)
        _check_all_through_output(forward)
        if independent:
            check_independent([forward.y], all_shifts(forward.calls))
        return _exact_diagonals(forward, chunk_size)

    if samples is None:
        return mean_over_batches(objective, exact_diagonals, tolerance)

    check_sampling(samples, tolerance, generator)
    assert generator is not None
    independence = IndependenceCheck()

    def probe_batch(
        batch: Any, count: int, first_pass: bool
    ) -> Mapping[str, ProbedDiagonal | None]:
        forward = _forward(objective, head, output, batch, independent)
        if first_pass:
            _check_all_through_output(forward)
        shifts = all_shifts(forward.calls)
        S_xi = forward.half(random_signs(forward.y, count, generator))
        gradients = vector_jacobian_products([forward.y], shifts, [S_xi])
        if first_pass and independent:
            independence.of_batch([forward.y], shifts, [S_xi], gradients)
        return _squares(forward, gradients)

    return mean_over_probes(
        objective, probe_batch, samples=samples, tolerance=tolerance, chunk_size=chunk_size
    )


class _Forward(NamedTuple):
    """One forward pass of a batch.

    n is the number of samples if they are taken to be independent, and 1 otherwise.
    """

    loss: Tensor
    calls: Calls
    output_shift: Tensor  # zeros, of the output's own shape
    y: Tensor  # (n, T, C), the output
    half: HalfHessian  # ξ → S ξ
    independent: bool


def _output_module(model: nn.Module, output: str) -> nn.Module:
    modules = dict(named_modules(model))
    name = plain_name(output, modules)
    if name not in modules:
        raise ValueError(f"output={output!r} names no module: {did_you_mean(output, modules)}")
    return modules[name]


def _forward(
    objective: Objective, head: nn.Module, output: str, batch: Any, independent: bool
) -> _Forward:
    with shifted_outputs(objective.layers) as calls, shifted_output(head) as output_calls:
        loss = objective.loss(batch)
    if len(output_calls) != 1:
        raise ValueError(
            f"the output {output!r} came {len(output_calls)} times in one loss, but must come once"
        )
    (output_call,) = output_calls
    y = stack_positions([_with_columns(output_call.x, calls)], independent)
    half = half_hessian(loss, output_call.shift, y.detach())
    return _Forward(loss, calls, output_call.shift, y, half, independent)


def _with_columns(y: Tensor, calls: Calls) -> Tensor:
    """An output (n,), one number per sample, becomes (n, 1); a single sample's output (C,), (1,
    C)."""
    if y.ndim == 0:
        raise ValueError(
            "the model's output is a single number: name the head whose output the loss takes, "
            "output=…"
        )
    if y.ndim > 1:
        return y
    return y[:, None] if several_samples(all_shifts(calls)) else y[None]


def _check_all_through_output(forward: _Forward) -> None:
    """Raise ValueError if the loss depends on a layer not only through y.

    If all ways lead through y, the chain rule gives ∂L/∂z = (∂y/∂z)ᵀ ∂L/∂y. The loss was taken with
    y as data, so a derivative that is left takes another way.
    """
    shifts = all_shifts(forward.calls)
    if not shifts:
        return
    direct = torch.autograd.grad(forward.loss, shifts, retain_graph=True, allow_unused=True)
    if all(gradient is None for gradient in direct):
        return
    (of_output,) = torch.autograd.grad(
        forward.loss, [forward.output_shift], retain_graph=True, materialize_grads=True
    )
    through_output = vector_jacobian_products(
        [forward.y], shifts, [of_output.view(1, *forward.y.shape)]
    )
    half_of_the_digits = torch.finfo(forward.y.dtype).eps ** 0.5
    for gradient, through in zip(direct, through_output, strict=True):
        if gradient is None:
            continue
        allowed = half_of_the_digits * float((gradient + through[0]).abs().max())
        if float(gradient.abs().max()) > allowed:
            raise ValueError(
                "the loss depends on a layer by another way than the output (an auxiliary loss, a "
                "second head), which gauss_newton cannot see: name an output= through which all "
                "of it passes, or use hutchinson_outputs"
            )


def _exact_diagonals(forward: _Forward, chunk_size: int) -> BatchDiagonals:
    """Σ of the squared gradients over all columns of S."""
    sums: dict[str, Tensor | None] = dict.fromkeys(forward.calls)
    for xi in _unit_vectors(forward.y, chunk_size):
        gradients = vector_jacobian_products(
            [forward.y], all_shifts(forward.calls), [forward.half(xi)]
        )
        for name, squares in _squares(forward, gradients).items():
            if squares is not None:
                before = sums[name]
                sums[name] = squares.total if before is None else before + squares.total
    return sums


def _unit_vectors(y: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """Each entry of a sample's y, (T, C), for all samples at once: chunks of (K, n, T, C)."""
    n, T, C = y.shape
    for start in range(0, T * C, chunk_size):
        index = torch.arange(start, min(start + chunk_size, T * C), device=y.device)
        xi = y.new_zeros(len(index), n, T * C)
        xi[torch.arange(len(index), device=index.device), :, index] = 1
        yield xi.view(-1, n, T, C)


def _squares(forward: _Forward, per_call: list[Tensor]) -> dict[str, ProbedDiagonal | None]:
    """The squared gradients by W, from K gradients by z: one tensor per call, (K, …, d_out)."""
    gradients = by_layer(per_call, forward.calls)
    squares: dict[str, ProbedDiagonal | None] = dict.fromkeys(forward.calls)
    for name, layer_calls in forward.calls.items():
        if layer_calls:
            g = stack_positions(gradients[name], forward.independent, batched=True)
            x = stacked_inputs(layer_calls, forward.independent)
            squares[name] = ProbedDiagonal(*outer_products(g, g, x, x))
    return squares
