"""Adapters folded into whole kernels, and taken off again."""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lora_jax.adapters import quant
from lora_jax.core import paths
from lora_jax.core.adapter import Adapter, Full, LowRank, Rows, attach, is_adapted, wide_dtype
from lora_jax.core.errors import InputError
from lora_jax.core.factor import Factor
from lora_jax.core.methods.dora import magnitude_gain
from lora_jax.core.quantized import dense

Quantized = Literal["error", "dense", "requantize"]


def merge(variables: Any, adapters: Mapping[str, Adapter], *, check: bool = False, quantized: Quantized = "error") -> Any:
    """Plain parameters with the adapters folded in: `W + s A B` (`g (W + s A B)` with a magnitude), or a `Full`'s value.

    The sum is made in the wider of the kernel's and the adapter's dtype, at least float32, and has the kernel's dtype. The base
    is not changed. An adapter's bias goes to the parameter that its `bias_path` names.

    Args:
      variables: the base tree.
      adapters: `{path: adapter}`.
      check: raise where a merged parameter has a NaN or an infinity (needs concrete arrays).
      quantized: what to do with a kernel that is quantised: `"error"`, since the sum would have to be rounded; `"dense"`: it
        becomes dense; or `"requantize"`: the sum is quantised again, of the same kind and in the same blocks.

    Raises:
      InputError: a kernel is quantised, an adapter does not fit the tree or acts on some tokens only, its bias has no parameter
        to go to, or `check` finds a value that is not finite; the message names the path.

    >>> import jax.numpy as jnp, lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> merge({"w": jnp.zeros((2, 3))}, {"w": pair})["w"]
    Array([[0.5, 0.5, 0.5],
           [0.5, 0.5, 0.5]], dtype=float32)

    How far a kernel that is quantised again lies from the sum:

    >>> import jax
    >>> base = lj.quantize({"w": jax.random.normal(jax.random.key(0), (64, 3))}, ["w"], "int8")
    >>> adapters = {"w": lj.LowRank(jnp.ones((64, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)))}
    >>> dense, small = (merge(base, adapters, quantized=way) for way in ("dense", "requantize"))
    >>> {path: round(error, 3) for path, error in lj.quant.quantization_error(dense, small).items()}
    {'w': 0.006}
    """
    invoked = [path for path, a in adapters.items() if isinstance(a, LowRank) and a.invocation is not None]
    if invoked:
        raise InputError(f"{', '.join(invoked)}: an adapter that acts from an invocation sequence on (aLoRA) can't be merged")
    _check_quantized(variables, adapters, quantized)
    merged = _all_folded(variables, adapters, 1.0, quantized)
    if check:
        leaves, _ = paths.flatten(merged)
        biases = [getattr(adapter, "bias_path", None) for adapter in adapters.values()]
        places = dict.fromkeys([*adapters, *filter(None, biases)])
        bad = [path for path in places if not bool(jnp.isfinite(dense(leaves[path])).all())]
        if bad:
            raise InputError(f"merging makes NaN or infinite values in {', '.join(bad)}; the base is unchanged")
    return merged


