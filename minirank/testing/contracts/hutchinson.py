"""Hutchinson's estimate of the Hessian diagonal: is it unbiased, and does its variance fall?

Nothing is assumed of the random vectors, so that signs, Gaussian vectors and vectors on a layer's
outputs all pass. An implementation is called often, each time with a generator of another fixed
seed. The mean of its estimates is held against the exact diagonal, in units of the standard error
that the estimates themselves show.

The odds of a false alarm. Each entry may be off by LIMIT = 9 standard errors. Where the vectors are
random signs, estimates are bounded, and their means over 8 or more samples nearly normal: the odds
for the whole contract are far below 10⁻⁶. Gaussian vectors have longer tails. In 60,000 simulated
repetitions of each kind of case none was off by 8 standard errors, and each further one makes it
about four times as rare: some 10⁻⁶ for a case. Seeds are fixed, so that a verdict does not change
from run to run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...reference.hessian import gradients, mean_loss
from ..case import Arguments, CaseSpec, Contract, Implementation
from ..comparison import Rule
from . import curvature_models as toys
from . import curvature_twins as twins

UNBIASED = "E[estimate] = ∂²L/∂W_ij²"
VARIANCE = "the variance falls as 1 / samples"
DRAWN = "the generator alone decides"
LIMIT = 9.0  # standard errors
HINT_LIMIT = 5.0  # of a hint: a mean may be as far off and still be that of a wrong twin

Stack = dict[str, Tensor]  # {name: (runs, d_out, d_in)}


# ---- calls ---------------------------------------------------------------------------------------


def estimate(
    implementation: Implementation, arguments: Arguments, generator: torch.Generator, samples: int
) -> dict[str, Tensor]:
    """One outcome, in float64. Raises ValueError if it does not hold a tensor for each target."""
    model, *_, targets = arguments.positional
    outcome = implementation(*arguments.positional, generator=generator, samples=samples)
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in targets}
    if not isinstance(outcome, Mapping):
        raise ValueError(f"expected {{name: diagonal}}, got {type(outcome).__name__}")
    got = {name: tuple(h.shape) for name, h in outcome.items()}
    if got != shapes:
        raise ValueError(f"expected diagonals of the shapes {shapes}, got {got}")
    return {name: torch.as_tensor(h).detach().cpu().double().clone() for name, h in outcome.items()}


def estimates(
    implementation: Implementation, arguments: Arguments, *, runs: int, samples: int
) -> Stack:
    """Independent outcomes: one seed for each."""
    found = []
    for run in range(runs):
        generator = torch.Generator().manual_seed(1000 * samples + run)
        found.append(estimate(implementation, arguments, generator, samples))
    return {name: torch.stack([h[name] for h in found]) for name in found[0]}


def exact_diagonal(arguments: Arguments) -> dict[str, Tensor]:
    found = reference.hessian_diagonal(*arguments.positional)
    return {name: h.detach().cpu().double() for name, h in found.items()}


def rounding(arguments: Arguments, exact: Tensor) -> float:
    """What rounding may add to the error of an entry."""
    precision = next(arguments.positional[0].parameters()).dtype
    return 1000 * torch.finfo(precision).eps * max(float(exact.abs().max()), 1e-3)


# ---- is it unbiased? -----------------------------------------------------------------------------


def deviations(stack: Tensor, expected: Tensor, slack: float) -> Tensor:
    """How far the mean of the runs is from `expected`, in standard errors, for each entry."""
    standard_error = stack.std(0) / len(stack) ** 0.5
    beyond = ((stack.mean(0) - expected).abs() - slack).clamp(min=0)
    # Estimates that are all alike have no standard error: then they must be right.
    return torch.where(beyond > 0, beyond / standard_error, 0.0).nan_to_num(
        nan=torch.inf, posinf=torch.inf
    )


def unbiased(
    implementation: Implementation, arguments: Arguments, *, runs: int, samples: int, note: str = ""
) -> dict[str, Rule]:
    """A rule for each target: the mean of many estimates is the exact diagonal."""
    stack = estimates(implementation, arguments, runs=runs, samples=samples)
    return unbiased_rules(arguments, stack, samples, note)


def unbiased_rules(
    arguments: Arguments, stack: Stack, samples: int, note: str = ""
) -> dict[str, Rule]:
    exact = exact_diagonal(arguments)
    slack = {name: rounding(arguments, h) for name, h in exact.items()}
    off = {name: deviations(stack[name], exact[name], slack[name]) for name in exact}
    rules = {}
    if any(bool(h.any()) for h in exact.values()):
        rules["overall factor"] = overall_factor(exact, stack)
    right = all(rule.holds for rule in rules.values())
    if not right or any(bool((z > LIMIT).any()) for z in off.values()):
        note = whose_mean(arguments, stack, slack)
        rules = {entry: rule._replace(note=note) for entry, rule in rules.items()}
    for name, z in off.items():
        place = divmod(int(z.argmax()), z.shape[1])
        runs, mean = stack[name][:, place[0], place[1]], stack[name].mean(0)[place]
        error = float(runs.std()) / len(runs) ** 0.5
        rules[f"estimates of {name!r}"] = Rule(
            bool((z <= LIMIT).all()),
            f"a mean of {float(exact[name][place]):.4g} at {list(place)}",
            f"{float(mean):.4g} ± {error:.2g} from {len(runs)} estimates of {samples} samples",
            note,
        )
    return rules


def factor_deviation(expected: Mapping[str, Tensor], stack: Stack) -> tuple[Tensor, Tensor]:
    """(the projections of the runs on `expected`, how far their mean is from 1). A common factor
    shows with less noise than in single entries."""
    h = torch.cat([expected[name].flatten() for name in expected])
    factors = torch.cat([stack[name].flatten(1) for name in expected], 1) @ h / h.square().sum()
    return factors, deviations(factors, torch.ones_like(factors[0]), 1e-4)


def overall_factor(exact: Mapping[str, Tensor], stack: Stack) -> Rule:
    factors, off = factor_deviation(exact, stack)
    error = float(factors.std()) / len(factors) ** 0.5
    return Rule(
        bool(off <= LIMIT),
        "the diagonal itself, no multiple of it",
        f"{float(factors.mean()):.4g} ± {error:.2g} times the diagonal",
    )


def whose_mean(arguments: Arguments, stack: Stack, slack: Mapping[str, float]) -> str:
    """What a biased estimate estimates, if it is one of the usual faults."""
    found = {}
    for sentence, diagonal in wrong_means(arguments):
        off = [deviations(stack[n], h, slack[n]).max() for n, h in diagonal.items()]
        if any(bool(h.any()) for h in diagonal.values()):
            off.append(factor_deviation(diagonal, stack)[1])
        found[sentence] = float(torch.stack(off).max())
    best = min(found, key=lambda sentence: found[sentence])
    return f"the mean equals {best}" if found[best] <= HINT_LIMIT else ""


def wrong_means(arguments: Arguments) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(what it is, its expectation) of estimates with one fault."""
    for sentence, twin in twins.HESSIAN.items():
        try:
            found = twin(*arguments.positional)
        except Exception:  # this twin cannot do this problem
            continue
        yield sentence, {name: h.detach().cpu().double() for name, h in found.items()}
    H, places = full_hessian(arguments)
    shapes = {name: h.shape for name, h in exact_diagonal(arguments).items()}
    for sentence, covariance in VECTOR_FAULTS.items():
        C = torch.tensor([[covariance(a, b) for b in places] for a in places])
        diagonal = (H * C).sum(1)
        parts = torch.split(diagonal, [shape.numel() for shape in shapes.values()])
        yield sentence, {n: p.view(s) for (n, s), p in zip(shapes.items(), parts, strict=True)}


