"""ShapLoRA's coalitions, SAN and the Shapley sensitivity; Shapley values by definition.

Coalitions are random, so an implementation's own draws are judged. Every bound below is so wide
that a right implementation fails any of them with a probability of about 1e-6, all together: rows
and players count thousands, six standard deviations stand on each side, and what a sum of bounded
terms can reach follows from Bernstein's inequality.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations, product
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...reference.shaplora import length
from ..case import Arguments, CaseSpec, Contract, Implementation
from ..comparison import Rule
from .layer import normal

# ---- coalition_masks -----------------------------------------------------------------------------

COALITIONS = "ShapLoRA's sample of coalitions, after Eq 10"
DEVIATIONS = 6.0  # of a row's fraction from its p: two-sided 2e-9 for each row


def mask_arguments(ranks: Sequence[int], coalitions: int, seed: int = 0) -> Arguments:
    return Arguments(([*ranks], coalitions, torch.Generator().manual_seed(seed)))


def masks_of(implementation: Implementation, arguments: Arguments) -> Tensor:
    masks = implementation(*arguments.positional)
    return torch.as_tensor(masks).detach().cpu()


def form(masks: Tensor, arguments: Arguments) -> Rule:
    ranks, coalitions, _ = arguments.positional
    expected = (coalitions, sum(ranks))
    right = masks.dtype == torch.bool and tuple(masks.shape) == expected
    return Rule(right, f"bool of shape {expected}", f"{masks.dtype} of shape {tuple(masks.shape)}")


def complements(masks: Tensor) -> Rule:
    """As often as a mask comes, its complement comes."""
    counts = Counter(bytes(row) for row in masks.byte().numpy())
    opposite = Counter(bytes(row) for row in (~masks).byte().numpy())
    lonely = sum((counts - opposite).values())
    rule = "every mask with its complement, as often as the mask"
    return Rule(not lonely, rule, f"{lonely} of {len(masks)} masks lack theirs")


def halves(masks: Tensor) -> Rule:
    counts = masks.sum(0)
    wrong = (2 * counts != len(masks)).nonzero().flatten().tolist()
    got = f"rank {wrong[0]} is in {int(counts[wrong[0]])} of {len(masks)}" if wrong else "half"
    return Rule(not wrong, "every rank in exactly half of the coalitions", got)


def observed_form(implementation: Implementation, arguments: Arguments) -> Any:
    masks = masks_of(implementation, arguments)
    right = form(masks, arguments)
    if not right.holds:
        return {"masks": right}
    return {"masks": right, "complements": complements(masks), "halves": halves(masks)}


def observed_sample(implementation: Implementation, arguments: Arguments) -> Any:
    """Also the nine probabilities, and independence, from thousands of ranks."""
    found = observed_form(implementation, arguments)
    if not all(rule.holds for rule in found.values()):
        return found
    masks = masks_of(implementation, copied(arguments))
    ranks = arguments.positional[0]
    found["probabilities"] = probabilities(masks)
    if found["probabilities"].holds:
        # One row of each pair of complements: that in which some rank is out. All else in it is
        # independent of the choice. A second choice sees the rank that made the first.
        found["independence"] = independence(standardised(masks, 0), ranks)
        found["independence of the first rank"] = independence(standardised(masks, -1), ranks)
    return found


def copied(arguments: Arguments) -> Arguments:
    """The same again, with a generator in the same state."""
    ranks, coalitions, generator = arguments.positional
    return mask_arguments(ranks, coalitions, generator.initial_seed())


def levels(coalitions: int) -> Tensor:
    """The probabilities of all rows, ascending: each of 0.1, … 0.9 coalitions / 9 times."""
    return torch.arange(1, 10, dtype=torch.float64).repeat_interleave(coalitions // 9) / 10


def probabilities(masks: Tensor) -> Rule:
    """Whether the rows' fractions of ones, sorted, are where the nine probabilities put them."""
    fractions = masks.double().mean(1).sort().values
    p = levels(len(masks))
    deviations = (fractions - p) / (p * (1 - p) / masks.shape[1]).sqrt()
    worst = int(deviations.abs().argmax())
    counts = Counter((fractions * 10).round().int().tolist())
    table = ", ".join(f"{count} of p ≈ {k / 10}" for k, count in sorted(counts.items()))
    return Rule(
        float(deviations.abs().max()) <= DEVIATIONS,
        f"p = 0.1, 0.2, … 0.9, each for {len(masks) // 9} rows, complements counted",
        f"{table}; a row with {fractions[worst]:.3f} ones where p = {p[worst]:.1f} is due",
    )


