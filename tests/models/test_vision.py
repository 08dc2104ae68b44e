"""The vision models against logits that transformers and PEFT gave, and the loader's errors."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.models import vision
from lora_jax.models.vision_config import FAMILIES, read_config

DATA = pathlib.Path(__file__).parents[1] / "data" / "families"
CASES = ["vit", "dinov2", "dinov2_gated"]
EXPECTED = {case: load_file(DATA / case / "expected.safetensors") for case in CASES}
# In files as old as the models, and in transformers' memory.
OLD_AND_NEW = {
    "vit": ("vit.encoder.layer.0.attention.attention.query.weight", "vit.layers.0.attention.q_proj.weight"),
    "dinov2": ("dinov2.encoder.layer.1.attention.output.dense.bias", "dinov2.encoder.layer.1.attention.o_proj.bias"),
    "dinov2_gated": ("dinov2.encoder.layer.1.mlp.weights_in.weight", "dinov2.encoder.layer.1.mlp.up_proj.weight"),
}


def pixels(case):
    return jnp.asarray(load_file(DATA / case / "inputs.safetensors")["pixel_values"]).transpose(0, 2, 3, 1)


def base(case, **options):
    return vision.load(DATA / case / "base", **options)


def adapted(case):
    loaded = base(case)
    return loaded, lj.peft.load(DATA / case / "adapter", loaded.variables, names=loaded.names)


def close(found, expected, tolerance=1e-5):
    found, expected = np.asarray(found, np.float32), np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture
def model(tmp_path, request):
    """A writable copy of a case's directory."""
    shutil.copytree(DATA / getattr(request, "param", "vit") / "base", tmp_path / "model")
    return tmp_path / "model"


def rewrite(directory, tensors):
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, directory / "model.safetensors")


def configure(directory, **changes):
    fields = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    loaded = base(case)
    close(loaded.apply(loaded.variables, pixels(case)), EXPECTED[case]["base_output"])
    assert loaded.new == () and loaded.labels == tuple(f"LABEL_{i}" for i in range(loaded.config.num_labels))


@pytest.mark.parametrize("case", CASES)
def test_adapted_logits_are_those_of_peft(case):
    loaded, adapters = adapted(case)
    found = lj.lora(loaded.apply)(lj.attach(loaded.variables, adapters), pixels(case))
    close(found, EXPECTED[case]["output"])
    assert np.abs(np.asarray(found) - EXPECTED[case]["base_output"]).max() > 0.1
    close(loaded.apply(lj.merge(loaded.variables, adapters), pixels(case)), EXPECTED[case]["output"])


@pytest.mark.parametrize("case", CASES)
def test_adapters_are_written_as_they_were(case, tmp_path):
    loaded, adapters = adapted(case)
    lj.peft.save(tmp_path / "adapter", adapters, names=loaded.names)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "adapter", DATA / case / "adapter"))
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)


@pytest.mark.parametrize("case", ["vit", "dinov2"])
def test_adapters_of_transformers_4(case, tmp_path):
    loaded, adapters = adapted(case)
    lj.peft.save(tmp_path / "adapter", adapters, names=vision.file_names(loaded.names, loaded.config))
    older = {
        "vit": "vit.encoder.layer.1.attention.attention.query",
        "dinov2": "dinov2.encoder.layer.1.attention.attention.query",
    }
    assert f"base_model.model.{older[case]}.lora_A.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    again = lj.peft.load(tmp_path / "adapter", loaded.variables, names=vision.file_names(loaded.names, loaded.config))
    found = lj.lora(loaded.apply)(lj.attach(loaded.variables, again), pixels(case))
    close(found, EXPECTED[case]["output"])


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_merged_weights(case):
    loaded, adapters = adapted(case)
    labels = jnp.arange(2)

    def loss(logits):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).sum()

    def low_rank(adapters):
        return loss(lj.lora(loaded.apply)(lj.attach(loaded.variables, adapters), pixels(case)))

    def merged(adapters):
        return loss(loaded.apply(lj.merge(loaded.variables, adapters), pixels(case)))

    ours, theirs = (jax.tree.leaves(jax.jit(jax.grad(f))(adapters)) for f in (low_rank, merged))
    assert len(ours) >= 2 * len(adapters)
    for a, b in zip(ours, theirs):
        close(a, b, 1e-4)
        assert np.abs(np.asarray(b)).max() > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_bfloat16(case, lenient):
    loaded = base(case, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(loaded.variables)} == {"bfloat16"}
    found = loaded.apply(loaded.variables, pixels(case))
    assert found.dtype == jnp.bfloat16
    close(found, EXPECTED[case]["base_output"], 2e-2)


