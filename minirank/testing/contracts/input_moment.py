"""The input second moment: masks, padding, calls and modes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import reference
from ..case import Arguments, Contract, Implementation
from . import curvature_models as toys
from . import curvature_twins as twins

MOMENT = "the mean of x_j² over real tokens"

# ---- problems ------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """A layer over (n, T, d_in), and one over a sample's first position, (n, d_in)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.pooler = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pooler(torch.tanh(self.layer(x))[:, 0])
        return y


class Overwriting(nn.Module):
    """Overwrites the input of its layer after the layer has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.5
        with torch.no_grad():
            y: Tensor = self.layer(x)
            x.zero_()
        return y


def masked_output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    y: Tensor = model(batch["x"])
    return y.mean()


def with_mask(mask: Tensor, seed: int, padding: float = float("nan")) -> dict[str, Tensor]:
    """A dict batch x (n, T, 3) whose padding holds `padding`."""
    x = toys.normal(*mask.shape, 3, seed=seed)
    x[mask == 0] = padding
    return {"x": x, "attention_mask": mask}


def two_layers() -> nn.Module:
    return toys.built(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))


def tokens(*batches: Mapping[str, Tensor]) -> Arguments:
    return toys.problem(two_layers(), masked_output, batches, "0", "2")


def one_input() -> Arguments:
    return toys.problem(
        toys.built(lambda: nn.Linear(3, 2, bias=False)),
        toys.mean_output,
        [toys.normal(1, 3, seed=1)],
        "",
    )


def of_shapes(*shapes: tuple[int, ...]) -> Arguments:
    """Tensor batches of different shapes (…, 3)."""
    batches = [2 * toys.normal(*shape, 3, seed=i) + 1 for i, shape in enumerate(shapes)]
    return toys.problem(two_layers(), toys.mean_output, batches, "0", "2")


def padding(value: float) -> Arguments:
    mask = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 0, 0]])  # right, left, both
    return tokens(with_mask(mask, 1, value))


def uneven_padding() -> Arguments:
    """Batches with 7, 1 and 3 real tokens; one sample is all padding."""
    return tokens(
        with_mask(torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), 1),
        with_mask(torch.tensor([[1, 0]]), 2),
        with_mask(torch.tensor([[0, 0, 0], [1, 1, 1], [0, 0, 0]]), 3),
    )


def mask_comes_and_goes() -> Arguments:
    """The second batch has the first one's shape, but no mask; the third is the other way round."""
    mask = torch.tensor([[1, 0], [1, 1]])
    return tokens(with_mask(mask, 1), {"x": toys.normal(2, 2, 3, seed=2)}, with_mask(1 - mask, 3))


def numbered_mask(kind: torch.dtype) -> Arguments:
    mask = torch.tensor([[1, 2, 2, 0], [1, 1, 3, 3]])
    return tokens(with_mask(mask.to(kind), 1))


def strided_tokens() -> Arguments:
    mask = torch.tensor([[1, 1], [1, 0], [1, 1]]).T
    batch = with_mask(mask.contiguous(), 1)
    return tokens({"x": batch["x"].transpose(0, 1).contiguous().transpose(0, 1),
                   "attention_mask": mask})  # fmt: skip


def pooled() -> Arguments:
    """As many samples as positions, so that only the number of dimensions tells them apart."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    return toys.problem(toys.built(Pooled), masked_output, [with_mask(mask, 1)], "layer", "pooler")


def two_masked_calls() -> Arguments:
    """One layer called at both of its depths, over padded batches."""

    def build() -> nn.Module:
        layer = nn.Linear(3, 3)
        return nn.Sequential(layer, nn.Tanh(), layer)

    batches = [
        with_mask(torch.tensor([[1, 1, 0]]), 1),
        with_mask(torch.tensor([[1, 1], [1, 0]]), 2),
    ]
    return toys.problem(toys.built(build), masked_output, batches, "0")


def overwritten_input() -> Arguments:
    return toys.problem(
        toys.built(Overwriting), toys.mean_output, [toys.normal(2, 3, seed=1)], "layer"
    )


def large_inputs() -> Arguments:
    """A large mean and a small spread, and one column of zeros."""
    x = 1000 + toys.normal(50, 3, seed=1)
    x[:, 1] = 0
    return toys.problem(two_layers(), toys.mean_output, [x], "0")


# ---- wrong twins ---------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """The input of one call of a layer, as rows."""

    rows: Tensor  # (rows, d_in), padding included
    real: Tensor  # bool (rows,)
    samples: int  # of the batch


Moment = Callable[[list[list[Inputs]]], Tensor]


def moments(of_layer: Moment, *task: Any) -> twins.Diagonals:
    """What `of_layer` computes of the inputs of a layer: for each batch those of its calls."""
    given, loss_fn, batches, targets = task
    seen: dict[str, list[list[Inputs]]] = {name: [] for name in targets}
    mask: Tensor | None = None
    n = 0

    def observe(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        (x,) = inputs
        masked = mask is not None and mask.shape == x.shape[:-1]
        real = mask != 0 if mask is not None and masked else twins.every_row(x)
        seen[name][-1].append(Inputs(x.reshape(-1, x.shape[-1]), real.reshape(-1), n))

    model = copy.deepcopy(given).eval()
    for name in targets:
        model.get_submodule(name).register_forward_pre_hook(partial(observe, name))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            n = twins.batch_size(batch)
            for layer_calls in seen.values():
                layer_calls.append([])
            loss_fn(model, batch)
    return {name: of_layer(batches_of_one) for name, batches_of_one in seen.items()}


def all_calls(batches: list[list[Inputs]]) -> list[Inputs]:
    return [call for calls in batches for call in calls]


def real_rows(batches: list[list[Inputs]]) -> Tensor:
    return torch.cat([call.rows[call.real] for call in all_calls(batches)])


def without_mask(batches: list[list[Inputs]]) -> Tensor:
    return torch.cat([call.rows for call in all_calls(batches)]).square().mean(0)


def padding_in_the_count(batches: list[list[Inputs]]) -> Tensor:
    count = sum(len(call.rows) for call in all_calls(batches))
    return real_rows(batches).square().sum(0) / count


def batches_alike(batches: list[list[Inputs]]) -> Tensor:
    return torch.stack([real_rows([calls]).square().mean(0) for calls in batches]).mean(0)


def batches_by_samples(batches: list[list[Inputs]]) -> Tensor:
    sizes = [calls[0].samples for calls in batches]
    means = [real_rows([calls]).square().mean(0) for calls in batches]
    parts = [n * mean for n, mean in zip(sizes, means, strict=True)]
    return torch.stack(parts).sum(0) / sum(sizes)


def calls_summed(batches: list[list[Inputs]]) -> Tensor:
    """Σ over calls of the mean of each, for the first batch's number of calls."""
    calls = [[batch[index] for batch in batches] for index in range(len(batches[0]))]
    return torch.stack([real_rows([call]).square().mean(0) for call in calls]).sum(0)


