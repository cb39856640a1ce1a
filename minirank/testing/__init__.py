"""Checks that an implementation of your own runs on itself, in its own tests.

    from minirank import testing

    testing.check_allocator(my_allocator)
    testing.check_lora_layer(my_layer, x, weight=W, bias=b, A=A, B=B, scaling=s)
    with testing.unchanged(model):
        my_score(model)

allocator.py      the rules of score() and allocate(budget)
layer.py          the function of a LoRA layer, from its plain matrices
model_state.py    whether a block of code leaves a model as it was

Each check raises AssertionError with what was expected and what came. The library's own classes
pass the same checks.
"""

from .allocator import check_allocator
from .layer import check_lora_layer
from .model_state import unchanged

__all__ = ["check_allocator", "check_lora_layer", "unchanged"]
