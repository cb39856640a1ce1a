"""How sure are the ranks? Choose a curvature, and ask which ranks other data would change.

python examples/sure_ranks.py
"""

import torch
from torch import nn

from minirank import SensitivityLoRA, curvature

BUDGET = 24
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4))
x = torch.randn(3200, 16)
batches = list(zip(x.split(8), x[:, :4].argmax(1).split(8), strict=True))


def loss_fn(model, batch):
    inputs, labels = batch
    return nn.functional.cross_entropy(model(inputs), labels)


# 1. Sensitivity-LoRA's equations take any diagonal of the Hessian. The default is the paper's
#    stand-in for it, the inputs' second moment. Other curvatures can give other ranks.
for estimate in (curvature.input_second_moment, curvature.gauss_newton, curvature.empirical_fisher):
    allocator = SensitivityLoRA(model, loss_fn, batches[:40], curvature=estimate)
    allocator.score()
    print(f"{estimate.__name__:<20}", dict(allocator.allocate(BUDGET).ranks))

# 2. Other batches would give somewhat other scores. Measured in groups of batches, the scores tell
#    by how much, and which ranks would change with them.
options = {"curvature": curvature.gauss_newton, "groups": 10}
allocator = SensitivityLoRA(model, loss_fn, batches[:20], **options)
allocator.score()
print(f"\n{allocator.stability(BUDGET)}\n")

# 3. The other way round: read only as many batches as it takes until, with 95 % confidence, at most
#    so many ranks would change. (It warns if all batches do not suffice.)
allocator = SensitivityLoRA(model, loss_fn, batches, **options)
for max_moved in (1, 0):
    settled = allocator.settle(BUDGET, max_moved=max_moved)
    ranks = dict(settled.allocation.ranks)
    print(f"at most {max_moved}: read {settled.batches} of {len(batches)} batches; ranks {ranks}")

# 4. An estimate that draws random vectors stops when it knows every trace to a tolerance.
options = {"samples": 1000, "generator": torch.Generator().manual_seed(0)}
for tolerance in (0.2, 0.05):
    hessian = curvature.hutchinson_outputs(
        model, loss_fn, batches[:16], tolerance=tolerance, **options
    )
    print(f"\nHutchinson's estimate to {tolerance:.0%}: {hessian.samples} {hessian.over}; traces:")
    for name, diagonal in hessian.items():
        print(f"  layer {name}: {diagonal.sum():.3f} ± {hessian.standard_errors[name]:.3f}")
