"""The toy problems of the curvature contracts: a model, its loss, batches and target layers.

Every loss calls the model once, as `model(x)`, uses nothing else of it, is convex in the output y
and a mean over samples. So one problem serves the Hessian diagonal, Gauss-Newton and the Fisher.
Each function makes a fresh problem with the same numbers, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..case import Arguments, CaseSpec, Implementation, call

Loss = Callable[[nn.Module, Any], Tensor]

EVAL = "eval mode"
UNTOUCHED = "model left as it was"

# Each term is a product of about that many factors with a rounding error of their own (softmax,
# tanh and their derivatives, inputs, chain rule).
FACTORS = 8


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whole(*shape: int, below: int, seed: int) -> Tensor:
    """Whole numbers from 0 to below - 1."""
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


def built(build: Callable[[], nn.Module], spread: float = 0.8) -> nn.Module:
    """A model with fixed weights, whose making draws nothing from the global generator."""
    with torch.random.fork_rng(devices=[]):
        model = build().double()
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=100 + seed) * spread)
    return model


def problem(model: nn.Module, loss: Loss, batches: Sequence[Any], *targets: str) -> Arguments:
    return Arguments((model, loss, list(batches), list(targets)))


# ---- losses --------------------------------------------------------------------------------------


def squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    error: Tensor = model(x) - y
    return error.square().mean()


def half_square(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y.square().flatten(1).sum(1).mean() / 2


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Over (n, C) or (n, T, C); labels are classes, or probabilities of the output's shape."""
    x, labels = batch
    y = model(x)
    rows = labels.reshape(-1, y.shape[-1]) if labels.is_floating_point() else labels.reshape(-1)
    return F.cross_entropy(y.reshape(-1, y.shape[-1]), rows)


def binary_cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, labels = batch
    y = model(x)
    return F.binary_cross_entropy_with_logits(y, labels.to(y.dtype))


