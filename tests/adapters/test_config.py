import json
import re

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import pytest

import lora_jax as lj


@pytest.mark.parametrize("options,message", [
    ({"rank": 0}, "rank must be a whole number of at least 1, not 0"),
    ({"rank": 2.0}, "rank must be a whole number"),
    ({"rank": True}, "rank must be a whole number"),
    ({"alpha": 0}, "alpha must be positive"),
    ({"alpha": float("nan")}, "alpha must be positive"),
    ({"alpha": "16"}, "alpha must be a number"),
    ({"targets": "query"}, "write ['query'] for one pattern"),
    ({"targets": []}, "targets, train and trainable_token_indices are all empty"),
    ({"targets": [""]}, "a pattern is a non-empty string"),
    ({"targets": ["re:("]}, "is not a regular expression"),
    ({"exclude": "query"}, "exclude must be a list of patterns"),
    ({"train": "head"}, "train must be a list of patterns, not 'head'; write ['head']"),
    ({"rank_pattern": {"query": 0}}, "rank_pattern['query'] must be a whole number of at least 1"),
    ({"alpha_pattern": ["query"]}, "alpha_pattern must be a dict"),
    ({"layers": []}, "layers must be a non-empty list"),
    ({"layers": [-1]}, "layers must be a non-empty list"),
    ({"layers": [1, 1]}, "layers names an index twice"),
    ({"layers": 3}, "layers must be a list of whole numbers"),
    ({"scaling": "sqrt"}, "scaling must be one of 'lora', 'rslora'"),
    ({"init": "zeros"}, "init must be one of 'kaiming', 'gaussian', 'orthogonal'"),
    ({"init": "orthogonal", "rank": 3}, "init='orthogonal' shares each rank out over two halves, so it must be even, not 3"),
    ({"init": "orthogonal", "rank_pattern": {"a": 4, "b": 5}}, "must be even, not 5"),
    ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
    ({"dtype": "int8"}, "dtype must be a floating-point dtype, not int8"),
    ({"dtype": "floaty"}, "dtype must name a floating-point dtype"),
    ({"batch_axes": {"up": 0}}, "batch_axes['up'] must be a list of whole numbers"),
])  # fmt: skip
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        lj.LoraConfig(**options)


def test_scales():
    assert lj.LoraConfig().scale(4, 8) == 2.0
    assert lj.LoraConfig(scaling="rslora").scale(4, 8) == 4.0


def test_equal_configurations_are_equal_however_they_were_given():
    one = lj.LoraConfig(targets=("a", re.compile("b")), dtype=jnp.float32, layers=(2, 0), alpha=4)
    assert one == lj.LoraConfig(targets=["a", "re:b"], layers=[0, 2], alpha=4.0)
    assert hash(one) == hash(lj.LoraConfig.from_json(one.to_json()))


_patterns = st.lists(st.from_regex(r"[a-z_.]{1,6}(/[a-z0-9]{1,4})?", fullmatch=True), max_size=3)


@hypothesis.given(
    st.builds(
        lj.LoraConfig,
        rank=st.integers(1, 512), alpha=st.floats(0.01, 1e4), targets=st.one_of(st.just("all-linear"), _patterns.filter(len)),
        exclude=_patterns, rank_pattern=st.dictionaries(st.sampled_from("abc"), st.integers(1, 9)),
        alpha_pattern=st.dictionaries(st.sampled_from(["a/b", re.compile("x", re.S)]), st.floats(0.5, 2)),
        layers=st.one_of(st.none(), st.lists(st.integers(0, 99), min_size=1, unique=True)),
        scaling=st.sampled_from(["lora", "rslora"]), dropout=st.floats(0, 0.99), train=_patterns,
        init=st.sampled_from(["kaiming", "gaussian"]), dtype=st.sampled_from(["float32", "bfloat16", "float16"]), branch_dtype=st.sampled_from([None, "float32"]),
        batch_axes=st.dictionaries(st.sampled_from("de"), st.lists(st.integers(-3, 3), unique=True)),
    )
)  # fmt: skip
def test_json_round_trip(config):
    assert lj.LoraConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize("change,message", [
    (lambda d: d | {"rnak": 8}, "unknown fields: rnak"),
    (lambda d: {k: v for k, v in d.items() if k != "alpha"}, "missing fields: alpha"),
    (lambda d: d | {"format_version": 4}, "format version 4; this lora_jax reads 1 to 3"),
    (lambda d: {k: v for k, v in d.items() if k != "format_version"}, "format version None"),
    (lambda d: d | {"rank": "8"}, "rank must be a whole number"),
    (lambda d: [d], "must be a JSON object, not list"),
])  # fmt: skip
def test_json_is_read_strictly(change, message):
    text = json.dumps(change(json.loads(lj.LoraConfig().to_json())))
    with pytest.raises(ValueError, match=re.escape(message)):
        lj.LoraConfig.from_json(text)


def test_what_is_not_json():
    with pytest.raises(ValueError, match="is not JSON"):
        lj.LoraConfig.from_json("{rank: 8}")
