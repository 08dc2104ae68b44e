"""The ready rules put other libraries' parameters where Hugging Face has them.

transformers' Flax models are filled from torch's tensors by the rules, and give torch's logits. The other libraries are heavy, so
for them `data/rules/make_trees.py` did that once and wrote down their trees, which are checked here.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.huggingface.names import match
from lora_jax.peft import rules
from lora_jax.peft.slots import layout

DATA = pathlib.Path(__file__).parents[1] / "data" / "peft"
SIZES = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 12}
BERT = transformers.BertConfig(vocab_size=9, max_position_embeddings=10, **SIZES)
GPT2 = transformers.GPT2Config(vocab_size=9, n_positions=10, n_embd=8, n_layer=3, n_head=2)
LLAMA = transformers.LlamaConfig(vocab_size=9, max_position_embeddings=10, attention_bias=True, **SIZES)
VIT = transformers.ViTConfig(image_size=4, patch_size=2, **SIZES)
FLAX = {
    "FlaxBertModel": (BERT, rules.FLAX_BERT),
    "FlaxBertForSequenceClassification": (BERT, rules.FLAX_BERT),
    "FlaxBertForQuestionAnswering": (BERT, rules.FLAX_BERT),
    "FlaxBertForPreTraining": (BERT, rules.FLAX_BERT_TIED),
    "FlaxGPT2Model": (GPT2, rules.FLAX_GPT2),
    "FlaxGPT2LMHeadModel": (GPT2, rules.FLAX_GPT2),
    "FlaxLlamaModel": (LLAMA, rules.FLAX_LLAMA),
    "FlaxLlamaForCausalLM": (LLAMA, rules.FLAX_LLAMA),
    "FlaxViTModel": (VIT, rules.FLAX_VIT),
    "FlaxViTForImageClassification": (VIT, rules.FLAX_VIT),
}
TREES = {file.stem: json.loads(file.read_text()) for file in (DATA.parent / "rules").glob("*.json")}
OTHERS = {f"{library}/{variant}": recorded for library, found in TREES.items() for variant, recorded in found.items()}
# What MaxText keeps otherwise than Hugging Face: not in the tables, so that no adapter on it is written.
LLAMA_REFUSED = r"model\.layers\.\d+\.self_attn\.[qk]_proj\.weight"
GEMMA3_REFUSED = r"model\.embed_tokens\.weight|.*norm\.weight"
REFUSED = {"maxtext/llama": LLAMA_REFUSED, "maxtext/gemma3": GEMMA3_REFUSED}
REFUSED["maxtext/gemma2"] = rf"{GEMMA3_REFUSED}|.*q_proj\.weight"


def table_of(name):
    """A table by the name in FLAX or OTHERS."""
    if name in FLAX:
        return FLAX[name][1]
    word, _, layers = OTHERS[name]["rules"].rstrip(")").partition("(")
    return getattr(rules, word)(int(layers)) if layers else getattr(rules, word)


def tree_of(name):
    """{path: shape} of a model, by the name in FLAX or OTHERS."""
    if name in OTHERS:
        return {path: tuple(shape) for path, shape in OTHERS[name]["tree"].items()}
    model = getattr(transformers, name)(FLAX[name][0], _do_init=False)
    shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), model.input_shape))
    return {path: leaf.shape for path, leaf in paths.flatten(shapes)[0].items()}


def nest(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        here = tree
        for key in above:
            here = here.setdefault(key, {})
        here[last] = leaf
    return tree


def tensors_of(leaves, table):
    """{Hugging Face's name: tensor} of {path: array}."""
    names = match(nest(leaves), table)
    return {
        tensor: name.export(leaves[path], index)
        for path, name in names.items()
        for index, tensor in name.tensors(leaves[path].shape).items()
    }


def fill(shapes, table, tensors):
    """The parameter tree with a checkpoint's tensors, and the names of those it took."""
    leaves, treedef = paths.flatten(shapes)
    names, used = match(shapes, table), set()
    for path, leaf in leaves.items():
        (tensor,) = names[path].tensors(leaf.shape).values()
        leaves[path] = names[path].restore(tensors[tensor], leaf.shape)
        used.add(tensor)
    return jax.tree_util.tree_unflatten(treedef, leaves.values()), used


@pytest.mark.parametrize(
    "kind, case, table",
    [
        ("FlaxBertForSequenceClassification", "bert-seq-cls", rules.FLAX_BERT),
        ("FlaxGPT2LMHeadModel", "gpt2-conv1d", rules.FLAX_GPT2),
        ("FlaxLlamaForCausalLM", "llama-qv", rules.FLAX_LLAMA),
        ("FlaxViTForImageClassification", "vit-conv", rules.FLAX_VIT_5),
    ],
)
def test_a_flax_model_filled_by_the_rules_gives_torchs_logits(lenient, kind, case, table):
    folder = DATA / case.split("-")[0]
    base = next((folder / "base").glob("*.safetensors"))
    tensors = safetensors.numpy.load_file(base)
    config = transformers.AutoConfig.from_pretrained(folder / "base")
    model = getattr(transformers, kind)(config, _do_init=False)
    shapes = jax.eval_shape(lambda: model.init_weights(jax.random.key(0), model.input_shape))
    params, used = fill(shapes, table, tensors)
    assert used == set(tensors)
    logits = model(**safetensors.numpy.load_file(folder / "inputs.safetensors"), params=params).logits
    expected = safetensors.numpy.load_file(DATA / case / "expected.safetensors")["base_output"]
    np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", FLAX)
def test_transformers_own_flax_names_differ_in_the_last_word_alone(lenient, name):
    shapes = tree_of(name)
    last = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    for path, hf in match(nest({p: jax.ShapeDtypeStruct(s, np.float32) for p, s in shapes.items()}), FLAX[name][1]).items():
        *above, word = path.split("/")
        assert hf.name == ".".join([*above, last.get(word, word)])


@pytest.mark.parametrize("name", OTHERS)
def test_the_trees_of_other_libraries_cover_every_tensor_once(name):
    recorded = OTHERS[name]
    leaves = {path: np.zeros(shape, np.float32) for path, shape in tree_of(name).items()}
    written = tensors_of(leaves, table_of(name))
    refused = next((pattern for start, pattern in REFUSED.items() if name.startswith(start)), "nothing")
    pooler = "bert.pooler.dense." if name == "keras_hub/bert_words" else "-"  # keras-hub's has one there
    assert {tensor for tensor in written if not tensor.startswith(pooler)} == {
        tensor for tensor in recorded["tensors"] if not re.fullmatch(refused, tensor)
    }
    for tensor, array in written.items():
        assert array.shape == tuple(recorded["tensors"].get(tensor, array.shape))
    unnamed = set(leaves) - set(match(nest(leaves), table_of(name)))
    heads = {"lm_head/kernel"} if recorded["rules"] == "EASYDEL_TIED" else set()  # there, and never used
    assert bool(unnamed - heads) == (refused != "nothing")
    assert recorded["error"] < 1e-5 and recorded["adapted"] < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_adapters_of_other_libraries_make_the_round_trip(name, tmp_path):
    rng = np.random.default_rng(0)
    leaves = {path: np.zeros(shape, np.float32) for path, shape in tree_of(name).items()}
    names = match(nest(leaves), table_of(name))
    pairs = {}
    for path, hf in names.items():
        if hf.kind == "linear" and len(hf.groups(leaves[path].ndim)) > 1 and "experts" not in hf.name:
            laid = layout(hf, leaves[path].ndim)
            a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in laid.factor_shapes(leaves[path].shape, 2))
            pairs[path] = lj.LowRank(a, b, laid, scale=2.0)
    lj.peft.save(tmp_path, pairs, names=names)
    loaded = lj.peft.load(tmp_path, nest(leaves), names=names)
    assert set(loaded) == set(pairs)
    for path, pair in pairs.items():
        np.testing.assert_array_equal(loaded[path].a, pair.a)
        np.testing.assert_array_equal(loaded[path].b, pair.b)