def standardised(masks: Tensor, out: int) -> Tensor:
    """(x − p) / √(p (1 − p)) of the rows in which rank `out` is out, without that rank."""
    rows = masks[~masks[:, out]].double()
    rows = torch.cat([rows[:, :out], rows[:, out + 1 :]], 1) if out >= 0 else rows[:, :out]
    p = ((rows.mean(1) * 10).round() / 10).clamp(0.1, 0.9)[:, None]
    return (rows - p) / (p * (1 - p)).sqrt()


def independence(z: Tensor, ranks: Sequence[int]) -> Rule:
    """Whether z, (rows, ranks), looks like independent numbers of mean 0 and variance 1."""
    rows, players = z.shape
    x = math.log(1e8)  # chi-square is outside these bounds with probability 1e-8 (Laurent, Massart)
    spread = float((z.sum(1) / math.sqrt(players)).square().sum()) / rows
    narrow, wide = 1 - 2 * math.sqrt(x / rows), 1 + 2 * math.sqrt(x / rows) + 2 * x / rows
    between_rows = z @ z.T / math.sqrt(players)
    between_rows.fill_diagonal_(0)
    worst_row = float(between_rows.abs().max())
    worst_player = float(z.sum(0).abs().max()) / math.sqrt(rows)
    lags = [float((z[:, k:] * z[:, :-k]).sum()) / math.sqrt(rows * players) for k in (1, 2, 3)]
    worst_lag = max(map(abs, lags))
    faults = []
    if spread > wide or worst_lag > DEVIATIONS + 1:
        faults.append("ranks of one coalition depend on each other, as with one draw per module")
    if spread < narrow:
        faults.append("the number of ranks in a coalition does not vary as independent draws do")
    if worst_row > 8:
        faults.append("coalitions depend on each other, as with one draw for several of them")
    if worst_player > 9.5:
        faults.append("some rank is in too often where another is out")
    return Rule(not faults, "independent draws for every rank and row", "; ".join(faults) or "so")


