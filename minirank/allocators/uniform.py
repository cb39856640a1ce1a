"""`UniformRanks`: the baseline that every method is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..layers.targets import Targets, linear_targets
from .allocator import ShareAllocator


class UniformRanks(ShareAllocator):
    """The same rank for every module. Ranks that do not divide evenly go to the first modules.

    Args:
        model: with plain linear layers; also on the meta device, since no weight is read.
        targets: see `linear_targets`.

    Raises:
        ValueError: `targets` selects no linear layer.

    >>> model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))
    >>> allocator = UniformRanks(model)
    >>> allocator.score()
    {'0': tensor(1.), '1': tensor(1.)}
    >>> allocator.allocate(5).ranks
    {'0': 3, '1': 2}
    """

    method = "uniform"

    def __init__(self, model: nn.Module, targets: Targets = None) -> None:
        super().__init__(model)
        self.targets = linear_targets(model, targets)

    def score(self) -> dict[str, Tensor]:
        """1 for every module: {module: tensor of shape ()}."""
        return self.store_scores({name: torch.ones((), device="cpu") for name in self.targets})