@pytest.mark.parametrize("case", ["vit", "dinov2"])
def test_positions_are_interpolated_for_other_sizes(case):
    loaded, stored = base(case), load_file(DATA / case / "sizes.safetensors")
    sizes = {name.split(".")[0] for name in stored}
    assert len(sizes) == 3
    for size in sizes:
        images = jnp.asarray(stored[f"{size}.input"]).transpose(0, 2, 3, 1)
        close(loaded.apply(loaded.variables, images), stored[f"{size}.output"])


@pytest.mark.parametrize(("model", "case"), [(case, case) for case in CASES], indirect=["model"])
def test_both_spellings_of_names_are_read(model, case):
    old, new = OLD_AND_NEW[case]
    loaded = base(case)
    assert old in load_file(model / "model.safetensors")
    assert new in {name.name for name in loaded.names.values()}
    leaves, _ = paths.flatten(loaded.variables)
    assert set(leaves) == set(loaded.names)
    rewrite(model, {name.name: name.export(np.asarray(leaves[path])) for path, name in loaded.names.items()})
    again = vision.load(model)
    for path, leaf in paths.flatten(again.variables)[0].items():
        np.testing.assert_array_equal(leaf, leaves[path])


@pytest.mark.parametrize(("model", "case"), [("vit", "vit"), ("dinov2", "dinov2")], indirect=["model"])
def test_an_encoder_alone_gets_a_head(model, case):
    tensors = {
        n.removeprefix(f"{case}."): t for n, t in load_file(model / "model.safetensors").items() if "classifier" not in n
    }
    rewrite(model, tensors | {"pooler.dense.weight": np.ones((32, 32)), "pooler.dense.bias": np.ones(32)})
    heads = [vision.load(model, num_labels=2, seed=seed) for seed in (0, 0, 1)]
    assert heads[0].new == ("params/classifier/kernel", "params/classifier/bias")
    assert heads[0].labels == ("LABEL_0", "LABEL_1")
    logits = [head.apply(head.variables, pixels(case)) for head in heads]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert logits[0].shape == (2, 2) and jnp.abs(logits[0] - logits[2]).max() > 0
    np.testing.assert_array_equal(vision.with_new_head(heads[0], 1).apply(heads[2].variables, pixels(case)), logits[2])
    kernel = vision.with_new_head(heads[0], 1).variables["params"]["classifier"]["kernel"]
    np.testing.assert_array_equal(kernel, heads[2].variables["params"]["classifier"]["kernel"])
    configure(model, initializer_range=0.04)
    wider = vision.load(model, num_labels=2, seed=1).variables["params"]["classifier"]["kernel"]
    np.testing.assert_allclose(wider, 2 * kernel, rtol=1e-6)


def test_what_takes_a_pair():
    loaded = base("dinov2_gated")
    adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), loaded.apply, loaded.variables, pixels("dinov2_gated"))
    assert set(adapters) == {path for path in loaded.names if path.endswith("/kernel")}
    in_attention = lj.LoraConfig(rank=2, targets="attention")
    few = lj.init(jax.random.key(0), in_attention, loaded.apply, loaded.variables, pixels("dinov2_gated"))
    assert set(few) == {path for path in adapters if "/attention/" in path}


def test_quantised_kernels():
    loaded = base("dinov2_gated", quantize="int8", block=8)
    some = {path for path, leaf in paths.flatten(loaded.variables)[0].items() if paths.is_quantized(leaf)}
    assert some == {path for path in loaded.names if path.endswith("/kernel") and "/layer_" in path}
    close(lj.lora(loaded.apply)(loaded.variables, pixels("dinov2_gated")), EXPECTED["dinov2_gated"]["base_output"], 0.05)


