"""θ, whole ranks from shares, the best ranks, and L1RA's rule.

Scores, gates and budgets are plain Python numbers, so most cases run once. Whole numbers compare
exactly. Where a contract leaves something open (the factor of θ, who gets the last parameters of a
budget), the case compares what every right implementation has in common.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...reference.budget import ideal_ranks
from ..case import Arguments, CaseSpec, Contract, Implementation, call
from ..comparison import Note, Rule
from .layer import normal

Ranks = dict[str, int]
Gates = Mapping[str, Sequence[float]]


def fresh(*positional: Any, **options: Any) -> Callable[[], Arguments]:
    """A function that makes these arguments anew at every call."""
    return lambda: copy.deepcopy(Arguments(positional, options))


def plain(value: Any) -> Any:
    """`value` with lists and numbers of Python in place of arrays and tensors."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def plainly(implementation: Implementation, arguments: Arguments) -> Any:
    return plain(call(implementation, arguments))


def on_every(names: Any, value: int) -> Ranks:
    """The same cost or bound for every module."""
    return dict.fromkeys(names, value)


# ---- sensitivity_theta ---------------------------------------------------------------------------


def theta_shares(implementation: Implementation, arguments: Arguments) -> Any:
    """θ up to its factor, in the dtype of the diagonals, or in the narrower one that came."""
    diagonals = arguments.positional[0]
    theta = call(implementation, arguments)
    values = [float(theta[name]) for name in diagonals]
    proper = len(theta) == len(diagonals) and min(values) >= 0 and 0 < sum(values) < math.inf
    told = ", ".join(f"{name}: {value:.4g}" for name, value in theta.items())
    dtypes = [next(iter(diagonals.values())).dtype]
    dtypes += [torch.as_tensor(value).dtype for value in theta.values() if hasattr(value, "dtype")]
    dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)
    exact = torch.tensor(values, dtype=torch.float64)
    return {
        "θ": Rule(proper, "one θ ≥ 0 for each matrix, not all of them zero", told),
        "θ / Σθ": (exact / exact.sum()).to(dtype),
    }


def of_size(*shape: int, seed: int) -> Tensor:
    """A diagonal of positive entries of unequal size."""
    return normal(*shape, seed=seed).square() + 0.01


def vector(*entries: float) -> Tensor:
    return torch.tensor(entries, dtype=torch.float64)


def theta_case(name: str, equation: str, *diagonals: Tensor, **options: float) -> CaseSpec:
    names = ["h.1", "h.10", "a", "h.2", *map(str, range(len(diagonals)))]
    named = dict(zip(names, diagonals, strict=False))
    terms = 4.0 * max(h.numel() for h in diagonals) + 8 * len(diagonals) + 60
    return CaseSpec(name, equation, fresh(named, **options), theta_shares, terms)


def theta_cases() -> tuple[CaseSpec, ...]:
    case, some = theta_case, [of_size(9, seed=i) for i in range(4)]
    even = vector(5, 4, 3, 2, 1, 1)
    return (
        case("two matrices", "Eqs 8-14", vector(3, 1, 2, 2), vector(1, 9, 2, 1)),
        case("one matrix", "no positive θ: all equal", vector(3, 1, 2)),
        case("equal metrics", "no positive θ: all equal", even, even.flip(0), even.roll(2)),
        case("one entry each", "k = max(1, ⌊N / 2⌋), Eq 9", vector(3), vector(1), vector(5)),
        case(
            "odd sizes",
            "k = max(1, ⌊N / 2⌋), Eq 9",
            *(of_size(n, seed=n) for n in (3, 5, 7, 11)),
        ),
        case("topk_fraction 1/3", "Eq 9", *some, topk_fraction=1 / 3),
        case("topk_fraction 1", "Eq 9", *some, topk_fraction=1.0),
        case("topk_fraction 0.05", "k = max(1, …), Eq 9", *some, topk_fraction=0.05),
        case("effective_share 0.6", "Eq 10", *some, effective_share=0.6),
        case(
            "share reached exactly",
            "Σ of the largest ≥ share · Σ h, Eq 10",
            vector(4, 2, 1, 1),
            vector(1, 1, 1, 1),
            vector(3, 3, 1, 1),
            effective_share=0.75,
        ),
        case(
            "effective_share 1",
            "Eq 10",
            vector(3, 0, 2, 0, 0),
            vector(1, 1, 1, 1, 1),
            vector(5, 0, 0, 0, 0),
            effective_share=1.0,
        ),
        case(
            "diagonals with rows",
            "all entries together, Eqs 8-10",
            of_size(4, 3, seed=1),
            of_size(2, 5, seed=2) * 3,
            of_size(7, seed=3),
        ),
        case(
            "views",
            "Eqs 8-10",
            of_size(4, 3, seed=1).t(),
            of_size(5, seed=2).expand(4, 5),
            of_size(9, 2, seed=3)[::2, 1],
        ),
        case(
            "negative entries",
            "with their sign in Eq 8, as zero in Eqs 9 and 10",
            *(normal(12, seed=i) + shift for i, shift in enumerate((1.0, 0.4, 1.5, 2.0))),
        ),
        case(
            "negative trace",
            "a negative θ counts as zero",
            vector(5, 4, 3, 2),
            vector(1, -6, 0.5, -2),
            vector(1, 2, 3, 3),
        ),
        case(
            "a matrix without a positive entry",
            "S_topk = S_er = 0, Eqs 9 and 10",
            vector(3, 1, 2, 2),
            vector(0, 0, 0, 0),
            vector(1, 5, 2, 1),
        ),
        case(
            "equal traces",
            "a metric that is equal everywhere says nothing, Eq 13",
            vector(4, 3, 2, 1),
            vector(7, 1, 1, 1),
            vector(5, 3, 1, 1),
        ),
        case(
            "equal S_topk and S_er",
            "a metric that is equal everywhere says nothing, Eqs 11 and 13",
            vector(4, 4, 0.25, 0.125),
            vector(4, 4, 0.5, 0.125),
            vector(4, 4, 0.125, 0.125),
        ),
        case(
            "equal S_er",
            "a metric that is equal everywhere says nothing, Eq 11",
            vector(4, 4, 0.25, 0.125),
            vector(8, 2, 0.5, 0.125),
            vector(2, 2, 0.125, 0.125),
        ),
        case("tiny entries", "θ has no unit", *(h * 1e-15 for h in some)),
        case("huge entries", "θ has no unit", *(h * 1e15 for h in some)),
        case(
            "many matrices",
            "Eqs 8-14",
            *(of_size(5 + i % 7, 6, seed=i) * (1 + i % 5) for i in range(24)),
        ),
    )


def sigma_over_squared_mean(metric: Tensor) -> Tensor:
    """σ/μ² times the metric, or zeros if it is equal everywhere."""
    if metric.min() == metric.max():
        return torch.zeros_like(metric)
    return metric.std(correction=0) / metric.mean() * (metric / metric.mean())


