"""Train steps, optimisers, losses, checkpoints, and many sets at once."""