def test_on_a_mesh():
    mesh = lj.sharding.make_mesh({"fsdp": 2, "model": 2}, jax.devices()[:4])
    place = lj.sharding.by_path(lambda tree: vision.shardings(mesh, tree))
    loaded = base("dinov2", sharding=place)
    layer = loaded.variables["params"]["encoder"]["layer_0"]
    assert layer["mlp"]["up"]["kernel"].sharding.spec == jax.P("fsdp", "model")
    assert layer["attention"]["out"]["kernel"].sharding.spec == jax.P("model", "fsdp")
    close(jax.jit(loaded.apply)(loaded.variables, pixels("dinov2")), EXPECTED["dinov2"]["base_output"])


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        (
            (2, 3, 16, 16),
            jnp.float32,
            r"shape \(2, 3, 16, 16\); it must be \(batch, height, width, 3\) of 4 x 4 pixels or more",
        ),
        ((16, 16, 3), jnp.float32, r"pixel_values has the shape \(16, 16, 3\)"),
        ((2, 3, 16, 3), jnp.float32, r"of 4 x 4 pixels or more"),
        ((2, 16, 16, 3), jnp.uint8, "the dtype uint8; it must be floats"),
    ],
)
def test_bad_pixels(shape, dtype, message):
    loaded = base("vit")
    with pytest.raises(lj.InputError, match=message):
        loaded.apply(loaded.variables, jnp.zeros(shape, dtype))


def test_oblong_models_have_one_size(model):
    configure(model, image_size=[8, 32])
    loaded = vision.load(model)
    assert loaded.config.grid == (2, 8)
    assert loaded.apply(loaded.variables, jnp.zeros((1, 8, 32, 3))).shape == (1, 5)
    with pytest.raises(lj.InputError, match="the positions of 2 x 8 patches can't be interpolated"):
        loaded.apply(loaded.variables, jnp.zeros((1, 16, 16, 3)))


# --- config.json ------------------------------------------------------------------------------------------------------

# What another value of a field does: an error that says so, or (None) other logits.
COMMON = {
    "model_type": ("deit", "the model_type is 'deit'; this loader reads 'vit', 'dinov2'"),
    "hidden_size": (40, "has the shape"),
    "num_hidden_layers": (1, "has unexpected tensors"),
    "num_attention_heads": (2, None),
    "head_dim": (4, "has the shape"),
    "hidden_act": ("relu", None),
    "layer_norm_eps": (0.1, None),
    "patch_size": (3, "has the shape"),
    "num_channels": (1, "has the shape"),
    "qkv_bias": (False, "has unexpected tensors"),
    "id2label": ({"0": "cat", "1": "dog"}, "classifier.bias has the shape"),
    "is_decoder": (True, "is_decoder is True; only False can be read"),
    "is_encoder_decoder": (True, "is_encoder_decoder is True"),
    "add_cross_attention": (True, "add_cross_attention is True"),
    "pruned_heads": ({"0": [1]}, "pruned_heads is"),
    "rope_theta": (100.0, "it has fields that this loader does not know: rope_theta .*may change what the model computes"),
}
CHANGES = {
    "vit": COMMON | {"image_size": (24, "has the shape"), "intermediate_size": (40, "has the shape")},
    "dinov2": COMMON
    | {
        "image_size": ([28, 7], "image_size must be square"),
        "mlp_ratio": (3, "has the shape"),
        "use_swiglu_ffn": (True, "lacks the tensors dinov2.encoder.layer.0.mlp.down_proj"),
    },
}
# Of no account for the logits in transformers, either; `initializer_range` is for new heads, `num_labels` for files without labels.
IDLE = {
    "vit": {"encoder_stride", "pooler_act", "pooler_output_size"},
    "dinov2": {"layerscale_value", "use_mask_token", "drop_path_rate", "out_features", "out_indices", "stage_names"}
    | {"apply_layernorm", "reshape_hidden_states"},
}
IDLE_IN_ALL = {"architectures", "dtype", "transformers_version", "label2id", "initializer_range", "num_labels"}
IDLE_IN_ALL |= {"hidden_dropout_prob", "attention_probs_dropout_prob"}


