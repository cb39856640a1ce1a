"""Diagonals of the loss's Hessian over the weights of linear layers, and stand-ins for them.

Every estimator has one call and one result:

    estimate(model, loss_fn, batches, targets=None, *, …) -> Estimate, a dict {name: diagonal}

A diagonal has the shape of the layer's weight, (d_out, d_in); the input second moment gives
(d_in,), which all rows of the weight share. So each estimator can be the `curvature` of
`SensitivityLoRA` (options are bound with `functools.partial`), and each is useful by itself. The
model is measured in eval mode and left unchanged.

| estimator                    | gives                          | can differ from the Hessian by|
|------------------------------|--------------------------------|-------------------------------|
| `exact_hessian_diagonal`     | the diagonal, through outputs  | nothing                       |
| `hessian_diagonal_reference` | the diagonal, entry by entry   | nothing                       |
| `hutchinson_outputs`         | an estimate by random signs on | chance                        |
|                              | the layers' outputs            |                               |
| `hutchinson_weights`         | the textbook estimate, by      | chance                        |
|                              | random signs on the weights    |                               |
| `gauss_newton`               | Gauss-Newton's diagonal, exact | the network's own curvature   |
|                              | or by random signs             | (and chance, by random signs) |
| `empirical_fisher`           | the mean square of the         | any amount                    |
|                              | gradients of single samples    |                               |
| `input_second_moment`        | the mean square of the layer's | any amount                    |
|                              | inputs: Sensitivity-LoRA's own |                               |

| estimator                    | costs, for each batch                                          |
|------------------------------|----------------------------------------------------------------|
| `exact_hessian_diagonal`     | d_out · positions Hessian-vector products per layer            |
| `hessian_diagonal_reference` | d_out · d_in Hessian-vector products per layer                 |
| `hutchinson_outputs`         | one Hessian-vector product per random vector, for all layers   |
| `hutchinson_weights`         | one Hessian-vector product per random vector, for all layers   |
| `gauss_newton`               | one backward pass per output entry, or per random vector       |
| `empirical_fisher`           | one forward and one backward pass                              |
| `input_second_moment`        | one forward pass                                               |

In training passes (forward, and backward with the gradients of all targets), on four transformer
blocks of width 192 and 12 batches, checks included: `empirical_fisher` 1.6, and with one random
vector `gauss_newton` 1.8 and `hutchinson_outputs` 4.1 (examples/benchmark_passes.py).

Which one: `exact_hessian_diagonal` for small models, `hutchinson_outputs` for larger ones,
`gauss_newton` where no entry may be negative. The last two are cheap, but only stand-ins.

How sure a result is: an `Estimate` holds the standard error of each layer's trace, the number of
values behind it (`samples`), and their kind (`over`: random vectors, or batches). With
`tolerance=`, an estimator stops as soon as every standard error is small enough (averaging.py).

What to know:

- Precision. A half-precision model is computed in float32 wherever the loss is differentiated; its
  own tensors come back bit for bit. In float32 the curvature of a loss near zero can be all
  rounding: the estimators notice, and ask for `model.double()`.
- Quantised layers. No estimator reads W: x, ∂L/∂z and the shapes are enough. A packed layer is
  taken at its word that it computes W x + b, and is left bit for bit as it was. In a half-precision
  model it computes in its own type, with float32 around it. bitsandbytes rounds the inputs of its
  8-bit layers: derivatives see W alone, not that rounding. A layer without a backward pass is
  scored by `input_second_moment` alone; the others refuse it by name.
- Padding. `input_second_moment` drops padding tokens by the batch's `attention_mask`; the rule is
  at the top of input_moment.py. The other estimators differentiate the loss, so they leave out what
  the loss leaves out.
- Attention. Its fused kernels cannot be differentiated twice: measure.py selects one that can.
- Samples. `exact_hessian_diagonal`, `hutchinson_outputs`, `gauss_newton` and `empirical_fisher`
  take the first dimension of a layer's input as samples that do not interact, and check it. With
  `independent=False` the first three work without it; the Fisher always needs it.
- Checkpointing. Estimators through outputs follow gradient checkpointing (use_reentrant=False).
  Those through weights, `hutchinson_weights` and `hessian_diagonal_reference`, refuse it.
- Tied weights. A layer counts by its outputs. If its weight is used elsewhere too (tied to another
  module, or penalised by the loss), only its use in this layer is measured.
- Negative entries. The Hessian's own diagonal can have them, also on average over a layer.
  `gauss_newton`, `empirical_fisher` and `input_second_moment` are never negative.
- Weights of batches. A batch's mean loss counts by the number of its samples. If the loss is a mean
  over tokens, give their number with `batch_weight=`.
- Idle layers. A layer that no batch reaches, such as an expert to which no token is routed, has a
  diagonal of zeros, and an IdleLayerWarning names it. If no layer is reached, that is an error.
- Weights that are read. Some modules read a child's weight and never call the child (Swin's qkv,
  Mamba's out_proj in transformers). Nothing can be measured there, and an error names the child.
  One more forward pass, in which such layers hold NaN, tells them from idle ones (unreached.py).
- Groups of batches. Estimates from separate batches combine to their mean, weighted by
  `Estimate.weights`. `SensitivityLoRA(groups=…)` uses this to tell which ranks would change with
  other data of the same kind. Give one generator to all groups: it then draws new vectors for each.

The files, in reading order: `estimate` (the result), `averaging` (means and standard errors),
`layer_outputs` (recording and differentiating), `unreached` (layers without a call), `objective`
(the loss, and the loop over batches), `outer_products`, `diagnostics` (independence and rounding),
`hessian`, `sampling` (random vectors), `hutchinson`, `output_hessian` and `gauss_newton`, `fisher`,
`padding` (a mask that nobody has named) and `input_moment` (padding is dropped here). An
independent check of the exact ones, in plain PyTorch, is `minirank.reference`.
"""

from .estimate import Estimate
from .fisher import empirical_fisher
from .gauss_newton import gauss_newton
from .hessian import exact_hessian_diagonal, hessian_diagonal_reference
from .hutchinson import hutchinson_outputs, hutchinson_weights
from .input_moment import input_second_moment
from .unreached import IdleLayerWarning

__all__ = [
    "Estimate",
    "IdleLayerWarning",
    "empirical_fisher",
    "exact_hessian_diagonal",
    "gauss_newton",
    "hessian_diagonal_reference",
    "hutchinson_outputs",
    "hutchinson_weights",
    "input_second_moment",
]