@dataclass(frozen=True)
class Theta:
    """sensitivity_theta in parts, each of which a wrong twin replaces."""

    trace: Callable[[Tensor], Tensor] = torch.sum
    positive: Callable[[Tensor], Tensor] = torch.relu  # the entries that Eqs 9 and 10 see
    k: Callable[[float], int] = math.floor
    topk: Callable[[Tensor], Tensor] = torch.mean
    count: Callable[[Tensor, float], Any] = lambda sums, share: (sums < share).sum() + 1
    weighted: Callable[[Tensor], Tensor] = sigma_over_squared_mean
    of_trace: Callable[[Tensor], Tensor] = sigma_over_squared_mean
    of_local: Callable[[Tensor], Tensor] = sigma_over_squared_mean
    fraction: float | None = None  # whatever is given
    share: float | None = None

    def __call__(
        self,
        diagonals: Mapping[str, Tensor],
        topk_fraction: float = 0.5,
        effective_share: float = 0.85,
    ) -> dict[str, float]:
        metrics = []
        for h in diagonals.values():
            h = h.double().flatten()
            largest = self.positive(h).sort(descending=True).values
            k = max(1, self.k((self.fraction or topk_fraction) * len(h)))
            sums = largest.cumsum(0) / max(float(largest.sum()), 1e-300)
            count = self.count(sums, self.share or effective_share) if largest.any() else 0
            metrics.append([self.trace(h), self.topk(largest[:k]), torch.as_tensor(count)])
        S_g, S_topk, S_er = torch.tensor(metrics, dtype=torch.float64).T
        S_l = self.weighted(S_topk) + self.weighted(S_er)
        theta = (self.of_trace(S_g) + self.of_local(S_l)).clamp(min=0)
        theta = theta if theta.any() else torch.ones_like(theta)
        return dict(zip(diagonals, theta.tolist(), strict=True))


def sigma_over_mean(metric: Tensor) -> Tensor:
    return metric.std(correction=0) / metric.mean() * metric


def variance_over_squared_mean(metric: Tensor) -> Tensor:
    return metric.var(correction=0) / metric.mean() ** 2 * metric


def one_over_mean(metric: Tensor) -> Tensor:
    return metric / metric.mean()


THETA_TWINS: dict[str, Implementation] = {
    "θ with σ/μ in place of σ/μ² (Eqs 11 and 13)": Theta(
        weighted=sigma_over_mean, of_trace=sigma_over_mean, of_local=sigma_over_mean
    ),
    "θ with σ² in place of σ (Eqs 11 and 13)": Theta(
        weighted=variance_over_squared_mean,
        of_trace=variance_over_squared_mean,
        of_local=variance_over_squared_mean,
    ),
    "θ with 1/μ in place of σ/μ² (Eqs 11 and 13)": Theta(
        weighted=one_over_mean, of_trace=one_over_mean, of_local=one_over_mean
    ),
    "θ with γ1 = γ2 = 1 (Eq 13)": Theta(of_trace=torch.clone, of_local=torch.clone),
    "θ with β1 = β2 = 1 (Eq 11)": Theta(weighted=torch.clone),
    "the trace alone, without S_l (Eq 14)": Theta(of_trace=torch.clone, of_local=torch.zeros_like),
    "γ2 S_l alone, without the trace (Eq 14)": Theta(of_trace=torch.zeros_like),
    "θ without Eq 9, S_topk": Theta(topk=lambda largest: largest.sum() * 0),
    "θ without Eq 10, S_er": Theta(count=lambda sums, share: 0),
    "θ with the mean of h in place of the trace (Eq 8)": Theta(trace=torch.mean),
    "θ with negative entries as zero in Eq 8 too": Theta(trace=lambda h: h.clamp(min=0).sum()),
    "θ with absolute values in Eq 8": Theta(trace=lambda h: h.abs().sum()),
    "θ with absolute values of all entries": Theta(
        trace=lambda h: h.abs().sum(), positive=torch.abs
    ),
    "θ with negative entries in Eqs 9 and 10": Theta(positive=torch.clone),
    "θ with the sum of the k largest in place of their mean (Eq 9)": Theta(topk=torch.sum),
    "θ with k rounded up (Eq 9)": Theta(k=math.ceil),
    "θ with > in place of ≥ in Eq 10": Theta(count=lambda sums, share: (sums <= share).sum() + 1),
    "θ with k = N / 2, whatever topk_fraction is (Eq 9)": Theta(fraction=0.5),
    "θ with 85 %, whatever effective_share is (Eq 10)": Theta(share=0.85),
    "θ with one less in Eq 10": Theta(count=lambda sums, share: (sums < share).sum()),
    "θ with the count of Eq 10 as a share of N": Theta(
        count=lambda sums, share: ((sums < share).sum() + 1) / len(sums)
    ),
}

# ---- ranks_from_shares ---------------------------------------------------------------------------


def shares_case(
    name: str, rule: str, scores: Sequence[float], budget: int, **bounds: Sequence[int]
) -> CaseSpec:
    """Without costs: the ranks exactly."""
    return CaseSpec(name, rule, shares_arguments(scores, budget, **bounds), plainly, floating=False)


def shares_arguments(
    scores: Sequence[float], budget: int, **bounds: Sequence[int]
) -> Callable[[], Arguments]:
    names = [f"h.{i + 1}" for i in reversed(range(len(scores)))]  # h.10 before h.1
    named = {kind: dict(zip(names, values, strict=True)) for kind, values in bounds.items()}
    return fresh(dict(zip(names, scores, strict=True)), budget, **named)


def tie_in_fractions(implementation: Implementation, arguments: Arguments) -> Any:
    """A tie that floating-point numbers may break, where each rank is one of two."""
    scores, budget = arguments.positional
    ranks = plainly(implementation, arguments)
    right = reference.ranks_from_shares(scores, budget)
    near = all(ranks.get(name) in (floor, floor + 1) for name, floor in _floors(arguments).items())
    whole = len(ranks) == len(scores) and sum(ranks.values()) == budget
    found: dict[str, Any] = {
        "ranks": Rule(near and whole, "the floors, and the rest by largest remainder", str(ranks))
    }
    if ranks != right:
        found["tie"] = Note("floating-point rounding breaks a tie of equal remainders")
    return found


def _floors(arguments: Arguments) -> Ranks:
    """⌊clip(t · score, lower, upper)⌋ of every module."""
    scores, budget = arguments.positional
    given = arguments.options
    exact = {name: Fraction(score) for name, score in scores.items()}
    cost = given.get("costs") or on_every(scores, 1)
    low = given.get("lower") or on_every(scores, 0)
    high = given.get("upper") or on_every(scores, budget)
    return {n: math.floor(r) for n, r in ideal_ranks(exact, budget, cost, low, high).items()}