def unmerge(merged: Any, adapters: Mapping[str, Adapter], *, quantized: Quantized = "error") -> Any:
    """The base again, to rounding: `W - s A B`. The inverse of `merge` for low-rank adapters.

    Args:
      merged: a tree that the adapters are merged into.
      adapters: `{path: adapter}`.
      quantized: what to do with a kernel that is quantised, as in `merge`.

    Raises:
      InputError: a kernel is quantised, an adapter does not fit the tree, or is a `Full` or has a magnitude, so that the merged
        tree does not hold the old value.

    >>> import lora_jax as lj
    >>> pair = lj.LowRank(jnp.ones((2, 1)), jnp.ones((1, 3)), lj.Layout((), (0,), (1,)), scale=0.5)
    >>> unmerge(merge({"w": jnp.zeros((2, 3))}, {"w": pair}), {"w": pair})["w"].tolist()
    [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    lost = [path for path, a in adapters.items() if not isinstance(a, LowRank) or a.magnitude is not None]
    if lost:
        raise InputError(
            f"{', '.join(lost)}: a Full adapter, Rows and one with a magnitude replace their parameter, so the old value is "
            "not in the merged tree: keep the base, or unmerge the other adapters alone"
        )
    _check_quantized(merged, adapters, quantized)
    return _all_folded(merged, adapters, -1.0, quantized)


def _check_quantized(variables: Any, adapters: Mapping[str, Adapter], quantized: str) -> None:
    if quantized not in get_args(Quantized):
        raise InputError(f"quantized must be one of {', '.join(map(repr, get_args(Quantized)))}, not {quantized!r}")
    leaves, _ = paths.flatten(variables)
    rounded = {path: leaves[path] for path in adapters if path in leaves and paths.is_quantized(leaves[path])}
    if rounded and quantized == "error":
        raise InputError(
            f"{', '.join(rounded)}: the kernel is quantised, so the sum would be rounded: say quantized='dense' for a dense "
            "one, or quantized='requantize' to have it quantised again"
        )
    shifted = [path for path, leaf in rounded.items() if leaf.zero_point is not None]
    if shifted and quantized == "requantize":
        raise InputError(f"{', '.join(shifted)}: a kernel with a zero point can't be quantised again: say quantized='dense'")


def _all_folded(variables: Any, adapters: Mapping[str, Adapter], sign: float, quantized: str) -> Any:
    def one(node: Any) -> Any:
        if not is_adapted(node):
            return node
        folded = _folded(dense(node.base), node.adapter, sign)
        again = quantized == "requantize" and paths.is_quantized(node.base)
        return quant.rounded_like(folded, node.base) if again else folded

    return _with_biases(jax.tree.map(one, attach(variables, adapters), is_leaf=is_adapted), adapters, sign)


def _folded(base: jax.Array, adapter: Any, sign: float) -> jax.Array:
    if isinstance(adapter, Full):
        return adapter.value.astype(base.dtype)
    if isinstance(adapter, Rows):
        return adapter.put(base)
    adapter = adapter.widened()
    wide = wide_dtype(base, adapter.a)
    result = base.astype(wide) + sign * adapter.delta().astype(wide)
    if adapter.magnitude is not None:
        layout = adapter.layout
        result = result * Factor(magnitude_gain(base, adapter), (*layout.batch, *layout.outputs)).laid_along(
            range(base.ndim), wide
        )
    return result.astype(base.dtype)


def _with_biases(tree: Any, adapters: Mapping[str, Adapter], sign: float) -> Any:
    """The tree with each adapter's bias in the parameter that it belongs to."""
    biases = {path: a for path, a in adapters.items() if isinstance(a, LowRank) and a.bias is not None}
    if not biases:
        return tree
    leaves, treedef = paths.flatten(tree)
    for path, adapter in biases.items():
        if adapter.bias_path not in leaves:
            missing = f"{adapter.bias_path!r} is not in the tree" if adapter.bias_path else "its layer has none"
            raise InputError(f"{path}: the adapter's bias can't be merged, since it needs a bias parameter and {missing}")
        leaf = leaves[adapter.bias_path]
        if jnp.shape(leaf) != jnp.shape(adapter.bias):
            raise InputError(
                f"{path}: the adapter's bias has the shape {jnp.shape(adapter.bias)}, {adapter.bias_path} {jnp.shape(leaf)}"
            )
        wide = adapter.widened()
        change = wide.where_adapted(wide.scaled(wide.bias), 0.0)
        with jax.numpy_dtype_promotion("standard"):
            leaves[adapter.bias_path] = (leaf + sign * change).astype(leaf.dtype)
    return jax.tree.unflatten(treedef, list(leaves.values()))
