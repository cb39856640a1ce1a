"""Contracts about models and callables, told as plain data for other languages.

A port cannot be given a PyTorch model in a file. It can be given what the model does: the inputs of
its layers, its Jacobians, the gradient of each sample, the worth of each coalition. Each function
here takes those, and is the part of a reference function that comes after them. `TABULATED` makes
the arguments from the cases of that reference function. `MLP` is a model of its own, small enough
to be told in full.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..reference.fisher import samples_of
from ..reference.gauss_newton import Constant, jacobian, length
from ..reference.hessian import gradients, mean_loss
from .case import Arguments, CaseSpec, Contract, Implementation, call

Diagonals = dict[str, Tensor]  # {name of a layer: (d_out, d_in)}


# ---- the functions ------------------------------------------------------------------------------


def shapley_values_from_worths(worths: Tensor) -> Tensor:
    """φ (n,) of n players. worths (2^n,): entry Σ 2^i over its players i is a coalition's worth."""
    n = len(worths).bit_length() - 1

    def value(mask: Tensor) -> float:
        return float(worths[sum(2**i for i in range(n) if mask[i])])

    return reference.exact_shapley_values(value, n)


def shapley_sensitivity_from_gradients(
    params: dict[str, dict[str, Tensor]],
    masks: Tensor,
    gradients: list[dict[str, dict[str, Tensor]]],
    samples: list[int],
) -> dict[str, Tensor]:
    """{name: (r,)}, the scores of ShapLoRA.

    Args:
        params: {name: gate (r,), P (d_out, r), Q (r, d_in)}.
        masks: bool (K, Σ r). The gates outside a coalition are zero in it (Eq 6).
        gradients: [batch]: {name: gate (K, r), P (K, d_out, r), Q (K, r, d_in)}, the gradients of
            the batch's mean loss in each coalition.
        samples: how many samples each batch has.
    """
    ranks = [len(own["gate"]) for own in params.values()]
    scores = {name: torch.zeros_like(own["gate"]) for name, own in params.items()}
    for k, mask in enumerate(masks):
        for (name, own), members in zip(params.items(), mask.split(ranks), strict=True):
            gate = torch.where(members, own["gate"], torch.zeros_like(own["gate"]))
            mean = {}
            for key in ("gate", "P", "Q"):
                parts = [n * g[name][key][k] for n, g in zip(samples, gradients, strict=True)]
                mean[key] = torch.stack(parts).sum(0) / sum(samples)
            score = reference.san(gate, own["P"], own["Q"], mean["gate"], mean["P"], mean["Q"])
            scores[name] += score / len(masks)
    return scores


def input_second_moment_from_inputs(
    inputs: dict[str, list[list[Tensor]]], masks: list[Tensor | None]
) -> dict[str, Tensor]:
    """{name: (d_in,)}, the mean of x_j² over the tokens of all batches and calls but padding.

    Args:
        inputs: {name: [batch][call]}: x (…, d_in). Padding may hold anything, NaN too.
        masks: the attention mask (n, T) of each batch, or None. Zero is padding. A mask says
            nothing about an input whose shape is not (n, T, d_in).
    """
    result = {}
    for name, batches in inputs.items():
        tokens = []
        for calls, mask in zip(batches, masks, strict=True):
            for x in calls:
                padded = mask is not None and x.shape[:-1] == mask.shape
                tokens.append(x[mask != 0] if padded else x.reshape(-1, x.shape[-1]))
        result[name] = torch.cat(tokens).double().square().mean(0)
    return result


def gauss_newton_from_jacobians(
    jacobians: dict[str, list[Tensor]], loss_hessians: list[Tensor], samples: list[int]
) -> Diagonals:
    """{name: diag(Jᵀ H_y J)}, a mean over all samples.

    Args:
        jacobians: {name: [batch]}: J (M, d_out, d_in) of the batch's M outputs over the weight.
        loss_hessians: [batch]: H_y (M, M) of the batch's mean loss over its outputs.
        samples: how many samples each batch has.
    """
    result = {}
    for name, of_batches in jacobians.items():
        total = torch.zeros_like(of_batches[0][0])
        for J, H_y, n in zip(of_batches, loss_hessians, samples, strict=True):
            total = total + n * torch.einsum("aij,ab,bij->ij", J, H_y, J)
        result[name] = total / sum(samples)
    return result


def empirical_fisher_from_gradients(gradients: Diagonals) -> Diagonals:
    """{name: (d_out, d_in)} of {name: (samples, d_out, d_in)}, gradients of each sample's loss."""
    return {name: g.square().mean(0) for name, g in gradients.items()}