def within_parameters(implementation: Implementation, arguments: Arguments) -> Any:
    """With costs: what holds for everybody, whoever gets the last parameters."""
    scores, budget = arguments.positional
    given = arguments.options
    cost = given["costs"]
    low = given.get("lower") or on_every(scores, 0)
    high = given.get("upper") or on_every(scores, budget)
    ranks = plainly(implementation, arguments)
    if set(ranks) != set(scores) or any(int(rank) != rank for rank in ranks.values()):
        return {"ranks": Rule(False, "a whole rank for every module", str(ranks))}
    left = budget - sum(rank * cost[name] for name, rank in ranks.items())
    floors = _floors(arguments)
    fit = [n for n, rank in ranks.items() if rank < high[n] and cost[n] <= left]
    below = {n: f"{ranks[n]} < {floors[n]}" for n in scores if ranks[n] < floors[n]}
    outside = {n: r for n, r in ranks.items() if not low[n] <= r <= high[n]}
    return {
        "ranks": Rule(True, "a whole rank for every module", str(ranks)),
        "bounds": Rule(not outside, "lower ≤ rank ≤ upper", f"{outside} outside of them"),
        "cost": Rule(left >= 0, f"Σ rank · cost ≤ {budget}", f"{budget - left}, with {ranks}"),
        "rest": Rule(
            not fit,
            "no further rank fits into what is left",
            f"{left} parameters left, where a rank costs { {n: cost[n] for n in fit} }",
        ),
        "floors": Rule(
            not below, "nobody below ⌊clip(t · score, lower, upper)⌋", f"{below}, with {ranks}"
        ),
    }


def parameters_case(
    name: str,
    scores: Sequence[float],
    budget: int,
    costs: Sequence[int],
    observe: Callable[[Implementation, Arguments], Any] = within_parameters,
    **bounds: Sequence[int],
) -> CaseSpec:
    given = shares_arguments(scores, budget, costs=costs, **bounds)
    return CaseSpec(name, "a budget in parameters, Eq 15", given, observe, floating=False)


def drawn_shares(seed: int, modules: int, bounded: bool) -> Callable[[], Arguments]:
    """Skewed scores, a quarter of them zero, and bounds that bind."""
    draw = random.Random(seed)
    scores = [0.0 if draw.random() < 0.25 else draw.random() ** 3 for _ in range(modules)]
    if not bounded:
        return shares_arguments(scores, 3 * modules + seed)
    lower = [draw.choice([0, 0, 1, 3]) for _ in range(modules)]
    upper = [low + draw.choice([0, 1, 4, 9]) for low in lower]
    part = draw.choice([0.3, 0.6, 0.9])
    budget = round(sum(lower) + part * (sum(upper) - sum(lower)))
    return shares_arguments(scores, budget, lower=lower, upper=upper)


def drawn_costs(seed: int) -> Callable[[], Arguments]:
    """`drawn_shares` in parameters."""

    def arguments() -> Arguments:
        draw = random.Random(seed)
        (scores, _), bounds = drawn_shares(seed, 9, True)()
        costs = {name: draw.choice([7, 10, 16, 40]) for name in scores}
        least, most = (
            sum(bounds[kind][name] * costs[name] for name in scores) for kind in ("lower", "upper")
        )
        budget = least + round(draw.choice([0.2, 0.5, 0.8]) * (most - least))
        return Arguments((scores, budget), {"costs": costs, **bounds})

    return arguments


def twice(one: Callable[[], Arguments], other: Callable[[], Arguments]) -> Any:
    """An observation: both outcomes, read after the second call."""

    def observe(implementation: Implementation, _: Arguments) -> Any:
        first = call(implementation, one())
        second = call(implementation, other())
        return {"first call": plain(first), "second call": plain(second)}

    return observe


def two_calls(one: Callable[[], Arguments], other: Callable[[], Arguments]) -> CaseSpec:
    rule = "a later call leaves an earlier result as it was"
    return CaseSpec("two calls", rule, one, twice(one, other), floating=False)


PROPORTIONAL = "r = clip(t · score, lower, upper), largest remainder, Eq 15"
TIES = "ties to the earlier module"
ZEROS = "what scored modules cannot hold is shared evenly among the others"


def shares_cases() -> tuple[CaseSpec, ...]:
    case, paid = shares_case, parameters_case
    return (
        case("one module", PROPORTIONAL, [0.3], 5),
        case("largest remainder", PROPORTIONAL, [48, 31, 21], 10),
        case("a small share with the largest remainder", PROPORTIONAL, [6.4, 2.8, 0.8], 10),
        case("two remainders", PROPORTIONAL, [4.3, 1.6, 2.5, 0.6], 9),
        case("budget 0", PROPORTIONAL, [2.0, 1.0], 0),
        case("a tie", TIES, [1.0, 3.0], 2),
        case("equal scores", TIES, [0.1, 0.1, 0.1, 0.1], 10),
        case("a tie of some", TIES, [1.0, 2.0, 1.0, 4.0], 6),
        case("scores of zero", ZEROS, [0.0, 3.0, 0.0, 1.0], 7),
        case("all scores zero", ZEROS, [0.0, 0.0, 0.0], 8),
        case("upper bound", PROPORTIONAL, [10.0, 3.0, 1.0], 10, upper=[2, 9, 9]),
        case("two rounds of upper bounds", PROPORTIONAL, [20, 6, 2, 1], 15, upper=[3, 5, 9, 9]),
        case("lower bound", PROPORTIONAL, [10.0, 1.0, 0.0, 4.0], 12, lower=[1, 2, 1, 1]),
        case(
            "a lower bound takes from the others",
            PROPORTIONAL,
            [9, 6, 1, 0],
            16,
            lower=[0, 0, 3, 3],
        ),
        case("both bounds", PROPORTIONAL, [9, 5, 1, 1], 14, lower=[0, 0, 3, 0], upper=[4, 9, 9, 9]),
        case("equal bounds", PROPORTIONAL, [9, 5, 1], 9, lower=[0, 2, 0], upper=[9, 2, 9]),
        case("an upper bound of zero", PROPORTIONAL, [9, 5, 1], 9, upper=[0, 9, 9]),
        case("what one cannot hold", ZEROS, [5, 0, 0], 9, upper=[2, 9, 9]),
        case(
            "zeros above their bounds",
            ZEROS,
            [5, 0, 0, 0],
            11,
            lower=[0, 0, 4, 1],
            upper=[2] + 3 * [6],
        ),
        case("zeros with upper bounds", ZEROS, [0, 5, 0, 0], 13, upper=[1, 2, 9, 9]),
        case(
            "budget at the lower bounds", PROPORTIONAL, [1, 5, 0], 6, lower=[3, 1, 2], upper=[4] * 3
        ),
        case(
            "budget at the upper bounds", PROPORTIONAL, [1, 5, 0], 9, lower=[1] * 3, upper=[4, 2, 3]
        ),
        case("tiny scores", "only their ratios matter", [4.8e-12, 3.1e-12, 2.1e-12], 10),
        case("huge scores", "only their ratios matter", [4.8e12, 3.1e12, 2.1e12], 10),
        case("more modules than ranks", PROPORTIONAL, [1 / (i + 2) for i in range(14)], 5),
        CaseSpec(
            "a tie of fractions",
            TIES,
            shares_arguments([1.0, 4.0, 1.0], 4),
            tie_in_fractions,
            floating=False,
        ),
        two_calls(shares_arguments([1, 2, 4], 9), shares_arguments([5, 2, 4], 20)),
        *(
            CaseSpec(f"many modules, {seed}", PROPORTIONAL, drawn, plainly, floating=False)
            for seed in range(3)
            for drawn in [drawn_shares(seed, 20, bounded=False)]
        ),
        *(
            CaseSpec(f"many bounds, {seed}", PROPORTIONAL, drawn, plainly, floating=False)
            for seed in range(6)
            for drawn in [drawn_shares(seed, 12, bounded=True)]
        ),
        paid("costs, one module", [0.3], 50, [12]),
        paid("costs", [0.7, 2.9, 5.4], 10_000, [768, 768, 1920]),
        paid("equal costs", [1.0, 2.0, 4.0], 41, [3, 3, 3]),
        paid("a dear module first", [5.0, 1.0, 1.0], 130, [60, 7, 7]),
        paid("a dear module last", [1.0, 1.0, 5.0], 130, [7, 7, 60]),
        paid("costs and scores of zero", [0.0, 2.0, 0.0], 90, [10, 20, 5]),
        paid("costs and upper bounds", [8.0, 2.0, 1.0], 300, [10, 20, 5], upper=[3, 20, 20]),
        paid("costs and lower bounds", [8.0, 1.0, 0.0], 200, [10, 20, 5], lower=[0, 2, 4]),
        paid("costs, all scores zero", [0.0, 0.0], 100, [10, 40]),
        paid("costs above the budget", [1.0, 2.0], 9, [10, 12]),
        paid("costs at the lower bounds", [8.0, 1.0], 50, [10, 20], lower=[1, 2]),
        paid("costs at the upper bounds", [8.0, 0.0], 50, [10, 20], plainly, upper=[1, 2]),
        paid("a budget above Σ upper · cost", [8.0, 0.0], 999, [10, 20], plainly, upper=[1, 2]),
        *(
            CaseSpec(
                f"many costs, {seed}",
                "a budget in parameters, Eq 15",
                drawn_costs(seed),
                within_parameters,
                floating=False,
            )
            for seed in range(6)
        ),
    )


