"""The encoders of all families against what transformers gives, with and without PEFT's adapters, and their errors."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import sharding
from lora_jax.core import paths
from lora_jax.models import bert, encoder_families
from lora_jax.models.config_fields import OF_NO_ACCOUNT
from tests.support.marks import slow_unless

DATA = pathlib.Path(__file__).parents[1] / "data" / "families"
CASES = ("distilbert", "electra", "modernbert", "modernbert_mean", "roberta", "xlm_roberta")
LINEAR = {"modernbert": 4, "modernbert_mean": 4}  # kernels of a layer, where they are not 6


def inputs(case):
    return {name: jnp.asarray(x, jnp.int32) for name, x in load_file(DATA / case / "inputs.safetensors").items()}


def expected(case):
    return load_file(DATA / case / "expected.safetensors")


def close(got, want, tolerance=1e-5):
    """Equal to a share of the largest value."""
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def copied(case, directory, **changes):
    """A writable copy of a case's model; a field that is changed to `None` is left out."""
    shutil.copytree(DATA / case / "base", directory)
    fields = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return directory


def rewrite(directory, rename, **more):
    """Write the tensors under new names (`None`: left out), and more of them."""
    tensors = {rename(name): tensor for name, tensor in load_file(directory / "model.safetensors").items()}
    tensors = {name: tensor for name, tensor in (tensors | more).items() if name is not None}
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")


def without_head(directory, case):
    """Make it a checkpoint of the encoder alone."""
    prefix = encoder_families.FAMILIES[json.loads((directory / "config.json").read_text())["model_type"]].prefix
    rewrite(directory, lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None)


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    loaded = bert.load(DATA / case / "base")
    assert loaded.new == () and loaded.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    close(loaded.apply(loaded.variables, **inputs(case)), expected(case)["base_output"])


@pytest.mark.parametrize("case", ["distilbert", "modernbert"])
def test_a_norm_takes_off_a_large_mean_exactly(case):
    """A norm sees no constant that is added to all values, here 32 to embeddings of about 1."""
    loaded = bert.load(DATA / case / "base")
    leaves, treedef = paths.flatten(loaded.variables)
    table = np.asarray(leaves["params/embeddings/word/embedding"])
    words = table.astype(np.float16).astype(np.float32)  # so that the sums below are exact
    logits = []
    for constant in (0, 32):
        leaves["params/embeddings/word/embedding"] = jnp.asarray(words + np.float32(constant))
        logits.append(loaded.apply(jax.tree.unflatten(treedef, list(leaves.values())), **inputs(case)))
    close(logits[1], np.asarray(logits[0]))


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_peft(case, tmp_path):
    loaded = bert.load(DATA / case / "base")
    adapters = lj.peft.load(DATA / case / "adapter", loaded.variables, names=loaded.names)
    assert set(adapters) == {path for path in loaded.names if path.endswith("/kernel")}
    close(lj.lora(loaded.apply)(lj.attach(loaded.variables, adapters), **inputs(case)), expected(case)["output"])
    lj.peft.save(tmp_path, adapters, names=loaded.names)
    theirs, ours = (load_file(d / "adapter_model.safetensors") for d in (DATA / case / "adapter", tmp_path))
    assert {name: x.tobytes() for name, x in theirs.items()} == {name: x.tobytes() for name, x in ours.items()}


