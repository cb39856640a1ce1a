"""The contracts: for each reference function its cases, smallest first, and its wrong twins.

layouts.py    numbers, and the ways they may lie in memory
forward.py    lora_forward, merged_weight
resize.py     resize
round_trip.py round_trip
layer.py      Layer; these five contracts in order
peft.py       peft_export, peft_delta_weight
curvature.py  input_second_moment, the Hessian diagonal and its stand-ins, Hutchinson's estimate
ranks.py      θ, whole ranks from shares, the best ranks, L1RA's rule
shapley.py    coalitions, SAN, the Shapley sensitivity, Shapley values

A case says how to make fresh arguments and what of the outcome is compared. A wrong twin is an
implementation with one fault, under a sentence that completes "the result equals …".
"""

from functools import cache

from ..case import Contract


@cache
def all_contracts() -> tuple[Contract, ...]:
    """Every contract, made at the first call, so that `import minirank` need not wait for them."""
    from . import curvature, layer, peft, ranks, shapley

    return (
        *layer.CONTRACTS,
        *peft.CONTRACTS,
        *curvature.CONTRACTS,
        *ranks.CONTRACTS,
        *shapley.CONTRACTS,
    )