Place = tuple[int, int, int]  # layer, row, column of a weight


def full_hessian(arguments: Arguments) -> tuple[Tensor, list[Place]]:
    """The Hessian over the weights of all targets together, and the place of each weight."""
    L, weights = mean_loss(*arguments.positional)
    Ws = list(weights.values())
    g = torch.cat([part.flatten() for part in gradients(L, Ws, twice=True)])
    rows = [torch.cat([h.flatten() for h in gradients(value, Ws)]) for value in g]
    places = [
        (layer, i, j)
        for layer, W in enumerate(Ws)
        for i in range(W.shape[0])
        for j in range(W.shape[1])
    ]
    return torch.stack(rows).detach().cpu().double(), places


# What E[v_a v_b] is, where it should be 1 for a = b and else 0. The mean of v_a (Hv)_a is then
# the sum over b of H_ab E[v_a v_b].
VECTOR_FAULTS: dict[str, Callable[[Place, Place], float]] = {
    "that of the same random signs in every layer": lambda a, b: float(a[1:] == b[1:]),
    "that of one sign for each row of a weight": lambda a, b: float(a[:2] == b[:2]),
    "that of one sign for each column of a weight": lambda a, b: float(a[::2] == b[::2]),
    "that of one sign for each layer": lambda a, b: float(a[0] == b[0]),
    "that of vectors uniform in [-1, 1], whose variance is 1/3": lambda a, b: float(a == b) / 3,
    "that of vectors of zeros and ones": lambda a, b: 0.5 if a == b else 0.25,
    "zero, as of H v not multiplied by v": lambda a, b: 0.0,
}


