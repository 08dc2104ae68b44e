"""How quantised checkpoints of the hub store their tensors, a file for each format."""
