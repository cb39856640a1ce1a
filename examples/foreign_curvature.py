"""What the conformance kit says of other people's curvature: curvlinops, BackPACK, torch.func.

    python examples/foreign_curvature.py > examples/results/foreign_curvature.txt
    python examples/foreign_curvature.py --only torch

Each is wrapped as its own documentation has it, in a few lines that offer the contract's signature:
a copy of the model in eval mode, the loss as a module of (output, labels), batches weighted by
their samples. What such a loss cannot express is skipped, with the reason. Every report is printed
as it comes out; the failures that it only names follow in full. A package that is not installed is
left out with a line.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from reports import printed
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map

from minirank import reference, testing

Diagonals = dict[str, Tensor]
LOSSES: dict[str, type[nn.Module]] = {
    "squared_error": nn.MSELoss,
    "cross_entropy": nn.CrossEntropyLoss,
    "binary_cross_entropy": nn.BCEWithLogitsLoss,
}
NO_MODULE = "the loss is no module of (output, labels)"
SKIPPED = {
    "batches of one tensor*": NO_MODULE,
    "padding in the loss*": NO_MODULE,
    "no curvature*": NO_MODULE,
    "a model that computes its loss*": NO_MODULE,
}


def in_eval_mode(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_()


def weights_of(model: nn.Module, targets: list[str]) -> dict[str, nn.Parameter]:
    return {name: model.get_submodule(name).get_parameter("weight") for name in targets}


def labelled(batches: list[Any]) -> Iterator[tuple[float, Tensor, Tensor]]:
    """(share of all samples, x, labels) of each batch."""
    n = sum(len(x) for x, _ in batches)
    for x, labels in batches:
        yield len(x) / n, x, labels


class ClassesSecond(nn.Module):
    """Outputs (n, T, C) as nn.CrossEntropyLoss wants them: (n, C, T)."""

    def forward(self, y: Tensor) -> Tensor:
        return y.movedim(-1, 1) if y.ndim > 2 else y


def fitting_labels(labels: Tensor, loss_fn: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    """Labels as the loss's module takes them: 0 and 1 in the model's dtype, classes second."""
    if loss_fn.__name__ == "binary_cross_entropy":
        return labels.to(dtype)
    shared = loss_fn.__name__ == "cross_entropy" and labels.is_floating_point()
    probabilities: Tensor = ClassesSecond()(labels) if shared else labels
    return probabilities


# ---- torch.func ----------------------------------------------------------------------------------


def torch_func_hessian(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: list[Any], targets: list[str]
) -> Diagonals:
    """torch.func.hessian of a functional call, one target at a time."""
    model = in_eval_mode(model)
    found = {}
    for name, W in weights_of(model, targets).items():
        key = f"{name}.weight".lstrip(".")

        def loss(w: Tensor, key: str = key) -> Tensor:
            def call(*args: Any, **kwargs: Any) -> Any:
                return functional_call(model, {key: w}, args, kwargs)

            sizes = [len(samples(batch)) for batch in batches]
            parts = [n * loss_fn(call, batch) for n, batch in zip(sizes, batches, strict=True)]
            return torch.stack(parts).sum() / sum(sizes)

        with sdpa_kernel(SDPBackend.MATH):
            H = torch.func.hessian(loss)(W.detach())
        found[name] = H.reshape(W.numel(), W.numel()).diag().view_as(W)
    return found


def torch_func_fisher(
    model: nn.Module, loss_fn: Callable[..., Tensor], batches: list[Any], targets: list[str]
) -> Diagonals:
    """vmap over samples of torch.func.grad."""
    model = in_eval_mode(model)
    parameters = {
        f"{n}.weight".lstrip("."): W.detach() for n, W in weights_of(model, targets).items()
    }

    def loss(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, parameters, args, kwargs)

        return loss_fn(call, tree_map(lambda x: x.unsqueeze(0), sample))

    squares = []
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
            squares.append([g.square() for g in each.values()])
    sums = [torch.cat(parts).mean(0) for parts in zip(*squares, strict=True)]
    return dict(zip(targets, sums, strict=True))


def samples(batch: Any) -> Tensor:
    """The first tensor of a batch."""
    while not isinstance(batch, Tensor):
        batch = next(iter(batch.values())) if isinstance(batch, dict) else batch[0]
    return batch


# ---- curvlinops ----------------------------------------------------------------------------------


def operator(
    kind: str, model: nn.Module, loss_fn: Any, batches: list[Any], targets: list[str]
) -> tuple[Any, dict[str, nn.Parameter]]:
    curvlinops = importlib.import_module("curvlinops")
    model = in_eval_mode(model)
    weights = weights_of(model, targets)
    data = [(x, fitting_labels(labels, loss_fn, x.dtype)) for x, labels in batches]
    module = LOSSES[loss_fn.__name__]()
    if isinstance(module, nn.CrossEntropyLoss):
        model = nn.Sequential(model, ClassesSecond())
    made = getattr(curvlinops, kind)(
        model, module, list(weights.values()), data, check_deterministic=False
    )
    return made, weights


def by_target(diagonal: Tensor, weights: dict[str, nn.Parameter]) -> Diagonals:
    parts = torch.split(diagonal, [W.numel() for W in weights.values()])
    return {name: h.view_as(W) for h, (name, W) in zip(parts, weights.items(), strict=True)}


def curvlinops_diagonal(kind: str) -> Callable[..., Diagonals]:
    """diag(A I), A being one of curvlinops' linear operators."""

    def diagonal(*task: Any) -> Diagonals:
        with sdpa_kernel(SDPBackend.MATH):
            A, weights = operator(kind, *task)
            size = sum(W.numel() for W in weights.values())
            identity = torch.eye(size, dtype=next(iter(weights.values())).dtype)
            return by_target((A @ identity).diag(), weights)

    return diagonal