# ---- cases ---------------------------------------------------------------------------------------


def two_of_one_shape() -> Arguments:
    """Two layers of one shape with strong curvature between them, and uneven batches."""
    nn = torch.nn
    model = toys.built(lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), 1.2)
    return toys.problem(model, toys.squared_error, toys.pairs(4, 1, shape=(2,)), "0", "2")


# Inputs of one nonzero number each and a squared error: the Hessian is diagonal, so that random
# signs on the weights estimate it without error, and other vectors with little.


def uncorrelated(model: torch.nn.Module | None = None, target: str = "0") -> Arguments:
    if model is None:
        model = toys.built(lambda: torch.nn.Sequential(torch.nn.Linear(3, 2)))
    x = torch.eye(3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])
    y = toys.normal(3, 2, seed=1)
    return toys.problem(model, toys.squared_error, [(x, y), (3 * x[:1], y[:1])], target)


def in_train_mode(dropout: bool) -> Arguments:
    """With batch statistics, or a fixed factor in train mode."""
    nn = torch.nn

    def build() -> nn.Module:
        first = nn.Dropout(0.5) if dropout else toys.OnlyInTraining()
        return nn.Sequential(first, nn.Linear(3, 2), *([nn.BatchNorm1d(2)] if dropout else []))

    return uncorrelated(toys.built(build).train(), "1")


def frozen() -> Arguments:
    arguments = uncorrelated()
    model = arguments.positional[0].requires_grad_(False)
    model[0].weight.grad = toys.normal(2, 3, seed=50)
    return arguments


def hooked() -> Arguments:
    arguments = uncorrelated()
    layer = arguments.positional[0][0]
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    layer.register_forward_hook(lambda module, inputs, y: y * 2)
    return arguments


def of_a_diagonal_hessian(
    implementation: Implementation, arguments: Arguments, *, note: str = ""
) -> dict[str, Rule]:
    """Random signs are exact, with any number of samples; other vectors are unbiased."""
    exact = exact_diagonal(arguments)
    rules = {"overall factor": Rule(True, "1", "1")}
    rules |= {f"estimates of {name!r}": Rule(True, "the exact diagonal", "it") for name in exact}
    for samples in (1, 3):
        got = estimate(implementation, arguments, torch.Generator().manual_seed(5), samples)
        off = {name: float((got[name] - h).abs().max()) for name, h in exact.items()}
        if any(off[name] > rounding(arguments, h) for name, h in exact.items()):
            rules |= unbiased(implementation, arguments, runs=60, samples=10, note=note)
            break
    return rules


