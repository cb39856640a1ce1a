"""minirank: how many LoRA ranks each linear layer gets. See the README for the order to read the files in."""

from . import budget, curvature, shapley, testing
from .allocation import Allocation, Allocator, UniformRanks
from .checkpoint import load_adapter, read_adapter, save_adapter
from .l1ra import L1RA
from .lora import LoRALinear
from .peft_export import export_peft
from .peft_import import import_peft
from .resize import resize
from .sensitivity import SensitivityLoRA
from .shaplora import ShapLoRA
from .targets import linear_targets
from .wrap import disabled, lora_layers, merge, unmerge, unwrap, wrap

__version__ = "0.1.0"

__all__ = [
    "L1RA",
    "Allocation",
    "Allocator",
    "LoRALinear",
    "SensitivityLoRA",
    "ShapLoRA",
    "UniformRanks",
    "budget",
    "curvature",
    "disabled",
    "export_peft",
    "import_peft",
    "linear_targets",
    "load_adapter",
    "lora_layers",
    "merge",
    "read_adapter",
    "resize",
    "save_adapter",
    "shapley",
    "testing",
    "unmerge",
    "unwrap",
    "wrap",
]
