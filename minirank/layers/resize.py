"""Change the ranks of LoRA layers in the middle of training, the optimizer's state with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..checks import as_generator, is_integer
from .lora import RANK_DIM, LoRALinear, select_ranks
from .targets import close_names, first_names
from .wrap import HasRanks, lora_layers, plain_ranks


class Resized(NamedTuple):
    """What `resize` did to one layer."""

    old_rank: int
    new_rank: int
    keep: Tensor  # bool (old_rank,): the survivors, which now come first, in their old order
    state_reset: tuple[
        str, ...
    ]  # optimizer entries that could not be sliced, so that their parameter starts afresh


@torch.inference_mode(False)
def resize(
    model: nn.Module,
    ranks: Mapping[str, int] | HasRanks,
    optimizer: Optimizer | None = None,
    *,
    generator: torch.Generator | int = 0,
) -> dict[str, Resized]:
    """Give LoRA layers the ranks of an Allocation or of {name: rank}; layers that are not named stay as they are.

    Survivors are those of the Allocation's `keep` masks; without masks, the ranks that contribute most to ΔW
    (`LoRALinear.contributions`; ties: the earlier). New ranks contribute exactly zero, so growing keeps the function,
    and shrinking takes away the pruned ranks' own contribution. `scaling` does not change. At rank 0 the layer stays,
    as the base function, without gradients, and can grow again.

    Parameters change shape, so each changed one is a new nn.Parameter. `optimizer` gets it in the old one's place; one
    that is in use but not given here would keep the old parameters, and the new ones would not train. Moments and
    gradients of surviving ranks are carried over bit for bit, those of new ranks are zero. Scalars such as the step
    count stay, and so do averages over ranks (one of Adafactor's two factors). A parameter with an entry whose shape
    does not say where its ranks are starts afresh, and `Resized.state_reset` names the entry.

    Returns: what happened, for the layers that changed.

    Raises ValueError: unknown name, a rank out of range, a merged layer, masks that do not fit, an optimizer that does
    not hold a layer's parameters, or two layers that share one. Nothing has changed then.
    """
    generator = as_generator(generator)
    plan: dict[str, tuple[LoRALinear, Tensor, dict[str, nn.Parameter]]] = {}
    for name, (layer, rank, keep) in _wanted(model, ranks).items():
        if rank != layer.rank or not keep.all():
            plan[name] = (
                layer,
                keep,
                layer.resized(keep, rank - int(keep.sum()), generator=generator),
            )

    places = {
        id(p): (group["params"], i)
        for group in (optimizer.param_groups if optimizer else [])
        for i, p in enumerate(group["params"])
    }
    report: dict[str, Resized] = {}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    for name, (layer, keep, parameters) in plan.items():
        reset: list[str] = []
        rank = parameters["lora_A"].shape[0]
        for key, new in parameters.items():
            old = layer.get_parameter(key)
            if (
                old.grad is not None and rank > 0
            ):  # with an empty one, optimizers would count steps, or divide by zero
                new.grad = _carry(old.grad, RANK_DIM[key], keep, rank)
            if optimizer is None:
                continue
            if id(old) not in places:
                if not old.requires_grad:
                    continue  # frozen by the user, who need not have given it to the optimizer
                raise ValueError(
                    f"the optimizer does not hold {name}.{key}: make it after wrap(), from model.parameters()"
                )
            states[new], lost = _carry_state(
                optimizer.state.get(old, {}), old, RANK_DIM[key], keep, rank
            )
            reset += [f"{key}.{entry}" for entry in lost]
        report[name] = Resized(layer.rank, rank, keep, tuple(reset))

    for layer, _, parameters in plan.values():
        for key, new in parameters.items():
            old = layer.get_parameter(key)
            setattr(layer, key, new)
            if optimizer is not None and new in states:
                group, index = places[id(old)]
                group[index] = new
                optimizer.state.pop(old, None)
                if states[new]:
                    optimizer.state[new] = states[new]
    return report


def separate_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """`lora_layers`. Raises ValueError if two of them share a parameter, so that the ranks of one are the other's."""
    layers = lora_layers(model)
    owners: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        for key, parameter in layer.named_parameters(recurse=False):
            owner = owners.setdefault(parameter, name)
            if owner != name:
                raise ValueError(
                    f"{owner!r} and {name!r} share their {key}, so that their ranks are no ranks of their own: give "
                    "each its own parameter, or use one module in both places"
                )
    return layers


def _wanted(
    model: nn.Module, ranks: Mapping[str, int] | HasRanks
) -> dict[str, tuple[LoRALinear, int, Tensor]]:
    masks: Mapping[str, Tensor] = getattr(ranks, "keep", None) or {}
    layers = separate_layers(model)
    first = first_names(model)
    wanted: dict[str, tuple[LoRALinear, int, Tensor]] = {}
    for alias, rank in plain_ranks(ranks).items():
        name = first.get(alias, alias)
        layer = layers.get(name)
        if layer is None:
            if name in first and rank == 0:
                continue  # wrap() left it plain
            hint = (
                close_names(alias, layers)
                if layers and alias not in first
                else "wrap() puts one in"
            )
            raise ValueError(f"{alias!r} has no adapter to resize: {hint}")
        limit = min(layer.in_features, layer.out_features)
        if not is_integer(rank, 0, limit):
            raise ValueError(
                f"rank of {alias!r}: expected an integer from 0 to {limit}, got {rank!r}"
            )
        if layer.merged:
            raise ValueError(f"{alias!r} is merged: unmerge() the model before resizing it")
        keep = masks[alias] if alias in masks else _largest(layer.contributions(), rank)
        if keep.shape != (layer.rank,) or int(keep.sum()) > rank:
            raise ValueError(
                f"the keep mask of {alias!r} has shape {tuple(keep.shape)} and {int(keep.sum())} survivors; expected "
                f"shape ({layer.rank},) and at most {rank}: score and allocate again after a resize"
            )
        if name in wanted and wanted[name][1] != rank:
            raise ValueError(
                f"{alias!r} and {name!r} are one module, but got ranks {rank} and {wanted[name][1]}"
            )
        wanted[name] = layer, rank, keep
    return wanted


def _largest(values: Tensor, count: int) -> Tensor:
    keep = torch.zeros(values.shape, dtype=torch.bool, device="cpu")
    broken_last = values.cpu().nan_to_num(nan=-1.0)
    keep[torch.sort(broken_last, descending=True, stable=True).indices[:count]] = True
    return keep


def _carry(value: Tensor, dim: int, keep: Tensor, new_rank: int) -> Tensor:
    """The survivors of `value` along `dim`, then zeros up to the new rank."""
    kept = select_ranks(value, dim, keep)
    result = value.new_zeros([new_rank if d == dim else size for d, size in enumerate(value.shape)])
    result.narrow(dim, 0, kept.shape[dim]).copy_(kept)
    return result


def _carry_state(
    state: Mapping[str, Any], old: Tensor, dim: int, keep: Tensor, new_rank: int
) -> tuple[dict[str, Any], list[str]]:
    """(new state, entries that could not be carried). An optimizer expects all of its entries or none, so one that
    cannot be carried resets the parameter's state."""
    carried: dict[str, Any] = {}
    lost: list[str] = []
    for key, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            carried[key] = value
            if isinstance(value, list | tuple | dict):  # LBFGS's history of flat vectors, say
                lost.append(key)
            continue
        axes = _rank_axes(key, value.shape, old.shape, dim)
        if len(axes) != 1:
            lost.append(key)
        else:
            axis = axes.pop()
            carried[key] = value if axis is None else _carry(value, axis, keep, new_rank)
    return ({}, lost) if lost else (carried, [])


# torch.optim.Adafactor's factored second moment: means over the other axis of the parameter, which they keep at size 1.
# At rank 1 their shapes alone could not be told from a full moment's.
FACTORS = {"row_var": 0, "col_var": 1}


def _rank_axes(key: str, shape: torch.Size, parameter: torch.Size, dim: int) -> set[int | None]:
    """The axes of an optimizer entry that may count the ranks, None for "it has no such axis"; one if that is sure.

    An entry is taken for a full moment, or for a statistic that keeps some axes of the parameter and has averaged the
    others away (to size 1, or dropped). One that has averaged over the ranks does not depend on their number.
    """
    if key in FACTORS and len(shape) == len(parameter) == 2:
        return {dim if FACTORS[key] == dim else None}
    if shape == parameter:
        return {dim}
    if len(shape) == len(parameter):
        fits = all(size in (1, full) for size, full in zip(shape, parameter, strict=True))
        if not fits or parameter[dim] == 1:
            return set()
        return {dim if shape[dim] == parameter[dim] else None}
    if len(shape) == 1:  # one number per entry of one axis
        return {
            0 if axis == dim else None for axis, size in enumerate(parameter) if size == shape[0]
        }
    return set()
