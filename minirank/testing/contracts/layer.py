"""The LoRA layer: its function, merging, resizing, and one file there and back."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..case import Arguments, CaseSpec, Contract, Implementation, mapped
from ..comparison import Bits, Rule
from ..round_trip import round_trip

LORA = "y = W x + b + s · B (gate ⊙ A x)"
MERGED = "W' = W + s · B diag(gate) A"
RESIZE = "ranks that stay keep their moments, new ones start with B = 0"
LAYER = "merge and unmerge keep the function; W comes back bit for bit"
ROUND_TRIP = "what is read is what was written, bit for bit"

View = Callable[[Tensor], Tensor]


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers, float64, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


# ---- memory layouts ------------------------------------------------------------------------------


def plain(tensor: Tensor) -> Tensor:
    return tensor


def with_gaps(tensor: Tensor) -> Tensor:
    """The same numbers in every second place of a larger tensor, which is NaN elsewhere."""
    whole = tensor.new_full([2 * size + 1 for size in tensor.shape], torch.nan)
    view = whole[(slice(1, None, 2),) * tensor.ndim]
    view.copy_(tensor)
    return view


def transposed(tensor: Tensor) -> Tensor:
    """The same numbers, with the last two dimensions stored the other way round."""
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


def repeated(tensor: Tensor) -> Tensor:
    """The first row of `tensor` in the place of every row, stored once."""
    return tensor[:1].expand(tensor.shape)


# ---- what cases share ----------------------------------------------------------------------------


def in_dtype(value: Any, dtype: torch.dtype, like: str) -> Rule:
    got = getattr(value, "dtype", type(value).__name__)
    return Rule(got == dtype, f"{dtype}, as {like}", str(got))


def lowered(arguments: Arguments, base: torch.dtype, adapter: torch.dtype) -> Arguments:
    """(…, A, B, scaling) and gate in the dtype `adapter`, what stands before A in `base`."""
    *before, A, B, scaling = arguments.positional
    wide = (A.to(adapter), B.to(adapter))
    options = mapped(arguments.options, lambda tensor: tensor.to(adapter))
    return Arguments((*mapped(before, lambda t: t.to(base)), *wide, scaling), options)


def factors(
    d_in: int, d_out: int, rank: int, scaling: float, gate: bool, view: View
) -> tuple[Tensor, Tensor, Tensor, float, dict[str, Tensor]]:
    """W, A, B, scaling, {"gate": gate} or {}."""
    W = view(normal(d_out, d_in, seed=2))
    A, B = view(normal(rank, d_in, seed=4)), view(normal(d_out, rank, seed=5))
    # Gates below zero and above one are among them.
    return W, A, B, scaling, {"gate": view(1.5 * normal(rank, seed=6))} if gate else {}


# ---- lora_forward --------------------------------------------------------------------------------


def forward_arguments(
    *leading: int,
    d_in: int = 5,
    d_out: int = 4,
    rank: int = 3,
    bias: bool = True,
    gate: bool = False,
    scaling: float = 1.7,
    x_view: View = plain,
    view: View = plain,
) -> Arguments:
    x = x_view(normal(*leading, d_in, seed=1))
    W, A, B, scaling, options = factors(d_in, d_out, rank, scaling, gate, view)
    return Arguments((x, W, view(normal(d_out, seed=3)) if bias else None, A, B, scaling), options)


def forward(implementation: Implementation, arguments: Arguments) -> Any:
    y = implementation(*arguments.positional, **arguments.options)
    return {"y": y, "dtype of y": in_dtype(y, arguments.positional[0].dtype, "x")}


def two_calls(implementation: Implementation, arguments: Arguments) -> Any:
    """Equal shapes and other numbers: what was kept of the first call must not come again."""
    second = Arguments(*(mapped(part, lambda t: 0.75 * t.flip(0)) for part in arguments))
    return {
        "y of the first call": implementation(*arguments.positional, **arguments.options),
        "y of the second call": implementation(*second.positional, **second.options),
    }


def after_a_step(implementation: Implementation, arguments: Arguments) -> Any:
    """The same tensors with new numbers in them, as an optimizer leaves them."""
    trained = Arguments(*(mapped(part, torch.clone) for part in arguments))
    before = implementation(*trained.positional, **trained.options)
    for tensor in (*trained.positional[3:5], *trained.options.values()):
        tensor.mul_(-0.5).add_(0.25)
    return {
        "y": before,
        "y after A, B and gate changed in place": implementation(
            *trained.positional, **trained.options
        ),
    }


def without_gate_by_name(implementation: Implementation, arguments: Arguments) -> Any:
    return {"y": implementation(*arguments.positional, gate=None)}


def half_precision_base(implementation: Implementation, arguments: Arguments) -> Any:
    return forward(implementation, lowered(arguments, torch.bfloat16, torch.float32))


def random_cotangent(y_shape: Sequence[int], x: Tensor) -> Tensor:
    return normal(*y_shape, seed=7).to(x)


def cotangent_of_a_sum(y_shape: Sequence[int], x: Tensor) -> Tensor:
    """What y.sum().backward() hands over: one number, expanded."""
    return torch.ones((), dtype=x.dtype, device=x.device).expand(tuple(y_shape))


def gradients(
    implementation: Implementation,
    arguments: Arguments,
    wanted: Sequence[str] = ("x", "A", "B", "gate"),
    cotangent: Callable[[Sequence[int], Tensor], Tensor] = random_cotangent,
    passes: int = 1,
) -> Any:
    """y, and the gradients of Σ cotangent · y over the wanted ones of x, A, B and gate."""
    x, W, b, A, B, scaling = arguments.positional
    c = arguments.options.get("gate")
    named = {"x": x, "A": A, "B": B, **({} if c is None else {"gate": c})}
    given_y = cotangent((*x.shape[:-1], len(W)), x)
    backward = getattr(implementation, "backward", None)
    if backward is not None:
        y = implementation(*arguments.positional, **arguments.options)
        for _ in range(passes):
            given = backward(x, W, b, A, B, scaling, c, given_y)
        found = {name: given[name] for name in named if name in wanted}
        return {"y": y} | {f"gradient of {name}": g for name, g in found.items()}
    values = {name: t.detach().requires_grad_(name in wanted) for name, t in named.items()}
    options = {} if c is None else {"gate": values["gate"]}
    y = implementation(values["x"], W, b, values["A"], values["B"], scaling, **options)
    leaves = {name: value for name, value in values.items() if value.requires_grad}
    if isinstance(y, Tensor) and not y.requires_grad:
        raise ValueError(
            f"y has no gradient, although {', '.join(leaves)} require one: does autograd see the "
            "operations? Pass backward= for gradients of your own, or gradients=False"
        )
    for _ in range(passes):
        given = torch.autograd.grad(
            y, list(leaves.values()), given_y, retain_graph=True, materialize_grads=True
        )
    found = dict(zip(leaves, given, strict=True))
    return {"y": y.detach()} | {f"gradient of {name}": g for name, g in found.items()}


def half_precision_gradients(implementation: Implementation, arguments: Arguments) -> Any:
    """Compared in bfloat16: how many digits of the adapter's own type survive is left open."""
    found = gradients(implementation, lowered(arguments, torch.bfloat16, torch.float32))
    return {name: gradient.to(torch.bfloat16) for name, gradient in found.items()}


