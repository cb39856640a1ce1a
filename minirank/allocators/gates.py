"""What L1RA does to gates, apart from training them: shrink them, and keep them in a parameter group of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from ..layers.lora import LoRALinear

Shrinkage = Literal["proximal", "subgradient"]


def shrink(gates: list[Tensor], amount: float, how: Shrinkage = "proximal") -> None:
    """Shrink gates towards zero, in place, by at most `amount` = η_c λ, and clamp them to [0, 1]."""
    if (
        how == "proximal"
    ):  # soft threshold, then clamp: a negative gate comes out at zero either way
        torch._foreach_sub_(gates, amount)
    else:
        for gate in gates:
            gate.sub_(amount * gate.sign() * (gate.abs() > amount))
    torch._foreach_clamp_min_(gates, 0.0)
    torch._foreach_clamp_max_(gates, 1.0)


def check_gates(layers: Mapping[str, LoRALinear], amount: float) -> None:
    """Raise ValueError unless every layer has a trained gate that can shrink by `amount` in its own dtype."""
    if not layers:
        raise ValueError("the model has no gated LoRA layer: wrap(model, ranks, gate=1.0) first")
    for name, layer in layers.items():
        assert layer.gate is not None  # they were chosen so
        if layer.initial_gate == 0:
            raise ValueError(
                f"the gates of {name!r} start from 0, where every rank falls: wrap with gate=1.0"
            )
        if not layer.gate.requires_grad:
            raise ValueError(
                f"the gate of {name!r} does not train: gate.requires_grad_(True), or wrap without gates"
            )
        # Below a quarter of the spacing above 1, rounding takes every shrinkage of a gate near 1 back.
        if 0 < amount < torch.finfo(layer.gate.dtype).eps / 4:
            raise ValueError(
                f"the gates of {name!r} are {layer.gate.dtype}, in which 1 - gate_lr · l1 = 1 - {amount:g} is 1: wrap "
                "with dtype=torch.float32, or take a larger l1"
            )


def gates_into_own_group(
    optimizer: Optimizer, gates: Mapping[str, nn.Parameter], gate_lr: float
) -> list[int]:
    """Move the gates into a new parameter group with learning rate `gate_lr` and no weight decay, its other options
    being those of the group they were in. Groups of nothing but gates stay, and are checked.

    Returns: the indices of the groups that hold gates. Raises as L1RA, before anything has changed.
    """
    groups = optimizer.param_groups
    if isinstance(optimizer, LBFGS):
        raise TypeError(
            "LBFGS knows one parameter group only, and gates need their own: use another optimizer"
        )
    held = {id(p) for group in groups for p in group["params"]}
    for name, gate in gates.items():
        if id(gate) not in held:
            raise ValueError(
                f"the optimizer does not hold the gate of {name!r}: make it after wrap()"
            )
    ids = {id(gate) for gate in gates.values()}
    mixed = []
    for group in groups:
        is_gate = [id(p) in ids for p in group["params"]]
        if any(is_gate) and not all(is_gate):
            mixed.append(group)
        elif any(is_gate):
            lr, decay = float(group.get("initial_lr", group["lr"])), group.get("weight_decay", 0)
            if lr != gate_lr or decay != 0:
                raise ValueError(
                    f"the gates' parameter group has lr={lr:g} and weight_decay={decay:g}; gate_lr is {gate_lr:g}, and "
                    "gates must not decay: make the two agree, or leave the gates with the other parameters"
                )
    if mixed and any("initial_lr" in group for group in groups):
        raise ValueError(
            "a learning-rate scheduler has seen this optimizer, and the gates need a parameter group more: make L1RA "
            "before the scheduler, or give the gates their group yourself"
        )
    if mixed:
        optimizer.add_param_group(_taken_out(mixed, ids, gate_lr))
    return [i for i, group in enumerate(groups) if any(id(p) in ids for p in group["params"])]


def _taken_out(groups: list[dict[str, Any]], ids: set[int], gate_lr: float) -> dict[str, Any]:
    """A new group of the parameters with these ids, which leave their groups."""
    own = {**groups[0], "params": [], "lr": gate_lr}
    named = own.pop("param_names", None) is not None
    if "weight_decay" in own:
        own["weight_decay"] = 0.0
    for group in groups:
        names = group.get("param_names") or [""] * len(group["params"])
        pairs = list(zip(names, group["params"], strict=True))
        own["params"] += [(name, p) if named else p for name, p in pairs if id(p) in ids]
        stay = [(name, p) for name, p in pairs if id(p) not in ids]
        group["params"] = [p for _, p in stay]
        if named:
            group["param_names"] = [name for name, _ in stay]
    return own
