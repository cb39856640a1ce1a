"""What an allocation must keep to: the budget and its unit, what a rank costs, and the bounds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, get_args

from torch import nn

from ..checks import is_integer, quoted_names, require
from ..layers.hints import did_you_mean
from ..layers.names import with_plain_names
from ..layers.targets import layer_shape, modules_and_stacks, rank_cost
from .allocation import Unit

Bound = int | Mapping[str, int] | None  # for all modules, or by name


class Constraints(NamedTuple):
    """What an allocation must keep to. The mappings hold every scored module, in order."""

    budget: int
    unit: Unit
    costs: dict[str, int]  # trainable parameters of one rank: d_out + d_in, for each expert
    lower: dict[str, int]
    upper: dict[str, int]  # at most min(d_out, d_in)

    @property
    def budget_costs(self) -> dict[str, int] | None:
        """What one rank takes from the budget, as `minirank.budget` wants it: None means 1."""
        return None if self.unit == "ranks" else self.costs


def check_unit(unit: object) -> None:
    """Raise ValueError unless `unit` is one of `Unit`."""
    expected = " or ".join(map(repr, get_args(Unit)))
    require(unit in get_args(Unit), "unit", unit, expected)


def constraints_for(
    model: nn.Module,
    names: Iterable[str],
    budget: int,
    unit: Unit,
    min_rank: Bound,
    max_rank: Bound,
) -> Constraints:
    """The constraints on the ranks of the modules `names` of `model`.

    Args:
        budget, unit, min_rank, max_rank: as in `Allocator.allocate`.

    Raises:
        RuntimeError: the model has no linear layer of that name.
        ValueError: unknown names or unit, or a bound that is not an integer from 0 to
            min(d_out, d_in).
    """
    check_unit(unit)
    modules = modules_and_stacks(model)
    shapes = {name: _shape(name, modules) for name in names}
    return Constraints(
        budget,
        unit,
        {name: rank_cost(modules[name]) for name in shapes},
        _lower_bounds(min_rank, shapes),
        _upper_bounds(max_rank, shapes),
    )


def _shape(name: str, modules: Mapping[str, nn.Module]) -> tuple[int, int]:
    """(d_out, d_in)"""
    shape = layer_shape(modules[name]) if name in modules else None
    if shape is None:
        raise RuntimeError(
            f"the scores are stale: the model no longer has a linear layer {name!r}; "
            "call score() again"
        )
    return shape


def _lower_bounds(min_rank: Bound, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """0 where `min_rank` says nothing."""
    given = _given_bounds("min_rank", min_rank, shapes)
    for name, bound in given.items():
        if bound > min(shapes[name]):
            raise ValueError(
                f"min_rank={bound} of {name!r} is above min(d_out, d_in) = {min(shapes[name])}"
            )
    return {name: given.get(name, 0) for name in shapes}


def _upper_bounds(max_rank: Bound, shapes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """At most min(d_out, d_in), which is also the bound where `max_rank` says nothing."""
    given = _given_bounds("max_rank", max_rank, shapes)
    return {name: min(given.get(name, min(shape)), *shape) for name, shape in shapes.items()}


def _given_bounds(
    argument: str, bound: Bound, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """{module: bound} of the modules for which `bound` says something, checked to be integers."""
    if bound is None:
        return {}
    given = bound if isinstance(bound, Mapping) else dict.fromkeys(shapes, bound)
    by_name = with_plain_names(given, shapes)
    unknown = [name for name in by_name if name not in shapes]
    if unknown:
        raise ValueError(
            f"{argument} names {unknown}, which were not scored; scored are "
            f"{quoted_names(list(shapes))}. It takes full names: {did_you_mean(unknown[0], shapes)}"
        )
    for name, value in by_name.items():
        if value is not None and not is_integer(value, 0):
            raise ValueError(
                f"{argument} must be integers of at least 0, got {value!r} for {name!r}"
            )
    return {name: value for name, value in by_name.items() if value is not None}