def forward_case(name: str, *leading: int, observe: Any = forward, **sizes: Any) -> CaseSpec:
    d_in, rank = sizes.get("d_in", 5), sizes.get("rank", 3)
    arguments = partial(forward_arguments, *leading, **sizes)
    return CaseSpec(name, LORA, arguments, observe, terms=d_in + rank + 4)


def gradient_case(name: str, *leading: int, **options: Any) -> CaseSpec:
    how = {key: options.pop(key) for key in ("wanted", "cotangent", "passes") if key in options}
    arguments = partial(forward_arguments, *leading, **options)
    # A sum over samples of sums over outputs and ranks.
    terms = torch.Size(leading).numel() + options.get("d_out", 4) + options.get("rank", 3) + 8
    observe = partial(gradients, **how)
    return CaseSpec(f"gradients: {name}", LORA, arguments, observe, terms, needs_gradients=True)


SQUARE = {"d_in": 4, "d_out": 4, "rank": 4}  # a matrix the wrong way round raises nothing here
FORWARD = (
    forward_case("rank 1", 2, rank=1),
    forward_case("rank 0", 2, rank=0),
    forward_case("rank 0, gate", 2, rank=0, gate=True),
    forward_case("one input, one output", 2, d_in=1, d_out=1, rank=1, gate=True),
    forward_case("no bias", 2, bias=False),
    forward_case("no bias, gate", 2, bias=False, gate=True),
    forward_case("one vector", gate=True),
    forward_case("gate", 3, gate=True),
    forward_case("gate=None", 3, observe=without_gate_by_name),
    forward_case("square", 4, **SQUARE, gate=True),
    forward_case("rank above d_in and d_out", 3, rank=7, gate=True),
    forward_case("scaling 2, an int", 3, scaling=2),
    forward_case("scaling 0", 3, scaling=0.0),
    forward_case("scaling below zero", 3, scaling=-0.3, gate=True),
    forward_case("no rows", 0, gate=True),
    forward_case("positions", 2, 3, gate=True),
    forward_case("four dimensions", 2, 3, 2, gate=True),
    forward_case("x transposed", 2, 3, gate=True, x_view=transposed),
    forward_case("x with gaps", 2, 3, gate=True, x_view=with_gaps),
    forward_case("x repeated", 3, 2, gate=True, x_view=repeated),
    forward_case("matrices transposed", 3, gate=True, view=transposed),
    forward_case("matrices with gaps", 3, gate=True, view=with_gaps),
    forward_case("matrices repeated", 3, gate=True, view=repeated),
    forward_case("sizes beside powers of two", 67, d_in=129, d_out=65, rank=17, gate=True),
    forward_case("two calls", 3, gate=True, observe=two_calls),
    forward_case("after a step", 3, gate=True, observe=after_a_step),
    CaseSpec(
        "bfloat16 base, float32 adapter",
        LORA,
        partial(forward_arguments, 2, 3, gate=True),
        half_precision_base,
        terms=4,
        floating=False,
    ),
    gradient_case("no gate", 3),
    gradient_case("gate", 3, gate=True),
    gradient_case("rank 0", 2, rank=0, gate=True),
    gradient_case("no bias", 3, bias=False, gate=True),
    gradient_case("one vector", gate=True),
    gradient_case("square", 4, **SQUARE, gate=True),
    gradient_case("positions, x transposed", 2, 3, gate=True, x_view=transposed),
    gradient_case("matrices with gaps", 3, gate=True, view=with_gaps),
    gradient_case("of a plain sum", 2, 3, gate=True, cotangent=cotangent_of_a_sum),
    gradient_case("A and B alone", 3, gate=True, wanted=("A", "B")),
    gradient_case("x alone", 3, gate=True, wanted=("x",)),
    gradient_case("gate alone", 3, gate=True, wanted=("gate",)),
    gradient_case("a second backward pass", 3, gate=True, passes=2),
    CaseSpec(
        "gradients: bfloat16 base, float32 adapter",
        LORA,
        partial(forward_arguments, 2, 3, gate=True),
        half_precision_gradients,
        terms=8,
        floating=False,
        needs_gradients=True,
    ),
)


