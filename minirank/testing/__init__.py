"""Checks for an allocator or a LoRA layer of your own."""

from .allocator_rules import check_allocator, check_lora_layer, unchanged

__all__ = ["check_allocator", "check_lora_layer", "unchanged"]
