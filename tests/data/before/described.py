"""What make_before.py writes and tests/test_compatibility.py compares: signatures as text, and a set with each kind of adapter."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj


def signature(function):
    """The names, order and defaults of the parameters; of a Flax module without Flax's own."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ""
    shown, keyword = [], False
    for p in parameters:
        if p.name in ("parent", "name") and hasattr(function, "scope"):
            continue
        if p.kind == p.KEYWORD_ONLY and not keyword:
            keyword = True
            shown.append("*")
        mark = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        shown.append(f"{mark}{p.name}{'' if p.default is p.empty else f'={default(p.default)}'}")
    return f"({', '.join(shown)})"


def default(value):
    return value.__name__ if isinstance(value, type) else repr(value)


def entries(name, value):
    """A name, and the public methods of a class."""
    if isinstance(value, types.ModuleType):
        return {name: "module"}
    if not callable(value):
        return {name: repr(value) if isinstance(value, (int, str, tuple)) else type(value).__name__}
    found = {name: signature(value)}
    for member in sorted(vars(value)) if isinstance(value, type) and not hasattr(value, "scope") else ():
        static = inspect.getattr_static(value, member)
        if isinstance(static, property):
            found[f"{name}.{member}"] = "property"
        elif isinstance(static, (types.FunctionType, classmethod, staticmethod)):
            found[f"{name}.{member}"] = signature(getattr(value, member))
    return {name: text for name, text in found.items() if "._" not in name}  # no private methods


def model(params, ids):
    x = params["table"][ids] + params["tokens"][ids]
    for i in range(3):
        x = jnp.tanh(x @ params["stack"][i])
    return x @ params["plain"] @ params["dora"] @ params["vera"] @ params["head"]


CONFIG = {
    "rank": 2,
    "alpha": 3.0,
    "targets": ("plain", "stack"),
    "rank_pattern": {"stack": 1},
    "alpha_pattern": {"stack": 4.0},
    "exclude": ("dora",),
    "scaling": "rslora",
    "dropout": 0.25,
    "train": ("head",),
}
PEFT_CONFIG = {
    "rank": 2,
    "targets": ["q_proj"],
    "dora": True,
    "train": ["norm"],
    "trainable_token_indices": {"embed_tokens": [3, 8]},
}


def variables():
    draw = np.random.default_rng(0)
    shapes = {
        "table": (7, 4),
        "tokens": (7, 4),
        "stack": (3, 4, 4),
        "plain": (4, 5),
        "dora": (5, 6),
        "vera": (6, 4),
        "head": (4, 2),
    }
    return {name: jnp.asarray(draw.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def adapters():
    """Each kind of adapter."""
    draw = np.random.default_rng(1)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    layout = lj.Layout((), (0,), (1,))
    ranks = jnp.arange(2) < jnp.array([1, 2, 0])[:, None]
    return {
        "dora": lj.LowRank(array(5, 2), array(2, 6), layout, scale=0.5, magnitude=array(6), bias=array(6), bias_path="bias"),
        "head": lj.Full(array(4, 2)),
        "plain": lj.LowRank(array(4, 2), array(2, 5), layout, scale=2.0, dropout=0.1, frozen=("a",)),
        "stack": lj.LowRank(
            array(3, 4, 2) * ranks[:, None], array(3, 2, 4) * ranks[..., None], lj.Layout((0,), (1,), (2,)),
            scale=jnp.array([1.0, 2.0, 0.5]), ranks=(1, 2, 0),
        ),
        "table": lj.LowRank(array(7, 1).astype(jnp.bfloat16), array(1, 4).astype(jnp.bfloat16), layout, invocation=(1, 2)),
        "tokens": lj.Rows(array(2, 4), indices=(1, 5), layout=layout),
        "vera": lj.LowRank(
            array(6, 3), array(3, 4), layout, lambda_d=array(3), lambda_b=array(4), frozen=("a", "b")
        ),
    }  # fmt: skip


def leaves(tree):
    """The arrays of a tree, in its order."""
    found = [jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in jax.tree.leaves(tree)]
    return {f"{i:02}": np.asarray(x, np.float32 if x.dtype == jnp.bfloat16 else x.dtype) for i, x in enumerate(found)}