def curvature_of_mlp(
    weights: list[Tensor],
    biases: list[Tensor],
    inputs: list[Tensor],
    labels: list[Tensor],
    probes: list[list[Tensor]],
) -> dict[str, Diagonals]:
    """Every diagonal of h ↦ W h + b, tanh, W h + b, … (no tanh at the end), layer by layer.

    The loss is the mean cross-entropy (natural logarithm) over all samples of all batches.

    Args:
        weights, biases: of the layers "0", "1", …: (d_out, d_in), (d_out,).
        inputs, labels: of each batch: (n, d_in), and int64 (n,).
        probes: v of each sample and layer: the estimate is the mean of v ⊙ H v, where H is the
            Hessian over the weights of all layers together.
    """
    layers = {str(i): nn.Linear(*W.T.shape) for i, W in enumerate(weights)}
    model = TanhMLP(layers).to(weights[0].dtype)
    with torch.no_grad():
        for layer, W, b in zip(layers.values(), weights, biases, strict=True):
            layer.weight.copy_(W)
            layer.bias.copy_(b)
    batches = list(zip(inputs, labels, strict=True))
    targets = [f"layers.{name}" for name in layers]
    task = (model, cross_entropy, batches, targets)
    found = {
        "input_second_moment": reference.input_second_moment(*task),
        "hessian_diagonal": reference.hessian_diagonal(*task),
        "gauss_newton_diagonal": reference.gauss_newton_diagonal(*task),
        "empirical_fisher": reference.empirical_fisher(*task),
        "hutchinson": hutchinson_from_probes(task, probes),
    }
    short = {target: target.removeprefix("layers.") for target in targets}
    return {
        kind: {short[target]: value.detach() for target, value in own.items()}
        for kind, own in found.items()
    }


def hutchinson_from_probes(task: Any, probes: list[list[Tensor]]) -> Diagonals:
    """The mean of v ⊙ H v over the given probes."""
    loss, weights = mean_loss(*task)
    Ws = list(weights.values())
    g = gradients(loss, Ws, twice=True)
    diagonals = [torch.zeros_like(W) for W in Ws]
    for v in probes:
        g_v = torch.stack([(a * b).sum() for a, b in zip(g, v, strict=True)]).sum()
        for h, a, Hv in zip(diagonals, v, gradients(g_v, Ws), strict=True):
            h += a * Hv / len(probes)
    return dict(zip(weights, diagonals, strict=True))