def named_cross_entropy(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Of a dict; the mean over samples of the mean over real tokens."""
    y = model(batch["input_ids"])
    mask = batch["attention_mask"].to(y.dtype)
    each = F.cross_entropy(y.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return ((each.view_as(mask) * mask).sum(1) / mask.sum(1)).mean()


def mean_output(model: nn.Module, x: Tensor) -> Tensor:
    """Linear in the output: no curvature of its own."""
    y: Tensor = model(x)
    return y.mean()


# ---- models --------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One layer called on two parts of the input, or a second time on its own output."""

    def __init__(self, own_output: bool) -> None:
        super().__init__()
        self.own_output = own_output
        self.layer = nn.Linear(3, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.tanh(self.layer(x[:, 0]))
        second = self.layer(first if self.own_output else x[:, 1])
        y: Tensor = self.head(first + torch.tanh(second))
        return y


class Positions(nn.Module):
    """A layer at every position, whose outputs meet in a product and a mean: terms between
    positions count."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.flat = flat
        self.layer = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            z = self.layer(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
        else:
            z = self.layer(x)
        y: Tensor = self.head(torch.tanh(z).mean(1) + z[:, 0] * z[:, -1])
        return y


class Attention(nn.Module):
    """Self-attention by scaled_dot_product_attention, and a head at every position."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unsqueeze(1) for layer in (self.query, self.key, self.value))
        y: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        return y


class OnlyInTraining(nn.Module):
    """What dropout is to expectations: another function in train mode. It draws no numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.linspace(0.2, 2.0, x.shape[-1]).to(x) if self.training else x


class Deep(nn.Module):
    """Layers with names of which one begins another: h.1 and h.10."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.h:
            x = x + torch.tanh(layer(x)) / 2
        return x


class OwnLoss(nn.Module):
    """Called as transformers are: model(**batch), and it computes the loss itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 3)

    def forward(self, *, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = torch.tanh(self.layer(self.embedding(input_ids))).mean(1)
        return {"loss": F.cross_entropy(y, labels), "logits": y}


def own_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch)["loss"]
    return loss


def perceptron(activation: nn.Module | None = None, d_out: int = 2) -> nn.Module:
    activation = nn.Tanh() if activation is None else activation
    return built(lambda: nn.Sequential(nn.Linear(3, 4), activation, nn.Linear(4, d_out)))


# ---- problems ------------------------------------------------------------------------------------


def pairs(*sizes: int, shape: tuple[int, ...] = (3,), d_out: int = 2) -> list[Any]:
    """Batches (x, y) for a squared error, with targets far from the outputs."""
    return [
        (normal(n, *shape, seed=i), 2 * normal(n, d_out, seed=20 + i)) for i, n in enumerate(sizes)
    ]


def classified(*sizes: int, shape: tuple[int, ...] = (3,), classes: int = 2) -> list[Any]:
    """Batches (x, labels) for a cross-entropy over classes."""
    return [
        (normal(n, *shape, seed=i), whole(n, below=classes, seed=20 + i))
        for i, n in enumerate(sizes)
    ]


def one_weight() -> Arguments:
    model = built(lambda: nn.Sequential(nn.Linear(1, 1, bias=False)))
    return problem(model, squared_error, pairs(1, shape=(1,), d_out=1), "0")


def linear(*sizes: int, bias: bool = True) -> Arguments:
    """A whole model that is one layer, in a Sequential."""
    model = built(lambda: nn.Sequential(nn.Linear(3, 2, bias=bias)))
    return problem(model, cross_entropy, classified(*sizes), "0")


def regression(*sizes: int) -> Arguments:
    return problem(perceptron(), squared_error, pairs(*sizes), "0", "2")


def one_of_two() -> Arguments:
    """One target of two, and after the other's name."""
    return problem(perceptron(), squared_error, pairs(3), "2")


def other_order() -> Arguments:
    return problem(perceptron(nn.Softplus()), cross_entropy, classified(3), "2", "0")


def rectified() -> Arguments:
    return problem(perceptron(nn.ReLU()), cross_entropy, classified(5), "0", "2")


def plain_tensor() -> Arguments:
    batches = [normal(2, 3, seed=1), normal(3, 3, seed=2)]
    return problem(perceptron(), half_square, batches, "0", "2")


def strided() -> Arguments:
    """A weight and an input whose memory runs the other way, and an input of stride 0."""
    model = perceptron()
    with torch.no_grad():
        for layer in (model[0], model[2]):  # type: ignore[index]
            layer.weight = nn.Parameter(layer.weight.T.contiguous().T)
    x, same = normal(3, 4, seed=1).T, normal(1, 3, seed=2).expand(2, 3)
    labels = whole(6, below=2, seed=3)
    return problem(model, cross_entropy, [(x, labels[:4]), (same, labels[4:])], "0", "2")


def two_calls(own_output: bool) -> Arguments:
    model = built(lambda: Twice(own_output))
    return problem(model, cross_entropy, classified(3, shape=(2, 3)), "layer", "head")


def positions(flat: bool = False) -> Arguments:
    batches = classified(2, 1, shape=(3, 3))
    return problem(built(lambda: Positions(flat), 0.5), cross_entropy, batches, "layer", "head")


def attention() -> Arguments:
    x, labels = normal(2, 3, 3, seed=1), whole(2, 3, below=2, seed=2)
    names = ("query", "key", "value", "out")
    return problem(built(Attention), cross_entropy, [(x, labels)], *names)


def padded() -> Arguments:
    """A dict of token ids, labels and a mask, with a loss over real tokens."""
    model = built(lambda: nn.Sequential(nn.Embedding(5, 3), Attention()))
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    batch = {"attention_mask": mask, "input_ids": whole(3, 3, below=5, seed=1)}
    batch["labels"] = whole(3, 3, below=2, seed=2)
    return problem(model, named_cross_entropy, [batch], "1.query", "1.value")


def train_mode(dropout: bool) -> Arguments:
    """In train mode but for its last layer, with batch statistics that a forward pass would
    change."""
    first = (lambda: nn.Dropout(0.5)) if dropout else OnlyInTraining

    def build() -> nn.Module:
        norms = [nn.BatchNorm1d(4)] if dropout else []
        return nn.Sequential(first(), nn.Linear(3, 4), *norms, nn.Tanh(), first(), nn.Linear(4, 2))

    model = built(build).train()
    list(model.children())[-1].eval()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return problem(model, cross_entropy, classified(4), *names)


def frozen() -> Arguments:
    """All but one bias is frozen. Some parameters hold gradients from earlier."""
    model = perceptron().requires_grad_(False)
    for seed, parameter in enumerate(model.parameters()):
        if seed != 1:
            parameter.grad = normal(*parameter.shape, seed=50 + seed)
    list(model.parameters())[-1].requires_grad_()
    return problem(model, squared_error, pairs(3), "0", "2")


def hooked() -> Arguments:
    """The user's own hooks: one before a layer, one behind an activation. Both change values."""
    model = perceptron()
    layer, activation, _ = model.children()
    layer.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))
    activation.register_forward_hook(lambda module, inputs, y: y * 2)
    return problem(model, squared_error, pairs(3), "0", "2")


