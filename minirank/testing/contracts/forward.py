"""lora_forward, and merged_weight: the layer's function, and its weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ..case import Arguments, CaseSpec, Implementation, mapped
from ..comparison import Rule
from .layouts import View, normal, plain, repeated, transposed, with_gaps

LORA = "y = W x + b + s · B (gate ⊙ A x)"
MERGED = "W' = W + s · B diag(gate) A"


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