class TanhMLP(nn.Module):
    """Linear layers with tanh between them."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(dict(layers))

    def forward(self, h: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers.values()):
            h = layer(h.tanh() if i else h)
        return h


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


# ---- their arguments, from the cases of the reference functions ---------------------------------


def worths(value: Callable[[Tensor], float], n: int) -> Arguments:
    coalitions = [torch.tensor([bool(k >> i & 1) for i in range(n)]) for k in range(2**n)]
    table = [float(value(mask)) for mask in coalitions]
    return Arguments((torch.tensor(table, dtype=torch.float64),))


def coalition_gradients(
    loss: Callable[..., Tensor], params: Any, batches: Any, masks: Tensor
) -> Arguments:
    batches = list(batches)
    ranks = [len(own["gate"]) for own in params.values()]
    plain = {name: {key: own[key].detach() for key in own} for name, own in params.items()}
    table = []
    for batch in batches:
        rows = []
        for mask in masks:
            S = {name: {key: w.clone() for key, w in own.items()} for name, own in plain.items()}
            for own, members in zip(S.values(), mask.split(ranks), strict=True):
                own["gate"][~members] = 0.0
            leaves = [w.requires_grad_() for own in S.values() for w in own.values()]
            rows.append(torch.autograd.grad(loss(S, batch), leaves, materialize_grads=True))
        columns = map(torch.stack, zip(*rows, strict=True))
        table.append({name: {key: next(columns) for key in own} for name, own in plain.items()})
    return Arguments((plain, masks, table, [length(batch) for batch in batches]))


def layer_inputs(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Any, targets: list[str]
) -> Arguments:
    inputs: dict[str, list[list[Tensor]]] = {name: [] for name in targets}
    masks: list[Tensor | None] = []
    model = model.eval()  # these arguments are made for this call alone

    def observe(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        inputs[name][-1].append(given[0].detach())

    for name in targets:
        model.get_submodule(name).register_forward_pre_hook(partial(observe, name))
    for batch in batches:
        for calls in inputs.values():
            calls.append([])
        masks.append(batch.get("attention_mask") if isinstance(batch, Mapping) else None)
        with torch.no_grad():
            loss_fn(model, batch)
    return Arguments((inputs, masks))


@torch.enable_grad()
def output_jacobians(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Any, targets: list[str]
) -> Arguments:
    model = model.eval().requires_grad_()
    outputs: list[Tensor] = []
    model.register_forward_hook(lambda module, inputs, y: outputs.append(y))
    jacobians: dict[str, list[Tensor]] = {name: [] for name in targets}
    loss_hessians, samples = [], []
    for batch in batches:
        loss_fn(model, batch)
        y = outputs.pop()
        y_alone = y.detach().requires_grad_()
        (slope,) = gradients(loss_fn(Constant(y_alone), batch), [y_alone], twice=True)
        loss_hessians.append(jacobian(slope, y_alone))
        samples.append(length(batch))
        for name, own in jacobians.items():
            W = model.get_submodule(name).get_parameter("weight")
            own.append(jacobian(y, W).view(-1, *W.shape))
    return Arguments((jacobians, loss_hessians, samples))


@torch.enable_grad()
def sample_gradients(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: Any, targets: list[str]
) -> Arguments:
    model = model.eval().requires_grad_()
    weights = [model.get_submodule(name).get_parameter("weight") for name in targets]
    rows = [
        torch.autograd.grad(loss_fn(model, sample), weights, materialize_grads=True)
        for batch in batches
        for sample in samples_of(batch)
    ]
    columns = map(torch.stack, zip(*rows, strict=True))
    return Arguments((dict(zip(targets, columns, strict=True)),))


# ---- contracts ----------------------------------------------------------------------------------


def alike_fisher(gradients: Diagonals) -> Diagonals:
    return {name: g.mean(0).square() for name, g in gradients.items()}


def alike(function: Implementation, samples: int) -> Implementation:
    """`function` with equal weights for all batches; `samples` is the place of that argument."""

    def twin(*args: Any) -> Any:
        return function(*args[:samples], [1] * len(args[samples]), *args[samples + 1 :])

    return twin


@dataclass(frozen=True)
class Tabulated:
    """A function of plain data that stands for a reference function of models or callables."""

    function: Implementation
    tabulate: Callable[..., Arguments]  # from the arguments of the reference function
    wrong_twins: Mapping[str, Implementation]


ALIKE = "the mean over batches weighted alike"
TABULATED: Mapping[Implementation, Tabulated] = {
    reference.exact_shapley_values: Tabulated(shapley_values_from_worths, worths, {}),
    reference.shapley_sensitivity: Tabulated(
        shapley_sensitivity_from_gradients,
        coalition_gradients,
        {ALIKE: alike(shapley_sensitivity_from_gradients, 3)},
    ),
    reference.input_second_moment: Tabulated(input_second_moment_from_inputs, layer_inputs, {}),
    reference.gauss_newton_diagonal: Tabulated(
        gauss_newton_from_jacobians,
        output_jacobians,
        {ALIKE: alike(gauss_newton_from_jacobians, 2)},
    ),
    reference.empirical_fisher: Tabulated(
        empirical_fisher_from_gradients,
        sample_gradients,
        {"the square of the mean gradient": alike_fisher},
    ),
}


def tabulated(contract: Contract) -> Contract | None:
    """The contract as one of plain data, or None. A case of it makes its table when it is run."""
    known = TABULATED.get(contract.reference)
    if known is None:
        return None

    def arguments(spec: CaseSpec) -> Arguments:
        given = spec.arguments()
        return known.tabulate(*given.positional, **given.options)

    specs = [
        replace(
            spec,
            arguments=partial(arguments, spec),
            observe=call,
            floating=True,
            needs_gradients=False,
        )
        for spec in contract.specs
    ]
    name = getattr(known.function, "__name__", contract.name)
    return Contract(name, contract.source, known.function, tuple(specs), known.wrong_twins)


def mlp_arguments(*sizes: int, batches: tuple[int, ...], probes: int = 2) -> Arguments:
    """Weights, data and random signs with a fixed seed."""
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    weights = [normal(b, a) / a**0.5 for a, b in pairwise(sizes)]
    biases = [normal(len(W)) / 2 for W in weights]
    inputs = [normal(n, sizes[0]) for n in batches]
    labels = [torch.randint(0, sizes[-1], (n,), generator=generator) for n in batches]
    signs = [[normal(*W.shape).sign() for W in weights] for _ in range(probes)]
    return Arguments((weights, biases, inputs, labels, signs))


CURVATURE = "diag H; diag(Jᵀ H_y J); mean of squared gradients; mean of v ⊙ H v; mean of x_j²"
MLP = Contract(
    "curvature_of_mlp",
    "Hutchinson 1990, Schraudolph 2002, arXiv 2509.09119 (appendix E)",
    curvature_of_mlp,
    (
        CaseSpec("one layer", CURVATURE, partial(mlp_arguments, 3, 2, batches=(4,)), terms=64),
        CaseSpec("two layers", CURVATURE, partial(mlp_arguments, 3, 4, 2, batches=(5,)), terms=128),
        CaseSpec(
            "uneven batches",
            CURVATURE,
            partial(mlp_arguments, 3, 3, 2, 3, batches=(1, 4, 2)),
            terms=256,
        ),
    ),
)
