"""resize: ranks pruned and added in the middle of a training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..case import Arguments, CaseSpec, Implementation
from ..comparison import Bits, Rule
from .layouts import View, normal, plain, transposed, with_gaps

RESIZE = "ranks that stay keep their moments, new ones start with B = 0"

STATES = ("A", "B", "gate")
MOMENTS = ("exp_avg", "exp_avg_sq")
RANK_DIM = {"A": 0, "B": 1, "gate": 0}


def resize_arguments(
    keep: Sequence[int], add: int, d_in: int = 7, d_out: int = 6, view: View = plain
) -> Arguments:
    """Ranks with distinct numbers; some are −0.0 or tiny, which arithmetic would not return."""
    shapes = {"A": (len(keep), d_in), "B": (d_out, len(keep)), "gate": (len(keep),)}
    layer: dict[str, Any] = {"scaling": 1.7, "step": 37}
    for seed, part in enumerate(("values", *MOMENTS)):
        tensors = {}
        for key, shape in shapes.items():
            tensor = normal(*shape, seed=20 + 3 * seed + len(shape) + (key == "B"))
            tensor = tensor.square() * 1e-3 if part == "exp_avg_sq" else tensor
            if part == "values" and key == "B":
                tensor[:2] = -0.0
            if part == "values" and key == "gate":
                tensor[::2] *= 1e-12
            if part == "exp_avg" and key == "A":
                tensor[:, 0] *= 1e-30
            tensors[key] = view(tensor)
        layer |= tensors if part == "values" else {part: tensors}
    return Arguments((layer, torch.tensor(keep, dtype=torch.bool), add))


def flat(layer: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"A": …, …, "exp_avg of A": …}, ranks first in each tensor."""
    parts = {key: layer[key] for key in STATES}
    parts |= {f"{moment} of {key}": layer[moment][key] for moment in MOMENTS for key in STATES}
    return {
        name: tensor.detach().cpu().movedim(RANK_DIM[name.rpartition(" ")[2]], 0)
        for name, tensor in parts.items()
    }


def resized(implementation: Implementation, arguments: Arguments) -> Any:
    old, keep, add = arguments.positional
    held = identities(old)
    with torch.random.fork_rng(devices=()):
        new = implementation(old, keep, add)
    left = identities(old) == held
    return described(new, flat(old)["A"][keep.cpu()]) | {
        "dict given": Rule(left, "left as it was", "as it was" if left else "other values in it")
    }


def prune_then_add(implementation: Implementation, arguments: Arguments) -> Any:
    """A resize of what a resize gave."""
    old, keep, add = arguments.positional
    with torch.random.fork_rng(devices=()):
        pruned = implementation(old, keep, 0)
        everything = torch.ones(len(pruned["A"]), dtype=torch.bool, device=keep.device)
        new = implementation(pruned, everything, add)
    return described(new, flat(old)["A"][keep.cpu()])


def identities(layer: Mapping[str, Any]) -> list[int]:
    """Of all values in the dict, and in the dicts of moments."""
    values = [*layer.values(), *(value for m in MOMENTS for value in layer[m].values())]
    return [id(value) for value in values]


def described(new: Mapping[str, Any], survivors: Tensor) -> dict[str, Any]:
    """What of a resized layer is compared: `survivors` in their old order, then the new ranks.

    Args:
        survivors: their rows of A.
    """
    tensors = flat(new)
    ranks = {name: len(tensor) for name, tensor in tensors.items()}
    outcome: dict[str, Any] = {
        "ranks": ranks,
        "scaling": float(new["scaling"]),
        "step": int(new["step"]),
    }
    order = ranks_in_order(survivors, tensors["A"])
    if set(ranks.values()) != {len(order)}:
        return outcome
    kept, added = order[: len(survivors)], order[len(survivors) :]
    for name, tensor in tensors.items():
        outcome[f"{name} of ranks that stay"] = Bits(tensor[kept])
        if name == "A":
            outcome["A of new ranks"] = random_rows(tensor[added])
        else:
            outcome[f"{name} of new ranks"] = tensor[added]
    return outcome


def ranks_in_order(survivors: Tensor, A: Tensor) -> list[int]:
    """The places of the survivors' rows in A, in the survivors' order, then all other places."""
    places: list[int] = []
    for row in survivors:
        equal = [i for i in range(len(A)) if i not in places and torch.equal(A[i], row)]
        if not equal:
            return list(range(len(A)))
        places.append(equal[0])
    return places + [i for i in range(len(A)) if i not in places]


def random_rows(rows: Tensor) -> Rule:
    expected = "finite random rows, no two of which are equal or multiples"
    if not len(rows):
        return Rule(True, expected, expected)
    norms = rows.double().norm(dim=1, keepdim=True)
    if not (torch.isfinite(norms).all() and (norms > 0).all()):
        return Rule(False, expected, "a row of zeros, or one that is not finite")
    if any(len(row.unique()) == 1 for row in rows):
        return Rule(False, expected, "a row of equal entries")
    cosines = ((rows.double() / norms) @ (rows.double() / norms).T).fill_diagonal_(0).abs()
    if (cosines > 1 - 1e-6).any():
        return Rule(False, expected, "rows that are multiples of one another")
    return Rule(True, expected, expected)


def global_generator(implementation: Implementation, arguments: Arguments) -> Any:
    """Do new ranks follow torch.manual_seed, and does the generator advance?"""
    with torch.random.fork_rng(devices=()):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn += [flat(implementation(*arguments.positional))["A"].clone() for _ in range(2)]
    first, second, again, _, other, _ = drawn
    same, advanced, depends = (torch.equal(first, x) for x in (again, second, other))
    return {
        "A of equal seeds": Rule(same, "equal", "equal" if same else "other numbers"),
        "A of a second call": Rule(not advanced, "other numbers", "equal" if advanced else "other"),
        "A of another seed": Rule(not depends, "other numbers", "equal" if depends else "other"),
    }


