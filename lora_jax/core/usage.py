"""How a function uses each of its parameters: the walk of `transform` with probes in place of adapters, on shapes alone."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core import paths, quantized
from lora_jax.core.adapter import Layout, is_adapted
from lora_jax.core.text_table import text_table
from lora_jax.core.transform import Walk, is_array, trace
from lora_jax.core.weight import Factor, Term, Use, Weight


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter and its uses.

    Args:
      path: its path.
      shape: its shape.
      dtype: its dtype.
      uses: each distinct use, in the order in which the function makes them.
    """

    path: str
    shape: tuple[int, ...]
    dtype: Any
    uses: tuple[Use, ...]

    @property
    def kind(self) -> str:
        """`"linear"` (in products only), `"embedding"` (looked up, and perhaps in products), `"other"` or `"unused"`."""
        kinds = {use.kind for use in self.uses}
        if not kinds or "other" in kinds:
            return "other" if kinds else "unused"
        return "embedding" if "lookup" in kinds else "linear"

    @property
    def obstacle(self) -> str:
        """Why the parameter can't take a low-rank pair; empty if it can."""
        if self.kind == "unused":
            return "the function does not use it"
        for use in self.uses:
            if use.kind == "other":
                return f"`{use.primitive}` at {use.site}: {use.reason}"
        if not {"in", "out"} <= set(self._roles):
            return f"it has no {'out' if 'in' in self._roles else 'in'} axis, so a pair would save nothing"
        return ""

    @property
    def mixed(self) -> bool:
        """Whether it looks like a kernel (a product uses it, or a custom derivative rule) that can't take a pair."""
        kernel = any(use.kind == "product" or use.primitive.startswith("custom_") for use in self.uses)
        return bool(self.obstacle) and len(self.shape) > 1 and kernel and self.kind != "linear"

    @property
    def _roles(self) -> tuple[str, ...]:
        by_kind = {use.kind: use.roles for use in reversed(self.uses)}
        return by_kind.get("lookup") or by_kind.get("product", ())

    @property
    def stack_axes(self) -> tuple[int, ...]:
        """The axes along which the function takes one matrix at a time, as a scan over layers does."""
        return tuple(axis for axis, role in enumerate(self._roles) if role == "stack")

    @property
    def layout(self) -> Layout:
        """Which axes are batch, in and out, by the first lookup or else the first product."""
        axes = lambda *roles: tuple(axis for axis, role in enumerate(self._roles) if role in roles)
        return Layout(axes("batch", "stack"), axes("in"), axes("out"))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How a function uses each parameter; prints as a table."""

    parameters: dict[str, Parameter]

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("parameter", "shape", "use", "batch", "in", "out", "low-rank")]
        for p in self.parameters.values():
            axes = ("", "", "") if p.obstacle else (p.layout.batch, p.layout.inputs, p.layout.outputs)
            by = ", ".join(dict.fromkeys(use.primitive for use in p.uses))
            use = f"{p.kind} ({by})" if by else p.kind
            answer = f"no: {p.obstacle}" if p.obstacle else "yes"
            rows.append((p.path, str(p.shape), use, *(",".join(map(str, a)) for a in axes), answer))
        return text_table(rows, "lllllll")


def explain(fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> Explanation:
    """How `fn(params, *args, **kwargs)` uses each parameter, and which can't take a low-rank pair, and why.

    Nothing is computed: `fn` is traced on shapes, so arrays may be `jax.ShapeDtypeStruct`s.

    Args:
      fn: any function whose first argument is the parameter tree.
      params: the tree, with or without adapters.

    >>> import jax.numpy as jnp
    >>> def model(params, ids):
    ...     return params["table"][ids] * params["scale"] @ params["w"].T
    >>> params = {"table": jnp.ones((9, 4)), "scale": jnp.ones(4), "w": jnp.ones((2, 4))}
    >>> for path, parameter in explain(model, params, jnp.array([1, 2])).parameters.items():
    ...     print(path, parameter.kind, parameter.layout if not parameter.obstacle else "-")
    scale other -
    table embedding Layout(batch=(), inputs=(0,), outputs=(1,))
    w linear Layout(batch=(), inputs=(1,), outputs=(0,))
    """
    nodes, treedef = paths.flatten(params, is_leaf=is_adapted)
    leaves = [quantized.dense_shape(node.base if is_adapted(node) else node) for node in nodes.values()]
    walk, reached = Walk(probing=True), set()

    def run(leaves: list[Any], args: Any, kwargs: Any) -> None:
        traced = trace(fn, treedef, leaves, args, kwargs)
        reached.update(traced.reached_inputs(list(nodes)))
        traced.run([_probe(path, leaf, walk) for path, leaf in zip(nodes, leaves)], walk)

    abstractly(run, leaves, args, kwargs)
    arrays = {path: leaf for path, leaf in zip(nodes, leaves) if hasattr(leaf, "dtype")}
    return Explanation({path: _parameter(path, leaf, walk, path in reached) for path, leaf in arrays.items()})


def abstractly(fn: Callable[..., Any], *trees: Any) -> None:
    """Run `fn(*trees)` on shapes alone: arrays and `ShapeDtypeStruct`s are traced, every other leaf passes as it is."""
    flat, treedef = jax.tree.flatten(trees)
    dynamic = [is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat]

    def run(arrays: list[Any]) -> None:
        rest = iter(arrays)
        fn(*jax.tree.unflatten(treedef, [next(rest) if d else leaf for d, leaf in zip(dynamic, flat)]))

    jax.eval_shape(run, [leaf for d, leaf in zip(dynamic, flat) if d])


def _probe(path: str, leaf: Any, walk: Walk) -> Any:
    """One factor for each axis, each of which remembers its axis."""
    if not is_array(leaf) or leaf.ndim == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating):
        return leaf
    factors = [Factor(jnp.zeros((size,)), (axis,), (axis,)) for axis, size in enumerate(leaf.shape)]
    return Weight(leaf, (Term(tuple(factors), path, walk),))


def _parameter(path: str, leaf: Any, walk: Walk, reached: bool) -> Parameter:
    uses = tuple(walk.uses.get(path, ()))
    if not uses and reached and (leaf.ndim == 0 or not jnp.issubdtype(leaf.dtype, jnp.floating)):
        uses = (Use("other", "", "", reason="it is a scalar" if leaf.ndim == 0 else f"its dtype is {leaf.dtype}"),)
    return Parameter(path, tuple(leaf.shape), leaf.dtype, uses)
