"""Models quantised while they are loaded: as `quantize` makes of the dense ones, without a dense one in memory."""

import json
import pathlib
import tracemalloc

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import lora_jax as lj
from lora_jax import sharding
from lora_jax.adapters import quant
from lora_jax.core import paths
from lora_jax.models import bert, llama, weights
from tests.support import tiny, tiny_lm
from tests.support.frontends import normal
from tests.support.gguf_write import write, write_family
from tests.support.marks import checkerboard, every_other

DATA = pathlib.Path(__file__).parents[1] / "data" / "families"
KERNELS = ["re:.*/layer.*/kernel"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tiny_lm.model(tmp_path_factory.mktemp("tiny") / "model", tie_word_embeddings=False)


def same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


KINDS = [("nf4", "float32"), ("nf4", "bfloat16"), ("int4", "float32"), ("int8", "bfloat16"), ("fp8", "float32")]


@pytest.mark.parametrize(
    ("kind", "dtype", "scan_layers"), every_other([(*kind, scan) for scan in (False, True) for kind in KINDS])
)
def test_as_the_dense_model_quantised(directory, kind, dtype, scan_layers):
    options = {"dtype": dtype, "scan_layers": scan_layers}
    got = llama.load(directory, quantize=kind, block=16, **options)
    same(got.variables, lj.quantize(llama.load(directory, **options).variables, KERNELS, kind, block=16))
    leaves, _ = paths.flatten(got.variables)
    quantized = {path for path, leaf in leaves.items() if paths.is_quantized(leaf)}
    assert len(quantized) == (7 if scan_layers else 14)
    assert not {"params/embed_tokens/embedding", "params/lm_head/kernel", "params/norm/scale"} & quantized


@pytest.mark.parametrize(("family", "scan_layers"), checkerboard(["mixtral", "qwen3_moe"], [False, True]))
def test_experts(family, scan_layers):
    """Some kernels are of several tensors in each slice: the gate and the up part of an expert, the experts of a layer."""
    base = DATA / family / "base"
    got = llama.load(base, quantize="nf4", block=8, scan_layers=scan_layers)
    dense = llama.load(base, scan_layers=scan_layers).variables
    same(got.variables, lj.quantize(dense, [weights.KERNELS], "nf4", block=8))


@pytest.mark.parametrize(("family", "scan_layers"), checkerboard(["mixtral", "qwen3_moe"], [True, False]))
def test_experts_of_a_gguf_file(tmp_path, family, scan_layers):
    file = write_family(tmp_path / "tiny.gguf", family)
    got = llama.load(file, quantize="int8", block=8, scan_layers=scan_layers)
    dense = llama.load(file, scan_layers=scan_layers).variables
    same(got.variables, lj.quantize(dense, [weights.KERNELS], "int8", block=8))


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_gguf_file(tmp_path, scan_layers):
    file = write(tmp_path / "tiny.gguf", "base", quantise=gguf.GGMLQuantizationType.Q8_0)
    got = llama.load(file, quantize="nf4", block=8, scan_layers=scan_layers)
    same(got.variables, lj.quantize(llama.load(file, scan_layers=scan_layers).variables, KERNELS, "nf4", block=8))


def test_a_bert(tmp_path):
    directory = tiny.model(tmp_path / "model")
    got = bert.load(directory, quantize="int8", block=4)
    same(got.variables, lj.quantize(bert.load(directory).variables, KERNELS, "int8", block=4))
    assert sum(map(paths.is_quantized, paths.flatten(got.variables)[0].values())) == 6 * got.config.num_hidden_layers


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("axes", [{"data": 2, "model": 4}, {"fsdp": 8}])
def test_on_a_mesh(directory, axes, scan_layers):
    mesh = sharding.make_mesh(axes)
    wanted = lambda variables: llama.shardings(mesh, variables)
    dense = llama.load(directory, scan_layers=scan_layers)
    places = paths.flatten(wanted(dense.variables))[0]
    got = llama.load(
        directory, scan_layers=scan_layers, sharding=lambda path, shape: places[path], quantize="nf4", block=16
    ).variables
    same(got, lj.quantize(dense.variables, KERNELS, "nf4", block=16))
    jax.tree.map(lambda leaf, place: None if leaf.sharding == place else pytest.fail(f"{leaf.sharding}"), got, wanted(got))


def test_no_dense_model_is_held(tmp_path):
    """Among numpy's buffers, of which dense parameters are made; JAX's own are not traced."""
    config = tiny_lm.sizes(hidden_size=256, intermediate_size=512, num_hidden_layers=16, head_dim=64)
    made = llama.init(config, jax.random.key(0))
    leaves, _ = paths.flatten(made.variables)
    tensors = {name.name: np.ascontiguousarray(name.export(np.asarray(leaves[path]))) for path, name in made.names.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(llama.hf_config(config)))
    for scan_layers in (False, True):
        llama.load(tmp_path, scan_layers=scan_layers, quantize="int8")  # what is imported and traced once is no parameter
        tracemalloc.start()
        llama.load(tmp_path, scan_layers=scan_layers, quantize="int8")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < sum(leaf.nbytes for leaf in jax.tree.leaves(made.variables)) / 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, "quantize must be one of 'nf4', 'int4', 'int8', 'fp8', not 'int3'"),
        ({"block": 32}, "block is for a quantised base: leave it out, or say how to quantise"),
        ({"quantize": "nf4", "block": 5}, r"block: no axis of params/layer_0/self_attn/q_proj/kernel of the shape \(32, 32\)"),
    ],
)
def test_bad_requests(directory, options, message):
    with pytest.raises(ValueError, match=message):
        llama.load(directory, **options)


@pytest.mark.parametrize("spec", [jax.P("data", "model"), jax.P(None, ("data", "model")), jax.P(("model", "data"))])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_shards_round_their_own_blocks(kind, spec):
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    kernel = normal(0, 128, 64)
    shards = jax.device_put(kernel, jax.NamedSharding(mesh, spec))
    compiled = jax.jit(lambda w: quant.rounded(w, kind, 0, 16)).lower(shards).compile().as_text()
    assert "all-" not in compiled
    found = lj.quantize({"w": shards}, ["w"], kind, block=16)
    same(found, lj.quantize({"w": kernel}, ["w"], kind, block=16))
    assert found["w"].qvalue.sharding == found["w"].scale.sharding == shards.sharding


def test_blocks_that_shards_cut():
    mesh = sharding.make_mesh({"data": 2, "model": 4})
    kernel = normal(0, 64, 32)
    shards = jax.device_put(kernel, jax.NamedSharding(mesh, jax.P("model", "data")))
    found = lj.quantize({"w": shards}, ["w"], "nf4", block=32)["w"]
    same(found, lj.quantize({"w": kernel}, ["w"], "nf4", block=32)["w"])
    assert found.qvalue.sharding == shards.sharding
    assert found.scale.sharding.is_equivalent_to(jax.NamedSharding(mesh, jax.P(None, "data")), 2)