def resize_case(name: str, keep: Sequence[int], add: int, **options: Any) -> CaseSpec:
    observe = options.pop("observe", resized)
    arguments = partial(resize_arguments, keep, add, **options)
    return CaseSpec(name, RESIZE, arguments, observe)


RESIZES = (
    resize_case("rank 1, nothing changes", (1,), 0),
    resize_case("rank 1, pruned to 0", (0,), 0),
    resize_case("rank 0 grows", (), 2),
    resize_case("rank 0 stays", (), 0),
    resize_case("the first is pruned", (0, 1, 1), 0),
    resize_case("the last is pruned", (1, 1, 0), 0),
    resize_case("some are pruned", (1, 0, 0, 1, 1), 0),
    resize_case("one is added", (1, 1, 1), 1),
    resize_case("three are added", (1, 1), 3),
    resize_case("pruned and added", (0, 1, 0, 1, 0), 2),
    resize_case("pruned and added, as many", (0, 1, 1, 0), 2),
    resize_case("all are replaced", (0, 0, 0), 3),
    resize_case("square", (1, 0, 1, 0, 1), 2, d_in=5, d_out=5),
    resize_case("tensors transposed", (1, 0, 1, 0, 1), 1, view=transposed),
    resize_case("tensors with gaps", (1, 0, 1, 0, 1), 1, view=with_gaps),
    resize_case("twice", (0, 1, 1, 0), 2, observe=prune_then_add),
    resize_case("the global generator decides", (1, 0), 2, observe=global_generator),
)


def resize_twin(change: Callable[..., dict[str, Any]]) -> Implementation:
    """The reference's outcome, changed: change(new, old, keep, add) -> what replaces its parts."""

    def twin(layer, keep, add):  # type: ignore[no-untyped-def]
        new = reference.resize(layer, keep, add)
        return {**new, **change(new, layer, keep, add)}

    return twin


def zeroed(part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in part.items()}


def first_ranks(part: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`part` cut, or filled up with zeros, to the ranks of `like`, with no regard to which stay."""
    result = zeroed(like)
    for key, value in part.items():
        to, source = (t.movedim(RANK_DIM[key], 0) for t in (result[key], value))
        count = min(len(to), len(source))
        to[:count] = source[:count]
    return result


def new_ranks_with(key: str, number: float | None, parts: Sequence[str] = ("",)) -> Implementation:
    """New ranks whose `key` is `number`, or random for None, in the values or in moments."""

    def change(new: dict[str, Any], old: dict[str, Any], keep: Tensor, add: int) -> dict[str, Any]:
        changed: dict[str, Any] = {}
        for part in parts:
            whole = new[part] if part else new
            value = whole[key].clone()
            rows = value.movedim(RANK_DIM[key], 0)[len(value.movedim(RANK_DIM[key], 0)) - add :]
            rows.normal_() if number is None else rows.fill_(number)
            changed |= {part: {**whole, key: value}} if part else {key: value}
        return changed

    return resize_twin(change)


RESIZE_TWINS: dict[str, Implementation] = {
    f"the resized layer {sentence}": twin
    for sentence, twin in {
        "with all moments at zero": resize_twin(
            lambda new, old, keep, add: {moment: zeroed(new[moment]) for moment in MOMENTS}
        ),
        "with exp_avg_sq at zero": resize_twin(
            lambda new, old, keep, add: {"exp_avg_sq": zeroed(new["exp_avg_sq"])}
        ),
        "with exp_avg at zero": resize_twin(
            lambda new, old, keep, add: {"exp_avg": zeroed(new["exp_avg"])}
        ),
        "with the moments of the first ranks, not of those that stay": resize_twin(
            lambda new, old, keep, add: {m: first_ranks(old[m], new[m]) for m in MOMENTS}
        ),
        "with the step at 0": resize_twin(lambda new, old, keep, add: {"step": 0}),
        "with moments and step at 0": resize_twin(
            lambda new, old, keep, add: {"step": 0, **{m: zeroed(new[m]) for m in MOMENTS}}
        ),
        "with its scaling computed anew as alpha / r": resize_twin(
            lambda new, old, keep, add: {"scaling": old["scaling"] * len(keep) / len(new["A"])}
        ),
        "with the scaling of 1": resize_twin(lambda new, old, keep, add: {"scaling": 1.0}),
        "with gates of all ranks at 1": resize_twin(
            lambda new, old, keep, add: {"gate": torch.ones_like(new["gate"])}
        ),
        "with the gates of the first ranks, not of those that stay": resize_twin(
            lambda new, old, keep, add: {
                "gate": torch.cat([old["gate"][: int(keep.sum())], new["gate"][int(keep.sum()) :]])
            }
        ),
        "with new gates at 0": new_ranks_with("gate", 0.0),
        "with new rows of A at 0": new_ranks_with("A", 0.0),
        "with the ranks that `keep` prunes": lambda layer, keep, add: reference.resize(
            layer, ~keep, add
        ),
        "without new ranks": lambda layer, keep, add: reference.resize(layer, keep, 0),
        "without pruning": lambda layer, keep, add: reference.resize(
            layer, torch.ones_like(keep), add
        ),
        "with the first ranks, not those that `keep` names": lambda layer, keep, add: (
            reference.resize(layer, torch.arange(len(keep)).to(keep.device) < keep.sum(), add)
        ),
    }.items()
}
