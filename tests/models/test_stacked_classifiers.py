"""Encoders and vision models with scanned layers, or with some of them computed again: the same as one by one."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax import sharding
from lora_jax.core import paths
from lora_jax.models import bert, vision
from lora_jax.models.encoder import Encoder
from lora_jax.models.vision_encoder import VisionEncoder
from lora_jax.planning.flops import dot_flops
from tests.support.identity import distance
from tests.support.marks import slow_unless

DATA = pathlib.Path(__file__).parents[1] / "data"
CASES = {name: (bert, DATA / "families" / name) for name in ("distilbert", "electra", "modernbert", "roberta")}
CASES |= {name: (vision, DATA / "families" / name) for name in ("dinov2_gated", "vit")}
FORMS = {
    "remat": {"remat": "full"},
    "scanned": {"scan_layers": True},
    "both": {"scan_layers": True, "remat": "products"},
}
FAST = {("modernbert", "both"), ("vit", "scanned")}
STACKED = [*((case, "both") for case in CASES), ("modernbert", "remat"), ("roberta", "scanned"), ("vit", "scanned")]


def load(case, **options):
    module, directory = CASES[case]
    return module.load(directory / "base", **options)


@functools.cache
def inputs(case):
    stored = load_file(CASES[case][1] / "inputs.safetensors")
    if "pixel_values" in stored:
        return {"pixel_values": stored["pixel_values"].transpose(0, 2, 3, 1)}
    return {name: array.astype(np.int32) for name, array in stored.items()}


def by_tensor(loaded, gradient):
    """The gradient by the names of Hugging Face's tensors, but for biases of keys: a softmax takes no notice of them."""
    leaves, _ = paths.flatten(gradient)
    return {tensor: name.export(leaves[path], index) for path, name in loaded.names.items() if not path.endswith("key/bias")
            for index, tensor in name.tensors(leaves[path].shape).items()}  # fmt: skip


def saved(directory, adapters, loaded):
    lj.peft.save(directory, adapters, names=loaded.names)
    return load_file(directory / "adapter_model.safetensors")


def result(case, options, directory):
    """Logits, the gradient of the weights, and with PEFT's adapters these, the logits and the adapters' gradient."""
    loaded = load(case, **options)
    adapters = lj.peft.load(CASES[case][1] / "adapter", loaded.variables, names=loaded.names)

    def loss(apply, params):
        logits = apply(params, **inputs(case))
        return jnp.sum(jnp.sin(3.0 * logits)), logits

    plain = jax.jit(jax.grad(functools.partial(loss, loaded.apply), has_aux=True))
    attach = functools.partial(lj.attach, loaded.variables)
    adapted = jax.jit(jax.grad(lambda adapters: loss(lj.lora(loaded.apply), attach(adapters)), has_aux=True))
    gradient, logits = plain(loaded.variables)
    moves, outputs = adapted(adapters)
    values = logits, outputs, by_tensor(loaded, gradient), saved(directory / "moves", moves, loaded)
    return values, saved(directory / "adapters", adapters, loaded)


@functools.cache
def one_by_one(case, directory):
    return result(case, {}, directory)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return tmp_path_factory.mktemp("one_by_one")


@pytest.mark.parametrize(("case", "form"), slow_unless(lambda pair: pair in FAST, STACKED))
def test_the_same_values_gradients_and_files(case, form, once, tmp_path):
    (want, theirs), (got, ours) = one_by_one(case, once / case), result(case, FORMS[form], tmp_path)
    for a, b in zip(got, want):
        assert jax.tree.structure(a) == jax.tree.structure(b) and distance(a, b) < 1e-5
    stored = load_file(CASES[case][1] / "adapter" / "adapter_model.safetensors")
    for tensors in (ours, theirs):
        assert {name: x.tobytes() for name, x in tensors.items()} == {name: x.tobytes() for name, x in stored.items()}


def test_names_of_a_stack():
    """Of ModernBERT's layers without the first, which has no norm before attention."""
    loaded = load("modernbert", scan_layers=True)
    layers = loaded.variables["params"]["encoder"]
    assert layers.keys() == {"layer_0", "layers", "norm"} and "norm" not in layers["layer_0"]["attention"]
    assert loaded.names["params/encoder/layers/mlp/up/kernel"].name == "model.layers.{l:1|2|3}.mlp.Wi.weight"
    assert layers["layers"]["mlp"]["up"]["kernel"].shape == (3, 32, 96)
    assert bert.hf_names(loaded.config, scan_layers=True) == loaded.names
    vit = load("vit", scan_layers=True)
    assert vit.names["params/encoder/layers/mlp/up/kernel"].name == "vit.layers.{l}.mlp.fc1.weight"
    names = vision.file_names(vit.names, vit.config)
    assert names["params/encoder/layers/mlp/up/kernel"].name == "vit.encoder.layer.{l}.intermediate.dense.weight"


def layers_alone(case, **options):
    """The encoder without what comes before and after it, its parameters and inputs."""
    loaded, x = load(case, **options), jnp.ones((2, 16, 32))
    params, last = {"params": loaded.variables["params"]["encoder"]}, (options["scan_layers"], options["remat"])
    if case == "vit":
        return VisionEncoder(loaded.config, jnp.float32, *last), params, (x,)
    return Encoder(loaded.config, jnp.float32, *last), params, (x, jnp.ones((2, 1, 1, 16), bool), jnp.arange(16)[None])


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", ["modernbert", "vit"])
def test_what_is_computed_again(case, scan_layers):
    """Nothing, no product with a weight but attention's own, or all products."""

    def flops(remat):
        model, params, given = layers_alone(case, scan_layers=scan_layers, remat=remat)
        adapters = lj.init(jax.random.key(0), lj.LoraConfig(rank=2), model.apply, params, *given)
        loss = lambda params: jnp.sum(lj.lora(model.apply)(params, *given))
        return dot_flops(jax.make_jaxpr(jax.grad(loss))(lj.attach(params, adapters)))

    none, products, full = map(flops, (None, "products", "full"))
    config = load(case).config
    scores = 2 * 2 * config.num_hidden_layers * config.num_attention_heads * 16 * 16 * config.head_dim * 2
    assert none < products <= none + scores < full


@pytest.mark.parametrize("case", ["modernbert", "vit"])
def test_scanned_on_a_mesh_and_quantised(case):
    mesh = sharding.make_mesh({"fsdp": 2, "model": 2}, jax.devices()[:4])
    place = sharding.by_path(functools.partial(CASES[case][0].shardings, mesh))
    options = {"quantize": "int8", "block": 8, "sharding": place}
    one, several = load(case, **options), load(case, scan_layers=True, **options)
    assert several.variables["params"]["encoder"]["layers"]["mlp"]["up"]["kernel"].qvalue.sharding.spec[0] is None
    ours, theirs = (jax.jit(lj.lora(model.apply))(model.variables, **inputs(case)) for model in (several, one))
    assert distance(ours, theirs) < 1e-5


def test_a_new_head_beside_a_stack():
    one, several = (load("modernbert", scan_layers=scan, num_labels=7, seed=2) for scan in (False, True))
    assert several.new == one.new != ()
    ours, theirs = (np.asarray(model.variables["params"]["classifier"]["out_proj"]["kernel"]) for model in (several, one))
    np.testing.assert_array_equal(ours, theirs)