def forward_twin(change: Callable[..., Any]) -> Implementation:
    """The reference, called with other arguments."""

    def twin(x, W, b, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
        return reference.lora_forward(*change(x, W, b, A, B, scaling, gate))

    return twin


def gradient_without(factor: Any, value: Tensor) -> Tensor:
    """factor · value, with the gradient of `value` alone."""
    result: Tensor = (factor * value - value).detach() + value
    return result


def scaling_missing_backward(x, W, b, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
    base = reference.lora_forward(x, W, b, A[:0], B[:, :0], 1.0)
    return base + gradient_without(scaling, reference.lora_forward(x, 0 * W, None, A, B, 1.0, gate))


def gate_missing_backward(x, W, b, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
    h = x @ A.T
    h = h if gate is None else gradient_without(gate.detach(), h) + (gate - gate.detach()) * h
    return reference.lora_forward(x, W, b, A[:0], B[:, :0], 1.0) + scaling * h @ B.T


def adapter_missing_in_x(x, W, b, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
    update = reference.lora_forward(x.detach(), 0 * W, None, A, B, scaling, gate)
    return reference.lora_forward(x, W, b, A[:0], B[:, :0], 1.0) + update


FORWARD_TWINS = {
    f"the layer {sentence}": twin
    for sentence, twin in {
        "without its adapter": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A[:0], B[:, :0], s, None)
        ),
        "without its base weight": forward_twin(
            lambda x, W, b, A, B, s, c: (x, 0 * W, b, A, B, s, c)
        ),
        "without W and b": forward_twin(lambda x, W, b, A, B, s, c: (x, 0 * W, None, A, B, s, c)),
        "without its bias": forward_twin(lambda x, W, b, A, B, s, c: (x, W, None, A, B, s, c)),
        "with its bias added twice": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, 2 * b, A, B, s, c)
        ),
        "with its bias times the scaling": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, s * b, A, B, s, c)
        ),
        "without its gate": forward_twin(lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, None)),
        "with the gate applied twice": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, c * c)
        ),
        "with the absolute value of the gate": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, c.abs())
        ),
        "with the gate clipped to [0, 1]": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, c.clamp(0, 1))
        ),
        "with negative gates as zero": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, c.clamp(min=0))
        ),
        "with a sigmoid of the gate": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, c.sigmoid())
        ),
        "with the first gate for all ranks": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, c[:1])
        ),
        "without its scaling": forward_twin(lambda x, W, b, A, B, s, c: (x, W, b, A, B, 1.0, c)),
        "with the scaling divided by the rank (scaling is alpha / r already)": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s / len(A), c)
        ),
        "with the scaling divided by the root of the rank": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s / len(A) ** 0.5, c)
        ),
        "with the scaling times the rank": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s * len(A), c)
        ),
        "with the scaling applied twice": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s * s, c)
        ),
        "with the adapter subtracted": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, -s, c)
        ),
        "without the last rank": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A[:-1], B[:, :-1], s, c if c is None else c[:-1])
        ),
        "with W transposed": forward_twin(lambda x, W, b, A, B, s, c: (x, W.T, b, A, B, s, c)),
        "with A transposed": forward_twin(lambda x, W, b, A, B, s, c: (x, W, b, A.T, B, s, c)),
        "with B transposed": forward_twin(lambda x, W, b, A, B, s, c: (x, W, b, A, B.T, s, c)),
        "with the gate on the inputs": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A * c, B, s, None)
        ),
        "with the gate on the outputs": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, c[:, None] * B, s, None)
        ),
        "with gradients of A, B and gate of zero": forward_twin(
            lambda x, W, b, A, B, s, c: (
                *(x, W, b, A.detach(), B.detach(), s),
                c if c is None else c.detach(),
            )
        ),
        "with a gradient of the gate of zero": forward_twin(
            lambda x, W, b, A, B, s, c: (x, W, b, A, B, s, c.detach())
        ),
        "with a gradient of x of zero": forward_twin(
            lambda x, W, b, A, B, s, c: (x.detach(), W, b, A, B, s, c)
        ),
        "without the adapter's part in the gradient of x": adapter_missing_in_x,
        "without the scaling in the gradients of the adapter": scaling_missing_backward,
        "without the gate in the gradients of A and x": gate_missing_backward,
    }.items()
}