@dataclass(frozen=True)
class Shares:
    """ranks_from_shares in parts, each of which a wrong twin replaces."""

    ideal: Callable[..., dict[str, Fraction]] = ideal_ranks
    rounded: Callable[[Fraction], int] = math.floor
    order: Callable[[Fraction, Fraction], Any] = lambda remainder, score: remainder
    later: bool = False  # ties to the later module
    hand_out: bool = True
    only_scored: bool = False  # modules that score zero get nothing of what is handed out
    stop: bool = False  # at the first rank that does not fit
    bounded: bool = True

    def __call__(
        self,
        scores: dict[str, float],
        budget: int,
        costs: Ranks | None = None,
        lower: Ranks | None = None,
        upper: Ranks | None = None,
    ) -> Ranks:
        cost = costs or on_every(scores, 1)
        low = (lower if self.bounded else None) or on_every(scores, 0)
        high = (upper if self.bounded else None) or on_every(scores, budget)
        exact = {name: Fraction(score) for name, score in scores.items()}
        ideal = self.ideal(exact, budget, cost, low, high)
        ranks = {name: self.rounded(rank) for name, rank in ideal.items()}
        names = list(scores)[:: -1 if self.later else 1]
        names.sort(key=lambda n: self.order(ideal[n] - ranks[n], exact[n]), reverse=True)
        if self.only_scored:
            names = [name for name in names if scores[name]]
        left = budget - sum(rank * cost[name] for name, rank in ranks.items())
        fits = self.hand_out
        while fits:
            fits = False
            for name in names:
                if cost[name] > left and self.stop:
                    return ranks
                if ranks[name] < high[name] and cost[name] <= left:
                    ranks[name] += 1
                    left -= cost[name]
                    fits = True
        return ranks


Exact = dict[str, Fraction]


def clipped_once(scores: Exact, budget: int, cost: Ranks, low: Ranks, high: Ranks) -> Exact:
    total = sum(score * cost[name] for name, score in scores.items()) or Fraction(1)
    shares = {name: score * budget / total for name, score in scores.items()}
    return {n: min(max(share, Fraction(low[n])), Fraction(high[n])) for n, share in shares.items()}


def lower_and_a_share(scores: Exact, budget: int, cost: Ranks, low: Ranks, high: Ranks) -> Exact:
    room = {name: high[name] - low[name] for name in scores}
    rest = budget - sum(low[name] * cost[name] for name in scores)
    shares = ideal_ranks(scores, rest, cost, on_every(scores, 0), room)
    return {name: low[name] + share for name, share in shares.items()}


def nothing_for_zeros(scores: Exact, budget: int, cost: Ranks, low: Ranks, high: Ranks) -> Exact:
    ideal = ideal_ranks(scores, budget, cost, low, high)
    return {n: rank if scores[n] else Fraction(low[n]) for n, rank in ideal.items()}


def cost_by_score(scores: Exact, budget: int, cost: Ranks, low: Ranks, high: Ranks) -> Exact:
    """Parameters, not ranks, in proportion to the scores."""
    return ideal_ranks({n: s / cost[n] for n, s in scores.items()}, budget, cost, low, high)


def without_costs(scores: Exact, budget: int, cost: Ranks, low: Ranks, high: Ranks) -> Exact:
    return ideal_ranks(scores, budget, on_every(scores, 1), low, high)


SHARES_TWINS: dict[str, Implementation] = {
    "the ranks with ties to the later module": Shares(later=True),
    "the ranks without bounds": Shares(bounded=False),
    "lower + a share of what is left, in place of clip(t · score, lower, upper)": Shares(
        ideal=lower_and_a_share
    ),
    "each share clipped once, with the rest handed out one by one": Shares(ideal=clipped_once),
    "the ranks with parameters, not ranks, in proportion to the scores": Shares(
        ideal=cost_by_score
    ),
    "the ranks of a budget in ranks: costs are ignored": Shares(ideal=without_costs),
    "the ranks with what is left handed out up to the first that does not fit": Shares(stop=True),
    "the ranks with nothing for modules that score zero": Shares(
        ideal=nothing_for_zeros, only_scored=True
    ),
    "the ranks with the rest handed out by score, not by remainder": Shares(
        order=lambda remainder, score: score
    ),
    "the ranks with the rest handed out by module order, not by remainder": Shares(
        order=lambda remainder, score: 0
    ),
    "the ranks with the smallest remainder first": Shares(
        order=lambda remainder, score: -remainder
    ),
    "the ranks rounded down, with nothing handed out": Shares(hand_out=False),
    "every share rounded to the nearest rank, whatever the sum": Shares(
        rounded=round, hand_out=False
    ),
    "every share rounded up, whatever the sum": Shares(rounded=math.ceil, hand_out=False),
}

