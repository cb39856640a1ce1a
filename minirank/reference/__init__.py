"""The papers in plain torch: read these files, copy them, hold a faster version against them.

    lora.py          the layer; merging and unmerging
    resize.py        pruning and adding ranks, Adam's moments included
    sensitivity.py   Sensitivity-LoRA: the input second moment, and θ (Eqs 8-14)
    budget.py        from one score for each module to whole ranks (Eq 15)
    best_ranks.py    from one score for each rank to the ranks that stay
    l1ra.py          L1RA: shrink, prune, reassign; a training
    shapley.py       Shapley values by definition; ShapLoRA's coalitions
    shaplora.py      ShapLoRA: the sensitivity of ranks in coalitions (Eqs 6-10)
    hessian.py       the Hessian diagonal, exactly
    hutchinson.py    Hutchinson's estimate of it
    gauss_newton.py  the Gauss-Newton diagonal
    fisher.py        the empirical Fisher diagonal
    peft_format.py   what a PEFT folder of mixed ranks and alphas has to compute

Each file imports torch and the standard library alone. Copied to an empty folder it works. Run as
a script (`python l1ra.py`) it shows its method on a toy. The files do not check arguments, do
not move tensors between devices and do not save memory. They compute in the precision of what they
are given: pass `model.double()` for float64.

Each function has a hardened twin in the library:

    here                         there
    lora_forward, merged_weight  layers.lora: LoRALinear.forward, .merged_weight
    Layer                        layers.lora: LoRALinear, with layers.merge
    resize                       layers.resize: resize
    input_second_moment          curvature: input_second_moment
    sensitivity_theta            allocators.sensitivity: matrix_metrics, then sensitivity_metrics
    ranks_from_shares            budget: proportional_ranks
    best_ranks                   budget: best_ranks
    l1ra_shrink                  allocators.gates: shrink (in place)
    l1ra_reassign                allocators.reassign: reassign (also a budget in parameters)
    exact_shapley_values         shapley: exact_shapley_values
    coalition_masks              shapley: coalition_masks
    san                          allocators.shaplora: san, which takes the ipt of gate, P and Q
    shapley_sensitivity          allocators.shaplora: ShapLoRA.score
    hessian_diagonal             curvature: exact_hessian_diagonal; hessian_diagonal_reference is
                                 the library's own slow way, and not this function
    hutchinson                   curvature: hutchinson_weights (hutchinson_outputs: other vectors)
    gauss_newton_diagonal        curvature: gauss_newton
    empirical_fisher             curvature: empirical_fisher
    peft_export                  files.peft_export: export_peft (writes the folder)
    peft_delta_weight            files.peft_import: import_peft (reads the folder)
"""

from .best_ranks import best_ranks
from .budget import ranks_from_shares
from .fisher import empirical_fisher
from .gauss_newton import gauss_newton_diagonal
from .hessian import hessian_diagonal
from .hutchinson import hutchinson
from .l1ra import l1ra_reassign, l1ra_shrink
from .lora import Layer, lora_forward, merged_weight
from .peft_format import peft_delta_weight, peft_export
from .resize import resize
from .sensitivity import input_second_moment, sensitivity_theta
from .shapley import coalition_masks, exact_shapley_values
from .shaplora import san, shapley_sensitivity

__all__ = [
    "Layer",
    "best_ranks",
    "coalition_masks",
    "empirical_fisher",
    "exact_shapley_values",
    "gauss_newton_diagonal",
    "hessian_diagonal",
    "hutchinson",
    "input_second_moment",
    "l1ra_reassign",
    "l1ra_shrink",
    "lora_forward",
    "merged_weight",
    "peft_delta_weight",
    "peft_export",
    "ranks_from_shares",
    "resize",
    "san",
    "sensitivity_theta",
    "shapley_sensitivity",
]
