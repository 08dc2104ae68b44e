"""The words that options of adapters may be: a command line lists them without JAX."""

WORDS = ("all-linear", "attention")  # of `LoraConfig.targets`
DTYPES = {"nf4": "nf4", "int4": "int4", "int8": "int8", "fp8": "float8_e4m3fn"}  # of `quantize`, and what qwix calls them
