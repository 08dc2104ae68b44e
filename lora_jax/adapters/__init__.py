"""Making and changing adapter sets."""