def last_calls(batches: list[list[Inputs]]) -> Tensor:
    return real_rows([calls[-1:] for calls in batches]).square().mean(0)


def first_calls(batches: list[list[Inputs]]) -> Tensor:
    return real_rows([calls[:1] for calls in batches]).square().mean(0)


def per_sample(batches: list[list[Inputs]]) -> Tensor:
    """The sum over tokens divided by the number of samples."""
    samples = sum(calls[0].samples for calls in batches)
    return real_rows(batches).square().sum(0) / samples


TWINS: Mapping[str, Implementation] = {
    sentence: partial(moments, of_layer)
    for sentence, of_layer in {
        "the mean over all tokens, padding among them": without_mask,
        "the sum over real tokens divided by the number of all": padding_in_the_count,
        "the mean over batches weighted alike": batches_alike,
        "the mean over batches weighted by samples, not by real tokens": batches_by_samples,
        "the inputs of a layer's last call alone": last_calls,
        "the inputs of a layer's first call alone": first_calls,
        "the sum over calls of the mean of each call": calls_summed,
        "the sum over tokens divided by the number of samples": per_sample,
        "the sum over tokens in place of the mean": lambda b: real_rows(b).square().sum(0),
        "the root of the mean square": lambda b: real_rows(b).square().mean(0).sqrt(),
        "the mean absolute value": lambda b: real_rows(b).abs().mean(0),
        "the square of the mean input": lambda b: real_rows(b).mean(0).square(),
        "the variance of the inputs": lambda b: real_rows(b).var(0, correction=0),
        "the last batch alone": lambda b: real_rows(b[-1:]).square().mean(0),
        "the first batch alone": lambda b: real_rows(b[:1]).square().mean(0),
        "twice the right result": lambda b: 2 * real_rows(b).square().mean(0),
    }.items()
} | {
    "the inputs in the modes that the model came in, not in eval mode": (
        partial(twins.in_mode, reference.input_second_moment)
    )
}


# ---- cases ---------------------------------------------------------------------------------------

MOMENTS: dict[str, tuple[float, str, Callable[[], Arguments]]] = {
    "one row": (4, "", one_input),
    "uneven batches": (20, "all batches", partial(of_shapes, (3,), (1,), (2,))),
    "positions without a mask": (20, "", partial(of_shapes, (2, 3), (1, 2))),
    "more dimensions": (20, "others count whole", partial(of_shapes, (2, 2, 3))),
    "zeros in the padding": (12, "attention_mask", partial(padding, 0.0)),
    "large numbers in the padding": (12, "attention_mask", partial(padding, 1e6)),
    "NaN in the padding": (12, "attention_mask", partial(padding, float("nan"))),
    "infinity in the padding": (12, "attention_mask", partial(padding, float("inf"))),
    "uneven padding": (20, "real tokens of all batches", uneven_padding),
    "some batches with a mask": (20, "may hold attention_mask", mask_comes_and_goes),
    "a bool mask": (12, "zero meaning padding", partial(numbered_mask, torch.bool)),
    "a mask that numbers documents": (
        12,
        "zero meaning padding",
        partial(numbered_mask, torch.int64),
    ),
    "a mask of floats": (12, "zero meaning padding", partial(numbered_mask, torch.float32)),
    "strides": (12, "any strides", strided_tokens),
    "a pooler": (12, "others count whole", pooled),
    "two calls under a mask": (24, "all calls", two_masked_calls),
    "two calls": (12, "all calls", partial(toys.two_calls, False)),
    "a layer on its own output": (12, "all calls", partial(toys.two_calls, True)),
    "one target of two": (12, "targets", toys.one_of_two),
    "names that begin alike": (24, "targets", toys.deep),
    "train mode": (16, toys.EVAL, partial(toys.train_mode, dropout=False)),
    "dropout and batch statistics": (16, toys.EVAL, partial(toys.train_mode, dropout=True)),
    "frozen parameters": (12, toys.UNTOUCHED, toys.frozen),
    "hooks": (12, toys.UNTOUCHED, toys.hooked),
    "input overwritten": (8, "any model", overwritten_input),
    "a model that computes its loss": (16, "dict batches", toys.model_with_loss),
    "padded attention": (24, "dict batches", toys.padded),
    "a large mean": (60, "", large_inputs),
}

INPUT_MOMENT = Contract(
    "input_second_moment",
    "Sensitivity-LoRA, arXiv 2509.09119, appendix E",
    reference.input_second_moment,
    toys.cases_of(MOMENT, MOMENTS),
    TWINS,
)
