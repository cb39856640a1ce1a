"""`SingularValues`: the ranks that a roomy first training has used.

    ΔW = s · B diag(gate) A = U diag(σ) Vᵀ,  and the largest σ of all modules together are kept

Plain LoRA with more ranks than the budget is trained once. What a module has learnt is ΔW. The
nearest matrix of rank k has the k largest singular values of ΔW (Eckart and Young, 1936), so the
others are what a module would lose. The ranks found are then trained anew.

The single ranks of an adapter say less. A and B can be mixed, B M and M⁻¹ A for any invertible M,
without a change of ΔW, and training does mix them: a change of rank 1 is spread over all ranks that
a module has. Singular values do not depend on M.

This is no method of a paper that minirank implements. It is the simplest reading of a first
training, and it is here since it found planted ranks best (examples/results/README.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import quoted_names, require_batches, require_function
from ..curvature.input_moment import DEFAULT_MASK, Mask, second_moment_of
from ..layers.experts import LoRAExperts
from ..layers.lora import LoRALinear
from ..layers.resize import separate_layers
from ..measure import LossFn
from .allocator import Ranks, RankScoreAllocator
from .constraints import Constraints


def singular_values(layer: LoRALinear, second_moment: Tensor | None = None) -> Tensor:
    """The singular values of the layer's ΔW, largest first: (r,), float64, on the CPU.

    With the mean squares of the layer's inputs, (d_in,), they are those of ΔW · diag(√E[x²]). In a
    stack of experts, which gains or loses one rank of all experts together, the k-th is the root of
    the sum of squares of all experts' k-th.

    >>> from minirank import wrap
    >>> layer = wrap(nn.Sequential(nn.Linear(3, 2)), {"0": 2}, scaling=2.0)["0"]
    >>> layer.lora_A.data = torch.tensor([[3.0, 0.0, 4.0], [3.0, 0.0, 4.0]])
    >>> layer.lora_B.data = torch.tensor([[0.5, 0.5], [0.0, 0.0]])
    >>> singular_values(layer)  # two ranks, and one direction
    tensor([10.,  0.], dtype=torch.float64)
    """
    left, right = (factor.detach().cpu() for factor in layer.factors(torch.float64))
    if second_moment is not None:
        right = right * second_moment.detach().cpu().double().sqrt()
    # ΔW = left · right is (d_out, d_in). R of a QR decomposition has the same singular values, and
    # is no larger than (r, r).
    core = torch.linalg.qr(left).R @ torch.linalg.qr(right.mT).R.mT
    values: Tensor = torch.linalg.svdvals(core)
    if values.ndim == 2:
        values = values.norm(dim=0)
    missing = layer.rank - len(values)  # if the rank exceeds a side of W
    return torch.cat([values, values.new_zeros(missing)])


class SingularValues(RankScoreAllocator):
    """Ranks after a roomy first training, by the singular values of what each module has learnt.

    The largest singular values of all modules together are kept; a module's rank is how many of its
    own are among them. Give the Allocation to `wrap` and the untouched model, and train anew. (It
    says how many ranks a module gets, not which of the present ones: `keep` is None.)

    The first training must have room: no module gets more ranks than it had there. Give every
    module as many as the largest that you would ever give one, say four times the average.

    Args:
        model: with LoRA layers, trained; of any form, with gates or without.
        loss_fn, batches: some data of the task, as for `curvature.input_second_moment`. Modules
            differ in the size of their inputs, and with data the values are those of
            ΔW · diag(√E[x²]): what the change does to the module's outputs, for inputs that do not
            correlate. Without data they are those of ΔW.
        mask: which tokens are real, as for `curvature.input_second_moment`.

    Cost: the first training; with data, a forward pass over the batches.

    Raises:
        TypeError: `loss_fn` or `batches` is of the wrong kind.
        ValueError: no LoRA layer, or two that share a parameter; one of `loss_fn` and `batches`
            without the other; or with them a stack of experts, whose inputs cannot be measured.

    Source: the best approximation of a given rank (Eckart and Young, 1936). No paper's method.

    >>> from minirank import wrap
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    >>> layers = wrap(model, {"0": 2, "1": 2})
    >>> for layer, ones in zip(layers.values(), (1, 2)):  # as if trained
    ...     layer.lora_A.data, layer.lora_B.data = torch.eye(2, 4), torch.eye(4, 2)
    ...     layer.lora_B.data[ones:] = 0.0
    >>> allocator = SingularValues(model)
    >>> allocator.score()
    {'0': tensor([1., 0.], dtype=torch.float64), '1': tensor([1., 1.], dtype=torch.float64)}
    >>> allocator.allocate(3).ranks
    {'0': 1, '1': 2}
    """

    method = "singular values"

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None = None,
        batches: Iterable[Any] | None = None,
        *,
        mask: Mask = DEFAULT_MASK,
    ) -> None:
        super().__init__(model)
        if (loss_fn is None) != (batches is None):
            raise ValueError("give loss_fn and batches together, or neither: values of ΔW alone")
        if batches is not None:
            require_function("loss_fn", loss_fn)
            require_batches(batches)
        self.loss_fn = loss_fn
        self.batches = batches
        self.mask = mask
        stacks = [name for name, layer in self._layers().items() if isinstance(layer, LoRAExperts)]
        if stacks and batches is not None:
            raise ValueError(
                f"{quoted_names(stacks)}: a stack of experts is a parameter that its module reads, "
                "so that its inputs cannot be measured: give no loss_fn and batches, for values of "
                "ΔW alone in all modules"
            )

    def _layers(self) -> dict[str, LoRALinear]:
        layers = separate_layers(self.model)
        if not layers:
            raise ValueError("the model has no LoRA layer: wrap(model, ranks) and train it first")
        return layers

    def score(self) -> dict[str, Tensor]:
        """The singular values of every module's change, stored for `allocate`.

        Returns:
            {name: singular values, largest first, (r,), float64}.

        Raises:
            ValueError: they are all zero, as before any training, or one is not finite; or as for
                `curvature.input_second_moment`.

        Warns:
            IdleLayerWarning: no token of the batches reaches some layers, whose values are then 0.
        """
        layers = self._layers()
        for name, layer in layers.items():
            # Looked for here, since LAPACK may return finite numbers for a matrix with a NaN.
            if not all(factor.isfinite().all() for factor in layer.factors()):
                raise ValueError(
                    f"the adapter of {name!r} is not finite: did the training diverge?"
                )
        moments: Mapping[str, Tensor] = {}
        if self.loss_fn is not None and self.batches is not None:
            moments = second_moment_of(layers, self.model, self.loss_fn, self.batches, self.mask)
        scores = {n: singular_values(layer, moments.get(n)) for n, layer in layers.items()}
        if not any(values.any() for values in scores.values()):
            raise ValueError(
                "every ΔW is zero, as wrap(model, ranks) leaves it: train the model first"
            )
        return self.store_scores(scores)

    def ranks_from_scores(
        self, scores: Mapping[str, Tensor], constraints: Constraints
    ) -> tuple[Ranks, None]:
        ranks, _ = super().ranks_from_scores(scores, constraints)
        return ranks, None