@pytest.mark.parametrize(
    ("model", "field", "value", "message"),
    [(case, field, *change) for case in CHANGES for field, change in CHANGES[case].items()],
    indirect=["model"],
)
def test_every_field_is_honoured_or_refused(model, request, field, value, message):
    case = request.node.callspec.params["model"]
    configure(model, **{field: value})
    if message is None:
        loaded = vision.load(model)
        found = loaded.apply(loaded.variables, pixels(case))
        assert np.abs(np.asarray(found) - EXPECTED[case]["base_output"]).max() > 1e-3
    else:
        with pytest.raises(lj.InputError, match=message):
            vision.load(model)


@pytest.mark.parametrize("case", CHANGES)
def test_no_field_is_forgotten(case):
    fields = set(json.loads((DATA / case / "base" / "config.json").read_text()))
    assert fields - set(CHANGES[case]) <= IDLE[case] | IDLE_IN_ALL
    assert set(FAMILIES[case].ignored) == IDLE[case]
    assert set(FAMILIES[case].defaults) <= set(CHANGES[case])


@pytest.mark.parametrize(("model", "case"), [("vit", "vit"), ("dinov2", "dinov2")], indirect=["model"])
def test_idle_fields_change_nothing(model, case):
    configure(model, **dict.fromkeys(IDLE[case] | {"hidden_dropout_prob"}, 7))
    loaded = vision.load(model)
    close(loaded.apply(loaded.variables, pixels(case)), EXPECTED[case]["base_output"])


def test_what_is_left_out_is_what_transformers_has():
    vit, dinov2 = (read_config({"model_type": family}) for family in ("vit", "dinov2"))
    assert (vit.patch_size, vit.grid, vit.intermediate_size, vit.layer_norm_eps) == ((16, 16), (14, 14), 3072, 1e-12)
    assert (dinov2.patch_size, dinov2.grid, dinov2.intermediate_size, dinov2.layer_norm_eps) == ((14, 14), (16, 16), 3072, 1e-6)
    giant = {"hidden_size": 1536, "num_attention_heads": 24, "use_swiglu_ffn": True}
    assert read_config({"model_type": "dinov2", **giant}).intermediate_size == 4096
    assert read_config({"model_type": "vit", "num_labels": 7}).num_labels == 7


BAD = {
    "zero layers": ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive whole number, not 0"),
    "a flag as a number": ({"hidden_size": True}, "hidden_size must be a positive whole number, not True"),
    "a number as a flag": ({"qkv_bias": 1}, "qkv_bias must be true or false, not 1"),
    "a text as a number": ({"layer_norm_eps": "1e-6"}, "layer_norm_eps must be a positive number, not '1e-6'"),
    "three sizes": ({"image_size": [4, 4, 4]}, "image_size must be a positive whole number or two of them"),
    "a large patch": ({"patch_size": 32}, r"patch_size \(32, 32\) is larger than the image_size \(16, 16\)"),
    "an activation": ({"hidden_act": "softmax"}, "hidden_act 'softmax' is not one of gelu, gelu_accurate"),
    "a list of labels": ({"id2label": ["cat"]}, "id2label must be an object"),
    "more heads than sizes": ({"num_attention_heads": 64}, "head_dim must be a positive whole number, not 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_config(model, case):
    changes, message = BAD[case]
    configure(model, **changes)
    with pytest.raises(lj.InputError, match=rf"config\.json: .*{message}"):
        vision.load(model)


def test_bad_tensors(model):
    tensors = load_file(model / "model.safetensors")
    rewrite(model, {name: tensor for name, tensor in tensors.items() if "cls_token" not in name})
    with pytest.raises(lj.InputError, match=r"lacks the tensors vit\.embeddings\.cls_token"):
        vision.load(model)
    rewrite(model, tensors | {"vit.layers.0.attention.q_proj.weight": np.zeros((32, 32), np.float32)})
    with pytest.raises(lj.InputError, match=r"has two tensors for vit\.layers\.0\.attention\.q_proj\.weight"):
        vision.load(model)
