"""The `lora-jax` command."""
