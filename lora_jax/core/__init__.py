"""The idea: a parameter that is a base and small factors, and the walk over a jaxpr that keeps it so.

Read `transform` (`lora`), then `weight`, then one rule.

| file | what is in it |
| --- | --- |
| `transform` | `lora(fn)`: a function on a tree with adapters |
| `tracing` | a function's jaxpr over the arrays of its parameter tree |
| `interpreter` | the one walk over a jaxpr, for any kind of array that is never formed |
| `weight` | `Weight`, its terms, and what a method may add to a product |
| `factor`, `contraction` | arrays that lie along axes of a weight, and their products |
| `rules/` | what each primitive does with a weight: moves, products, control flow |
| `methods/` | DoRA, VeRA, aLoRA, biases, dropout, trained rows: one file each |
| `usage` | `explain`: the same walk with probes, which record how each parameter is used |
| `adapter`, `paths` | adapters, and the tree that they are attached to |
| `deferred`, `quantized` | bases that are made where they are used |

To let a weight through one more primitive, write `rule(context, eqn, *operands) -> results` and enter it in the table of its
file. A rule that moves a weight returns `weight.move(base, fn)`: the equation's result on the base, and for each `Factor` what
the equation does to the axes that the factor has. A rule that cannot keep the factors raises `NotLowRank(reason)`. Then the
contract `lora(fn)(attach(p, a), x) == fn(merge(p, a), x)`, in value and gradient, wants a line in `tests/core/test_layers.py`
or in the frontends of `tests/support/frontends.py`; `explain` follows without a line of its own.

To add a method, write a `Method` (`weight`) in a file of `methods/`: what it does `before` A, `inside` and `after` B, what it
does to the whole weight (`dense`), and which of its arrays move with it (`map`). `methods/terms.py` makes it of an adapter's
arrays; `adapter.PARTS` says along which axes those lie; `adapters/merging.py` what they do to merged weights.
"""