@pytest.mark.parametrize("case", slow_unless(lambda case: case == "modernbert", CASES))
def test_gradients_are_those_of_merged_weights(case):
    loaded, batch = bert.load(DATA / case / "base"), inputs(case)
    adapters = lj.peft.load(DATA / case / "adapter", loaded.variables, names=loaded.names)
    loss = lambda logits: jnp.sum(jnp.sin(3.0 * logits))
    adapted = lambda adapters: loss(lj.lora(loaded.apply)(lj.attach(loaded.variables, adapters), **batch))
    merged = lambda adapters: loss(loaded.apply(lj.merge(loaded.variables, adapters), **batch))
    got, want = (jax.jit(jax.grad(f))(adapters) for f in (adapted, merged))
    jax.tree.map(close, got, want)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16(case, lenient):
    loaded = bert.load(DATA / case / "base", dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.variables)} == {"bfloat16"}
    logits = loaded.apply(loaded.variables, **inputs(case))
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(logits, np.float32), expected(case)["base_output"], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("case", CASES)
def test_names_lead_to_every_tensor_and_back(case):
    loaded, tensors = bert.load(DATA / case / "base"), load_file(DATA / case / "base" / "model.safetensors")
    leaves, _ = paths.flatten(loaded.variables)
    assert bert.hf_names(loaded.config) == loaded.names and set(leaves) == set(loaded.names)
    assert sorted(name.name for name in loaded.names.values()) == sorted(tensors)
    for path, name in loaded.names.items():
        np.testing.assert_array_equal(name.export(leaves[path]), tensors[name.name])


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case):
    """On the right, and with the padding token on the left, which learned positions that count all tokens do not allow."""
    loaded, ids = bert.load(DATA / case / "base"), inputs(case)["input_ids"][:, :7]
    short = loaded.apply(loaded.variables, ids)
    padding = loaded.config.padding_id or 0
    for before in (0, 4) if loaded.config.padding_id is not None or loaded.config.rope_theta else (0,):
        widths = ((0, 0), (before, 4 - before))
        padded = jnp.pad(ids, widths, constant_values=padding)
        mask = jnp.pad(jnp.ones_like(ids), widths)
        if not before or loaded.config.pooling == "mean":  # or the first token is padding
            close(loaded.apply(loaded.variables, padded, mask), short)


def test_positions_of_roberta_count_tokens_that_are_not_padding():
    loaded = bert.load(DATA / "roberta" / "base")
    ids = inputs("roberta")["input_ids"][:1, :5]
    first = lambda ids, mask: loaded.apply(loaded.variables, ids, mask)
    gap = jnp.concatenate([ids[:, :2], jnp.zeros((1, 3), jnp.int32), ids[:, 2:]], axis=1)
    close(first(gap, (gap != 0).astype(jnp.int32)), first(ids, None))


# --- sentence models --------------------------------------------------------------------------------------------------


