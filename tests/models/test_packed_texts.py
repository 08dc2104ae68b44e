"""Encoders of several texts in a row: each gets what it gets alone, in a row of padding."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.data.language import Document
from lora_jax.data.packing import pack
from lora_jax.models import bert
from tests.support.identity import distance, random_adapters
from tests.support.marks import slow_unless

DATA = pathlib.Path(__file__).parents[1] / "data"
FAMILIES = ("distilbert", "electra", "modernbert", "modernbert_mean", "roberta", "xlm_roberta")
CASES = {name: DATA / "families" / name for name in FAMILIES} | {"bert": DATA / "bert"}
FAST = ("bert", "modernbert")
LENGTHS = (5, 7, 4, 9)  # of the texts; the first three share a row of 17 with a free place, the last has its own


@functools.cache
def texts(case):
    """The inputs of a few texts, one in a row and packed."""
    ids = load_file(CASES[case] / "inputs.safetensors")["input_ids"].reshape(-1).astype(np.int32)
    ids = np.where(ids < 5, 5, ids)  # no padding among them
    cut = np.split(np.resize(ids, sum(LENGTHS)), np.cumsum(LENGTHS)[:-1])
    padded = np.zeros((len(LENGTHS), max(LENGTHS)), np.int32)
    mask = np.zeros_like(padded)
    for i, tokens in enumerate(cut):
        padded[i, : len(tokens)], mask[i, : len(tokens)] = tokens, 1
    rows = pack([Document(tokens, tokens > 0) for tokens in cut], length=17)
    return {"input_ids": padded, "attention_mask": mask}, {"input_ids": rows.input_ids, "segment_ids": rows.segment_ids}


def both(loaded, case):
    """Functions of the parameters that give the logits of each text, alone and packed."""
    alone, packed = texts(case)
    assert packed["segment_ids"].max(1).tolist() == [3, 1]

    def of_rows(apply, params):
        return apply(params, **packed, num_segments=3)[np.array([0, 0, 0, 1]), np.array([0, 1, 2, 0])]

    return lambda apply, params: apply(params, **alone), of_rows


def same_gradients(one, other, params):
    found = []
    for function in (one, other):
        loss = lambda params, function=function: (jnp.sum(jnp.sin(3.0 * function(params))), function(params))
        found.append(jax.jit(jax.grad(loss, has_aux=True))(params))
    (moves, want), (gradient, got) = found
    assert want.shape == (4, *got.shape[1:]) and distance(got, want) < 1e-5
    # Up to a share of the largest: that of a key's bias is zero but for rounding.
    moves, gradient = ({path: np.asarray(leaf) for path, leaf in paths.flatten(tree)[0].items()} for tree in (moves, gradient))
    most = max(np.abs(leaf).max() for leaf in moves.values())
    for path, leaf in moves.items():
        scale = most if path.endswith("key/bias") else np.abs(leaf).max()
        np.testing.assert_allclose(gradient[path], leaf, rtol=0, atol=1e-5 * scale, err_msg=path)


@pytest.mark.parametrize("case", slow_unless(lambda case: case in FAST, CASES))
def test_packed_texts_are_apart(case):
    loaded = bert.load(CASES[case] / "base")
    alone, packed = (functools.partial(function, loaded.apply) for function in both(loaded, case))
    same_gradients(alone, packed, loaded.variables)


@pytest.mark.parametrize("case", slow_unless(lambda case: case == "roberta", ["modernbert", "roberta"]))
def test_packed_texts_with_adapters(case):
    loaded = bert.load(CASES[case] / "base")
    shapes = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), loaded.apply, loaded.variables, **texts(case)[0])
    # Small, as a model that large ones drive into saturation multiplies rounding, that of other padding alike.
    adapters = jax.tree.map(lambda leaf: 0.2 * leaf, random_adapters(shapes, jnp.float32))
    alone, packed = both(loaded, case)
    adapted = [lambda a, f=f: f(lj.lora(loaded.apply), lj.attach(loaded.variables, a)) for f in (alone, packed)]
    got, want = (jax.jit(jax.grad(lambda a, f=f: jnp.sum(jnp.sin(3.0 * f(a)))))(adapters) for f in adapted)
    assert distance(got, want) < 1e-5
    merged = packed(loaded.apply, lj.merge(loaded.variables, adapters))
    assert distance(merged, adapted[1](adapters)) < 1e-5 and distance(adapted[0](adapters), merged) < 1e-5


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_of_packed_texts(pooling, tmp_path):
    loaded = bert.load(CASES["modernbert" if pooling == "cls" else "modernbert_mean"] / "base", num_labels=0, scan_layers=True)
    assert loaded.config.pooling == pooling
    alone, packed = (jax.jit(functools.partial(f, loaded.apply))(loaded.variables) for f in both(loaded, "modernbert"))
    assert packed.shape == (4, 32) and distance(packed, alone) < 1e-5


def test_texts_longer_than_the_positions():
    """A row may be, a text may not."""
    loaded = bert.load(CASES["bert"] / "base")
    ids, segments = np.full((2, 40), 7, np.int32), np.array([[1] * 20 + [2] * 20, [1] * 40])
    logits = loaded.apply(loaded.variables, ids, segment_ids=segments, num_segments=2)
    alone = loaded.apply(loaded.variables, ids[:1, :20])
    assert distance(logits[0], jnp.concatenate([alone, alone])) < 1e-5
    assert bool(jnp.isnan(logits[1, 0]).all())


IDS = np.ones((1, 4), np.int32)
REFUSED = {
    "shape": (
        {"segment_ids": IDS[:, :3], "num_segments": 1},
        r"segment_ids has the shape \(1, 3\), but input_ids has \(1, 4\)",
    ),
    "mask": (
        {"segment_ids": IDS, "num_segments": 1, "attention_mask": IDS},
        "attention_mask can't be given together with segment",
    ),
    "no number": ({"segment_ids": IDS}, "num_segments must say how many texts a row with segment_ids has at most, not None"),
    "zero": ({"segment_ids": IDS, "num_segments": 0}, "num_segments must say how many texts .*, not 0"),
    "number alone": ({"num_segments": 2}, "num_segments is for rows of several texts: give segment_ids, too, or leave it out"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_do_not_fit(name):
    given, message = REFUSED[name]
    loaded = bert.load(CASES["bert"] / "base")
    with pytest.raises(lj.InputError, match=message):
        loaded.apply(loaded.variables, IDS, **given)
