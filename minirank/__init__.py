"""minirank: how many LoRA ranks each linear layer of a model gets.

reference/     the papers in plain torch: read these, copy these
layers/        the LoRA layer, and surgery on any nn.Module
curvature/     diagonals of the loss's Hessian, and their stand-ins
allocators/    the methods: score() and allocate(budget)
files/         adapter files, and PEFT's folders both ways
distributed.py several processes: pooled scores, averaged gradients, one allocation for all
testing/       checks for an implementation of your own
"""

from . import budget, curvature, distributed, reference, shapley, testing
from .allocators.allocation import Allocation
from .allocators.allocator import Allocator, RankScoreAllocator, ShareAllocator
from .allocators.l1ra import L1RA
from .allocators.sensitivity import SensitivityLoRA
from .allocators.shaplora import ShapLoRA
from .allocators.singular_values import SingularValues
from .allocators.uniform import UniformRanks
from .files.adapter_file import load_adapter, read_adapter, save_adapter
from .files.peft_export import export_peft
from .files.peft_import import import_peft
from .layers.lora import LoRALinear
from .layers.merge import merge, unmerge
from .layers.resize import resize
from .layers.targets import linear_targets
from .layers.unpack import pack_attention, unpack_attention
from .layers.wrap import disabled, lora_layers, unwrap, wrap

__version__ = "0.2.0"

__all__ = [
    "L1RA",
    "Allocation",
    "Allocator",
    "LoRALinear",
    "RankScoreAllocator",
    "SensitivityLoRA",
    "ShapLoRA",
    "ShareAllocator",
    "SingularValues",
    "UniformRanks",
    "budget",
    "curvature",
    "disabled",
    "distributed",
    "export_peft",
    "import_peft",
    "linear_targets",
    "load_adapter",
    "lora_layers",
    "merge",
    "pack_attention",
    "read_adapter",
    "reference",
    "resize",
    "save_adapter",
    "shapley",
    "testing",
    "unmerge",
    "unpack_attention",
    "unwrap",
    "wrap",
]