NUMBERED = re.compile(r"(?:(layer|transformer_layer|decoder_block)_)?\d+")


def stacked(leaves):
    """Leaves with the layers' numbers taken out of their paths, and stacked."""
    out = {}
    for path, leaf in leaves.items():
        number = next((i for i, key in enumerate(path.split("/")) if NUMBERED.fullmatch(key)), None)
        keys = path.split("/")
        if number is not None:
            keys[number : number + 1] = list(filter(None, [NUMBERED.fullmatch(keys[number])[1]]))
        out.setdefault("/".join(keys), []).append(leaf)
    return {path: arrays[0] if path in leaves else np.stack(arrays) for path, arrays in out.items()}


@pytest.mark.parametrize("name", [*FLAX, *(name for name in OTHERS if not name.startswith("maxtext/"))])
def test_stacked_layers_are_the_same_tensors(lenient, name):
    rng = np.random.default_rng(0)
    leaves = {path: rng.normal(size=shape).astype(np.float32) for path, shape in tree_of(name).items()}
    one_by_one, together = (tensors_of(tree, table_of(name)) for tree in (leaves, stacked(leaves)))
    assert set(one_by_one) == set(together)
    for tensor, array in one_by_one.items():
        np.testing.assert_array_equal(together[tensor], array)


def test_the_collection_on_top_makes_no_difference():
    shape = jax.ShapeDtypeStruct((4, 4), np.float32)
    tree = {"h": {"0": {"attn": {"c_attn": {"kernel": shape}}}}}
    (bare,) = match(tree, rules.FLAX_GPT2).values()
    (inside,) = match({"params": tree}, rules.FLAX_GPT2).values()
    assert bare == inside and bare.kind == "conv1d"


