"""What two runs that are the same have in common in their metrics."""

from lora_jax.command import metrics


def lasting(directory):
    """The lines of a run's metrics without what depends on time."""
    return [{name: value for name, value in line.items() if not metrics.is_of_time(name)} for line in metrics.read(directory)]
