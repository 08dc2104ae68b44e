"""Rules for functions that JAX can't see into: kernels of Pallas, quantised products, and whatever else has a rule of its own.

`lora` computes `x W + s (x A) B` by reading the equations of a function, and a kernel is no equation of JAX. A registered
function is followed by what it computes instead: the base goes through the function itself, as it is, and what adapters add to
it is that of the product of JAX that the rule names. So grouped matrices stay a grouped kernel, and their pairs are two
`ragged_dot`s beside it. `explain` and `init` read the axes off that product, and `many.lora` multiplies its rows by it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax.core import jax_compat, programs
from lora_jax.core.deferred import use
from lora_jax.core.errors import InputError
from lora_jax.core.interpreter import Context, Equation, NotLowRank, evaluate, is_implicit

_rules: dict[str, Callable[..., Any]] = {}


def register(function: str | Callable[..., Any], rule: Callable[..., Any]) -> None:
    """Let weights through a function that has a derivative rule of its own, or that `jit` calls.

    Every call of the function must be the product that the rule is, whatever options it has beside its arrays. Register before
    the functions that call it are jitted; a second registration replaces the first.

    Args:
      function: the function, or the name that it has where it is defined.
      rule: takes the arrays that the function takes, in the same order, and returns the product that it computes, as
        `lax.ragged_dot`, `lax.dot_general` or an einsum of them: nothing may be done to the activation before that, and nothing
        to the result after it.

    Raises:
      InputError: `function` is neither.

    MaxText's experts go through `megablox.gmm`, a grouped product of Pallas:

    >>> import jax, jax.numpy as jnp, lora_jax as lj
    >>> from jax.experimental.pallas.ops.tpu.megablox import gmm
    >>> lj.rules.register(gmm, jax.lax.ragged_dot)
    >>> def model(params, x, sizes):
    ...     return gmm(x, params["experts"], sizes, tiling=(8, 8, 8), interpret=True)  # interpreted: this is no TPU
    >>> params, x, sizes = {"experts": jnp.ones((2, 8, 8))}, jnp.ones((8, 8)), jnp.array([5, 3], jnp.int32)
    >>> adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), model, params, x, sizes)
    >>> adapters["experts"].layout
    Layout(batch=(0,), inputs=(1,), outputs=(2,))
    >>> lj.lora(model)(lj.attach(params, adapters), x, sizes).shape
    (8, 8)
    """
    if isinstance(function, str):
        key = function
    elif callable(function):
        plain = inspect.unwrap(function)
        code = getattr(plain, "__code__", None)
        if code is None:
            raise InputError(f"{function!r} is not a function of Python: register it by its name")
        key = f"{plain.__name__} at {code.co_filename}:{code.co_firstlineno}"
    else:
        raise InputError(f"a rule is for a function or its name, not for {function!r}")
    _rules[key] = rule
    programs.forget()


def product_of(eqn: Equation) -> Callable[..., Any] | None:
    """The rule that is registered for the function that an equation calls."""
    return _rules.get(jax_compat.called_function(eqn)) or _rules.get(_name(eqn))


def traced_product(eqn: Equation, rule: Callable[..., Any]) -> tuple[Any, Any]:
    """The product that stands for an equation, as a jaxpr and its constants."""
    name = _name(eqn)
    jaxpr, consts = jax_compat.open_jaxpr(jax.make_jaxpr(rule)(*map(jax_compat.shape_of, eqn.invars)))
    got, wanted = ([jax_compat.shape_of(v).shape for v in some.outvars] for some in (jaxpr, eqn))
    if got != wanted:
        raise InputError(f"the rule that is registered for {name} gives results of the shapes {got}, and {name} of {wanted}")
    return jaxpr, consts


class Kernel:
    """A call of a registered function, which computes what its product computes with a base.

    Args:
      eqn: the call.
      operands: its operands, of which one is a weight.
    """

    def __init__(self, eqn: Equation, operands: Sequence[Any]):
        self.eqn, self.operands, self.result = eqn, operands, None

    def behind(self, product: Any) -> Any:
        """The product with this call in the place of its own with the base."""
        if not any(operand is product.x for operand in self.operands):
            raise NotLowRank(f"the rule that is registered for {_name(self.eqn)} must give the product the activation as it is")
        return dataclasses.replace(product, kernel=self)

    def with_base(self, product: Any, x: Any) -> Any:
        """The function's result with another x in the place of the product's."""
        operands = [v.base if is_implicit(v) else x if v is product.x else v for v in self.operands]
        return use(lambda *arrays: jax_compat.bind(self.eqn, arrays)[0], *operands)


def call(context: Context, eqn: Equation, rule: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
    """The results of a registered function."""
    jaxpr, consts = traced_product(eqn, rule)
    kernel = Kernel(eqn, operands)
    with context.inside(eqn), context.through(kernel):
        results = evaluate(context, jaxpr, consts, operands)
    if len(results) != 1 or results[0] is not kernel.result:
        raise NotLowRank(f"the rule that is registered for {_name(eqn)} must return one product, as it is")
    return results


def custom_call(context: Context, eqn: Equation, *operands: Any) -> list[Any]:
    """A function with a derivative rule of its own: what that does with a weight is known where the function is registered."""
    if rule := product_of(eqn):
        return call(context, eqn, rule, operands)
    raise NotLowRank(
        "the function has a derivative rule of its own, which takes the whole weight. If it is a solver or the like: call "
        "`lora` inside it, on the function that it differentiates; if it is a product: lora_jax.rules.register"
    )


def _name(eqn: Equation) -> str:
    return jax_compat.called_function(eqn).partition(" at ")[0]