# ---- merged_weight -------------------------------------------------------------------------------


def merge_arguments(
    d_in: int = 5,
    d_out: int = 4,
    rank: int = 3,
    scaling: float = 1.7,
    gate: bool = False,
    view: View = plain,
) -> Arguments:
    W, A, B, scaling, options = factors(d_in, d_out, rank, scaling, gate, view)
    return Arguments((W, A, B, scaling), options)


def merged(implementation: Implementation, arguments: Arguments) -> Any:
    result = implementation(*arguments.positional, **arguments.options)
    return {"W'": result, "dtype of W'": in_dtype(result, arguments.positional[0].dtype, "W")}


def merged_narrow(
    implementation: Implementation, arguments: Arguments, base: torch.dtype, adapter: torch.dtype
) -> Any:
    """With W or the adapter in a narrow dtype. W' is rounded once, from a sum in float32."""
    given = lowered(arguments, base, adapter)
    outcome = merged(implementation, given)
    return outcome | {"rounding": rounded_once(outcome["W'"], given)}


def rounded_once(result: Any, given: Arguments) -> Rule:
    """Is every entry within half a unit in the last place, and what float32 loses?"""
    W, A, B, scaling = mapped(given.positional, lambda t: t.detach().cpu().double())
    gate = {key: value.detach().cpu().double() for key, value in given.options.items()}
    exact = reference.merged_weight(W, A, B, scaling, **gate)
    size = {key: value.abs() for key, value in gate.items()}
    largest = reference.merged_weight(W.abs(), A.abs(), B.abs(), abs(scaling), **size)
    unit = torch.finfo(given.positional[0].dtype).eps * exact.abs().log2().floor().exp2()
    loss = len(A) * torch.finfo(torch.float32).eps * largest
    excess = ((result.detach().cpu().double() - exact).abs() - loss) / unit
    worst = float(excess.nan_to_num(nan=torch.inf).max())
    expected = "a sum in float32 or better, rounded once: at most 0.5 units in the last place"
    return Rule(worst <= 0.5, expected, f"{max(worst, 0.0):.2f} units in the last place")


def merged_case(name: str, **sizes: Any) -> CaseSpec:
    arguments = partial(merge_arguments, **sizes)
    return CaseSpec(name, MERGED, arguments, merged, terms=sizes.get("rank", 3) + 4)


def narrow_case(base: torch.dtype, adapter: torch.dtype) -> CaseSpec:
    w, a = (str(dtype).removeprefix("torch.") for dtype in (base, adapter))
    arguments = partial(merge_arguments, d_in=17, d_out=15, rank=3, gate=True)
    observe = partial(merged_narrow, base=base, adapter=adapter)
    return CaseSpec(f"W {w}, adapter {a}", MERGED, arguments, observe, terms=2, floating=False)


MERGE = (
    merged_case("rank 1", rank=1),
    merged_case("rank 0", rank=0),
    merged_case("rank 0, gate", rank=0, gate=True),
    merged_case("no gate"),
    merged_case("gate", gate=True),
    merged_case("square", **SQUARE, gate=True),
    merged_case("rank above d_in and d_out", rank=7, gate=True),
    merged_case("scaling 2, an int", scaling=2),
    merged_case("scaling below zero", scaling=-0.3, gate=True),
    merged_case("matrices transposed", gate=True, view=transposed),
    merged_case("matrices with gaps", gate=True, view=with_gaps),
    merged_case("matrices repeated", gate=True, view=repeated),
    merged_case("sizes beside powers of two", d_in=65, d_out=33, rank=17, gate=True),
    narrow_case(torch.bfloat16, torch.float32),
    narrow_case(torch.bfloat16, torch.bfloat16),
    narrow_case(torch.float16, torch.float32),
    narrow_case(torch.float32, torch.bfloat16),
)