@pytest.mark.parametrize(
    "table, path, tied",
    [
        (rules.FLAX_BERT_TIED, "bert/embeddings/word_embeddings/embedding", "cls.predictions.decoder.weight"),
        (rules.FLAX_BERT, "bert/embeddings/word_embeddings/embedding", ""),
        (rules.FLAX_GPT2, "transformer/wte/embedding", "lm_head.weight"),
        (rules.FLAX_GPT2, "wte/embedding", ""),
        (rules.TUNIX_QWEN3_TIED, "embedder/input_embedding", "lm_head.weight"),
        (rules.TUNIX_QWEN3, "embedder/input_embedding", ""),
        (rules.GEMMA3, "params/embedder/input_embedding", "lm_head.weight"),
    ],
)
def test_an_embedding_that_is_the_head_says_so(table, path, tied):
    (name,) = match(nest({path: jax.ShapeDtypeStruct((4, 3), np.float32)}), table).values()
    assert (name.tied, name.kind) == (tied, "embedding")


def test_a_tied_table_takes_no_head():
    with pytest.raises(ValueError, match="no rule matches the parameters lm_head/w"):
        match({"lm_head": {"w": np.zeros((3, 4))}}, rules.TUNIX_LLAMA3_TIED)


@pytest.mark.parametrize("module", ["query", "key"])
def test_adapters_on_what_maxtext_keeps_otherwise_are_refused(module, tmp_path):
    path = f"decoder/layers/self_attention/{module}/kernel"
    names = match(nest({path: np.zeros((8, 3, 2, 4), np.float32)}), rules.MAXTEXT_LLAMA)
    pair = lj.LowRank(jnp.ones((3, 8, 2)), jnp.ones((3, 2, 2, 4)), lj.Layout((1,), (0,), (2, 3)), scale=1.0)
    with pytest.raises(ValueError, match=f"names has no Hugging Face name for {path}"):
        lj.peft.save(tmp_path, {path: pair}, names=names)
