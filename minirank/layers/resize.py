"""Change the ranks of LoRA layers in the middle of training, the optimizer's state with them.

A new rank starts as in a new layer (`LoRALinear.initial_ranks`), and contributes exactly zero:

    start of the gates    row of A             column of B    gate
    none (plain LoRA)     uniform, ±1/√d_in    0              –
    above 0 (L1RA: 1)     N(0, 1/r_ref²)       0              the start
    0 (ShapLoRA)          N(0, 0.02²)          N(0, 0.02²)    0

The optimizer's moments of a new rank are zero. The iterate z of a schedule-free optimizer starts
where the new rank does (optimizers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import as_generator, is_integer
from ..placement import require_here, require_unsharded
from .hints import did_you_mean
from .lora import RANK_DIM, LoRALinear
from .names import plain_name
from .optimizer_state import carried_state, select_ranks, survivors_then_zeros
from .optimizers import Optimizers, Slot, as_optimizers, parameter_slots, start_iterates
from .replaced import note_replaced
from .targets import first_names
from .wrap import AllocationLike, lora_layers, ranks_by_name


class Resized(NamedTuple):
    """What `resize` did to one layer."""

    old_rank: int
    new_rank: int
    keep: Tensor  # bool (old_rank,): the survivors, which now come first, in their old order
    state_reset: tuple[str, ...]  # optimizer entries that cannot be sliced; see `resize`


@torch.inference_mode(False)  # parameters made in inference mode could not train
def resize(
    model: nn.Module,
    ranks: Mapping[str, int] | AllocationLike,
    optimizer: Optimizers | None = None,
    *,
    generator: torch.Generator | int = 0,
) -> dict[str, Resized]:
    """Give LoRA layers the ranks of an Allocation or of {name: rank}.

    The survivors are those of the Allocation's `keep` masks. Without masks they are the ranks that
    contribute most to ΔW (`LoRALinear.contributions`; among equals the earlier). New ranks
    contribute exactly zero, so growing keeps the function. `scaling` stays. At rank 0 the layer
    stays in place, computes what its base computes, and can grow again.

    A parameter that changes its shape is a new nn.Parameter. `optimizer` gets it in the old one's
    place, with the moments and gradients of surviving ranks bit for bit and zeros for new ranks.
    An optimizer that is in use but not given here keeps the old parameters, and its next step
    raises RuntimeError, since the new ones would not train. If the shape of an optimizer's entry
    does not tell which axis counts ranks, or the entry is quantised (8-bit optimizers), that
    parameter's state is reset, and `Resized.state_reset` names the entry.

    Args:
        model: holds LoRA layers. Layers that are not named stay as they are.
        ranks: an Allocation, or {name: rank}, 0 ≤ rank ≤ min(d_in, d_out).
        optimizer: the one that trains the layers, or a list of those that do.
        generator: a torch.Generator or a seed, for the new ranks.

    Returns: what happened, for the layers that changed.

    Raises:
        ValueError: an unknown name, a rank out of range, a merged layer, masks that do not fit, an
            optimizer that does not hold a layer's parameters, two optimizers that hold one, or two
            layers that share one. Model and optimizer are left unchanged.
        TypeError: `optimizer` is no torch.optim.Optimizer and no list of them, or one that keeps
            averaged parameters in an unknown way.

    >>> from minirank import resize, wrap
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> layers = wrap(model, {"0": 4, "1": 1})
    >>> optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    >>> resized = resize(model, {"0": 3, "1": 2}, optimizer)
    >>> {name: (change.old_rank, change.new_rank) for name, change in resized.items()}
    {'0': (4, 3), '1': (1, 2)}
    """
    generator = as_generator(generator)
    optimizers = as_optimizers(optimizer)
    slots = parameter_slots(optimizers) if optimizers else None
    changes: dict[str, _Change] = {}
    for name, (layer, rank, keep) in _requested(model, ranks).items():
        if rank != layer.rank or not keep.all():
            added = rank - int(keep.sum())
            parameters = resized_parameters(layer, keep, added, generator=generator)
            changes[name] = _Change(layer, keep, parameters)
    for name, change in changes.items():
        _carry_gradients(change)
        if slots is not None:
            _carry_optimizer_state(name, change, slots)
    resized = {name: change.summary() for name, change in changes.items()}
    for change in changes.values():
        _put_in(change, slots or {})
    return resized


def resized_parameters(
    layer: LoRALinear, keep: Tensor, add: int = 0, *, generator: torch.Generator | int = 0
) -> dict[str, nn.Parameter]:
    """The parameters that `layer` would have with other ranks; the layer is left unchanged.

    Args:
        keep: bool (r,), the ranks that survive, in their order.
        add: number of new ranks after them, started as the table at the top of this file says.
            They contribute exactly zero, so that growing leaves the function as it is.
        generator: a torch.Generator or a seed, for the new ranks.

    Raises:
        ValueError: a mask or a number of ranks that does not fit.

    >>> layer = LoRALinear(nn.Linear(8, 4), rank=2)
    >>> new = resized_parameters(layer, torch.tensor([False, True]), add=2)
    >>> new["lora_A"].shape, torch.equal(new["lora_A"][0], layer.lora_A[1])
    (torch.Size([3, 8]), True)
    """
    if keep.dtype != torch.bool or keep.shape != (layer.rank,):
        raise ValueError(
            f"keep must be bool of shape ({layer.rank},), got {keep.dtype} of shape "
            f"{tuple(keep.shape)}"
        )
    new_rank, limit = int(keep.sum()) + add, min(layer.in_features, layer.out_features)
    if add < 0 or new_rank > limit:
        raise ValueError(
            f"add={add} would give rank {new_rank}; expected add ≥ 0 and a rank of at most {limit}"
        )
    dtype, device = layer.lora_A.dtype, layer.lora_A.device
    result = {}
    for name, new in layer.initial_ranks(add, dtype, device, as_generator(generator)).items():
        old, axis = layer.get_parameter(name), RANK_DIM[name]
        value = torch.cat([select_ranks(old.detach(), axis, keep), new], axis)
        result[name] = nn.Parameter(value, requires_grad=old.requires_grad)
    return result


def separate_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """`lora_layers`, none of which shares a parameter with another.

    Raises ValueError if two of them do, since the ranks of one would be the ranks of the other; and
    if a parameter is sharded or has no values here.

    >>> separate_layers(nn.Sequential(nn.Linear(4, 2)))
    {}
    """
    require_unsharded(model)
    layers = lora_layers(model)
    owners: dict[nn.Parameter, str] = {}
    for name, layer in layers.items():
        own = dict(layer.named_parameters(recurse=False))
        require_here(name, own, "a change of ranks")
        for key, parameter in own.items():
            owner = owners.setdefault(parameter, name)
            if owner != name:
                raise ValueError(
                    f"{owner!r} and {name!r} share their {key}, so that a rank of one is a rank of "
                    "the other: give each its own parameter, or use one module in both places"
                )
    return layers


# ---- what is asked for --------------------------------------------------------------------------


def _requested(
    model: nn.Module, ranks: Mapping[str, int] | AllocationLike
) -> dict[str, tuple[LoRALinear, int, Tensor]]:
    """{first name: (layer, new rank, its survivors)}, checked."""
    masks: Mapping[str, Tensor] = getattr(ranks, "keep", None) or {}
    layers, first = separate_layers(model), first_names(model)
    requested: dict[str, tuple[LoRALinear, int, Tensor]] = {}
    for alias, rank in ranks_by_name(ranks).items():
        name = first.get(plain_name(alias, first), alias)
        if name not in layers:
            if name in first and rank == 0:
                continue  # wrap() left it plain
            raise ValueError(f"{alias!r} has no adapter to resize: {_hint(alias, layers, first)}")
        layer = layers[name]
        _require_resizable(alias, layer, rank)
        keep = masks[alias] if alias in masks else _largest(layer.contributions(), rank)
        _require_fitting_mask(alias, keep, layer.rank, rank)
        if name in requested and requested[name][1] != rank:
            raise ValueError(
                f"{alias!r} and {name!r} are one module, but got ranks {rank} and "
                f"{requested[name][1]}: give it one rank"
            )
        requested[name] = layer, rank, keep
    return requested


def _hint(alias: str, layers: Mapping[str, LoRALinear], first: Mapping[str, str]) -> str:
    if layers and alias not in first:
        return did_you_mean(alias, layers)
    return "wrap() puts one in"


def _require_resizable(alias: str, layer: LoRALinear, rank: int) -> None:
    limit = min(layer.in_features, layer.out_features)
    if not is_integer(rank, 0, limit):
        raise ValueError(f"rank of {alias!r}: expected an integer from 0 to {limit}, got {rank!r}")
    if layer.merged:
        raise ValueError(f"{alias!r} is merged: unmerge() the model before resizing it")


def _require_fitting_mask(alias: str, keep: Tensor, old_rank: int, rank: int) -> None:
    if keep.shape != (old_rank,) or int(keep.sum()) > rank:
        raise ValueError(
            f"the keep mask of {alias!r} has shape {tuple(keep.shape)} and {int(keep.sum())} "
            f"survivors; expected shape ({old_rank},) and at most {rank}: score and allocate again "
            "after a resize"
        )


def _largest(values: Tensor, count: int) -> Tensor:
    """A bool mask of the `count` largest values, the earlier among equals, NaN last."""
    keep = torch.zeros(values.shape, dtype=torch.bool, device="cpu")
    broken_last = values.cpu().nan_to_num(nan=-1.0)
    keep[torch.sort(broken_last, descending=True, stable=True).indices[:count]] = True
    return keep


# ---- the change ---------------------------------------------------------------------------------


@dataclass
class _Change:
    """One layer's new parameters, and what the optimizer will know of them."""

    layer: LoRALinear
    keep: Tensor  # bool (old rank,)
    parameters: dict[str, nn.Parameter]
    states: dict[str, dict[str, Any]] = field(default_factory=dict)  # where an optimizer holds them
    state_reset: list[str] = field(default_factory=list)

    @property
    def new_rank(self) -> int:
        return self.parameters["lora_A"].shape[RANK_DIM["lora_A"]]

    def summary(self) -> Resized:
        return Resized(self.layer.rank, self.new_rank, self.keep, tuple(self.state_reset))


