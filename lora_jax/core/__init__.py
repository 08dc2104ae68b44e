"""The idea: a parameter that is a base and small factors, and the walk over a jaxpr that keeps it so."""
