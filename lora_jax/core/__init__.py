"""The idea: a parameter that is a base and small factors, and the walk over a jaxpr that keeps it so.

Read `transform` (`lora`), then `weight`, then one rule.

| file | what is in it |
| --- | --- |
| `transform` | `lora(fn)`: a function on a tree with adapters |
| `tracing` | a function's jaxpr over the arrays of its parameter tree |
| `interpreter` | the one walk over a jaxpr, for any kind of array that is never formed |
| `weight` | `Weight`, its terms, and what a method may add to a product |
| `factor`, `contraction` | arrays that lie along axes of a weight, and their products |
| `rules/` | what each primitive does with a weight: moves, products, control flow; `register` for functions that are none |
| `programs` | a call or a loop with weights, compiled once |
| `methods/` | DoRA, VeRA, aLoRA, biases, dropout, trained rows: one file each |
| `usage` | `explain`: the same walk with probes, which record how each parameter is used |
| `adapter`, `paths` | adapters, and the tree that they are attached to |
| `deferred`, `quantized` | bases that are made where they are used |

What the wings above share is here, too: `errors`, `files`, `fields` (options said once), `text_table`.

To let a weight through one more primitive, write `rule(context, eqn, *operands) -> results` and enter it in the table of its
file. A rule that moves a weight returns `weight.move(base, fn)`: the equation's result on the base (by `on_bases`, since a
base may be `Deferred`), and for each `Factor` what the equation does to the axes that the factor has; `with_terms` where
terms differ. If its operand may be rows that were looked up, it first asks `weight.as_activation`. It raises
`NotLowRank(reason)` where factors cannot stay factors; the walk makes of it the user's `NotLowRankError`, or `W + AB` where
that is allowed. `explain` walks with the same rules, over one `AxisFactor` for each axis: a rule that makes an axis disappear
must say what role it had, since an axis that no product meets counts as a stack.

The contract `lora(fn)(attach(p, a), x) == fn(merge(p, a), x)`, in value and gradient, is `tests/core/test_identity.py` over
the models of `tests/support/frontends.py`; single forms of a use are in `test_control_flow.py`, refusals in
`test_refusals.py`.

To add a method, write a `Method` (`weight`) in a file of `methods/`: what it does `before` A, `inside` and `after` B, what it
does to the whole weight (`dense`), and which of its arrays move with it (`map`). `methods/terms.py` makes it of an adapter's
arrays; `adapter.PARTS` says along which axes those lie, and `EXTRA` that they are arrays of a pair. Outside the core
`adapters/merging.py` must know it, `adapters/init.py` and `adapters/config.py` make it, `training/many.py` (`_neutral`) says
what leaves a parameter as it is, `training/optim.py` what decays, and `peft/writing.py` what a file can hold.
"""