def of_seeds(implementation: Implementation, arguments: Arguments) -> dict[str, Rule]:
    def drawn(generator: torch.Generator) -> Tensor:
        found = estimate(implementation, arguments, generator, 2)
        return torch.cat([h.flatten() for h in found.values()])

    generator = torch.Generator().manual_seed(1)
    first, following = drawn(generator), drawn(generator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(77)
        again = drawn(torch.Generator().manual_seed(1))
    other = drawn(torch.Generator().manual_seed(2))
    exact = torch.cat([h.flatten() for h in exact_diagonal(arguments).values()])
    no_chance = torch.allclose(first, exact, rtol=1e-4) and torch.allclose(other, exact, rtol=1e-4)
    note = "exact here: no chance is left" if no_chance else ""

    def differ(a: Tensor, b: Tensor) -> bool:
        return no_chance or not torch.allclose(a, b, rtol=1e-9, atol=0)

    return {
        "equal seeds": Rule(
            torch.allclose(first, again, rtol=1e-6),
            "the same estimate from equal seeds, whatever the global generator's state",
            "another estimate",
        ),
        "another seed": Rule(
            differ(first, other),
            "another estimate from another seed",
            "the same estimate from another seed: the generator is not used",
            note,
        ),
        "the same generator again": Rule(
            differ(first, following),
            "a generator that has advanced, and so another estimate from it",
            "the same estimate from one generator twice",
            note,
        ),
    }


def of_variance(implementation: Implementation, arguments: Arguments) -> dict[str, Any]:
    """The variance at 32 samples is 1/32 of that at one; 1/8 passes, since both are estimated.
    Either number of samples is unbiased."""
    single = estimates(implementation, arguments, runs=200, samples=1)
    many = estimates(implementation, arguments, runs=40, samples=32)
    ours, least = (sum(float(h.var(0).sum()) for h in stack.values()) for stack in (single, many))
    ratio = ours / least if least else float("inf")
    return {
        "variance": Rule(
            ratio >= 8,
            "a variance that falls to 1/32 with 32 samples in place of 1",
            f"a variance that falls to 1/{ratio:.2g}",
            "" if ratio >= 8 else "are the vectors of the samples drawn anew, and all averaged?",
        ),
        "1 sample": unbiased_rules(arguments, single, 1),
        "32 samples": unbiased_rules(arguments, many, 32),
    }


def spec(
    name: str,
    equation: str,
    arguments: Callable[[], Arguments],
    observe: Callable[[Implementation, Arguments], Any],
    floating: bool = False,
) -> CaseSpec:
    return CaseSpec(
        name, equation, arguments, observe, floating=floating, repeatable=False, judges_itself=True
    )


FORTY = partial(unbiased, runs=40, samples=16)
FORTY_SHORT = partial(unbiased, runs=40, samples=8)
OTHER_VECTORS = "random signs on the weights would be exact here: these are other random vectors"
LEFT = toys.UNTOUCHED

HUTCHINSON = Contract(
    "hutchinson",
    "Hutchinson 1990; Bekas, Kokiopoulou and Saad 2007: h = the mean of v ⊙ H v",
    reference.hutchinson,
    (
        spec("seeds", DRAWN, two_of_one_shape, of_seeds),
        spec(
            "a diagonal Hessian",
            UNBIASED,
            uncorrelated,
            partial(of_a_diagonal_hessian, note=OTHER_VECTORS),
            floating=True,
        ),
        spec("train mode", toys.EVAL, partial(in_train_mode, False), of_a_diagonal_hessian),
        spec("dropout", toys.EVAL, partial(in_train_mode, True), of_a_diagonal_hessian),
        spec("frozen parameters", LEFT, frozen, of_a_diagonal_hessian),
        spec("hooks", LEFT, hooked, of_a_diagonal_hessian),
        spec("no curvature", UNBIASED, toys.no_curvature, partial(unbiased, runs=2, samples=2)),
        spec("uneven batches", UNBIASED, partial(toys.linear, 4, 1), FORTY),
        spec("two layers of one shape", VARIANCE, two_of_one_shape, of_variance),
        spec("one target of two", "targets", toys.one_of_two, FORTY),
        spec("targets in another order", "targets", toys.other_order, FORTY_SHORT),
        spec("attention", "the terms between positions", toys.attention, FORTY_SHORT),
        spec("padding in the loss", "dict batches", toys.padded, FORTY_SHORT),
    ),
)
