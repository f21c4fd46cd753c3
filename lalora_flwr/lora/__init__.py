"""LoRA factors: in and out of a model, when each trains, and their per-sample gradients."""