def merge_twin(change: Callable[..., Any]) -> Implementation:
    """The reference, called with other arguments."""

    def twin(W, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
        return reference.merged_weight(*change(W, A, B, scaling, gate))

    return twin


def summed_in_the_dtype_of_W(W, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
    A, B = A.to(W.dtype), B.to(W.dtype)
    return W + scaling * (B if gate is None else B * gate.to(W.dtype)) @ A


def update_rounded_first(W, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
    return W + reference.merged_weight((0 * W).to(A.dtype), A, B, scaling, gate).to(W.dtype)


def update_in_its_own_dtype(W, A, B, scaling, gate=None):  # type: ignore[no-untyped-def]
    return (W + (scaling * (B if gate is None else B * gate) @ A).to(W.dtype)).to(W.dtype)


MERGE_TWINS = {
    "W alone": merge_twin(lambda W, A, B, s, c: (W, A[:0], B[:, :0], s)),
    "ΔW alone": merge_twin(lambda W, A, B, s, c: (0 * W, A, B, s, c)),
    "W + ΔW without the gate": merge_twin(lambda W, A, B, s, c: (W, A, B, s)),
    "W + ΔW with the gate applied twice": merge_twin(lambda W, A, B, s, c: (W, A, B, s, c * c)),
    "W + ΔW with the absolute value of the gate": merge_twin(
        lambda W, A, B, s, c: (W, A, B, s, c.abs())
    ),
    "W + ΔW with the gate clipped to [0, 1]": merge_twin(
        lambda W, A, B, s, c: (W, A, B, s, c.clamp(0, 1))
    ),
    "W + ΔW without the scaling": merge_twin(lambda W, A, B, s, c: (W, A, B, 1.0, c)),
    "W + ΔW with the scaling divided by the rank (it is alpha / r already)": merge_twin(
        lambda W, A, B, s, c: (W, A, B, s / len(A), c)
    ),
    "W + ΔW with the scaling times the rank": merge_twin(
        lambda W, A, B, s, c: (W, A, B, s * len(A), c)
    ),
    "W + ΔW with the scaling applied twice": merge_twin(lambda W, A, B, s, c: (W, A, B, s * s, c)),
    "W − ΔW": merge_twin(lambda W, A, B, s, c: (W, A, B, -s, c)),
    "W + ΔW without the last rank": merge_twin(
        lambda W, A, B, s, c: (W, A[:-1], B[:, :-1], s, c if c is None else c[:-1])
    ),
    "W + ΔW with ΔW transposed": lambda W, A, B, s, gate=None: (
        W + reference.merged_weight(0 * W, A, B, s, gate).T
    ),
    "W + ΔW with W transposed": merge_twin(lambda W, A, B, s, c: (W.T, A, B, s, c)),
    "W + ΔW with A transposed": merge_twin(lambda W, A, B, s, c: (W, A.T, B, s, c)),
    "W + ΔW with the gate on the inputs": merge_twin(lambda W, A, B, s, c: (W, A * c, B, s)),
    "W + ΔW with the gate on the outputs": merge_twin(
        lambda W, A, B, s, c: (W, A, c[:, None] * B, s)
    ),
    "W + ΔW, all computed in W's dtype": summed_in_the_dtype_of_W,
    "W + ΔW, where ΔW was rounded to W's dtype first": update_rounded_first,
    "W + ΔW, with ΔW computed in the adapter's dtype": update_in_its_own_dtype,
    "W + ΔW, not rounded to W's dtype": lambda W, A, B, s, gate=None: reference.merged_weight(
        W.to(torch.promote_types(torch.promote_types(W.dtype, A.dtype), torch.float32)),
        *(A, B, s, gate),
    ),
}


# ---- resize --------------------------------------------------------------------------------------

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


# ---- Layer ---------------------------------------------------------------------------------------


def layer_arguments(
    *leading: int, bias: bool = True, transposed: bool = False, **sizes: Any
) -> Arguments:
    """(W, b, A, B, scaling, x), and the options of Layer."""
    given = forward_arguments(*(leading or (3,)), bias=bias, **sizes)
    x, W, b, A, B, scaling = given.positional
    W[0, 0] = -0.0  # W + ΔW − ΔW would return 0.0
    options = {**given.options, **({"transposed": True} if transposed else {})}
    return Arguments((W.T.contiguous() if transposed else W, b, A, B, scaling, x), options)


def life(implementation: Implementation, arguments: Arguments, steps: Sequence[str] = ()) -> Any:
    """y and the weight at first, and after each step: "merge" or "unmerge"."""
    *given, x = arguments.positional
    layer = implementation(*given, **arguments.options)
    W = given[0]
    outcome: dict[str, Any] = {}
    done: list[str] = []
    for step in ("", *steps):
        if step:
            getattr(layer, step)()
            done.append(step)
        when = f" after {', '.join(done)}" if done else ""
        y, weight = layer(x), layer.weight.detach().clone()  # a layer may change its own weight
        outcome[f"weight{when}"] = weight if step == "merge" else Bits(weight)
        outcome[f"dtype of weight{when}"] = in_dtype(weight, W.dtype, "W")
        outcome[f"y{when}"] = y
        outcome[f"dtype of y{when}"] = in_dtype(y, x.dtype, "x")
    return outcome


def half_precision_life(
    implementation: Implementation, arguments: Arguments, steps: Sequence[str]
) -> Any:
    W, b, A, B, scaling, x = arguments.positional
    base, adapter = torch.bfloat16, torch.float32
    positional = (W.to(base), None if b is None else b.to(base), A.to(adapter), B.to(adapter))
    options = {key: value.to(adapter) for key, value in arguments.options.items()}
    given = Arguments((*positional, scaling, x.to(base)), options)
    return life(implementation, given, steps)


def two_layers(implementation: Implementation, arguments: Arguments) -> Any:
    """Two layers around one W. What one does is nothing to the other."""
    W, b, A, B, scaling, x = arguments.positional
    first = implementation(W, b, A, B, scaling, **arguments.options)
    second = implementation(W, b, A.flip(0), B, 0.5 * scaling, **arguments.options)
    first.merge()
    outcome = {
        "y of the other layer": second(x),
        "weight of the other layer": Bits(second.weight.detach().clone()),
    }
    second.merge()
    first.unmerge()
    outcome |= {"y of the one": first(x), "weight of the one": Bits(first.weight.clone())}
    outcome |= {"y of the other, merged": second(x), "weight of the other, merged": second.weight}
    return outcome


def layer_case(name: str, *steps: str, **sizes: Any) -> CaseSpec:
    arguments = partial(layer_arguments, *sizes.pop("leading", (3,)), **sizes)
    terms = 2 * (sizes.get("d_in", 5) + sizes.get("rank", 3)) + 4
    return CaseSpec(name, LAYER, arguments, partial(life, steps=steps), terms)


BOTH = ("merge", "unmerge")
LAYERS = (
    layer_case("y", gate=True),
    layer_case("rank 0", *BOTH, rank=0),
    layer_case("rank 1", *BOTH, rank=1),
    layer_case("merged", "merge"),
    layer_case("merged, gate", "merge", gate=True),
    layer_case("merged twice", "merge", "merge", gate=True),
    layer_case("unmerged", *BOTH, gate=True),
    layer_case("unmerged twice", *BOTH, "unmerge", gate=True),
    layer_case("unmerged, never merged", "unmerge", gate=True),
    layer_case("unmerged, then merged", "unmerge", "merge", gate=True),
    layer_case("merged twice, unmerged once", "merge", "merge", "unmerge", gate=True),
    layer_case("merged and unmerged three times", *(3 * BOTH), gate=True),
    layer_case("a large update", *BOTH, "merge", gate=True, scaling=3e4),
    layer_case("no bias", *BOTH, bias=False),
    layer_case("transposed", *BOTH, gate=True, transposed=True),
    layer_case("transposed, merged twice", "merge", "merge", transposed=True),
    layer_case("transposed, square", *BOTH, **SQUARE, gate=True, transposed=True),
    layer_case("square", *BOTH, **SQUARE, gate=True),
    layer_case("positions", *BOTH, leading=(2, 3), gate=True),
    CaseSpec(
        "two layers of one W", LAYER, partial(layer_arguments, 3, gate=True), two_layers, terms=20
    ),
    CaseSpec(
        "bfloat16 W, float32 adapter",
        LAYER,
        partial(layer_arguments, 2, 3, gate=True),
        partial(half_precision_life, steps=(*BOTH, "merge")),
        terms=4,
        floating=False,
    ),
)


class Unguarded(reference.Layer):
    """Merging twice adds ΔW twice."""

    def merge(self) -> None:
        kept, self.original = self.original, None
        super().merge()
        if kept is not None:
            self.original = kept


class Subtracting(reference.Layer):
    """Unmerging subtracts ΔW."""

    def unmerge(self) -> None:
        if self.original is not None:
            W = self.weight.T if self.transposed else self.weight
            A, B, scaling, gate = self.adapter
            W = reference.merged_weight(W, A, B, -scaling, gate)
            self.weight, self.original = W.T if self.transposed else W, None


class AdapterTwice(reference.Layer):
    """A merged layer still adds its adapter."""

    def __call__(self, x: Tensor) -> Tensor:
        W = self.weight.T if self.transposed else self.weight
        return reference.lora_forward(x, W, self.bias, *self.adapter)


class NoMerge(reference.Layer):
    """merge() does nothing."""

    def merge(self) -> None:
        pass


class WithoutUnmerge(reference.Layer):
    """unmerge() does nothing."""

    def unmerge(self) -> None:
        pass


class MergedWithoutGate(reference.Layer):
    """The merged weight lacks the gate."""

    def merge(self) -> None:
        adapter, self.adapter = self.adapter, (*self.adapter[:3], None)
        super().merge()
        self.adapter = adapter


class MergedWithoutScaling(reference.Layer):
    """The merged weight lacks the scaling."""

    def merge(self) -> None:
        A, B, scaling, gate = self.adapter
        self.adapter = (A, B, 1.0, gate)
        super().merge()
        self.adapter = (A, B, scaling, gate)


class OtherLayout(reference.Layer):
    """The layout is not heeded: `transposed` is taken for False."""

    def __init__(self, *args: Any, transposed: bool = False, **options: Any) -> None:
        super().__init__(*args, **options)


class AlwaysUpright(reference.Layer):
    """The weight is (d_out, d_in) whatever the layout given."""

    def __init__(self, W: Tensor, *args: Any, transposed: bool = False, **options: Any) -> None:
        super().__init__(W.T if transposed else W, *args, **options)


LAYER_TWINS: dict[str, Implementation] = {
    "a layer whose second merge adds ΔW again": Unguarded,
    "a layer that subtracts ΔW to unmerge": Subtracting,
    "a layer that, merged, still adds its adapter to W + ΔW": AdapterTwice,
    "a layer that never merges": NoMerge,
    "a layer that never unmerges": WithoutUnmerge,
    "a layer that merges without its gate": MergedWithoutGate,
    "a layer that merges without its scaling": MergedWithoutScaling,
    "a layer that takes a transposed W for (d_out, d_in)": OtherLayout,
    "a layer that turns a transposed W to (d_out, d_in)": AlwaysUpright,
}


def unmerged_like(forward_twin: Implementation) -> Implementation:
    """A layer that computes, while it is not merged, what a wrong lora_forward computes."""

    class Changed(reference.Layer):
        def __call__(self, x: Tensor) -> Tensor:
            if self.original is not None:
                return super().__call__(x)
            W = self.weight.T if self.transposed else self.weight
            y: Tensor = forward_twin(x, W, self.bias, *self.adapter)
            return y

    return Changed


LAYER_TWINS |= {
    sentence: unmerged_like(twin)
    for sentence, twin in FORWARD_TWINS.items()
    if "gradient" not in sentence
}


# ---- round_trip ----------------------------------------------------------------------------------


def saved_layer(
    seed: int, rank: int, gate: bool = True, scaling: float = 2.0, view: View = plain
) -> dict[str, Any]:
    return {
        "A": view(normal(rank, 6, seed=seed)),
        "B": view(normal(5, rank, seed=seed + 1)),
        "gate": view(normal(rank, seed=seed + 2)) if gate else None,
        "scaling": scaling,
    }


def one_layer(**options: Any) -> Arguments:
    return Arguments(({"fc": saved_layer(40, **options)},))


NAMES = (
    *("h.1", "h.10", "h_1", "h.1x", "fc", "enc.fc", "A", "mlp.gate", "mlp.B", "a+b", "w[0]"),
    *("q/v", "with space", "größe", "^t$", "back\\slash", 'quo"te', "x" * 60),
)


def many_names() -> Arguments:
    layers = {name: saved_layer(50 + 3 * i, rank=i % 4) for i, name in enumerate(NAMES)}
    return Arguments((layers,))


def with_and_without_gates() -> Arguments:
    return Arguments(({str(i): saved_layer(50 + 3 * i, 2, gate=i % 2 == 0) for i in range(4)},))


def hard_scalings() -> Arguments:
    numbers = (0.1 + 0.2, 1 / 3, 2.0**-40, 1e30, 16 / 7**0.5)
    layers = {f"l{i}": saved_layer(50 + 3 * i, 1, scaling=s) for i, s in enumerate(numbers)}
    return Arguments((layers,))


def hard_numbers() -> Arguments:
    """Numbers that decimal text, or a sum with zero, would not return."""
    layer = saved_layer(60, 2)
    layer["A"][0, :4] = torch.tensor([-0.0, 1e-45, 3e38, 1 / 3])
    layer["gate"][0] = -0.0
    return Arguments(({"fc": layer},))


def one_tensor_in_two_layers() -> Arguments:
    layer = saved_layer(60, 3)
    other = {**saved_layer(70, 3), "A": layer["A"]}
    return Arguments(({"q": layer, "v": other},))


def to_file_and_back(
    implementation: Implementation, arguments: Arguments, old_content: bytes = b""
) -> Any:
    (layers,) = arguments.positional
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "adapter")  # without a suffix: torch.load heeds it
        if old_content:
            path.write_bytes(old_content)
        found = implementation(layers, str(path))
        written = [content for content in contents_of(folder) if content != old_content]
        outcome = {name: bits_of_layer(layer) for name, layer in found.items()}
    count = f"{len(written)} file{'' if len(written) == 1 else 's'}"
    return {
        "layers": outcome,
        "files written": Rule(len(written) == 1, "1 file", count),
        "what is returned": read_anew(layers, found),
    }


def contents_of(folder: str) -> list[bytes]:
    return [file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()]


def bits_of_layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    gate = layer.get("gate")
    return {
        "A": Bits(layer["A"].detach().clone()),
        "B": Bits(layer["B"].detach().clone()),
        "gate": None if gate is None else Bits(gate.detach().clone()),
        "scaling": Bits(torch.tensor(float(layer["scaling"]), dtype=torch.float64)),
    }


def read_anew(given: Mapping[str, Any], found: Mapping[str, Any]) -> Rule:
    """Tensors that were read from a file share no memory with those that were written."""

    def places(layers: Mapping[str, Any]) -> set[int]:
        values = itertools.chain.from_iterable(layer.values() for layer in layers.values())
        return {v.data_ptr() for v in values if isinstance(v, Tensor) and v.numel()}

    shared = bool(places(given) & places(found))
    return Rule(not shared, "read from the file", "what was given" if shared else "read")


def several_dtypes(implementation: Implementation, arguments: Arguments) -> Any:
    dtypes = itertools.cycle((torch.bfloat16, torch.float32, torch.float16, torch.float64))
    (layers,) = arguments.positional
    mixed = {
        name: mapped(layer, partial(Tensor.to, dtype=dtype))
        for (name, layer), dtype in zip(layers.items(), dtypes, strict=False)
    }
    return to_file_and_back(implementation, Arguments((mixed,)))


def trip_case(name: str, arguments: Callable[[], Arguments], **options: Any) -> CaseSpec:
    return CaseSpec(name, ROUND_TRIP, arguments, partial(to_file_and_back, **options))


TRIPS = (
    trip_case("one layer", partial(one_layer, rank=2)),
    trip_case("rank 1", partial(one_layer, rank=1)),
    trip_case("rank 0", partial(one_layer, rank=0)),
    trip_case("no gate", partial(one_layer, rank=2, gate=False)),
    trip_case("rank 0, no gate", partial(one_layer, rank=0, gate=False)),
    trip_case("with and without gates", with_and_without_gates),
    trip_case("scalings", hard_scalings),
    trip_case("numbers", hard_numbers),
    trip_case("names, mixed ranks", many_names),
    trip_case("tensors transposed", partial(one_layer, rank=3, view=transposed)),
    trip_case("tensors with gaps", partial(one_layer, rank=3, view=with_gaps)),
    trip_case("tensors repeated", partial(one_layer, rank=3, view=repeated)),
    trip_case("one tensor in two layers", one_tensor_in_two_layers),
    trip_case("an old file is replaced", partial(one_layer, rank=2), old_content=b"old" * 5000),
    CaseSpec("several dtypes", ROUND_TRIP, many_names, several_dtypes, floating=False),
)


def trip_twin(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Implementation:
    """The reference's outcome with each layer changed."""

    def twin(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
        return {name: change(layer) for name, layer in round_trip(layers, path).items()}

    return twin


def through(dtype: torch.dtype) -> Implementation:
    return trip_twin(lambda layer: mapped(layer, lambda tensor: tensor.to(dtype).to(tensor.dtype)))


def gate_into_B(layer: dict[str, Any]) -> dict[str, Any]:
    gate = layer["gate"]
    return layer if gate is None else {**layer, "B": layer["B"] * gate, "gate": None}


def in_storage_order(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The bytes as they lie in memory, without regard to strides."""
    read = round_trip(layers, path)

    def dense(tensor: Tensor) -> Tensor:
        return torch.as_strided(tensor, tensor.shape, torch.empty(tensor.shape).stride()).clone()

    return {name: {**read[name], **mapped(layer, dense)} for name, layer in layers.items()}


def without_empty_layers(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
    return {name: layer for name, layer in round_trip(layers, path).items() if len(layer["A"])}


def dots_as_underscores(layers: Mapping[str, Any], path: str) -> dict[str, Any]:
    read = round_trip(layers, path)
    last = {name.replace(".", "_"): layer for name, layer in read.items()}
    return {name: last[name.replace(".", "_")] for name in layers}


TRIP_TWINS: dict[str, Implementation] = {
    "the layers rounded to float32": through(torch.float32),
    "the layers rounded to bfloat16": through(torch.bfloat16),
    "the layers rounded to float16": through(torch.float16),
    "the layers with all tensors in float32": trip_twin(
        lambda layer: mapped(layer, lambda tensor: tensor.float())
    ),
    "the layers without their gates": trip_twin(lambda layer: {**layer, "gate": None}),
    "the layers with gates of one for None": trip_twin(
        lambda layer: (
            {**layer, "gate": layer["A"].new_ones(len(layer["A"]))}
            if layer["gate"] is None
            else layer
        )
    ),
    "the layers with None for gates of rank 0": trip_twin(
        lambda layer: layer if len(layer["A"]) else {**layer, "gate": None}
    ),
    "the layers with their gates multiplied into B": trip_twin(gate_into_B),
    "the layers with a scaling of 1": trip_twin(lambda layer: {**layer, "scaling": 1.0}),
    "the layers with their scaling rounded to float32": trip_twin(
        lambda layer: {**layer, "scaling": float(torch.tensor(layer["scaling"]).float())}
    ),
    "the layers with their scaling printed in 6 digits": trip_twin(
        lambda layer: {**layer, "scaling": float(f"{layer['scaling']:.6g}")}
    ),
    "the layers with the bytes of views in the order of the memory": in_storage_order,
    "the layers without those of rank 0": without_empty_layers,
    "the layers under names with _ for dots, where two became one": dots_as_underscores,
}


CONTRACTS = (
    Contract(
        "lora_forward", f"arXiv 2106.09685, {LORA}", reference.lora_forward, FORWARD, FORWARD_TWINS
    ),
    Contract("merged_weight", "arXiv 2106.09685", reference.merged_weight, MERGE, MERGE_TWINS),
    Contract(
        "resize", "arXiv 1412.6980, Algorithm 1, by ranks", reference.resize, RESIZES, RESIZE_TWINS
    ),
    Contract("Layer", f"arXiv 2106.09685, {LORA}", reference.Layer, LAYERS, LAYER_TWINS),
    Contract("round_trip", "safetensors", round_trip, TRIPS, TRIP_TWINS),
)