def curvlinops_hutchinson(*task: Any, generator: torch.Generator, samples: int) -> Diagonals:
    """hutchinson_diag. It draws from the global generator, and takes fewer products at a time than
    the matrix has columns."""
    hutchinson_diag = importlib.import_module("curvlinops").hutchinson_diag
    seed = int(torch.randint(2**31, (), generator=generator))
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.default_generator.manual_seed(seed)
        A, weights = operator("HessianLinearOperator", *task)
        most = sum(W.numel() for W in weights.values()) - 1
        done, total = 0, torch.zeros(())
        while done < samples:
            count = min(most, samples - done)
            total = total + count * hutchinson_diag(A, count)
            done += count
    return by_target(total.detach() / samples, weights)


# ---- BackPACK ------------------------------------------------------------------------------------


def backpack_diagonal(
    extension: str, field: str, converter: bool, per_sample: bool
) -> Callable[..., Diagonals]:
    """What an extension leaves in `field` after the backward pass of a mean loss.

    BackPACK's squares are of each sample's part of the mean, 1/n of its gradient: times n² they are
    the sums of squared gradients of a batch.
    """

    def diagonal(
        model: nn.Module, loss_fn: Callable[..., Tensor], batches: list[Any], targets: list[str]
    ) -> Diagonals:
        backpack = importlib.import_module("backpack")
        extensions = importlib.import_module("backpack.extensions")
        sums: Diagonals = {}
        for share, x, labels in labelled(batches):
            ours = in_eval_mode(model)
            weights = weights_of(ours, targets)
            module = LOSSES[loss_fn.__name__]()
            y = backpack.extend(ours, use_converter=converter)(x)
            if isinstance(module, nn.CrossEntropyLoss):
                y = ClassesSecond()(y)
            loss = backpack.extend(module)(y, fitting_labels(labels, loss_fn, x.dtype))
            with backpack.backpack(getattr(extensions, extension)()):
                loss.backward()
            for name, W in weights.items():
                h = getattr(W, field)
                if per_sample:
                    h = (h.square().sum(0) if field == "grad_batch" else h) * len(x)
                sums[name] = sums.get(name, torch.zeros_like(h)) + share * h
        return sums

    return diagonal


# ---- reports -------------------------------------------------------------------------------------


def show(title: str, package: str, mine: Callable[..., Any], like: Any, skip: bool) -> None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        print(f"\n==== {title}: {package} is not installed, left out")
        return
    print(f"\n==== {title} ({package} {version})")
    names = [case.name for case in testing.cases(like, dtype=torch.float64)]
    reasons = {
        glob: why for glob, why in SKIPPED.items() if any(n.startswith(glob[:-1]) for n in names)
    }
    for dtype in (torch.float64, torch.float32):
        report = testing.check(
            mine, like=like, dtype=dtype, skip=reasons if skip else {}, on_fail=None
        )
        if dtype == torch.float64:
            print(printed(report))
            print(
                "".join(f"also    {printed(result)[8:]}\n" for result in report.failed[6:]), end=""
            )
        else:
            print(f"in float32: {printed(report).splitlines()[0]}")


def comparisons() -> Iterator[tuple[str, str, Callable[..., Any], Any]]:
    """(title, package, implementation, reference)"""
    hessian, gauss_newton = reference.hessian_diagonal, reference.gauss_newton_diagonal
    fisher = reference.empirical_fisher
    yield "torch.func.hessian", "torch", torch_func_hessian, hessian
    yield "torch.func.vmap(grad)", "torch", torch_func_fisher, fisher

    package = "curvlinops-for-pytorch"
    for kind, like in (
        ("HessianLinearOperator", hessian),
        ("GGNLinearOperator", gauss_newton),
        ("EFLinearOperator", fisher),
    ):
        yield f"curvlinops, diag({kind} @ I)", package, curvlinops_diagonal(kind), like
    yield "curvlinops, hutchinson_diag", package, curvlinops_hutchinson, reference.hutchinson

    package = "backpack-for-pytorch"
    for extension, field, like in (
        ("DiagHessian", "diag_h", hessian),
        ("DiagGGNExact", "diag_ggn_exact", gauss_newton),
        ("SumGradSquared", "sum_grad_squared", fisher),
        ("BatchGrad", "grad_batch", fisher),
    ):
        for converter in (False, True) if extension == "DiagHessian" else (False,):
            title = f"BackPACK, {extension}{', use_converter=True' if converter else ''}"
            mine = backpack_diagonal(extension, field, converter, per_sample=like is fisher)
            yield title, package, mine, like


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="packages whose name begins so")
    only = parser.parse_args().only
    warnings.simplefilter("ignore")
    for title, package, mine, like in comparisons():
        if package.startswith(only):
            show(title, package, mine, like, skip=package != "torch")


if __name__ == "__main__":
    main()
