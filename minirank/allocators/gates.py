"""L1RA's gates, apart from their training: the shrinkage, and parameter groups of their own.

How gates shrink is `shrink` here; why they shrink this way is at the top of l1ra.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..layers.lora import LoRALinear
from ..layers.optimizers import Slot, iterates, new_learning_rate, parameter_slots

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


def shrink_in_optimizer(
    gates: Mapping[nn.Parameter, Slot], amount: float, how: Shrinkage = "proximal"
) -> None:
    """`shrink`, for gates and what their optimizers keep beside them.

    Of a schedule-free optimizer both iterates are shrunk, z and the average x. The gate between
    them follows, and is at zero when both are. Shrinking by one amount leaves z − x as it is, so
    the penalty takes as many steps from 1 to 0 as with any other optimizer.

    >>> gate = nn.Parameter(torch.tensor([1.0, 0.125]))
    >>> slot = parameter_slots([torch.optim.SGD([gate], lr=0.1)])[id(gate)]
    >>> with torch.no_grad():
    ...     shrink_in_optimizer({gate: slot}, 0.25)
    >>> gate.detach()
    tensor([0.7500, 0.0000])
    """
    averaged = {gate: iterates(slot, gate) for gate, slot in gates.items()}
    plain: list[Tensor] = [gate for gate, both in averaged.items() if both is None]
    if plain:
        shrink(plain, amount, how)
    for gate, both in averaged.items():
        if both is not None:
            shrink([both.z, both.x], amount, how)
            gate.copy_(torch.lerp(both.z, both.x, both.weight))


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


def gates_into_own_groups(
    optimizers: Sequence[Optimizer], gates: Mapping[str, nn.Parameter], gate_lr: float
) -> dict[Optimizer, list[int]]:
    """Move the gates into new parameter groups, with learning rate `gate_lr` and no weight decay.

    Each optimizer that holds gates beside other parameters gets one new group, whose other options
    are those of its first group that held gates. A group that holds gates only stays as it is, and
    is checked. All optimizers are left unchanged if anything is wrong.

    Returns:
        {optimizer that holds gates: the indices of the groups that do}.

    Raises:
        TypeError: an optimizer is LBFGS, which has one parameter group only.
        ValueError: no optimizer holds a gate, or two hold one; a group of gates has another
            learning rate or a weight decay; or a new group is needed after a scheduler has been
            made.
    """
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        raise TypeError(
            "LBFGS has one parameter group only, and gates need their own: use another optimizer"
        )
    slots = parameter_slots(optimizers)
    for name, gate in gates.items():
        if id(gate) not in slots:
            holder = "the optimizer does" if len(optimizers) == 1 else "the optimizers do"
            raise ValueError(
                f"{holder} not hold the gate of {name!r}: make it after wrap(), from all "
                "parameters that train"
            )
    ids = {id(gate) for gate in gates.values()}
    holders = dict.fromkeys(slots[id(gate)].optimizer for gate in gates.values())
    mixed = {optimizer: _mixed_groups(optimizer, ids, gate_lr) for optimizer in holders}
    for optimizer, groups in mixed.items():
        if groups:
            optimizer.add_param_group(_split_off(groups, ids, gate_lr))
    return {
        optimizer: [i for i, group in enumerate(optimizer.param_groups) if _holds_any(group, ids)]
        for optimizer in holders
    }


def _mixed_groups(optimizer: Optimizer, ids: set[int], gate_lr: float) -> list[dict[str, Any]]:
    """The groups that hold gates and other parameters, after a check of those with gates alone."""
    mixed = []
    for group in optimizer.param_groups:
        if _holds_any(group, ids):
            if _holds_only(group, ids):
                _check_group_of_gates(group, gate_lr)
            else:
                mixed.append(group)
    if mixed and any("initial_lr" in group for group in optimizer.param_groups):
        raise ValueError(
            "a learning-rate scheduler was made for this optimizer, and the gates need one more "
            "parameter group: make L1RA before the scheduler, or give the gates a group yourself"
        )
    return mixed


def _holds_any(group: Mapping[str, Any], ids: set[int]) -> bool:
    return any(id(parameter) in ids for parameter in group["params"])


def _holds_only(group: Mapping[str, Any], ids: set[int]) -> bool:
    return all(id(parameter) in ids for parameter in group["params"])


def _check_group_of_gates(group: Mapping[str, Any], gate_lr: float) -> None:
    """Raise ValueError unless the group trains as gates must."""
    lr = float(group.get("initial_lr", group["lr"]))
    decay = group.get("weight_decay", 0)
    # A tensor's learning rate is often float32.
    if not math.isclose(lr, gate_lr, rel_tol=1e-6) or decay != 0:
        raise ValueError(
            f"the gates' parameter group has lr={lr:g} and weight_decay={decay:g}; gate_lr is "
            f"{gate_lr:g}, and gates must not decay: give that group lr={gate_lr:g} and "
            "weight_decay=0, or leave the gates with other parameters, out of which L1RA takes them"
        )


def _split_off(groups: list[dict[str, Any]], ids: set[int], gate_lr: float) -> dict[str, Any]:
    """Take the parameters with these ids out of their groups, in place, and make a new group."""
    own = {**groups[0], "params": [], "lr": new_learning_rate(groups[0]["lr"], gate_lr)}
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
