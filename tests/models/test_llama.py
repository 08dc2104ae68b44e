"""Decoders of the Llama family against logits that transformers gave, packing, padding, the cache, generation, adapters."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.huggingface.names import HFName
from lora_jax.models import llama
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families import read_config
from lora_jax.models.rotary import Llama3Rope
from lora_jax.planning.flops import dot_flops
from tests.support.identity import distance, random_adapters
from tests.support.marks import checkerboard, every_other

DATA = pathlib.Path(__file__).parents[1] / "data" / "llama"
PEFT = DATA.parent / "peft"
FAMILY = [
    "llama3",
    "linear",
    "mistral",
    "qwen2",
]  # with scaled frequencies and all biases; tied; windows; windows on some layers
FORMS = {
    "unrolled": {},
    "scanned": {"scan_layers": True},
    "remat": {"remat": "full"},
    "both": {"scan_layers": True, "remat": "full"},
    "products": {"scan_layers": True, "remat": "products"},
}


def truth(name):
    tensors = load_file(DATA / name / "expected.safetensors")
    ids, mask = (jnp.asarray(tensors[key], jnp.int32) for key in ("input_ids", "attention_mask"))
    return ids, mask, tensors["output"], tensors["masked"]


def greedy(loaded, ids, count):
    """The most likely continuations of unpadded prompts, without a cache, as a function of the variables."""
    step = jax.jit(loaded.apply)  # one shape: what comes after a token does not reach it

    def run(variables):
        row = jnp.pad(ids, ((0, 0), (0, count)))
        for last in range(ids.shape[1], ids.shape[1] + count):
            row = row.at[:, last].set(jnp.argmax(step(variables, row)[:, last - 1], axis=-1).astype(jnp.int32))
        return row[:, -count:]

    return run


def attached(loaded, *args, **options):
    """Adapters of every product, moved off their start."""
    config = lj.LoraConfig(rank=2, alpha=1, **options)
    init = lambda variables: lj.init(jax.random.key(0), config, loaded.apply, variables, *args)
    adapters = random_adapters(jax.eval_shape(init, loaded.variables), jnp.float32)
    return lj.attach(loaded.variables, adapters), lj.merge(loaded.variables, adapters), adapters


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_logits_are_those_of_hugging_face(form):
    ids = jnp.asarray(load_file(PEFT / "llama" / "inputs.safetensors")["input_ids"], jnp.int32)
    loaded = llama.load(PEFT / "llama" / "base", **FORMS[form])
    want = load_file(PEFT / "llama-qv" / "expected.safetensors")["base_output"]
    np.testing.assert_allclose(loaded.apply(loaded.variables, ids), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "form"), checkerboard(FAMILY, ["unrolled", "scanned"]))
def test_the_family_with_and_without_padding(name, form):
    ids, mask, output, masked = truth(name)
    loaded = llama.load(DATA / name, **FORMS[form])
    np.testing.assert_allclose(loaded.apply(loaded.variables, ids), output, rtol=0, atol=1e-5)
    got, real = loaded.apply(loaded.variables, ids, mask), np.asarray(mask, bool)
    np.testing.assert_allclose(np.asarray(got)[real], masked[real], rtol=0, atol=1e-5)
    assert jnp.isfinite(got).all()  # the padding on the left sees nothing
    last = loaded.apply(loaded.variables, ids, mask, last_only=True)
    np.testing.assert_allclose(last, got[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_padding_on_the_right_changes_nothing(name):
    ids, _, output, _ = truth(name)
    loaded = llama.load(DATA / name)
    mask = jnp.arange(ids.shape[1])[None, :] < jnp.array([[7], [12]])
    got = loaded.apply(loaded.variables, ids, mask)
    np.testing.assert_allclose(got[0, :7], output[0, :7], rtol=0, atol=1e-5)
    np.testing.assert_allclose(got[1], output[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen2", "llama3"])
def test_packed_documents_are_apart(name):
    ids, _, _, _ = truth(name)
    loaded = llama.load(DATA / name)
    lengths = (4, 4, 4)
    segments = jnp.repeat(jnp.arange(3), jnp.array(lengths))[None]
    apply = jax.jit(loaded.apply)
    packed = apply(loaded.variables, ids[:1], segment_ids=segments)
    start = 0
    for length in lengths:
        alone = apply(loaded.variables, ids[:1, start : start + length])
        np.testing.assert_allclose(packed[:, start : start + length], alone, rtol=0, atol=1e-5)
        start += length
    positions = jnp.array([[*range(4)] * 3])
    given = apply(loaded.variables, ids[:1], segment_ids=segments, positions=positions)
    np.testing.assert_array_equal(given, packed)
    assert jnp.abs(apply(loaded.variables, ids[:1], segment_ids=segments, positions=2 * positions) - packed).max() > 1e-3


def test_rows_that_see_nothing_have_finite_gradients():
    ids, mask, _, _ = truth("llama3")
    loaded = llama.load(DATA / "llama3")
    loss = lambda variables: jnp.square(loaded.apply(variables, ids, mask)).mean()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(loaded.variables)))


def test_remat_and_scan_have_the_same_gradient():
    ids, mask, _, _ = truth("qwen2")

    def gradient(form):
        loaded = llama.load(DATA / "qwen2", **FORMS[form])
        loss = lambda variables: jnp.square(loaded.apply(variables, ids, mask)).mean()
        leaves, _ = paths.flatten(jax.jit(jax.grad(loss))(loaded.variables))
        return {tensor: name.export(leaves[path], index) for path, name in loaded.names.items()
                for index, tensor in name.tensors(leaves[path].shape).items()}  # fmt: skip

    want = gradient("unrolled")
    for form in ("remat", "scanned", "both", "products"):
        got = gradient(form)
        assert got.keys() == want.keys()
        assert distance(got, want) < 1e-5


def test_remat_presets(lenient):
    """What a step with adapters computes again: nothing, no product with a weight, all of them."""
    sizes = llama.load(DATA / "llama3").config

    def flops(remat, **how):
        model = llama.abstract(sizes, scan_layers=True, remat=remat)
        ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), model.apply, model.variables, ids)
        params = lj.attach(model.variables, adapters)
        loss = lambda params, ids: lj.lora(model.losses)(params, ids, ids).mean()
        return dot_flops(jax.make_jaxpr(jax.grad(loss, allow_int=True))(params, ids), **how)

    none, products, full = map(flops, (None, "products", "full"))
    scores = 2 * 2 * sizes.num_hidden_layers * sizes.num_attention_heads * 16 * 16 * sizes.head_dim * 2
    assert none < products <= none + scores < full
    once = [flops(remat, again=False) for remat in (None, "products", "full")]
    assert once[0] < none and set(once) == {once[0]}  # the logits are computed again anyway
    with pytest.raises(ValueError, match="remat must be None or one of 'full', 'products', not True"):
        llama.abstract(sizes, remat=True)


def test_bfloat16(lenient):
    ids, mask, output, _ = truth("mistral")
    loaded = llama.load(DATA / "mistral", dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.variables)} == {"bfloat16"}
    got = jax.jit(loaded.apply)(loaded.variables, ids)
    assert got.dtype == jnp.bfloat16
    assert distance(got.astype(jnp.float32), jnp.asarray(output)) < 3e-2
    params, _, _ = attached(loaded, ids, mask)
    adapted = jax.jit(lj.lora(loaded.apply))(params, ids)
    assert adapted.dtype == jnp.bfloat16
    exact = llama.load(DATA / "mistral")  # the same weights, since they are stored in bfloat16
    want = jax.jit(lj.lora(exact.apply))(attached(exact, ids, mask)[0], ids)
    assert distance(adapted.astype(jnp.float32), want) < 5e-2
    cache = jax.eval_shape(loaded.apply_cached, loaded.variables, ids, loaded.init_cache(2, 12))[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(cache.layers)} == {"bfloat16"}


@pytest.mark.parametrize("name", ["attention_mask", "segment_ids", "positions"])
def test_arrays_of_another_shape(name):
    loaded = llama.load(DATA / "linear")
    with pytest.raises(ValueError, match=rf"{name} has the shape \(1, 3\), but input_ids has \(1, 4\)"):
        loaded.apply(loaded.variables, jnp.zeros((1, 4), jnp.int32), **{name: jnp.ones((1, 3), jnp.int32)})


def test_a_dtype_that_is_no_float():
    with pytest.raises(ValueError, match="dtype must be a float dtype, not int8"):
        llama.load(DATA / "linear", dtype=jnp.int8)


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), every_other([*(("qwen2", form) for form in FORMS), ("llama3", "unrolled")]))
def test_every_product_takes_a_pair(name, form):
    ids, mask, _, _ = truth(name)
    loaded = llama.load(DATA / name, **FORMS[form])
    params, merged, adapters = attached(loaded, ids, mask)
    assert set(adapters) == {path for path in loaded.names if path.endswith("/kernel")}
    got, plain = jax.jit(lj.lora(loaded.apply))(params, ids, mask), jax.jit(loaded.apply)
    assert distance(got, plain(merged, ids, mask)) < 1e-5
    assert distance(got, plain(loaded.variables, ids, mask)) > 0.1


@pytest.mark.parametrize("tie", [None, False])
def test_pairs_on_the_embedding(tie):
    ids, _, output, _ = truth("linear")
    loaded = llama.load(DATA / "linear", tie=tie)
    np.testing.assert_allclose(loaded.apply(loaded.variables, ids), output, rtol=0, atol=1e-5)
    assert loaded.config.tie_word_embeddings == (tie is None)
    assert loaded.names["params/embed_tokens/embedding"].tied == ("lm_head.weight" if tie is None else "")
    assert ("params/lm_head/kernel" in loaded.names) == (tie is False)
    params, merged, _ = attached(loaded, ids, targets=["embed_tokens"])
    assert distance(lj.lora(loaded.apply)(params, ids), loaded.apply(merged, ids)) < 1e-5


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    every_other([("qwen2", "unrolled"), ("qwen2", "scanned"), ("llama3", "scanned"), ("mistral", "unrolled")]),
)
def test_decoding_with_a_cache_equals_the_whole_sequence(name, form):
    ids, mask, _, _ = truth(name)
    loaded = llama.load(DATA / name, **FORMS[form])
    params, merged, _ = attached(loaded, ids, mask)
    whole = np.asarray(loaded.apply(merged, ids, mask))
    step = jax.jit(lj.lora(loaded.apply_cached))
    cache, outs = loaded.init_cache(2, 14), []
    for piece in (slice(0, 7), slice(7, 8), slice(8, 9), slice(9, 12)):
        out, cache = step(params, ids[:, piece], cache, mask[:, piece])
        outs.append(out)
    real = np.asarray(mask, bool)
    assert distance(np.asarray(jnp.concatenate(outs, 1))[real], whole[real]) < 1e-5
    assert int(cache.length) == 12


def test_a_full_cache():
    loaded = llama.load(DATA / "linear")
    ids, step = jnp.ones((1, 2), jnp.int32), jax.jit(loaded.apply_cached)
    _, cache = step(loaded.variables, ids, loaded.init_cache(1, 4))
    logits, cache = step(loaded.variables, ids, cache)
    assert jnp.isfinite(logits).all()
    logits, _ = step(loaded.variables, ids, cache)
    assert jnp.isnan(logits).all()  # inside jit nothing can be raised
    with pytest.raises(ValueError, match="has 2 tokens a row, but the cache has room for 1"):
        loaded.apply_cached(loaded.variables, ids, loaded.init_cache(1, 1))
    with pytest.raises(ValueError, match="segment_ids can't be given together with a cache"):
        loaded.model.apply(loaded.variables, ids, segment_ids=ids, cache=loaded.init_cache(1, 4))


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), every_other([("llama3", "scanned"), ("qwen2", "unrolled")]))
def test_generation_equals_greedy_decoding_without_a_cache(name, form):
    ids, mask, _, _ = truth(name)
    loaded = llama.load(DATA / name, **FORMS[form])
    params, merged, _ = attached(loaded, ids, mask)
    first, second = greedy(loaded, ids[:1], 5), greedy(loaded, ids[1:, 5:], 5)  # the second without its padding
    for given, plain in ((loaded.variables, loaded.variables), (params, merged)):
        tokens, lengths = llama.generate(loaded, given, ids, mask, max_new_tokens=5)
        np.testing.assert_array_equal(tokens[:1], first(plain))
        np.testing.assert_array_equal(tokens[1:], second(plain))
        np.testing.assert_array_equal(lengths, [5, 5])


def test_an_invocation_sequence_acts_from_the_prompt_on():
    """Rows that have it in their prompt go on with the adapter, the others without."""
    loaded = llama.load(DATA / "llama3")
    ids = jnp.array([[3, 7, 8, 5], [3, 4, 9, 5]])
    config = lj.LoraConfig(rank=2, targets=["q_proj", "v_proj", "down_proj"], alora_invocation_tokens=[7, 8])
    adapters = lj.init(jax.random.key(0), config, loaded.apply, loaded.variables, ids)
    adapters = jax.tree.map(lambda leaf: np.asarray(leaf) + np.sin(np.arange(leaf.size)).reshape(leaf.shape), adapters)
    params = lj.attach(loaded.variables, jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), adapters))
    longer = np.pad(ids, ((0, 0), (0, 4)))  # one shape: what comes after a token does not reach it
    active = np.pad(lj.active_from(ids, [7, 8]), ((0, 0), (0, 4)), mode="edge")
    step = jax.jit(lj.lora(loaded.apply, active=active))
    for last in range(4, 8):
        longer[:, last] = np.argmax(step(params, longer)[:, last - 1], -1)
    tokens, _ = llama.generate(loaded, params, ids, max_new_tokens=4)
    np.testing.assert_array_equal(tokens, longer[:, 4:])
    base, _ = llama.generate(loaded, loaded.variables, ids, max_new_tokens=4)
    assert (tokens[0] != base[0]).any() and (tokens[1] == base[1]).all()


def test_generation_ends():
    ids, mask, _, _ = truth("llama3")
    loaded = llama.load(DATA / "llama3")
    free = np.asarray(llama.generate(loaded, loaded.variables, ids, mask, max_new_tokens=6).tokens)
    end = int(free[0, 2])
    tokens, lengths = llama.generate(loaded, loaded.variables, ids, mask, max_new_tokens=6, eos_ids=[end])
    for row, got, length in zip(free, np.asarray(tokens), np.asarray(lengths)):
        want = int(np.flatnonzero(row == end)[0]) + 1 if end in row else 6
        assert length == want
        np.testing.assert_array_equal(got[:want], row[:want])
        assert (got[want:] == end).all()


def test_sampling():
    ids, _, output, _ = truth("llama3")
    loaded = llama.load(DATA / "llama3")
    draw = lambda seed, temperature, ids: np.asarray(
        llama.generate(
            loaded, loaded.variables, ids, max_new_tokens=3, temperature=temperature, key=jax.random.key(seed)
        ).tokens
    )
    np.testing.assert_array_equal(draw(1, 1.0, ids), draw(1, 1.0, ids))
    np.testing.assert_array_equal(draw(1, 1e-4, ids), llama.generate(loaded, loaded.variables, ids, max_new_tokens=3).tokens)
    many = draw(2, 2.0, jnp.repeat(ids[:1], 4000, axis=0))[:, 0]
    share = np.bincount(many, minlength=24) / many.size
    np.testing.assert_allclose(share, jax.nn.softmax(output[0, -1] / 2), rtol=0, atol=0.03)


BAD_REQUESTS = {
    "right padding": ({"attention_mask": [[1, 1, 0]]}, "pad prompts on the left"),
    "mask of another shape": ({"attention_mask": [[1, 1]]}, r"attention_mask has the shape \(1, 2\)"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, not 0"),
    "negative temperature": ({"temperature": -1.0}, "temperature must be 0 or a positive number"),
    "no key": ({"temperature": 1.0}, "give a key"),
    "an id beyond the vocabulary": (
        {"prompt_ids": [[1, 99]]},
        "prompt_ids holds 99, but the model's embedding has the rows 0 to 23",
    ),
    "an id below": ({"prompt_ids": [[-1, 2]]}, "prompt_ids holds -1, but"),
    "one axis": ({"prompt_ids": [1, 2]}, r"must have the shape \(batch, length\)"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(case):
    changes, message = BAD_REQUESTS[case]
    loaded = llama.load(DATA / "linear")
    with pytest.raises(ValueError, match=message):
        llama.generate(loaded, loaded.variables, **{"prompt_ids": [[1, 2, 3]], "max_new_tokens": 1, **changes})


def test_sets_of_adapters_that_are_not_there():
    loaded, ids = llama.load(DATA / "linear"), jnp.array([[1, 2, 3], [3, 2, 1]])
    pair = {"params/norm/scale": lj.Full(loaded.variables["params"]["norm"]["scale"])}
    rows = lambda *index: llama.RowAdapters(loaded.variables, lj.many.stack([pair, pair]), jnp.array(index))
    with pytest.raises(ValueError, match="index asks for the set 2, but there are 2, numbered from 0"):
        llama.generate(loaded, rows(0, 2), ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="index has 1 sets, but there are 2 prompts: give one for each"):
        llama.generate(loaded, rows(1), ids, max_new_tokens=1)
    with pytest.raises(ValueError, match="index has 2 sets, but there are 1 prompts"):
        list(llama.stream(loaded, rows(0, 1), ids[0], max_new_tokens=1))
    with pytest.raises(ValueError, match=r"not one size: make the tree with `many.stack`"):
        llama.generate(loaded, rows(0, 1)._replace(stacked={}), ids, max_new_tokens=1)


# --- parameters and configurations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_parameters_are_those_of_the_module(name, scan_layers):
    loaded = llama.load(DATA / name, scan_layers=scan_layers)
    made = jax.eval_shape(loaded.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    shapes = lambda tree: {path: leaf.shape for path, leaf in paths.flatten(tree)[0].items()}
    assert shapes(made) == shapes(loaded.variables) == {
        path: shape for path, (shape, _) in llama.parameters(loaded.config, scan_layers).items()
    }  # fmt: skip
    tensors = load_file(DATA / name / "model.safetensors")
    leaves, _ = paths.flatten(loaded.variables)
    for path, hf in loaded.names.items():
        for index, tensor in hf.tensors(leaves[path].shape).items():
            np.testing.assert_array_equal(hf.export(leaves[path], index), tensors.pop(tensor).astype(np.float32))
    assert not tensors


def test_names():
    names = llama.load(DATA / "qwen2").names
    assert names["params/layer_1/self_attn/q_proj/kernel"] == HFName("model.layers.1.self_attn.q_proj.weight", "i o -> o i")
    names = llama.load(DATA / "qwen2", scan_layers=True).names
    assert names["params/layers/self_attn/q_proj/bias"] == HFName("model.layers.{l}.self_attn.q_proj.bias", "l o -> o")


@pytest.mark.parametrize("name", FAMILY)
def test_configurations_are_written_as_they_are_read(name):
    config = llama.load(DATA / name).config
    assert read_config(llama.hf_config(config)) == config


SIZES = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}


def config(**changes):
    return read_config({"model_type": "llama", **SIZES, **changes})


def test_old_and_new_spellings():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    want = config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling})
    assert want.rope_theta == 5e5 and want.rope_scaling == Llama3Rope(**scaling)
    assert config(rope_theta=5e5, rope_scaling={"type": "llama3", **scaling}) == want
    assert config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}, rope_parameters=None) == want
    assert config(rope_scaling=None).rope_scaling is None
    assert config(eos_token_id=[1, 2]).eos_token_ids == (1, 2) and config(eos_token_id=3).eos_token_ids == (3,)
    assert config(head_dim=None).head_dim == 4 and config(head_dim=6).head_dim == 6
    assert config(attention_bias=True).output_bias and not config(model_type="qwen2").output_bias


def test_windows():
    assert config(model_type="mistral", num_key_value_heads=1, sliding_window=3).windows == (3, 3, 3, 3)
    assert config(model_type="mistral", num_key_value_heads=1, sliding_window=None).windows == (None,) * 4
    sliding = {"model_type": "qwen2", "sliding_window": 3, "max_window_layers": 3}
    assert config(**sliding).windows == (None,) * 4
    assert config(**sliding, use_sliding_window=True).windows == (None, None, None, 3)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert config(**sliding, use_sliding_window=True, layer_types=kinds).windows == (3, None, 3, None)


BAD_CONFIGS = {
    "other architecture": (
        {"model_type": "falcon"},
        "the model_type is 'falcon'; this loader reads 'llama', 'mistral', 'qwen2'",
    ),
    "activation": ({"hidden_act": "softmax"}, "the activation is 'softmax'"),
    "missing size": ({"vocab_size": None}, "it lacks vocab_size"),
    "negative size": ({"vocab_size": -1}, "vocab_size must be a positive whole number, not -1"),
    "size is a text": ({"hidden_size": "8"}, "hidden_size must be a positive whole number, not '8'"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a positive number, not nan"),
    "too many layers": ({"num_hidden_layers": 10**12}, "at most 10000 can be read"),
    "too many sliding layers": ({"model_type": "mistral", "num_hidden_layers": 10**12}, "at most 10000 can be read"),
    "heads": ({"num_key_value_heads": 3}, "num_attention_heads 2, num_key_value_heads 3"),
    "odd heads": ({"head_dim": 3}, "head_dim must be even"),
    "unknown scaling": ({"rope_scaling": {"rope_type": "x"}}, "the rope_type is 'x'"),
    "scaling's option": ({"rope_scaling": {"type": "linear", "factor": 2.0, "x": 1}}, "the type 'linear' have x, which can't"),
    "unknown field": ({"twist": 1}, "fields that this loader does not know: twist .1."),
    "scaling without a factor": ({"rope_scaling": {"type": "linear"}}, "the rope scaling's factor must be a positive number"),
    "scaling is a list": ({"rope_scaling": [1]}, "rope_parameters must be an object"),
    "frequencies by layer": ({"rope_parameters": {"full_attention": {}}}, "every layer of this family must rotate alike"),
    "part of a head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; this family rotates whole heads"),
    "flag": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    "end": ({"eos_token_id": "x"}, "eos_token_id must be a token id or a list of them"),
    "layer types": (
        {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["x"]},
        "for each of 4 layers",
    ),
    "window": ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": 0}, "sliding_window must be a positive"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configurations(case):
    changes, message = BAD_CONFIGS[case]
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_random_weights():
    sizes = DecoderConfig(**SIZES, num_key_value_heads=1, head_dim=4, max_position_embeddings=16)
    made, same = llama.init(sizes, jax.random.key(1)), llama.init(sizes, jax.random.key(1), remat="full")
    assert distance(made.variables, same.variables) == 0
    stacked = llama.init(sizes, jax.random.key(1), scan_layers=True, dtype=jnp.bfloat16)
    kernel = stacked.variables["params"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.shape == (4, 8, 8) and kernel.dtype == jnp.bfloat16
    assert 0.015 < float(kernel.astype(jnp.float32).std()) < 0.025


def test_a_decoder_without_its_head_is_refused(tmp_path):
    source = PEFT / "llama" / "base"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="has 0 layers; the configuration asks for 3: it holds the decoder alone"):
        llama.load(tmp_path)
