"""Parameters on a mesh: by rules for their paths, or by the rules of the models here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lora_jax.core import paths
from lora_jax.core.deferred import where_it_divides
from lora_jax.core.errors import InputError
from lora_jax.sharding.mesh import AXES, checked, entries, named


def parameter_shardings(
    mesh: Mesh, variables: Any, rules: Mapping[Any, jax.P] | None = None, *, fsdp: str | None = None
) -> Any:
    """Shardings for a tree of parameters, from rules for their paths.

    Data parallel: no rules. FSDP: `fsdp="data"`. Tensor parallel: rules that name the model's axis, such as
    `{"up/kernel": jax.P(None, "model"), "down/kernel": jax.P("model", None)}`. A rule and `fsdp` go together: the fsdp axis
    then cuts an axis that the rule leaves whole.

    Args:
      mesh: a mesh.
      variables: the parameters, arrays or `jax.ShapeDtypeStruct`s, quantised or not.
      rules: `{pattern: jax.P}`, patterns as in `LoraConfig`; the first match wins. Without a match a parameter is replicated.
      fsdp: a mesh axis that cuts the largest axis of each parameter which it divides and no other mesh axis cuts.

    Returns:
      The same tree of `NamedSharding`s, for `jax.device_put` or `jit`.

    Raises:
      InputError: a pattern matches nothing; a rule names a mesh axis that does not exist, or one axis twice, or does not fit
        a parameter's shape.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
    >>> parameter_shardings(mesh, {"w": jnp.ones((4, 6)), "b": jnp.ones(6)}, {"w": jax.P("data")}, fsdp="data")["b"].spec
    P('data',)
    """
    leaves, treedef = paths.flatten(variables)
    table = {paths.normalize(pattern): spec for pattern, spec in (rules or {}).items()}
    for pattern in table:
        paths.select(leaves, [pattern], "rules")
    if fsdp is not None and fsdp not in mesh.shape:
        raise InputError(f"fsdp: the mesh has no axis {fsdp!r}; its axes are {dict(mesh.shape)}")

    def rule(path: str) -> jax.P:
        return next((spec for pattern, spec in table.items() if paths.matches(path, pattern)), jax.P())

    return jax.tree.unflatten(treedef, [_by_rule(mesh, path, leaf, rule(path), fsdp) for path, leaf in leaves.items()])


def model_shardings(mesh: Mesh, variables: Any, *, columns: Sequence[str], rows: Sequence[str]) -> Any:
    """Shardings for a transformer on a mesh with some of the axes `data`, `fsdp` and `model`.

    `data` cuts no parameter and `fsdp` the largest free axis of each. `model` cuts the dense layers as Megatron-LM does
    (https://arxiv.org/abs/1909.08053): those before the non-linearity by columns, those after it by rows.

    Args:
      mesh: its axes are among `AXES`; a batch is cut by `batch_sharding`.
      variables: the parameters, as for `parameter_shardings`.
      columns: the names of modules whose last axis `model` cuts, biases too.
      rows: the names of modules of which it cuts the last axis but one.

    Raises:
      InputError: the mesh has another axis, or one that does not divide a parameter's.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> mesh = make_mesh({"fsdp": 1, "model": 1}, jax.devices()[:1])
    >>> params = {"up": {"kernel": jnp.ones((4, 16))}, "down": {"kernel": jnp.ones((16, 4))}}
    >>> found = model_shardings(mesh, params, columns=("up",), rows=("down",))
    >>> found["up"]["kernel"].spec, found["down"]["kernel"].spec
    (P('fsdp', 'model'), P('model', 'fsdp'))
    """
    if unknown := set(mesh.shape) - set(AXES):
        raise InputError(f"mesh: the axes are {', '.join(AXES)}; there is no {', '.join(sorted(unknown))}")
    rules = {}
    for path, leaf in paths.flatten(variables)[0].items() if "model" in mesh.shape else ():
        (module, name), ndim = path.split("/")[-2:], len(leaf.shape)
        if module in columns:
            rules[path] = jax.P(*(None,) * (ndim - 1), "model")
        elif module in rows and name != "bias":
            rules[path] = jax.P(*(None,) * (ndim - 2), "model")
    return parameter_shardings(mesh, variables, rules, fsdp="fsdp" if "fsdp" in mesh.shape else None)


def by_path(shardings: Callable[[Any], Any]) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """The sharding of one parameter by its path and shape, as loaders take it, from a function of a tree of parameters.

    Args:
      shardings: a tree of parameters to the same tree of shardings, as `models.llama.shardings` is with a mesh.

    Returns:
      `(path, shape) -> sharding`, for `models.load(..., sharding=)`.

    >>> from lora_jax.sharding.mesh import make_mesh
    >>> mesh = make_mesh({"model": 1}, jax.devices()[:1])
    >>> columns = lambda tree: model_shardings(mesh, tree, columns=("up",), rows=())
    >>> by_path(columns)("params/up/kernel", (4, 6)).spec
    P(None, 'model')
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        tree: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        for name in reversed(path.split("/")):
            tree = {name: tree}
        return jax.tree.leaves(shardings(tree))[0]

    return place


def _by_rule(mesh: Mesh, path: str, leaf: Any, rule: jax.P, fsdp: str | None) -> Any:
    shape = jnp.shape(leaf.qvalue if paths.is_quantized(leaf) else leaf)
    spec = checked(path, mesh, entries(rule, len(shape)), shape)
    if fsdp is not None and fsdp not in sum(spec, ()):
        free = [axis for axis, size in enumerate(shape) if not spec[axis] and size % mesh.shape[fsdp] == 0]
        largest = max(free, key=lambda axis: shape[axis], default=None)
        spec = tuple((fsdp,) if axis == largest else names for axis, names in enumerate(spec))
    return part_shardings(leaf, named(mesh, spec))


def part_shardings(leaf: Any, sharding: NamedSharding) -> Any:
    """The shardings of the arrays of a quantised kernel, in its structure, from the kernel's; of an array, its own.

    Several values share a scale, so a mesh axis may divide the values and not the scales.
    """
    mesh: Any = sharding.mesh

    def place(part: Any) -> NamedSharding:
        shape = jnp.shape(part)
        return named(mesh, entries(where_it_divides(sharding, shape).spec, len(shape)))

    return jax.tree.map(place, leaf)
