"""Dense Hessians by torch.func."""

from __future__ import annotations

import torch
from torch import nn

from minirank.measure import batch_length


def dense_diagonal(model, loss_fn, batches, name):
    """The diagonal of the dense Hessian of the sample-weighted mean loss over one layer's real
    weight."""
    key = f"{name}.weight"

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, batch):
            return loss_fn(self.model, batch)

    def total(weight):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            losses = [
                torch.func.functional_call(Loss(), {f"model.{key}": weight}, (batch,))
                for batch in batches
            ]
        sizes = [batch_length(batch) for batch in batches]
        return sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)

    weight = model.get_parameter(key).detach()
    model.eval()
    hessian = torch.func.hessian(total)(weight).reshape(weight.numel(), weight.numel())
    return hessian.diagonal().reshape(weight.shape)