# ---- best_ranks ----------------------------------------------------------------------------------


def best_arguments(
    scores: Sequence[Sequence[float]], budget: int, **bounds: Sequence[int]
) -> Callable[[], Arguments]:
    return shares_arguments(scores, budget, **bounds)  # type: ignore[arg-type]


def best_case(
    name: str, rule: str, scores: Sequence[Sequence[float]], budget: int, **bounds: Sequence[int]
) -> CaseSpec:
    return CaseSpec(name, rule, best_arguments(scores, budget, **bounds), plainly, floating=False)


def drawn_best(seed: int, costs: bool) -> Callable[[], Arguments]:
    """Scores with many ties, modules of 0 to 6 ranks, and bounds that bind."""
    draw = random.Random(seed)
    scores = [[draw.randint(-4, 9) / 4 for _ in range(draw.randint(0, 6))] for _ in range(16)]
    lower = [min(len(own), draw.choice([0, 0, 1, 2])) for own in scores]
    upper = [
        min(len(own), low + draw.choice([0, 1, 2, 6]))
        for own, low in zip(scores, lower, strict=True)
    ]
    cost = [draw.choice([7, 10, 16, 40]) if costs else 1 for _ in scores]
    least, most = (sum(map(int.__mul__, bound, cost)) for bound in (lower, upper))
    budget = least + round(draw.choice([0.2, 0.5, 0.8]) * (most - least))
    bounds = {"lower": lower, "upper": upper, **({"costs": cost} if costs else {})}
    return best_arguments(scores, budget, **bounds)


BEST = "the best of all modules together"
LOWER = "the best `lower` of each module, then the best of all"
BEST_TIES = "ties by module, then rank"
FITS = "with costs: in the same order, each that still fits"


def best_cases() -> tuple[CaseSpec, ...]:
    case = best_case
    three = [[0.2, 0.9, 0.8], [0.5, 0.7, 0.1, 0.4], [0.3]]
    return (
        case("one module", BEST, [[0.1, 0.3, 0.2]], 2),
        case("three modules", BEST, three, 4),
        case("budget 0", BEST, three, 0),
        case("budget of all", BEST, three, 8),
        case("a module without ranks", BEST, [[], [0.3, 0.2], []], 1),
        case("negative scores", "scores of any sign", [[-0.5, -0.1, 0.0], [-0.9, -0.2, 0.1]], 3),
        case("only negative scores", "scores of any sign", [[-3.0, -1.0], [-2.0, -4.0]], 2),
        case("ties in a module", BEST_TIES, [[0.5, 0.5, 0.5, 0.5]], 2),
        case("ties between modules", BEST_TIES, [[0.5, 0.1], [0.5, 0.9], [0.5]], 3),
        case("all equal", BEST_TIES, [[1.0] * 3, [1.0] * 2, [1.0] * 4], 5),
        case("minus zero", BEST_TIES, [[-0.0, 1.0], [0.0, 0.0]], 2),
        case("lower bound", LOWER, [[0.9, 0.8, 0.7], [0.1, 0.3, 0.2]], 3, lower=[0, 2]),
        case("lower bound of all", LOWER, [[0.9, 0.8], [0.1, 0.3]], 4, lower=[2, 2]),
        case("lower bounds use the budget", LOWER, three, 4, lower=[1, 2, 1]),
        case("ties at the lower bound", BEST_TIES, [[0.9] * 3, [0.2] * 3], 3, lower=[0, 2]),
        case("upper bound", BEST, [[0.9, 0.8, 0.7], [0.1, 0.3, 0.2]], 3, upper=[1, 3]),
        case("an upper bound of zero", BEST, three, 3, upper=[0, 4, 1]),
        case("an upper bound above the ranks there are", BEST, three, 6, upper=[9, 9, 9]),
        case("ties at the upper bound", BEST_TIES, [[0.9] * 3, [0.2, 0.9, 0.1]], 3, upper=[1, 3]),
        case("both bounds", LOWER, three, 5, lower=[0, 1, 1], upper=[1, 3, 1]),
        case("equal bounds", LOWER, three, 5, lower=[2, 0, 1], upper=[2, 4, 1]),
        two_calls(best_arguments(three, 3), best_arguments(three[::-1], 5)),
        *(
            CaseSpec(f"many modules, {seed}", LOWER, drawn, plainly, floating=False)
            for seed in range(8)
            for drawn in [drawn_best(seed, costs=False)]
        ),
        case("costs", FITS, three, 2500, costs=[768, 1920, 300]),
        case(
            "costs, the next is too dear", FITS, [[0.9, 0.5], [0.8], [0.1]], 20, costs=[10, 15, 9]
        ),
        case(
            "costs, a later one fits", FITS, [[0.9], [0.8, 0.7], [0.3, 0.2]], 21, costs=[10, 8, 3]
        ),
        case("costs, the first is too dear", FITS, [[0.9], [0.8]], 8, costs=[10, 8]),
        case("costs and ties", FITS, [[0.5, 0.5], [0.5, 0.5]], 40, costs=[20, 15]),
        case("costs and lower bounds", FITS, three, 100, costs=[10, 20, 30], lower=[0, 2, 1]),
        case("costs and upper bounds", FITS, three, 100, costs=[10, 20, 30], upper=[1, 2, 1]),
        case("costs at the lower bounds", FITS, three, 70, costs=[10, 20, 30], lower=[0, 2, 1]),
        case("costs of all", FITS, three, 999, costs=[10, 20, 30]),
        case("costs and negative scores", FITS, [[-0.5, -0.1], [0.2]], 25, costs=[10, 15]),
        case("a budget above Σ upper · cost", FITS, three, 999, costs=[1, 2, 3], upper=[2, 2, 1]),
        *(
            CaseSpec(f"many costs, {seed}", FITS, drawn, plainly, floating=False)
            for seed in range(6)
            for drawn in [drawn_best(seed, costs=True)]
        ),
    )


@dataclass(frozen=True)
class Best:
    """best_ranks in parts, each of which a wrong twin replaces."""

    key: Callable[[float, int], float] = lambda score, cost: score
    later: bool = False  # ties to the later rank
    with_lower: bool = True
    with_upper: bool = True
    refill: bool = True  # what an upper bound prunes goes to others
    stop: bool = False  # at the first that does not fit

    def __call__(
        self,
        scores: dict[str, list[float]],
        budget: int,
        costs: Ranks | None = None,
        lower: Ranks | None = None,
        upper: Ranks | None = None,
    ) -> dict[str, list[bool]]:
        cost = costs or on_every(scores, 1)
        low = (lower if self.with_lower else None) or on_every(scores, 0)
        high = (upper if self.with_upper else None) or on_every(scores, budget)
        keep = {name: [False] * len(own) for name, own in scores.items()}
        each = [(name, i) for name, own in scores.items() for i in range(len(own))]
        each = each[::-1] if self.later else each
        each.sort(key=lambda rank: -self.key(scores[rank[0]][rank[1]], cost[rank[0]]))
        left = budget
        for bound in (low, high):
            for name, i in each:
                if keep[name][i]:
                    continue
                if cost[name] > left and bound is high and self.stop:
                    break
                full = sum(keep[name]) >= bound[name]
                if cost[name] <= left and not full:
                    keep[name][i], left = True, left - cost[name]
                elif full and not self.refill and bound is high:
                    left -= min(left, cost[name])
        return keep


