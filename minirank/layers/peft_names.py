"""How PEFT is told which modules get adapters, so that it adapts no others.

A regular expression over full names is exact; a list names suffixes, too. But PEFT 0.21 (tested)
turns an expression into the last parts of the names that it matches, in those models whose experts
transformers 5 has stacked (Mixtral, Qwen3-MoE, DeepSeek and others). There every module that ends
so would get an adapter, of PEFT's default rank if the allocation gave it none. So models with
stacks of experts get a list of full names, unless one of them is the end of another module's name.

In these models PEFT also takes some names for the old names of the stacks, wherever they stand:
the down_proj of DeepSeek's shared experts means the experts' stack there. No target_modules can say
otherwise, so that a warning has to.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import nn

from ..checks import quoted_names, warn_caller
from .experts import LoRAExperts
from .modules import expert_stacks, modules_by_name
from .names import named_modules, without_wrappers

# {family of models: the old names of what their experts stack}, in PEFT
OLD_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


class PeftNames(NamedTuple):
    """What PEFT makes of the names of a model's modules.

    Args:
        as_list: PEFT is to get a list of full names, not a regular expression.
        misread: the modules that PEFT takes for stacks of experts.
    """

    as_list: bool = False
    misread: tuple[str, ...] = ()


def peft_names(model: nn.Module, names: Iterable[str]) -> PeftNames:
    """What PEFT makes of these names of the model's modules. (Those of stacks do not belong here.)

    >>> peft_names(nn.Sequential(nn.Linear(4, 2)), ["0"])
    PeftNames(as_list=False, misread=())
    """
    modules = modules_by_name(model)
    stacked = any(isinstance(module, LoRAExperts) for module in modules.values())
    if not stacked and not expert_stacks(model):
        return PeftNames()
    names = list(names)
    every_name = [name for name, _ in named_modules(model)]
    ends = tuple(f".{name}" for name in names)
    misread = tuple(name for name in names if name.rpartition(".")[2] in _old_names(model))
    return PeftNames(not any(name.endswith(ends) for name in every_name), misread)


def _old_names(model: nn.Module) -> tuple[str, ...]:
    """What PEFT takes for old names of stacks in this model, so far as is known."""
    model_type = getattr(getattr(without_wrappers(model), "config", None), "model_type", None)
    module = sys.modules.get("transformers.conversion_mapping")
    families = getattr(module, "_MODEL_TO_CONVERSION_PATTERN", None)
    if not isinstance(families, Mapping) or not isinstance(model_type, str):
        return ()
    return OLD_NAMES.get(families.get(model_type, ""), ())


def target_modules(names: Iterable[str], as_list: bool) -> str | list[str]:
    r"""These modules and no others, for PEFT's target_modules.

    >>> target_modules(["layer.0.q", "head"], as_list=False)
    '(layer\\.0\\.q|head)'
    """
    return list(names) if as_list else exact_pattern(names)


def warn_of_misread_names(names: Iterable[str]) -> None:
    """Warn, at the line of the user, if there are any such names."""
    names = list(names)
    if names:
        warn_caller(
            f"{quoted_names(names)}: PEFT 0.21 with transformers 5 takes such names "
            "for the model's stacks of experts. It would adapt the stacks instead, and leave these "
            "modules out. Give them rank 0 (targets= leaves them out of the scores), or train and "
            "save the adapter with this library"
        )


def exact_pattern(names: Iterable[str]) -> str:
    r"""A regular expression that matches these names in full and no others, for PEFT.

    >>> exact_pattern(["layer.0.q", "head"])
    '(layer\\.0\\.q|head)'
    """
    return f"({'|'.join(map(re.escape, names))})"


def exact_key(name: str) -> str:
    r"""A key of PEFT's rank_pattern or alpha_pattern for this name alone.

    PEFT also tries each key after any prefix, which the leading ^ prevents.

    >>> exact_key("layer.0.q")
    '^layer\\.0\\.q'
    """
    return f"^{re.escape(name)}"