def observed_generator(implementation: Implementation, arguments: Arguments) -> Any:
    """The generator alone decides, and moves on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = masks_of(implementation, copied(arguments))
        torch.manual_seed(2)
        again = masks_of(implementation, copied(arguments))
    ranks, coalitions, generator = arguments.positional
    other = masks_of(implementation, mask_arguments(ranks, coalitions, seed=99))
    one = masks_of(implementation, arguments)
    after = masks_of(implementation, Arguments((ranks, coalitions, generator)))
    same = [torch.equal(first, masks) for masks in (again, one, other)]
    return {
        "equal seeds": Rule(same[0] and same[1], "equal coalitions", "other coalitions"),
        "another seed": Rule(not same[2], "other coalitions", "equal coalitions"),
        "the same generator again": Rule(
            not torch.equal(one, after), "other coalitions: it moves on", "equal coalitions"
        ),
    }


def mask_case(
    name: str,
    rule: str,
    ranks: Sequence[int],
    coalitions: int,
    observe: Callable[[Implementation, Arguments], Any] = observed_form,
) -> CaseSpec:
    arguments = partial(mask_arguments, ranks, coalitions)
    return CaseSpec(name, rule, arguments, observe, floating=False, repeatable=False)


MASKS = (
    mask_case("one rank", COALITIONS, [1], 18),
    mask_case("ranks of zero", COALITIONS, [0, 3, 0, 2, 0], 18),
    mask_case("two repetitions", COALITIONS, [2, 1, 3], 36),
    mask_case("the paper's number", COALITIONS, [2, 5, 1, 4], 90),
    mask_case("the generator", "the generator decides", [16, 40], 36, observed_generator),
    mask_case("one of each p", COALITIONS, [1200, 0, 3, 2997, 2400], 18, observed_sample),
    mask_case("one large module", COALITIONS, [6600], 36, observed_sample),
    mask_case("modules of four", COALITIONS, [4] * 1650, 360, observed_sample),
    mask_case("modules of one", COALITIONS, [1] * 6600, 90, observed_sample),
)

# ---- san -----------------------------------------------------------------------------------------

SAN = "SAN(i | S) = ipt(λ_i) + mean_j ipt(P_ji) + mean_j ipt(Q_ij), Eqs 7 and 8"


def san_arguments(
    rank: int, d_out: int, d_in: int, change: Callable[[Tensor], Tensor] = torch.clone
) -> Arguments:
    shapes = [(rank,), (d_out, rank), (rank, d_in)]
    own = [change(normal(*shape, seed=i)) for i, shape in enumerate([*shapes, *shapes])]
    return Arguments(tuple(own))


def some_zero(tensor: Tensor) -> Tensor:
    """Every other entry is zero, as outside a coalition."""
    flat = tensor.flatten().clone()
    flat[::2] = 0.0
    return flat.view(tensor.shape)


def strided(tensor: Tensor) -> Tensor:
    """The same values at every other place of a larger tensor, last dimension first."""
    larger = torch.stack([tensor, tensor + 1], -1)
    return larger[..., 0] if tensor.dim() == 1 else larger.transpose(0, 1).contiguous()[..., 0].T


def san_case(name: str, rank: int, d_out: int, d_in: int, **options: Any) -> CaseSpec:
    arguments = partial(san_arguments, rank, d_out, d_in, **options)
    return CaseSpec(name, SAN, arguments, terms=8.0 + d_out + d_in)


SANS = (
    san_case("rank 1", 1, 2, 3),
    san_case("rank 0", 0, 2, 3),
    san_case("one output", 3, 1, 5),
    san_case("one input", 3, 5, 1),
    san_case("odd sizes", 3, 7, 5),
    san_case("a square", 4, 4, 4),
    san_case("zeros", 5, 4, 6, change=some_zero),
    san_case("negative", 3, 4, 6, change=lambda t: -t.abs()),
    san_case("views", 3, 4, 6, change=strided),
    san_case("expanded", 3, 4, 6, change=lambda t: t[..., :1].expand(t.shape)),
    san_case("many", 16, 40, 90),
)


def ipt(w: Tensor, gradient: Tensor) -> Tensor:
    return (w * gradient).abs()


@dataclass(frozen=True)
class San:
    """san in parts, each of which a wrong twin replaces."""

    ipt: Callable[[Tensor, Tensor], Tensor] = ipt
    of_P: Callable[[Tensor], Tensor] = lambda P: P.mean(0)
    of_Q: Callable[[Tensor], Tensor] = lambda Q: Q.mean(1)
    of_gate: Callable[[Tensor], Tensor] = lambda gate: gate
    whole: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    def __call__(
        self, gate: Tensor, P: Tensor, Q: Tensor, grad_gate: Tensor, grad_P: Tensor, grad_Q: Tensor
    ) -> Tensor:
        each = self.ipt(gate, grad_gate), self.ipt(P, grad_P), self.ipt(Q, grad_Q)
        if self.whole is not None:
            return self.whole(*each)
        return self.of_gate(each[0]) + self.of_P(each[1]) + self.of_Q(each[2])


def mean_of_all(gate: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    return torch.cat([gate[None], P, Q.T]).mean(0)


def mean_of_both(gate: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    return gate + torch.cat([P, Q.T]).mean(0)


def product_of_all(gate: Tensor, P: Tensor, Q: Tensor) -> Tensor:
    return gate * P.mean(0) * Q.mean(1)


SAN_TWINS: dict[str, San] = {
    "SAN with sums in place of means over P and Q (Eq 7)": San(
        of_P=lambda P: P.sum(0), of_Q=lambda Q: Q.sum(1)
    ),
    "SAN with the sum over P (Eq 7)": San(of_P=lambda P: P.sum(0)),
    "SAN with the sum over Q (Eq 7)": San(of_Q=lambda Q: Q.sum(1)),
    "SAN without the gate's term (Eq 7)": San(of_gate=torch.zeros_like),
    "the gate's term alone (Eq 7)": San(whole=lambda gate, P, Q: gate),
    "SAN without P's term (Eq 7)": San(of_P=lambda P: P.sum(0) * 0),
    "SAN without Q's term (Eq 7)": San(of_Q=lambda Q: Q.sum(1) * 0),
    "SAN without absolute values (Eq 8)": San(ipt=torch.mul),
    "SAN with absolute values taken after the means (Eq 8)": San(
        ipt=torch.mul,
        of_gate=torch.abs,
        of_P=lambda P: P.mean(0).abs(),
        of_Q=lambda Q: Q.mean(1).abs(),
    ),
    "the absolute value of the sum of all terms (Eqs 7 and 8)": San(
        ipt=torch.mul, whole=lambda gate, P, Q: (gate + P.mean(0) + Q.mean(1)).abs()
    ),
    "SAN with (w · ∂L/∂w)² in place of |w · ∂L/∂w| (Eq 8)": San(
        ipt=lambda w, gradient: (w * gradient).square()
    ),
    "SAN with |∂L/∂w| in place of |w · ∂L/∂w| (Eq 8)": San(ipt=lambda w, gradient: gradient.abs()),
    "SAN with |w| in place of |w · ∂L/∂w| (Eq 8)": San(ipt=lambda w, gradient: w.abs()),
    "SAN with one mean over gate, P and Q together (Eq 7)": San(whole=mean_of_all),
    "SAN with one mean over P and Q together (Eq 7)": San(whole=mean_of_both),
    "the mean of SAN's three terms (Eq 7)": San(
        whole=lambda gate, P, Q: (gate + P.mean(0) + Q.mean(1)) / 3
    ),
    "the product of SAN's three terms (Eq 7)": San(whole=product_of_all),
    "SAN with P and Q averaged over their ranks (Eq 7)": San(
        of_P=lambda P: P.mean(1), of_Q=lambda Q: Q.mean(0)
    ),
    "SAN with the largest entry of P and Q in place of their means (Eq 7)": San(
        of_P=lambda P: P.amax(0), of_Q=lambda Q: Q.amax(1)
    ),
    "SAN with the Euclidean norm over P and Q (Eq 7)": San(
        of_P=lambda P: P.square().sum(0).sqrt(), of_Q=lambda Q: Q.square().sum(1).sqrt()
    ),
}

# ---- shapley_sensitivity -------------------------------------------------------------------------

Adapters = dict[str, dict[str, Tensor]]
Loss = Callable[[Adapters, Any], Tensor]
SENSITIVITY = "the mean of SAN(i | S) over coalitions, Eqs 6-10"
WIDTH = 4  # of all maps in these losses


def network(params: Adapters, x: Tensor) -> Tensor:
    """The adapters one after the other: tanh(x + x ΔWᵀ)."""
    for own in params.values():
        x = torch.tanh(x + (x @ own["Q"].T * own["gate"]) @ own["P"].T)
    return x


def squares(params: Adapters, batch: Any) -> Tensor:
    """A mean over samples, and over positions of a sample."""
    if isinstance(batch, dict):
        x, y = batch["x"], batch["y"]
    else:
        x, y = batch if isinstance(batch, (tuple, list)) else (batch, batch.flip(-1))
    error: Tensor = network(params, x) - y
    return error.square().mean()


def without_first(params: Adapters, batch: Any) -> Tensor:
    """A loss that does not depend on the first module."""
    return squares(dict([*params.items()][1:]), batch)


def twice_used(params: Adapters, batch: Any) -> Tensor:
    """Every module is called twice."""
    x, y = batch
    error: Tensor = network(params, network(params, x)) - y
    return error.square().mean()


def tensors(sizes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    # Later batches are larger in scale, so that their weights matter.
    return [normal(*size, WIDTH, seed=20 + i) * (1 + i) for i, size in enumerate(sizes)]


def tuples(sizes: Sequence[tuple[int, ...]]) -> list[tuple[Tensor, Tensor]]:
    return [(x, normal(*x.shape, seed=40 + i)) for i, x in enumerate(tensors(sizes))]


def dicts(sizes: Sequence[tuple[int, ...]]) -> list[dict[str, Tensor]]:
    return [{"x": x, "y": y} for x, y in tuples(sizes)]


def adapters_of(ranks: Sequence[int]) -> Adapters:
    found = {}
    for i, rank in enumerate(ranks):
        found[f"h.{len(ranks) - i}"] = {  # h.10 comes before h.9: in the order given, not by name
            "gate": normal(rank, seed=3 * i),
            "P": normal(WIDTH, rank, seed=3 * i + 1) / 2,
            "Q": normal(rank, WIDTH, seed=3 * i + 2) / 2,
        }
    return found


def sensitivity_arguments(
    ranks: Sequence[int],
    masks: Sequence[Sequence[int]],
    batches: Callable[[Sequence[tuple[int, ...]]], list[Any]] = tuples,
    sizes: Sequence[tuple[int, ...]] = ((5,),),
    loss: Loss = squares,
    change: Callable[[Tensor], Tensor] = torch.clone,
) -> Arguments:
    params = {
        name: {key: change(w) for key, w in own.items()} for name, own in adapters_of(ranks).items()
    }
    chosen = torch.tensor(masks).bool().view(len(masks), sum(ranks))
    return Arguments((loss, params, batches(sizes), chosen))


def drawn_masks(count: int, players: int) -> list[list[int]]:
    draw = random.Random(count)
    return [[draw.randint(0, 1) for _ in range(players)] for _ in range(count)]


def sensitivity_case(name: str, rule: str, *positional: Any, **options: Any) -> CaseSpec:
    return CaseSpec(name, rule, partial(sensitivity_arguments, *positional, **options), terms=100)


UNEVEN = ((6,), (1,), (3,))  # samples of each batch
OVER_ALL = "gradients of the mean over all samples, absolute values after that"
OVER_MASKS = "the score is the mean over all masks"

SENSITIVITIES = (
    sensitivity_case("one rank", SENSITIVITY, [1], [[1]]),
    sensitivity_case("no rank in", "λ = 0 outside the coalition, Eq 6", [2], [[0, 0]]),
    sensitivity_case("all ranks in", SENSITIVITY, [2, 1], [[1, 1, 1]]),
    sensitivity_case("one of two", "λ = 0 outside the coalition, Eq 6", [2], [[1, 0]]),
    sensitivity_case("complements", OVER_MASKS, [2, 1], [[1, 0, 0], [0, 1, 1]]),
    sensitivity_case("a mask twice", OVER_MASKS, [2, 1], [[1, 0, 1], [1, 1, 0], [1, 0, 1]]),
    sensitivity_case("no rank in some masks", OVER_MASKS, [2], [[0, 0], [1, 0], [0, 0], [0, 0]]),
    sensitivity_case("all masks", OVER_MASKS, [1, 2], [*product([0, 1], repeat=3)]),
    sensitivity_case("ranks of zero", SENSITIVITY, [0, 3, 0, 2], drawn_masks(4, 5)),
    sensitivity_case("uneven ranks", "masks in the order of params", [1, 3, 2], drawn_masks(5, 6)),
    sensitivity_case(
        "many modules", SENSITIVITY, [1 + i % 3 for i in range(11)], drawn_masks(4, 21)
    ),
    sensitivity_case("two equal batches", OVER_ALL, [2, 1], drawn_masks(4, 3), sizes=[(3,), (3,)]),
    sensitivity_case("uneven batches", OVER_ALL, [2, 1], drawn_masks(4, 3), sizes=UNEVEN),
    sensitivity_case("uneven batches, all ranks in", OVER_ALL, [2], [[1, 1]], sizes=UNEVEN),
    sensitivity_case("batches as tensors", OVER_ALL, [2, 1], drawn_masks(3, 3), tensors, UNEVEN),
    sensitivity_case("batches as mappings", OVER_ALL, [2, 1], drawn_masks(3, 3), dicts, UNEVEN),
    sensitivity_case(
        "positions",
        "the first dimension counts samples",
        [2, 1],
        drawn_masks(3, 3),
        sizes=[(2, 5), (4, 1), (1, 3)],
    ),
    sensitivity_case("one sample", OVER_ALL, [2, 1], drawn_masks(3, 3), sizes=[(1,)]),
    sensitivity_case(
        "a module that is not used", SENSITIVITY, [2, 1], drawn_masks(4, 3), loss=without_first
    ),
    sensitivity_case("modules used twice", SENSITIVITY, [2, 1], drawn_masks(4, 3), loss=twice_used),
    sensitivity_case("gates of zero", SENSITIVITY, [3, 2], drawn_masks(4, 5), change=some_zero),
    sensitivity_case("views", SENSITIVITY, [3, 2], drawn_masks(4, 5), change=strided),
    sensitivity_case("18 masks", OVER_MASKS, [2, 3], drawn_masks(18, 5), sizes=UNEVEN),
)


@dataclass(frozen=True)
class Sensitivity:
    """shapley_sensitivity in parts, each of which a wrong twin replaces."""

    san: Callable[..., Tensor] = San()
    weights: Callable[[list[Any]], list[float]] = lambda batches: [
        length(batch) / sum(map(length, batches)) for batch in batches
    ]
    together: bool = True  # absolute values after the mean over batches
    members: Callable[[Tensor], Tensor] = lambda mask: mask
    gate_in_san: bool = True  # as it is in the coalition, not as trained
    average: Callable[[Tensor, Tensor], Tensor] = lambda sample, masks: sample.mean(0)
    sorted_names: bool = False

    def __call__(
        self, loss: Loss, params: Adapters, batches: Iterable[Any], masks: Tensor
    ) -> dict[str, Tensor]:
        data = list(batches)
        names = sorted(params) if self.sorted_names else list(params)
        ranks = [len(params[name]["gate"]) for name in names]
        sample = []
        for mask in masks:
            inside = self.members(mask).split_with_sizes(ranks)
            own = dict(zip(names, inside, strict=True))
            sample.append(self._of_coalition(loss, params, data, own))
        scores = self.average(torch.stack(sample), masks).split_with_sizes(ranks)
        by_name = dict(zip(names, scores, strict=True))
        return {name: by_name[name] for name in params}

    def _of_coalition(
        self, loss: Loss, params: Adapters, data: list[Any], inside: dict[str, Tensor]
    ) -> Tensor:
        S = {
            name: {
                "gate": (own["gate"] * inside[name]).detach().requires_grad_(),
                "P": own["P"].detach().clone().requires_grad_(),
                "Q": own["Q"].detach().clone().requires_grad_(),
            }
            for name, own in params.items()
        }
        losses = [w * loss(S, b) for w, b in zip(self.weights(data), data, strict=True)]
        parts = [torch.stack(losses).sum()] if self.together else losses
        return torch.stack([self._san_of(part, S, params, [*inside]) for part in parts]).sum(0)

    def _san_of(self, part: Tensor, S: Adapters, params: Adapters, names: list[str]) -> Tensor:
        flat = [w for own in S.values() for w in own.values()]
        gradient = iter(torch.autograd.grad(part, flat, retain_graph=True, materialize_grads=True))
        scores = {}
        for name, own in S.items():
            gate = own["gate"] if self.gate_in_san else params[name]["gate"]
            w = gate.detach(), own["P"].detach(), own["Q"].detach()
            scores[name] = self.san(*w, *(next(gradient) for _ in w))
        return torch.cat([scores[name] for name in names])


def weighed_alike(batches: list[Any]) -> list[float]:
    return [1 / len(batches)] * len(batches)


def weighed_by_entries(batches: list[Any]) -> list[float]:
    sizes = [first_tensor(batch).numel() for batch in batches]
    return [size / sum(sizes) for size in sizes]


def first_tensor(batch: Any) -> Tensor:
    first: Tensor = next(iter(batch.values())) if isinstance(batch, dict) else batch
    return first if isinstance(first, Tensor) else first[0]


def over_own_masks(sample: Tensor, masks: Tensor) -> Tensor:
    """The mean over those masks that a rank is in."""
    return (sample * masks).sum(0) / masks.sum(0).clamp(min=1)


SENSITIVITY_TWINS: dict[str, Implementation] = {
    "the mean over the masks that a rank is in, not over all masks (Eqs 9 and 10)": Sensitivity(
        average=over_own_masks
    ),
    "the sum over masks, not their mean (Eqs 9 and 10)": Sensitivity(
        average=lambda sample, masks: sample.sum(0)
    ),
    "the largest score of all masks (Eqs 9 and 10)": Sensitivity(
        average=lambda sample, masks: sample.amax(0)
    ),
    "the score in the first mask alone (Eqs 9 and 10)": Sensitivity(
        average=lambda sample, masks: sample[0]
    ),
    "the score in the last mask alone (Eqs 9 and 10)": Sensitivity(
        average=lambda sample, masks: sample[-1]
    ),
    "the sensitivity with batches weighted alike": Sensitivity(weights=weighed_alike),
    "the sensitivity with batches weighted by their entries, not samples": Sensitivity(
        weights=weighed_by_entries
    ),
    "the sensitivity with the losses of batches summed": Sensitivity(
        weights=lambda batches: [1.0] * len(batches)
    ),
    "the sensitivity of the sum over samples, not their mean": Sensitivity(
        weights=lambda batches: [float(length(batch)) for batch in batches]
    ),
    "the sensitivity of the first batch alone": Sensitivity(
        weights=lambda batches: [float(i == 0) for i in range(len(batches))]
    ),
    "the sensitivity of the last batch alone": Sensitivity(
        weights=lambda batches: [float(i == len(batches) - 1) for i in range(len(batches))]
    ),
    "the sensitivity with absolute values taken batch by batch (Eq 8)": Sensitivity(together=False),
    "the sensitivity with absolute values batch by batch, and batches weighted alike": Sensitivity(
        together=False, weights=weighed_alike
    ),
    "the sensitivity with all ranks in, whatever the masks are (Eq 6)": Sensitivity(
        members=torch.ones_like
    ),
    "the sensitivity with the masks' complements (Eq 6)": Sensitivity(members=torch.logical_not),
    "the sensitivity with the trained gate, not the coalition's, in SAN (Eqs 6 and 8)": Sensitivity(
        gate_in_san=False
    ),
    "the sensitivity with masks in the order of sorted names": Sensitivity(sorted_names=True),
    **{
        f"the sensitivity by {text}": Sensitivity(san=twin)
        for text, twin in SAN_TWINS.items()
        if any(part in text for part in ("sums in place", "without", "after the means", "∂w| in"))
    },
}

# ---- exact_shapley_values ------------------------------------------------------------------------

SHAPLEY = "the mean over all orders of v(S ∪ {i}) − v(S)"
Game = Callable[[Any], float]


def table_game(worths: list[float]) -> Game:
    """v(S) from a list of 2^n numbers, in the order of binary numbers whose bit i is player i."""

    def value(mask: Any) -> float:
        if 2 ** len(mask) != len(worths):
            raise ValueError(f"value() got a mask of {len(mask)} players: expected bool (n,)")
        return worths[sum(1 << i for i, present in enumerate(mask) if bool(present))]

    return value


def additive(*weights: float) -> Game:
    """Every player is worth a number of its own."""

    def value(mask: Any) -> float:
        return float(sum(w for w, inside in zip(weights, mask, strict=True) if bool(inside)))

    return value


def random_game(n: int, seed: int) -> Game:
    return table_game(normal(2**n, seed=seed).tolist())


def gloves(left: int) -> Game:
    """Players before `left` hold a left glove, the others a right one. Pairs are worth 1."""
    return lambda mask: float(min(sum(map(bool, mask[:left])), sum(map(bool, mask[left:]))))


def majority(mask: Any) -> float:
    """A vote that 6 of 10 seats win. The players have 4, 3, 2, 1, 0 and 0 of them."""
    seats = (4, 3, 2, 1, 0, 0)
    return float(sum(s for s, inside in zip(seats, mask, strict=False) if bool(inside)) >= 6)


def shapley_case(name: str, rule: str, game: Game, n: int) -> CaseSpec:
    return CaseSpec(
        name,
        rule,
        lambda: Arguments((game, n)),
        observed_values,
        terms=2.0 ** (n + 3),
        floating=False,
    )


def observed_values(implementation: Implementation, arguments: Arguments) -> Any:
    return torch.as_tensor(implementation(*arguments.positional))


def observed_masks(implementation: Implementation, arguments: Arguments) -> Any:
    """What the game is asked."""
    game, n = arguments.positional
    asked = set()
    odd = set()

    def value(mask: Any) -> float:
        kind, shape = str(getattr(mask, "dtype", type(mask))), tuple(getattr(mask, "shape", ()))
        if not kind.endswith("bool") or shape != (n,):
            odd.add(f"{kind} of shape {shape}")
        asked.add(tuple(map(bool, mask)))
        return float(game(mask))

    implementation(value, n)
    return {
        "mask": Rule(not odd, f"bool of shape ({n},)", ", ".join(sorted(odd))),
        "coalitions": Rule(len(asked) == 2**n, f"all {2**n}", f"{len(asked)}"),
    }


VALUES = (
    shapley_case("one player", SHAPLEY, table_game([0.0, 2.5]), 1),
    shapley_case("an empty coalition of some worth", SHAPLEY, table_game([1.5, 2.5]), 1),
    shapley_case("two players", SHAPLEY, table_game([0.0, 1.0, 2.0, 5.0]), 2),
    shapley_case("two players and an offset", SHAPLEY, table_game([3.0, 1.0, 2.0, 5.0]), 2),
    shapley_case("an additive game", "φ is the weights", additive(3.0, -1.0, 0.0, 2.5), 4),
    shapley_case("gloves", SHAPLEY, gloves(2), 3),
    shapley_case("two pairs of gloves and one more", SHAPLEY, gloves(2), 5),
    shapley_case("a vote", SHAPLEY, majority, 4),
    shapley_case("a null player", "who never adds anything has φ = 0", majority, 6),
    shapley_case("negative worths", SHAPLEY, table_game([0.0, -1.0, -2.5, -2.0, -4, 0, -3, -9]), 3),
    CaseSpec(
        "the masks",
        "value(mask: bool (n,)) → float",
        lambda: Arguments((random_game(4, seed=1), 4)),
        observed_masks,
        floating=False,
    ),
    *(
        shapley_case(f"a random game of {n}", SHAPLEY, random_game(n, seed=n), n)
        for n in (2, 3, 4, 5, 6)
    ),
)


def weighted_values(weight: Callable[[int, int], float], value: Game, n: int) -> Tensor:
    """Σ over S without i of weight(|S|, n) · (v(S ∪ {i}) − v(S))."""
    coalitions = list(product([False, True], repeat=n))
    worth = {S: float(value(torch.tensor(S))) for S in coalitions}
    phi = [0.0] * n
    for S in coalitions:
        for i in range(n):
            if not S[i]:
                larger = (*S[:i], True, *S[i + 1 :])
                phi[i] += weight(sum(S), n) * (worth[larger] - worth[S])
    return torch.tensor(phi, dtype=torch.float64)


def shapley_weight(size: int, n: int) -> float:
    return 1 / (n * math.comb(n - 1, size))


def shares_of_all(value: Game, n: int) -> Tensor:
    phi = reference.exact_shapley_values(value, n)
    return phi / phi.sum()


def empty_is_zero(value: Game, n: int) -> Tensor:
    def zero(mask: Any) -> float:
        return value(mask) if any(map(bool, mask)) else 0.0

    return reference.exact_shapley_values(zero, n)


def one_order(value: Game, n: int) -> Tensor:
    masks = torch.ones(n + 1, n, dtype=torch.bool).tril(-1)
    worth = torch.tensor([float(value(mask)) for mask in masks], dtype=torch.float64)
    return worth.diff()


def orders_from_first(value: Game, n: int) -> Tensor:
    """The mean over the orders that begin with player 0, with everything else as it should be."""
    phi = [0.0] * n
    worth = {S: float(value(torch.tensor(S))) for S in product([False, True], repeat=n)}
    orders = [order for order in permutations(range(n)) if order[0] == 0]
    for order in orders:
        S = (False,) * n
        for i in order:
            larger = (*S[:i], True, *S[i + 1 :])
            phi[i] += (worth[larger] - worth[S]) / len(orders)
            S = larger
    return torch.tensor(phi, dtype=torch.float64)


def worth_alone(value: Game, n: int) -> Tensor:
    return torch.tensor([float(value(mask)) for mask in torch.eye(n).bool()], dtype=torch.float64)


VALUE_TWINS: dict[str, Implementation] = {
    "the Banzhaf values: all coalitions weighted alike": partial(
        weighted_values, lambda size, n: 1 / 2 ** (n - 1)
    ),
    "the sum over coalitions, without weights": partial(weighted_values, lambda size, n: 1.0),
    "what each player adds to all others together": partial(
        weighted_values, lambda size, n: float(size == n - 1)
    ),
    "what each player adds to no one": partial(weighted_values, lambda size, n: float(size == 0)),
    "the worth of each player alone, v({i})": worth_alone,
    "the values without the empty coalition among S": partial(
        weighted_values, lambda size, n: shapley_weight(size, n) * (size > 0)
    ),
    "the values without the coalition of all others among S": partial(
        weighted_values, lambda size, n: shapley_weight(size, n) * (size < n - 1)
    ),
    "the values with an empty coalition worth 0": empty_is_zero,
    "the values times n": partial(weighted_values, lambda size, n: 1 / math.comb(n - 1, size)),
    "the values with (n choose |S|) in place of (n − 1 choose |S|)": partial(
        weighted_values, lambda size, n: 1 / (n * math.comb(n, size))
    ),
    "the values as shares of their sum": shares_of_all,
    "what each player adds in the order 0, 1, 2, … alone": one_order,
    "the mean over the orders that begin with player 0": orders_from_first,
    "the values with the opposite sign": lambda value, n: -reference.exact_shapley_values(value, n),
}

# ---- the contracts -------------------------------------------------------------------------------

CONTRACTS: tuple[Contract, ...] = (
    Contract(
        "coalition_masks",
        f"ShapLoRA, arXiv 2601.17921, {COALITIONS}",
        reference.coalition_masks,
        MASKS,
    ),
    Contract("san", f"ShapLoRA, arXiv 2601.17921, {SAN}", reference.san, SANS, SAN_TWINS),
    Contract(
        "shapley_sensitivity",
        f"ShapLoRA, arXiv 2601.17921, {SENSITIVITY}",
        reference.shapley_sensitivity,
        SENSITIVITIES,
        SENSITIVITY_TWINS,
    ),
    Contract(
        "exact_shapley_values",
        f"L. S. Shapley, 1953: {SHAPLEY}",
        reference.exact_shapley_values,
        VALUES,
        VALUE_TWINS,
    ),
)
