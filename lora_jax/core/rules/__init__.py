"""What each JAX primitive does with a `Weight`."""
