"""Does DistributedDataParallel average the gradients of a layer that runs inside it?

DDP takes down its parameters when it is made. A layer that got others since then, by `wrap`,
`resize` or an update of L1RA, trains on each process by itself, and torch says nothing.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# {DDP: (its list of parameters, their ids)}. A list that is still the same has the same ids.
_known_ids: WeakKeyDictionary[nn.Module, tuple[list[nn.Parameter], set[int]]] = WeakKeyDictionary()


def require_averaged(*parameters: nn.Parameter) -> None:
    """Raise RuntimeError if a DDP is running the model now, and does not know one of these
    parameters, which trains."""
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    listed = getattr(ddp, "_module_parameters", None)
    if ddp is None or listed is None or ddp.parameters_to_ignore:  # the user averages some alone
        return
    # no_grad() does not exempt: checkpointing may take the gradient later.
    if torch.is_inference_mode_enabled():
        return
    known = _known_ids.get(ddp)
    if known is None or known[0] is not listed:
        known = listed, {id(known_parameter) for known_parameter in listed}
        _known_ids[ddp] = known
    if any(parameter.requires_grad and id(parameter) not in known[1] for parameter in parameters):
        raise RuntimeError(
            "this DistributedDataParallel was made before a layer got its present ranks (by "
            "wrap, resize or an update of L1RA), and would not average their gradients: call "
            "minirank.distributed.refresh(ddp) after the change, or make DDP after it"
        )