def as_sentence_model(case, directory, mode, *more):
    """As `sentence_transformers` writes it."""
    without_head(copied(case, directory), case)
    modules = ["Transformer", "Pooling", *more]
    listed = [
        {"idx": i, "path": f"{i}_{kind}", "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "1_Pooling").mkdir()
    modes = {
        "word_embedding_dimension": 32,
        "pooling_mode_cls_token": False,
        "include_prompt": True,
        f"pooling_mode_{mode}": True,
    }
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    return directory


@pytest.mark.parametrize(("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls")])
@pytest.mark.parametrize("case", CASES)
def test_sentence_vectors(case, mode, pooling, tmp_path):
    loaded = bert.load(as_sentence_model(case, tmp_path / "model", mode), num_labels=0)
    want = load_file(DATA / case / "pooled.safetensors")[pooling]
    close(loaded.apply(loaded.variables, **inputs(case)), want)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    assert sorted(name.name for name in loaded.names.values()) == sorted(tensors) and loaded.labels == ()


@pytest.mark.parametrize("case", ["distilbert", "modernbert_mean", "roberta"])
def test_vectors_of_a_classifier(case):
    """What its head reads; adapters are for transformers' class without a head then."""
    loaded = bert.load(DATA / case / "base", num_labels=0)
    close(loaded.apply(loaded.variables, **inputs(case)), load_file(DATA / case / "pooled.safetensors")[loaded.config.pooling])
    assert loaded.names["params/embeddings/norm/scale"].name.startswith("embeddings.")


@pytest.mark.parametrize("case", ["distilbert", "modernbert"])
def test_sentence_vectors_of_length_1(case, tmp_path):
    loaded = bert.load(as_sentence_model(case, tmp_path / "model", "mean_tokens", "Normalize"), num_labels=0)
    mean = load_file(DATA / case / "pooled.safetensors")["mean"]
    close(loaded.apply(loaded.variables, **inputs(case)), mean / np.linalg.norm(mean, axis=1, keepdims=True))


@pytest.mark.parametrize("case", ["electra", "modernbert"])
def test_a_head_on_what_a_sentence_model_pools(case, tmp_path):
    loaded = bert.load(as_sentence_model(case, tmp_path / "model", "mean_tokens"), num_labels=2, seed=3)
    assert loaded.new == ("params/classifier/bias", "params/classifier/kernel")
    kernel = np.asarray(loaded.variables["params"]["classifier"]["kernel"])
    close(loaded.apply(loaded.variables, **inputs(case)), load_file(DATA / case / "pooled.safetensors")["mean"] @ kernel)


def test_a_sentence_model_that_goes_on_after_pooling(tmp_path):
    directory = as_sentence_model("roberta", tmp_path / "model", "mean_tokens", "Dense")
    with pytest.raises(ValueError, match=r"modules\.json: Transformer, Pooling and Normalize can be read, not Dense"):
        bert.load(directory)


# --- heads ------------------------------------------------------------------------------------------------------------

NEW = {
    "distilbert": ("classifier/dense", "classifier/out_proj"),
    "electra": ("classifier/dense", "classifier/out_proj"),
    "modernbert_mean": ("classifier/dense", "classifier/norm", "classifier/out_proj"),
    "roberta": ("classifier/dense", "classifier/out_proj"),
}
PRETRAINING = {
    "distilbert": "vocab_transform.weight",
    "electra": "discriminator_predictions.dense.weight",
    "modernbert_mean": "decoder.weight",
    "roberta": "lm_head.dense.weight",
}


@pytest.mark.parametrize("case", NEW)
def test_a_checkpoint_of_pretraining_gets_a_new_head(case, tmp_path):
    """Its own head is left unread."""
    directory = copied(case, tmp_path / "model")
    without_head(directory, case)
    rewrite(directory, lambda name: name, **{PRETRAINING[case]: np.zeros((2, 2), np.float32)})
    loaded = bert.load(directory, num_labels=5, seed=1)
    assert {path.removeprefix("params/").rpartition("/")[0] for path in loaded.new} == set(NEW[case])
    assert loaded.apply(loaded.variables, **inputs(case)).shape == (2, 5)
    head = loaded.variables["params"]["classifier"]
    assert all(float(jnp.std(head[name]["kernel"])) == pytest.approx(0.02, rel=0.4) for name in ("dense", "out_proj"))
    same, other = (bert.with_new_head(loaded, seed).variables["params"]["classifier"]["dense"]["kernel"] for seed in (1, 2))
    np.testing.assert_array_equal(same, head["dense"]["kernel"])
    assert float(jnp.abs(other - same).max()) > 0


@pytest.mark.parametrize("case", NEW)
def test_other_labels_leave_the_rest_of_the_head(case):
    loaded, kept = bert.load(DATA / case / "base", num_labels=7), bert.load(DATA / case / "base")
    assert loaded.new == ("params/classifier/out_proj/bias", "params/classifier/out_proj/kernel")
    ours, theirs = (model.variables["params"]["classifier"]["dense"]["kernel"] for model in (loaded, kept))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("case", ["distilbert", "modernbert", "roberta"])
def test_peft_saves_the_head_whole(case, tmp_path):
    """A classifier's adapters have all of the module `classifier`, which in RoBERTa has two layers."""
    loaded = bert.load(DATA / case / "base")
    config = lj.LoraConfig(rank=2, targets=["qkv" if case == "modernbert" else "query"], train=["out_proj"])
    adapters = lj.init(jax.random.key(0), config, loaded.apply, loaded.variables, **inputs(case))
    lj.peft.save(tmp_path, adapters, names=loaded.names, task_type="SEQ_CLS", variables=loaded.variables)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    whole = {"distilbert": ["classifier", "pre_classifier"]}.get(case, ["classifier"])
    assert fields["modules_to_save"] == whole
    written = {name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora" not in name}
    heads = [name.name for name in loaded.names.values() if name.name.startswith(tuple(f"{module}." for module in whole))]
    assert written == {f"base_model.model.{name}" for name in heads}
    again = lj.peft.load(tmp_path, loaded.variables, names=loaded.names)
    close(
        lj.lora(loaded.apply)(lj.attach(loaded.variables, again), **inputs(case)),
        np.asarray(lj.lora(loaded.apply)(lj.attach(loaded.variables, adapters), **inputs(case))),
    )


def test_peft_has_no_pair_in_a_head_that_it_saves_whole(tmp_path):
    loaded = bert.load(DATA / "roberta" / "base")
    adapters = lj.peft.load(DATA / "roberta" / "adapter", loaded.variables, names=loaded.names)
    with pytest.raises(ValueError, match="can't give a pair or rows to a module that it saves whole: params/classifier/dense"):
        lj.peft.save(tmp_path, adapters, names=loaded.names, task_type="SEQ_CLS", variables=loaded.variables)


# --- config.json ------------------------------------------------------------------------------------------------------

CHANGED = {
    "classifier_pooling": "mean",
    "id2label": {"0": "a"},
    "layer_types": ["full_attention"] * 4,
    "local_attention": 8,
    "max_position_embeddings": 5,
    "model_type": "bert",
    "rope_parameters": {"full_attention": {"rope_theta": 10.0}},
}
CHANGED |= dict.fromkeys(("hidden_act", "activation", "hidden_activation", "classifier_activation"), "relu")


def changed(name, value):
    """Another value that could stand there."""
    if name in CHANGED:
        return CHANGED[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return 0.1 if isinstance(value, float) else ["other"] if isinstance(value, list) else "other"


@pytest.mark.parametrize("case", ["distilbert", "electra", "modernbert", "roberta"])
def test_every_field_counts_or_is_listed(case, tmp_path):
    fields = json.loads((DATA / case / "base" / "config.json").read_text())
    family = encoder_families.FAMILIES[fields["model_type"]]
    read = {"model_type", "id2label"} | ({"pad_token_id"} if case == "roberta" else set())
    listed = fields.keys() & {*OF_NO_ACCOUNT, *family.ignored, "num_key_value_heads", "tie_word_embeddings"} - read
    others = bert.load(copied(case, tmp_path / "listed", **{name: changed(name, fields[name]) for name in listed}))
    close(others.apply(others.variables, **inputs(case)), expected(case)["base_output"])
    for name in fields.keys() - listed:
        gone = {"layer_types": None} if name == "global_attn_every_n_layers" else {}  # which say it otherwise
        directory = copied(case, tmp_path / name, **gone, **{name: changed(name, fields[name])})
        try:
            loaded = bert.load(directory)
            logits = loaded.apply(loaded.variables, **inputs(case))
        except ValueError:
            continue
        assert np.abs(logits - expected(case)["base_output"]).max() > 1e-4, name


@pytest.mark.parametrize("case", ["modernbert", "roberta"])
def test_unknown_fields(case, tmp_path):
    directory = copied(case, tmp_path / "model", head_dim=8, per_layer_config={"0": {}})
    with pytest.raises(
        ValueError, match=r"config\.json: it has fields that this loader does not know: head_dim \(8\), per_layer_con"
    ):
        bert.load(directory)


def test_modernbert_as_older_versions_write_it(tmp_path):
    old = {"rope_parameters": None, "layer_types": None, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    loaded = bert.load(copied("modernbert", tmp_path / "model", **old, layer_norm_eps=0.1))
    close(loaded.apply(loaded.variables, **inputs("modernbert")), expected("modernbert")["base_output"])


REFUSED = {
    "a decoder": ("roberta", {"is_decoder": True}, "is_decoder is True; only False can be read"),
    "no activation": ("distilbert", {"activation": "softmax"}, "activation 'softmax' is not one of gelu"),
    "no size": ("distilbert", {"dim": "32"}, "dim must be a positive whole number, not '32'"),
    "no flag": ("modernbert", {"norm_bias": 1}, "norm_bias must be true or false, not 1"),
    "no number": ("electra", {"layer_norm_eps": -1.0}, "layer_norm_eps must be a positive number, not -1.0"),
    "embedding size": ("electra", {"embedding_size": None}, "it lacks embedding_size"),
    "padding": ("roberta", {"pad_token_id": 127}, "pad_token_id must be a whole number below .* 127, not 127"),
    "pooling": ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling 'max' is not one of cls, mean"),
    "layers": (
        "modernbert",
        {"layer_types": ["full_attention"]},
        "layer_types must be 'full_attention' or 'sliding_attention'",
    ),
    "period": ("modernbert", {"layer_types": None, "global_attn_every_n_layers": 0}, "global_attn_every_n_layers must be"),
    "window": ("modernbert", {"local_attention": -2}, "local_attention must be a whole number, not -2"),
    "rotary scaling": (
        "modernbert",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}},
        "rope_parameters: full_attention has .*'yarn'.*; only the rope_type 'default' can be read",
    ),
    "rotary kinds": ("modernbert", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters must have an object for each of"),
    "no rotary settings": ("modernbert", {"rope_parameters": {"full_attention": 1e4}}, "rope_parameters must have an object"),
    "no list": ("roberta", {"hidden_act": ["relu"]}, r"hidden_act \['relu'\] is not one of gelu"),
    "no object": ("electra", {"id2label": ["a"]}, r"id2label must be an object, not \['a'\]"),
    "labels": ("distilbert", {"id2label": None, "num_labels": "3"}, "num_labels must be a whole number, not '3'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, tmp_path):
    case, changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"config.json: {message}"):
        bert.load(copied(case, tmp_path / "model", **changes))


def test_calls_that_do_not_fit():
    loaded = bert.load(DATA / "distilbert" / "base")
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="token_type_ids: a model of the type 'distilbert' has no token types: leave them out"):
        loaded.apply(loaded.variables, ids, token_type_ids=ids)
    loaded = bert.load(DATA / "roberta" / "base")
    with pytest.raises(ValueError, match="but the model has 127 positions: cut the texts"):
        loaded.apply(loaded.variables, jnp.ones((1, 128), jnp.int32))


# --- quantised, and on a mesh -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_quantised_as_it_is_read(case):
    got, dense = bert.load(DATA / case / "base", quantize="int8", block=8), bert.load(DATA / case / "base")
    jax.tree.map(
        np.testing.assert_array_equal, got.variables, lj.quantize(dense.variables, ["re:.*/layer_.*/kernel"], "int8", block=8)
    )
    leaves, _ = paths.flatten(got.variables)
    assert sum(map(paths.is_quantized, leaves.values())) == LINEAR.get(case, 6) * got.config.num_hidden_layers
    logits = lj.lora(got.apply)(got.variables, **inputs(case))
    close(logits, expected(case)["base_output"], 0.1)


@pytest.mark.parametrize("case", ["electra", "modernbert"])
def test_on_a_mesh(case):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    loaded = bert.load(DATA / case / "base", sharding=sharding.by_path(lambda tree: bert.shardings(mesh, tree)))
    kernel = loaded.variables["params"]["encoder"]["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "model")
    close(jax.jit(loaded.apply)(loaded.variables, **inputs(case)), expected(case)["base_output"])