def overwritten() -> Arguments:
    """An activation that overwrites the layer's output."""
    return problem(perceptron(nn.SiLU(inplace=True)), squared_error, pairs(3), "0", "2")


def deep() -> Arguments:
    return problem(built(Deep), squared_error, pairs(2, shape=(2,)), "h.10", "h.1")


def model_with_loss() -> Arguments:
    batches = [
        {"input_ids": whole(n, 2, below=5, seed=n), "labels": whole(n, below=3, seed=9 + n)}
        for n in (3, 1)
    ]
    return problem(built(OwnLoss), own_loss, batches, "layer")


def wide() -> Arguments:
    """More entries than a usual chunk, and no multiple of one: 9 · 15."""
    model = built(lambda: nn.Sequential(nn.Linear(15, 9), nn.Tanh(), nn.Linear(9, 2)), 0.4)
    return problem(model, cross_entropy, classified(3, shape=(15,)), "0")


def many_samples() -> Arguments:
    return problem(perceptron(), cross_entropy, classified(67, 5), "0", "2")


def no_curvature() -> Arguments:
    """A loss linear in the layer's weight, in the mean of a linear model."""
    model = built(lambda: nn.Sequential(nn.Linear(3, 2)))
    return problem(model, mean_output, [normal(3, 3, seed=1)], "0")


def of_outputs(loss: Loss, labels: str, *leading: int, d_out: int) -> Arguments:
    """A perceptron with an output of shape (n, …, d_out) and labels of one kind."""
    model = perceptron(d_out=d_out)
    shapes = {"classes": leading, "numbers": (*leading, d_out)}
    batches = []
    for seed in (1, 2):
        x = normal(*leading, 3, seed=seed)[: seed + 1]
        drawn = {
            "classes": lambda seed=seed: whole(*leading, below=d_out, seed=20 + seed),
            "numbers": lambda seed=seed: 2 * normal(*shapes["numbers"], seed=20 + seed),
            "probabilities": lambda seed=seed: normal(*shapes["numbers"], seed=seed).softmax(-1),
            "yes or no": lambda seed=seed: whole(*shapes["numbers"], below=2, seed=20 + seed),
        }[labels]()
        batches.append((x, drawn[: seed + 1]))
    return problem(model, loss, batches, "0", "2")


# ---- what is compared ----------------------------------------------------------------------------


def diagonals(implementation: Implementation, arguments: Arguments) -> Any:
    """{name: diagonal}, in the model's precision where it comes in a better one."""
    outcome = call(implementation, arguments)
    model: nn.Module = arguments.positional[0]
    precision = next(model.parameters()).dtype
    if not isinstance(outcome, Mapping):
        return outcome
    return {name: no_better_than(precision, h) for name, h in outcome.items()}


def no_better_than(precision: torch.dtype, h: Any) -> Any:
    if not isinstance(h, Tensor) or not h.is_floating_point():
        return h
    better = torch.finfo(h.dtype).eps < torch.finfo(precision).eps
    return h.to(precision) if better else h


def cases_of(
    equation: str, makers: Mapping[str, tuple[float, str, Callable[[], Arguments]]]
) -> tuple[CaseSpec, ...]:
    """{name: (terms, the rule if it is not the equation, arguments)}"""
    return tuple(
        CaseSpec(name, rule or equation, arguments, diagonals, terms=FACTORS * terms)
        for name, (terms, rule, arguments) in makers.items()
    )