def _carry_gradients(change: _Change) -> None:
    if change.new_rank == 0:
        return  # with an empty gradient, optimizers would count steps or divide by zero
    for key, new in change.parameters.items():
        gradient = change.layer.get_parameter(key).grad
        if gradient is not None:
            new.grad = survivors_then_zeros(gradient, RANK_DIM[key], change.keep, change.new_rank)


def _carry_optimizer_state(
    name: str,
    change: _Change,
    slots: Mapping[int, Slot],
) -> None:
    for key, new in change.parameters.items():
        old, axis = change.layer.get_parameter(key), RANK_DIM[key]
        if id(old) in slots:
            slot = slots[id(old)]
            change.states[key], lost = carried_state(
                slot.optimizer.state.get(old, {}), old.shape, axis, change.keep, change.new_rank
            )
            start_iterates(slot, change.states[key], new, axis, int(change.keep.sum()))
            change.state_reset += [f"{key}.{entry}" for entry in lost]
        elif old.requires_grad:  # the user need not have given a frozen one to the optimizer
            raise ValueError(
                f"the optimizer does not hold {name}.{key}: make it after wrap(), from "
                "model.parameters()"
            )


def _put_in(change: _Change, slots: Mapping[int, Slot]) -> None:
    """Put the new parameters into the layer and, with their states, into their optimizers."""
    for key, new in change.parameters.items():
        old = change.layer.get_parameter(key)
        setattr(change.layer, key, new)
        note_replaced([(change.layer, key)], old)
        if key in change.states:
            slot = slots[id(old)]
            slot.group["params"][slot.place] = new
            slot.optimizer.state.pop(old, None)
            if change.states[key]:
                slot.optimizer.state[new] = change.states[key]