def best_of_each_alone(
    scores: dict[str, list[float]],
    budget: int,
    costs: Ranks | None = None,
    lower: Ranks | None = None,
    upper: Ranks | None = None,
) -> dict[str, list[bool]]:
    """The budget is split evenly over the modules."""
    shares = dict.fromkeys(scores, budget // len(scores))
    return {
        name: reference.best_ranks({name: own}, shares[name])[name] for name, own in scores.items()
    }


BEST_TWINS: dict[str, Implementation] = {
    "the best ranks with ties to the later one": Best(later=True),
    "the best ranks without `lower`": Best(with_lower=False),
    "the best ranks without `upper`": Best(with_upper=False),
    "the best ranks, with what `upper` prunes not given to others": Best(refill=False),
    "the best ranks up to the first that does not fit": Best(stop=True),
    "the best ranks by score per cost": Best(key=lambda score, cost: score / cost),
    "the best ranks by the absolute value of their score": Best(key=lambda score, cost: abs(score)),
    "the worst ranks": Best(key=lambda score, cost: -score),
    "the best ranks of each module alone, an equal number in each": best_of_each_alone,
}

# ---- l1ra_shrink ---------------------------------------------------------------------------------

PROXIMAL = "argmin over z in [0, 1] of ½ (z − c)² + amount · |z|"


def shrink_case(name: str, *gates: Tensor, amount: float = 0.25) -> CaseSpec:
    return CaseSpec(name, PROXIMAL, fresh([*gates], amount), terms=2)


SHRINK = (
    shrink_case("one gate", vector(0.75)),
    shrink_case("gates that stay", vector(0.9, 0.7, 0.3)),
    shrink_case("gates that reach zero", vector(0.9, 0.25, 0.2, 0.0)),
    shrink_case("gates below zero", vector(-0.1, -0.25, -0.6, 0.5)),
    shrink_case("gates above one", vector(1.1, 1.25, 1.5, 0.5)),
    shrink_case("gates of one", vector(1.0, 1.0)),
    shrink_case("amount 0", vector(-0.5, 0.5, 1.5), amount=0.0),
    shrink_case("a small amount", vector(0.9, 0.0009, 0.002), amount=0.001),
    shrink_case("an amount above one", vector(0.9, 1.5, 2.5), amount=1.25),
    shrink_case("rank 0", vector(), vector(0.5)),
    shrink_case("several modules", vector(0.9), vector(0.1, 0.6), vector(0.3, 0.2, 1.0)),
    shrink_case("views", normal(7, 2, seed=1)[::2, 1], normal(3, seed=2).flip(0)[1:]),
    shrink_case("one gate for all", vector(0.7).expand(4)),
    shrink_case("many gates", *(normal(9 + i, seed=i) for i in range(5)), amount=0.1),
)

SHRINK_TWINS: dict[str, Implementation] = {
    "max(c − amount, 0), without the bound at 1": lambda gates, amount: [
        (c - amount).clamp(min=0) for c in gates
    ],
    "min(c − amount, 1), without the bound at 0": lambda gates, amount: [
        (c - amount).clamp(max=1) for c in gates
    ],
    "c − amount, without bounds": lambda gates, amount: [c - amount for c in gates],
    "the soft threshold sign(c) · max(|c| − amount, 0), without [0, 1]": lambda gates, amount: [
        c.sign() * (c.abs() - amount).clamp(min=0) for c in gates
    ],
    "the soft threshold, then its absolute value": lambda gates, amount: [
        (c.abs() - amount).clamp(0, 1) for c in gates
    ],
    "c clamped to [0, 1] first, then shrunk": lambda gates, amount: [
        (c.clamp(0, 1) - amount).clamp(min=0) for c in gates
    ],
    "the subgradient step, which leaves gates of at most `amount` alone": lambda gates, amount: [
        (c - amount * c.sign() * (c.abs() > amount)).clamp(0, 1) for c in gates
    ],
    "the hard threshold: gates of at most `amount` are zero, others stay": lambda gates, amount: [
        (c * (c > amount)).clamp(0, 1) for c in gates
    ],
    "weight decay, (1 − amount) · c": lambda gates, amount: [
        (c * (1 - amount)).clamp(0, 1) for c in gates
    ],
    "the gates clamped to [0, 1], not shrunk": lambda gates, amount: [c.clamp(0, 1) for c in gates],
    "the gates shrunk by amount / 2": lambda gates, amount: [
        (c - amount / 2).clamp(0, 1) for c in gates
    ],
    "the gates shrunk by amount twice": lambda gates, amount: [
        (c - 2 * amount).clamp(0, 1) for c in gates
    ],
}

# ---- l1ra_reassign -------------------------------------------------------------------------------


def reassigned(implementation: Implementation, arguments: Arguments) -> Any:
    ranks, keep = call(implementation, arguments)
    return {"rank": plain(ranks), "keep": plain(keep)}


def reassign_arguments(
    gates: Sequence[Sequence[float]],
    budget: int,
    lower: Sequence[int] | int = 0,
    upper: Sequence[int] | int = 9,
    **options: float,
) -> Callable[[], Arguments]:
    names = [f"h.{i + 1}" for i in reversed(range(len(gates)))]
    bounds = (
        dict(zip(names, [bound] * len(names) if isinstance(bound, int) else bound, strict=True))
        for bound in (lower, upper)
    )
    return fresh(dict(zip(names, gates, strict=True)), budget, *bounds, **options)


def reassign_case(
    name: str,
    rule: str,
    gates: Sequence[Sequence[float]],
    budget: int,
    lower: Sequence[int] | int = 0,
    upper: Sequence[int] | int = 9,
    **options: float,
) -> CaseSpec:
    given = reassign_arguments(gates, budget, lower, upper, **options)
    return CaseSpec(name, rule, given, reassigned, floating=False)


def drawn_gates(seed: int) -> Callable[[], Arguments]:
    """Gates with many ties, some at the threshold, modules of 0 to 6 ranks, bounds that bind."""
    draw = random.Random(seed)
    modules = draw.choice([5, 12, 20])
    worst = draw.choice([0, 1, 2])  # from which gates are drawn, in tenths
    gates = [
        [draw.randint(worst if m % 3 else 3, 9) / 10 for _ in range(draw.randint(0, 6))]
        for m in range(modules)
    ]
    lower = [draw.choice([0, 0, 1, 2]) for _ in gates]
    upper = [low + draw.choice([0, 1, 3, 8]) for low in lower]
    threshold = draw.choice([0.0, 0.1, 0.3])
    part = draw.choice([0.2, 0.5, 0.8])
    budget = round(sum(lower) + part * (sum(upper) - sum(lower)))
    return reassign_arguments(gates, budget, lower, upper, threshold=threshold)


PRUNE = "gates ≤ threshold are pruned"
KEPT = "a module keeps its `lower` largest"
OUT = "freed ranks by descending smallest surviving gate, ties to the earlier module"
FIRST = "first among modules whose gates all exceed the threshold, then among the others"
UPPER = "beyond `upper` the smallest gates are pruned, later ones first among equals"
BUDGET = "beyond the budget the smallest gates of all are pruned, later ones first among equals"


def reassign_cases() -> tuple[CaseSpec, ...]:
    case = reassign_case
    return (
        case("nothing to do", PRUNE, [[0.5, 0.4]], 2),
        case("gates of one", PRUNE, [[1.0, 1.0], [1.0]], 3),
        case("one freed rank", PRUNE, [[0.9, 0.0], [0.8]], 3),
        case("a freed rank comes back", FIRST, [[0.5, 0.0, 0.3]], 3),
        case("a gate at the threshold", PRUNE, [[0.1, 0.2], [0.3]], 3, threshold=0.1),
        case("thresholds", PRUNE, [[0.25, 0.5, 0.75], [0.8, 0.5]], 5, threshold=0.5),
        case("threshold 0", PRUNE, [[1e-9, 0.0, 0.5], [0.7]], 4),
        case("by the smallest gate", OUT, [[0.9, 0.2], [0.5, 0.4], [0.0, 0.3]], 5),
        case("ties", OUT, [[0.4, 0.9], [0.9, 0.4], [0.4], [0.0, 0.0, 0.8]], 8, upper=[9, 9, 9, 1]),
        case("one round", OUT, [[0.5], [0.7], [0.0, 0.0]], 4),
        case("several rounds", OUT, [[0.5, 0.9], [0.7], [0.6], [0.0] * 7], 11),
        case(
            "rounds with upper bounds", OUT, [[0.5], [0.7], [0.6], [0.0] * 7], 10, 0, [9, 2, 3, 9]
        ),
        case("intact modules first", FIRST, [[0.9, 0.0, 0.8], [0.1], [0.0, 0.9]], 6),
        case(
            "others when the first are full",
            FIRST,
            [[0.9], [0.0, 0.2, 0.3], [0.0, 0.25]],
            5,
            0,
            [1, 9, 9],
        ),
        case("others in rounds", FIRST, [[0.9], [0.0, 0.2, 0.3], [0.0, 0.25]], 9, 0, [2, 9, 9]),
        case(
            "others by surviving gates",
            FIRST,
            [[0.0, 0.2, 0.9], [0.1, 0.3, 0.9]],
            6,
            0,
            9,
            threshold=0.1,
        ),
        case("a module without survivors comes last", OUT, [[0.0, 0.0], [0.0, 0.3], [0.0, 0.2]], 6),
        case("nothing survives", OUT, [[0.0, 0.0], [0.0], [0.0, 0.0]], 5),
        case("a kept gate of zero before none", OUT, [[0.0], [0.0, 0.0]], 2, [0, 1]),
        case("kept, yet not intact", FIRST, [[0.0], [0.0, 0.5], [0.3]], 5, 1),
        case(
            "lower keeps the largest", KEPT, [[0.02, 0.05, 0.01], [0.6]], 4, [2, 1], threshold=0.1
        ),
        case("lower keeps the earliest of equals", KEPT, [[0.0, 0.0, 0.0], [0.6]], 4, [2, 0]),
        case("lower below what survives", KEPT, [[0.0, 0.4, 0.3, 0.2], [0.6]], 5, [1, 1]),
        case("lower above what survives", KEPT, [[0.0, 0.4, 0.0], [0.6]], 4, [2, 0]),
        case("lower above what is there", KEPT, [[0.4], [0.6, 0.5], [0.0]], 6, [3, 0, 0]),
        case("an empty module", OUT, [[], [0.5, 0.0]], 2),
        case("empty modules", OUT, [[], [0.5], []], 6),
        case("an empty module with a lower bound", KEPT, [[], [0.5, 0.0, 0.2]], 3, [1, 0]),
        case("only empty modules", OUT, [[], [], []], 4),
        case("upper below what is there", UPPER, [[0.6, 0.9, 0.7, 0.8], [0.3]], 5, 0, [2, 9]),
        case("upper and equal gates", UPPER, [[0.5, 0.5, 0.5], [0.3]], 4, 0, [2, 9]),
        case("an upper bound of zero", UPPER, [[0.5, 0.9], [0.3]], 3, 0, [0, 9]),
        case("equal bounds", UPPER, [[0.5, 0.9, 0.7], [0.3, 0.0], [0.2]], 6, [2, 2, 0], [2, 2, 9]),
        case("budget below", BUDGET, [[0.9, 0.2, 0.8], [0.3, 0.7], [0.1]], 3),
        case("budget below, equal gates", BUDGET, [[0.5, 0.5], [0.5], [0.5, 0.5]], 3),
        case("budget below, equal gates in one module", BUDGET, [[0.5, 0.9, 0.5, 0.5]], 2),
        case("budget below, with lower bounds", BUDGET, [[0.9, 0.8], [0.2, 0.1, 0.3]], 3, [0, 2]),
        case("budget below what lower adds", BUDGET, [[0.9, 0.8], [0.1]], 4, [1, 3]),
        case("budget below, after pruning", BUDGET, [[0.9, 0.0, 0.4], [0.3, 0.7], [0.0]], 3),
        case(
            "budget below, upper, threshold",
            BUDGET,
            [[0.9, 0.1, 0.8, 0.7], [0.3, 0.7]],
            3,
            0,
            2,
            threshold=0.1,
        ),
        case("budget above", OUT, [[0.9, 0.2], [0.3, 0.7]], 9),
        case("budget above, after pruning", OUT, [[0.9, 0.0], [0.3, 0.7]], 9),
        case("budget 0", BUDGET, [[0.9, 0.2], [0.3]], 0),
        case("budget at the lower bounds", BUDGET, [[0.9, 0.2], [0.3, 0.7]], 2, 1),
        case("budget at the upper bounds", OUT, [[0.9, 0.0], [0.3, 0.7], []], 9, 1, [3, 4, 2]),
        CaseSpec(
            "two calls",
            "a later call leaves an earlier result as it was",
            reassign_arguments([[0.9, 0.0], [0.8]], 3),
            twice(
                reassign_arguments([[0.9, 0.0], [0.8]], 3),
                reassign_arguments([[0.0, 0.5], [0.8]], 5),
            ),
            floating=False,
        ),
        *(
            CaseSpec(f"many modules, {seed}", OUT, drawn_gates(seed), reassigned, floating=False)
            for seed in range(24)
        ),
    )


@dataclass(frozen=True)
class Reassign:
    """l1ra_reassign in parts, each of which a wrong twin replaces."""

    survives: Callable[[float, float], bool] = lambda gate, threshold: gate > threshold
    kept: Callable[[list[float], int], float] = lambda c, i: -c[i]  # who stays: the smallest of it
    pruned: Callable[[float, int, int], Any] = lambda gate, m, i: (gate, -m, -i)
    of_module: Callable[[list[float]], float] = min  # of the gates that survive
    only_survivors: bool = True
    descending: bool = True
    ties_to_later: bool = False
    intact: Callable[[list[float], float], bool] = lambda c, threshold: all(
        gate > threshold for gate in c
    )
    others: bool = True  # get what the intact modules cannot hold
    all_to_one: bool = False
    with_lower: bool = True
    with_upper: bool = True
    prunes_to_budget: bool = True

    def __call__(
        self, gates: Gates, budget: int, lower: Ranks, upper: Ranks, threshold: float = 0.0
    ) -> tuple[Ranks, dict[str, list[bool]]]:
        low = lower if self.with_lower else on_every(gates, 0)
        high = upper if self.with_upper else on_every(gates, budget)
        keep = {
            name: self._kept(list(gates[name]), low[name], high[name], threshold) for name in gates
        }
        ranks = {name: max(sum(keep[name]), low[name]) for name in gates}
        if self.prunes_to_budget:
            self._prune(gates, budget, low, keep, ranks)
        names = list(gates)[:: -1 if self.ties_to_later else 1]
        names.sort(key=lambda n: self._size(gates[n], keep[n]), reverse=self.descending)
        first = [name for name in names if self.intact(list(gates[name]), threshold)]
        others = [name for name in names if name not in first] if self.others else []
        for receivers in (first, others):
            self._hand_out(receivers, budget, high, ranks)
        return ranks, keep

    def _kept(self, c: list[float], low: int, high: int, threshold: float) -> list[bool]:
        count = min(max(sum(self.survives(gate, threshold) for gate in c), low), high)
        stay = sorted(range(len(c)), key=lambda i: self.kept(c, i))[:count]
        return [i in stay for i in range(len(c))]

    def _prune(
        self, gates: Gates, budget: int, low: Ranks, keep: dict[str, list[bool]], ranks: Ranks
    ) -> None:
        each = [(m, name, i) for m, name in enumerate(gates) for i in range(len(gates[name]))]
        each.sort(key=lambda rank: self.pruned(gates[rank[1]][rank[2]], rank[0], rank[2]))
        for _, name, i in each:
            if sum(ranks.values()) > budget and keep[name][i] and ranks[name] > low[name]:
                keep[name][i] = False
                ranks[name] -= 1

    def _size(self, c: Sequence[float], keep: list[bool]) -> float:
        kept = [gate for gate, k in zip(c, keep, strict=True) if k or not self.only_survivors]
        return self.of_module(kept) if kept else -math.inf

    def _hand_out(self, receivers: list[str], budget: int, high: Ranks, ranks: Ranks) -> None:
        while sum(ranks.values()) < budget and any(ranks[n] < high[n] for n in receivers):
            for name in receivers:
                while sum(ranks.values()) < budget and ranks[name] < high[name]:
                    ranks[name] += 1
                    if not self.all_to_one:
                        break


def mean_of(gates: list[float]) -> float:
    return sum(gates) / len(gates)


REASSIGN_TWINS: dict[str, Implementation] = {
    "the rule with ≥: gates at the threshold stay": Reassign(
        survives=lambda gate, threshold: gate >= threshold,
        intact=lambda c, threshold: all(gate >= threshold for gate in c),
    ),
    "the rule with threshold 0": lambda gates, budget, lower, upper, threshold=0.0: (
        reference.l1ra_reassign(gates, budget, lower, upper)
    ),
    "the rule with ties of modules to the later one": Reassign(ties_to_later=True),
    "the rule by the mean gate of a module": Reassign(of_module=mean_of),
    "the rule by the largest gate of a module": Reassign(of_module=max),
    "the rule by the sum of a module's gates": Reassign(of_module=sum),
    "the rule by the smallest gate before pruning": Reassign(only_survivors=False),
    "the rule in module order, whatever the gates are": Reassign(of_module=lambda gates: 0.0),
    "the rule by ascending smallest gate": Reassign(descending=False),
    "the rule without precedence: all modules in one round": Reassign(
        intact=lambda c, threshold: True
    ),
    "the rule with freed ranks dropped when intact modules are full": Reassign(others=False),
    "the rule with all freed ranks to the first module, up to its `upper`": Reassign(
        all_to_one=True
    ),
    "the rule without `lower`": Reassign(with_lower=False),
    "the rule without `upper`": Reassign(with_upper=False),
    "the rule without pruning down to the budget": Reassign(prunes_to_budget=False),
    "the rule in which `lower` keeps the earliest gates, not the largest": Reassign(
        kept=lambda c, i: -(c[i] > 0)
    ),
    "the rule in which later ones stay among equal gates of a module": Reassign(
        kept=lambda c, i: (-c[i], -i)  # type: ignore[arg-type, return-value]
    ),
    "the rule in which earlier ones are pruned first among equals": Reassign(
        pruned=lambda gate, m, i: (gate, m, i)
    ),
    "the rule in which the largest gates are pruned first": Reassign(
        pruned=lambda gate, m, i: (-gate, -m, -i)
    ),
    "the rule with ranks pruned from the last module on, not by their gates": Reassign(
        pruned=lambda gate, m, i: (-m, gate)
    ),
}

# ---- the contracts -------------------------------------------------------------------------------

CONTRACTS: tuple[Contract, ...] = (
    Contract(
        "sensitivity_theta",
        "Sensitivity-LoRA, arXiv 2509.09119, Eqs 8-14",
        reference.sensitivity_theta,
        theta_cases(),
        THETA_TWINS,
    ),
    Contract(
        "ranks_from_shares",
        "Sensitivity-LoRA, arXiv 2509.09119, Eq 15",
        reference.ranks_from_shares,
        shares_cases(),
        SHARES_TWINS,
    ),
    Contract(
        "best_ranks",
        "ShapLoRA, arXiv 2601.17921: the best ranks of all modules",
        reference.best_ranks,
        best_cases(),
        BEST_TWINS,
    ),
    Contract(
        "l1ra_shrink",
        f"L1RA, arXiv 2509.04884, the proximal step: {PROXIMAL}",
        reference.l1ra_shrink,
        SHRINK,
        SHRINK_TWINS,
    ),
    Contract(
        "l1ra_reassign",
        "L1RA, arXiv 2509.04884, pruning and reassignment",
        reference.l1ra_reassign,
        reassign_cases(),
        REASSIGN_TWINS,
    ),
)
