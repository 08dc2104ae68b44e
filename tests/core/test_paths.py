import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.core import paths

PATHS = ["params/layer_0/attn/query/kernel", "params/layer_0/attn/query/bias", "params/layer_1/mlp/up/kernel", "params/qkv"]


@pytest.mark.parametrize("pattern,found", [
    ("query", PATHS[:2]), ("attn/query", PATHS[:2]), ("query/kernel", PATHS[:1]), ("qkv", PATHS[3:]), ("kernel", [PATHS[0], PATHS[2]]),
    (PATHS[0], PATHS[:1]), ("re:.*layer_[01].*kernel", [PATHS[0], PATHS[2]]), ("/up/", PATHS[2:3]),
])  # fmt: skip
def test_select(pattern, found):
    assert paths.select(PATHS, [pattern], "targets") == found


@pytest.mark.parametrize("pattern", ["uery", "layer_0", "attn", "layer_0/query", "re:query", "QUERY"])
def test_what_matches_nothing_is_an_error_with_near_misses(pattern):
    with pytest.raises(ValueError, match=re.escape(f"exclude: the pattern {pattern!r} matches no parameter")) as error:
        paths.select(PATHS, ["kernel", pattern], "exclude")
    assert "\n  params/" in str(error.value)


def test_the_nearest_path_comes_first():
    with pytest.raises(ValueError, match=r"The nearest paths are:\n  params/layer_0/attn/query/"):
        paths.select(PATHS, ["attention/query"], "targets")


def test_compiled_patterns_keep_their_flags():
    assert paths.select(PATHS, [paths.normalize(re.compile("PARAMS/qkv", re.I))], "targets") == ["params/qkv"]


@pytest.mark.parametrize("pattern", ["", "/", 3, None, "re:("])
def test_what_is_not_a_pattern(pattern):
    with pytest.raises(ValueError, match="pattern"):
        paths.normalize(pattern)


def test_keys_with_separators_are_escaped_and_never_collide():
    tree = {"a.b": 1, "a": {"b": 2}, "a/b": 3, "a%2Eb": 4}
    found, treedef = paths.flatten(tree)
    assert found == {"a/b": 2, "a%252Eb": 4, "a%2Eb": 1, "a%2Fb": 3}
    assert jax.tree.unflatten(treedef, list(found.values())) == tree
    assert paths.select(found, ["a.b"], "targets") == ["a%2Eb"]


def test_one_array_has_no_path():
    with pytest.raises(ValueError, match="the parameters are one array, which has no path: give it a name"):
        paths.flatten(jnp.ones(3))


def test_two_leaves_of_one_path_are_refused():
    class Both:
        pass

    both = lambda name: ((jax.tree_util.GetAttrKey(name), 1.0), (jax.tree_util.DictKey(name), 2.0))
    jax.tree_util.register_pytree_with_keys(Both, lambda node: (both("w"), None), lambda aux, children: Both())
    with pytest.raises(ValueError, match="two leaves of the tree have the path 'x/w'"):
        paths.flatten({"x": Both()})


def test_keys_with_slashes_are_matched_in_parts():
    found, _ = paths.flatten({"net/~/linear_1": {"w": 1}, "net/~/linear_2": {"w": 2}})
    for pattern in ("linear_1", "~/linear_1/w", "net/~/linear_1"):
        assert paths.select(found, [pattern], "targets") == ["net%2F~%2Flinear_1/w"]


def test_keys_with_slashes_have_layers_and_attention():
    names = [f"net/layer_{i}/{part}" for i in range(2) for part in ("attention/query", "mlp/up")]
    variables = {name: {"w": jnp.ones((4, 4))} for name in names}
    fn = lambda p, x: functools.reduce(lambda x, name: x @ p[name]["w"], names, x)
    chosen = lambda **options: list(
        lj.init(jax.random.key(0), lj.LoraConfig(rank=2, **options), fn, variables, jnp.ones((1, 4)))
    )
    assert chosen(layers=[0]) == ["net%2Flayer_0%2Fattention%2Fquery/w", "net%2Flayer_0%2Fmlp%2Fup/w"]
    assert chosen(targets="attention") == [f"net%2Flayer_{i}%2Fattention%2Fquery/w" for i in range(2)]


def test_an_only_child_without_a_name_is_dropped():
    """As Haliax's arrays have it; where there are two, numbers tell them apart."""

    class Named:
        def __init__(self, *arrays):
            self.arrays = arrays

    jax.tree_util.register_pytree_node(Named, lambda node: (node.arrays, None), lambda aux, children: Named(*children))
    found, treedef = paths.flatten({"q_proj": {"weight": Named(1.0)}, "both": Named(2.0, 3.0), "list": [4.0]})
    assert list(found) == ["both/0", "both/1", "list/0", "q_proj/weight"]
    assert paths.select(found, ["q_proj"], "targets") == ["q_proj/weight"]
    assert jax.tree.unflatten(treedef, list(found.values()))["q_proj"]["weight"].arrays == (1.0,)
    assert list(paths.flatten(Named(1.0))[0]) == ["0"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
    query: float
    value: float


def test_the_value_of_a_boxed_leaf_is_dropped_and_a_key_called_value_is_not():
    tree = {"kernel": nn.Partitioned(jnp.ones(2), names=("a",)), "attention": {"value": jnp.ones(3)}}
    assert list(paths.flatten(tree)[0]) == ["attention/value", "kernel"]
    assert list(paths.flatten({"attn": Attention(1.0, 2.0)})[0]) == ["attn/query", "attn/value"]
