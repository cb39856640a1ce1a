"""Checks that an implementation of your own runs on itself, in its own tests.

    from minirank import reference, testing

    testing.check(my_kernel, like=reference.lora_forward)

    testing.check_allocator(my_allocator)
    testing.check_lora_layer(my_layer, x, weight=W, bias=b, A=A, B=B, scaling=s)
    with testing.unchanged(model):
        my_score(model)

kit.py            check, parametrize, cases: an implementation against its reference
report.py         what a check found: Report, Result, ConformanceError
comparison.py     entry by entry: what is allowed, where the largest error is
case.py           what a case and a contract are
contracts/        the cases of every reference function, and wrong twins for hints
round_trip.py     the reference of files: layers written and read, bit for bit
allocator.py      the rules of score() and allocate(budget)
layer.py          the function of a LoRA layer, from its plain matrices
model_state.py    whether a block of code leaves a model as it was
vectors.py        cases as files for other languages, and judging their results
adapters.py       PEFT adapters of mixed rank and alpha, for those files
tabulated.py      cases about models as plain data; plain_data.py: as JSON and tensors

Each check raises AssertionError with what was expected and what came. The library's own functions
pass the same checks.
"""

from .allocator import check_allocator
from .kit import Case, cases, check, parametrize
from .layer import check_lora_layer
from .model_state import unchanged
from .report import ConformanceError, Report, Result
from .round_trip import round_trip

__all__ = [
    "Case",
    "ConformanceError",
    "Report",
    "Result",
    "cases",
    "check",
    "check_allocator",
    "check_lora_layer",
    "parametrize",
    "round_trip",
    "unchanged",
]
