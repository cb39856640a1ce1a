"""L1RA's gates, apart from their training: the shrinkage, and a parameter group of their own.

How gates shrink is `shrink` here; why they shrink this way is at the top of l1ra.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..layers.lora import LoRALinear

Shrinkage = Literal["proximal", "subgradient"]


def shrink(gates: list[Tensor], amount: float, how: Shrinkage = "proximal") -> None:
    """Shrink gates by `amount` = gate_lr · l1, in place, and clamp them to [0, 1].

    "proximal" is the soft threshold: no gate shrinks below zero. "subgradient" leaves gates within
    `amount` of zero alone.

    >>> gates = [torch.tensor([1.0, 0.5, 0.125])]
    >>> shrink(gates, 0.25)
    >>> gates
    [tensor([0.7500, 0.2500, 0.0000])]
    """
    if how == "proximal":
        # The subtraction makes negative gates smaller, and the clamp below brings them to zero.
        torch._foreach_sub_(gates, amount)
    else:
        for gate in gates:
            gate.sub_(amount * gate.sign() * (gate.abs() > amount))
    torch._foreach_clamp_min_(gates, 0.0)
    torch._foreach_clamp_max_(gates, 1.0)


def check_gates(layers: Mapping[str, LoRALinear], amount: float) -> None:
    """Check that every layer has a gate that trains, and that can shrink by `amount`.

    Raises:
        ValueError: there is no layer, or a layer's gate starts from 0, is frozen, or has a dtype in
            which 1 − amount is 1.
    """
    if not layers:
        raise ValueError("the model has no gated LoRA layer: wrap(model, ranks, gate=1.0) first")
    for name, layer in layers.items():
        assert layer.gate is not None  # L1RA passes gated layers only
        if layer.initial_gate == 0:
            raise ValueError(
                f"the gates of {name!r} start from 0, where every rank is pruned: "
                "wrap with gate=1.0"
            )
        if not layer.gate.requires_grad:
            raise ValueError(
                f"the gate of {name!r} does not train: gate.requires_grad_(True), "
                "or wrap without gates"
            )
        # Near 1, a step below eps/4 is rounded away.
        if 0 < amount < torch.finfo(layer.gate.dtype).eps / 4:
            raise ValueError(
                f"the gates of {name!r} are {layer.gate.dtype}, in which 1 - gate_lr · l1 = "
                f"1 - {amount:g} is 1: wrap with dtype=torch.float32, or take a larger l1"
            )


def gates_into_own_group(
    optimizer: Optimizer, gates: Mapping[str, nn.Parameter], gate_lr: float
) -> list[int]:
    """Move the gates into a new parameter group, with learning rate `gate_lr` and no weight decay.

    The new group's other options are those of the first group that held gates. A group that holds
    gates only stays as it is, and is checked. The optimizer is left unchanged if anything is wrong.

    Returns:
        The indices of the groups that hold gates.

    Raises:
        TypeError: the optimizer is LBFGS, which has one parameter group only.
        ValueError: the optimizer does not hold a gate, a group of gates has another learning rate
            or a weight decay, or a new group is needed after a scheduler has been made.
    """
    groups = optimizer.param_groups
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS has one parameter group only, and gates need their own: use another optimizer"
        )
    held = {id(p) for group in groups for p in group["params"]}
    for name, gate in gates.items():
        if id(gate) not in held:
            raise ValueError(
                f"the optimizer does not hold the gate of {name!r}: make it after wrap()"
            )
    gate_ids = {id(gate) for gate in gates.values()}
    mixed = []  # groups that hold gates and other parameters
    for group in groups:
        if _holds_any(group, gate_ids):
            if _holds_only(group, gate_ids):
                _check_group_of_gates(group, gate_lr)
            else:
                mixed.append(group)
    if mixed and any("initial_lr" in group for group in groups):
        raise ValueError(
            "a learning-rate scheduler was made for this optimizer, and the gates need one more "
            "parameter group: make L1RA before the scheduler, or give the gates a group yourself"
        )
    if mixed:
        optimizer.add_param_group(_split_off(mixed, gate_ids, gate_lr))
    return [i for i, group in enumerate(groups) if _holds_any(group, gate_ids)]


def _holds_any(group: Mapping[str, Any], ids: set[int]) -> bool:
    return any(id(parameter) in ids for parameter in group["params"])


def _holds_only(group: Mapping[str, Any], ids: set[int]) -> bool:
    return all(id(parameter) in ids for parameter in group["params"])


def _check_group_of_gates(group: Mapping[str, Any], gate_lr: float) -> None:
    """Raise ValueError unless the group trains as gates must."""
    lr = float(group.get("initial_lr", group["lr"]))
    decay = group.get("weight_decay", 0)
    if lr != gate_lr or decay != 0:
        raise ValueError(
            f"the gates' parameter group has lr={lr:g} and weight_decay={decay:g}; gate_lr is "
            f"{gate_lr:g}, and gates must not decay: make the two agree, or leave the gates with "
            "the other parameters"
        )


def _split_off(groups: list[dict[str, Any]], ids: set[int], gate_lr: float) -> dict[str, Any]:
    """Take the parameters with these ids out of their groups, in place, and make a new group."""
    own = {**groups[0], "params": [], "lr": gate_lr}
    named = own.pop("param_names", None) is not None
    if "weight_decay" in own:
        own["weight_decay"] = 0.0
    for group in groups:
        names = group.get("param_names") or [""] * len(group["params"])
        pairs = list(zip(names, group["params"], strict=True))
        own["params"] += [(name, p) if named else p for name, p in pairs if id(p) in ids]
        staying = [(name, p) for name, p in pairs if id(p) not in ids]
        group["params"] = [p for _, p in staying]
        if named:
            group["param_names"] = [name for name, _ in staying]
    return own
