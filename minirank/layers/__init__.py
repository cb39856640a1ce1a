"""The LoRA layer, and the surgery that puts it into any nn.Module: wrap, resize, merge, unwrap."""
