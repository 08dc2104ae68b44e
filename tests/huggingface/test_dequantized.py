"""Quantised checkpoints of the hub, against values of encoders written from each format's specification."""

import json
import tracemalloc

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.huggingface.dequantized import open_tensors
from lora_jax.models import llama
from tests.support import quantized_files as files
from tests.support import tiny_lm


def check(packed, dense, rtol=0.0):
    """All rows, some rows, the model."""
    got, want = open_tensors(packed), open_tensors(dense)
    assert got.shapes == want.shapes
    for name, shape in want.shapes.items():
        np.testing.assert_allclose(got.read(name), want.read(name), rtol=rtol, atol=0, err_msg=name)
        for rows in (slice(1, 2), slice(3, shape[0] - 1), slice(shape[0] - 3, None), slice(5, 5)):
            np.testing.assert_array_equal(got.read(name, rows), got.read(name)[rows], err_msg=f"{name} {rows}")
    got, want = (lj.models.load(directory, scan_layers=True).variables for directory in (packed, dense))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=0), got, want)


def change(directory, **fields):
    file = directory / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"quantization_config": config["quantization_config"] | fields}))


def refused(directory, says):
    with pytest.raises(lj.InputError, match=says):
        open_tensors(directory)


def write(directory, tensors, **config):
    directory.mkdir(exist_ok=True)
    files.save(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps({"quantization_config": config}))
    return directory


# --- fp8 --------------------------------------------------------------------------------------------------------------


def fp8(directory, size=(8, 4), scale_type="float32", **more):
    def encode(name, weight):
        codes, scales, values = files.fp8(weight, size, scale_type)
        inputs = {} if more.get("activation_scheme") != "static" else {name[:-6] + "activation_scale": np.ones((), np.float32)}
        return {name: codes, f"{name}_scale_inv": scales, **inputs}, values

    config = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(size)}
    return files.model(directory, encode, config | more)


@pytest.mark.parametrize("size", [(8, 4), (5, 7), (128, 128)])
@pytest.mark.parametrize("scale_type", ["float32", "ue8m0"])
def test_fp8(tmp_path, size, scale_type):
    check(*fp8(tmp_path, size, scale_type))


def test_fp8_with_a_scale_for_a_tensor(tmp_path):
    def encode(name, weight):
        codes, scales, values = files.fp8(weight, weight.shape)
        return {name: codes, f"{name}_scale_inv": scales.reshape(())}, values

    check(*files.model(tmp_path, encode, {"quant_method": "fp8", "weight_block_size": None}))


def test_fp8_with_scales_of_inputs(tmp_path):
    check(*fp8(tmp_path, activation_scheme="static", modules_to_not_convert=["lm_head"]))


def test_fp8_experts_in_a_stack(tmp_path):
    stack = np.random.default_rng(0).normal(size=(3, 9, 6)).astype(np.float32)
    parts = [files.fp8(weight, (4, 4)) for weight in stack]
    codes, scales, values = (np.stack([one[i][0] if i == 0 else one[i] for one in parts]) for i in range(3))
    files.save(tmp_path / "model.safetensors", {"e.up": (codes, "F8_E4M3"), "e.up_scale_inv": scales})
    config = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    got = open_tensors(tmp_path)
    assert got.shapes == {"e.up": (3, 9, 6)}
    np.testing.assert_array_equal(got.read("e.up", slice(1, 3)), values[1:])


def test_every_byte_of_fp8(tmp_path):
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    scales = np.ones((1, 1), np.float32)
    files.save(tmp_path / "model.safetensors", {"w": (codes, "F8_E4M3"), "w_scale_inv": scales})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "fp8"}}))
    np.testing.assert_array_equal(open_tensors(tmp_path).read("w"), files.e4m3().reshape(16, 16))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"weight_block_size": [4, 4]}, r"weight_block_size \[4, 4\] does not cut model.layers.0.*_proj.weight \(.*\) into"),
        ({"weight_block_size": None}, "weight_block_size None does not cut"),
        ({"fmt": "e5m2"}, "config.json: quantization_config: its fmt is 'e5m2'; 'e4m3' can be read"),
        ({"expert_dtype": "fp4"}, "its expert_dtype is 'fp4'; 'fp8' can be read"),
        ({"rotation": "hadamard"}, "it has the field rotation, of which is not known what it changes"),
        ({"quant_method": "hqq"}, "the quant_method is 'hqq'; 'fp8'.* can be read: dequantise the checkpoint"),
        ({"quant_method": None}, "the quant_method is None"),
    ],
)
def test_what_is_not_read(tmp_path, fields, says):
    packed, _ = fp8(tmp_path)
    change(packed, **fields)
    refused(packed, says)


def test_weights_that_are_dense(tmp_path):
    _, dense = fp8(tmp_path)
    fields = json.loads((dense / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (dense / "config.json").write_text(json.dumps(fields))
    refused(dense, "no tensor is stored as 'fp8' has them: remove quantization_config if the weights are dense")


def test_scales_of_no_floats(tmp_path):
    tensors = {"w": (np.zeros((2, 2), np.uint8), "F8_E4M3"), "w_scale_inv": np.ones((1, 1), np.int32)}
    refused(
        write(tmp_path, tensors, quant_method="fp8"), "w_scale_inv must be .* F8_E8M0 or U8, but is of the shape .* and I32"
    )


def test_scales_without_values(tmp_path):
    _, dense = fp8(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = files.load_file(dense / "model.safetensors") | {f"{name}_scale_inv": np.ones((1, 1), np.float32)}
    files.save(dense / "model.safetensors", tensors)
    fields = json.loads((dense / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (dense / "config.json").write_text(json.dumps(fields))
    refused(dense, f"there is {name}_scale_inv, but {name} is stored as F32, where F8_E4M3 is needed")


# --- mxfp4 ------------------------------------------------------------------------------------------------------------


def test_mxfp4(tmp_path):
    draw = np.random.default_rng(0)
    up, down = (
        draw.normal(scale=10.0**-i, size=shape).astype(np.float32) for i, shape in enumerate([(3, 64, 10), (3, 32, 64)])
    )
    bias, want = draw.normal(size=(3, 10)).astype(np.float32), {}
    stored = {"e.gate_up_proj_bias": bias}
    for name, weight in {"e.gate_up_proj": up, "e.down_proj": down}.items():
        stored[f"{name}_blocks"], stored[f"{name}_scales"], want[name] = files.mxfp4(weight)
        assert np.linalg.norm(want[name] - weight) < 0.2 * np.linalg.norm(weight)
    got = open_tensors(write(tmp_path, stored, quant_method="mxfp4", modules_to_not_convert=["lm_head"]))
    assert got.shapes == {"e.gate_up_proj_bias": (3, 10), "e.gate_up_proj": (3, 64, 10), "e.down_proj": (3, 32, 64)}
    np.testing.assert_array_equal(got.read("e.gate_up_proj_bias"), bias)
    for name, values in want.items():
        np.testing.assert_array_equal(got.read(name), values)
        np.testing.assert_array_equal(got.read(name, slice(1, 3)), values[1:])


def test_every_code_and_exponent_of_mxfp4(tmp_path):
    blocks = np.arange(16, dtype=np.uint8) * 17  # each code twice
    exponents = np.arange(1, 253, dtype=np.uint8)  # in the range of normal float32s
    stored = {"x_blocks": np.tile(blocks, (1, 1, 252, 1)), "x_scales": exponents.reshape(1, 1, 252)}
    got = open_tensors(write(tmp_path, stored, quant_method="mxfp4")).read("x")
    want = np.repeat([files.e2m1(code) for code in range(16)], 2) * 2.0 ** (exponents.astype(float)[:, None] - 127)
    np.testing.assert_array_equal(got, want.reshape(1, -1, 1).astype(np.float32))


def test_mxfp4_of_another_layout(tmp_path):
    stored = {"x_blocks": np.zeros((2, 4, 3, 8), np.uint8), "x_scales": np.zeros((2, 4, 3), np.uint8)}
    refused(write(tmp_path, stored, quant_method="mxfp4"), r"x_blocks must be of the shape \(2, 4, 3, 16\) and U8")
    stored = {"x_blocks": np.zeros((2, 4, 3, 16), np.uint8)}
    refused(write(tmp_path, stored, quant_method="mxfp4"), "x_scales must be of the shape .* but is missing")
    stored = {"x_blocks": np.zeros((4, 3, 16), np.uint8)}
    refused(write(tmp_path, stored, quant_method="mxfp4"), r"has the shape \(4, 3, 16\), where \(experts, out, blocks, 16\)")


# --- bitsandbytes -----------------------------------------------------------------------------------------------------

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "llm_int8_threshold": 6.0}


@pytest.mark.parametrize(
    ("block", "options"),
    [
        (16, {}),
        (64, {"nested_block": 8}),
        (64, {"kind": "fp4"}),
        (36, {"nested_block": 5}),  # across rows, with a last block that is not full
        (16, {"storage": "int32"}),
    ],
)
def test_four_bits(tmp_path, block, options):
    encode = lambda name, weight: files.four_bits(name, weight, block, **options)
    check(*files.model(tmp_path, encode, BNB), rtol=1e-6)


def test_eight_bits(tmp_path):
    check(*files.model(tmp_path, files.eight_bits, {"quant_method": "bitsandbytes", "load_in_8bit": True}), rtol=1e-6)


def test_nf4_is_rounded_to_the_codes_and_scales_that_it_was_stored_with(tmp_path):
    """So that a quantised base is the file's own, with one kernel dense at a time."""
    encode = lambda name, weight: files.four_bits(name, weight, 16)
    packed, _ = files.model(tmp_path, encode, BNB)
    loaded = lj.models.load(packed, quantize="nf4", block=16)
    tensors = files.load_file(packed / "model.safetensors")
    leaves, _ = paths.flatten(loaded.variables)
    kernels = {path: leaf for path, leaf in leaves.items() if paths.is_quantized(leaf)}
    assert len(kernels) == 21
    for path, leaf in kernels.items():
        name = loaded.names[path].name
        pairs = tensors[name]
        codes = np.concatenate([pairs >> 4, pairs & 15], -1).reshape(leaf.shape[::-1])
        np.testing.assert_array_equal(np.asarray(leaf.qvalue).astype(np.uint8), codes.T)
        np.testing.assert_array_equal(leaf.scale, tensors[f"{name}.absmax"].reshape(leaf.shape[1], -1).T)


@pytest.mark.parametrize(
    ("lost", "changed", "says"),
    [
        ("absmax", {}, r"w.absmax must be of the shape \(64,\) and F32 or F16 or BF16, but is missing"),
        ("", {"blocksize": 32}, r"w.absmax must be of the shape \(32,\) .* but is of the shape \(64,\)"),
        ("", {"shape": [16, 16], "blocksize": 4}, "bitsandbytes__nf4 asks for 128 bytes in w, which has 512"),
        ("", {"nested_blocksize": 8, "nested_offset": 0.0}, "w.absmax must be .* and U8, but is of the shape .* and F32"),
        ("", {"shape": None}, "w.quant_state.bitsandbytes__nf4 does not say the shape and the blocks of w"),
        ("", {"blocksize": 0}, "does not say the shape"),
    ],
)
def test_four_bits_that_do_not_fit(tmp_path, lost, changed, says):
    weight = np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32)
    stored, _ = files.four_bits("w", weight, 16)
    state = "w.quant_state.bitsandbytes__nf4"
    text = json.dumps(json.loads(stored[state].tobytes()) | changed)
    stored[state] = np.frombuffer(text.encode(), np.uint8)
    refused(write(tmp_path, {name: tensor for name, tensor in stored.items() if name != f"w.{lost}"}, **BNB), says)


def test_eight_bits_that_do_not_fit(tmp_path):
    refused(write(tmp_path, {"m.SCB": np.ones(3, np.float32)}, **BNB), "there is m.SCB, but no m.weight")
    stored, _ = files.eight_bits("m.weight", np.ones((4, 3), np.float32))
    form = {"m.weight_format": np.ones((), np.uint8)}
    refused(write(tmp_path, stored | form, **BNB), "m.weight_format says that m.weight is laid out for one kind of GPU")
    refused(write(tmp_path, stored | {"m.SCB": np.ones(3, np.float32)}, **BNB), r"m.SCB must be of the shape \(4,\) and F32")


# --- gptq -------------------------------------------------------------------------------------------------------------


def gptq(directory, bits=4, group=8, version="gptq", reordered=False, g_idx=True, **more):
    encode = lambda name, weight: files.gptq(name, weight, bits, group, version=version, reordered=reordered, g_idx=g_idx)
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": reordered, "checkpoint_format": version}
    return files.model(directory, encode, config | more)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"version": "gptq_v2"}, {"reordered": True}, {"group": 16, "g_idx": False}],
    ids=["v1", "v2", "reordered", "plain"],
)
def test_gptq(tmp_path, bits, options):
    check(*gptq(tmp_path, bits, **options), rtol=1e-6)


def test_gptq_of_three_bits(tmp_path):
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    stored, values = files.gptq("m.weight", weight, 3, 32)
    got = open_tensors(write(tmp_path, stored, quant_method="gptq", bits=3, group_size=32, desc_act=False, sym=True))
    assert got.shapes == {"m.weight": (64, 96)}
    np.testing.assert_allclose(got.read("m.weight", slice(5, 40)), values[5:40], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 5}, "its bits is 5; 2, 3, 4, 8 can be read"),
        ({"checkpoint_format": "marlin"}, "its checkpoint_format is 'marlin'; 'gptq', 'gptq_v2'"),
        ({"dynamic": {"-:lm_head": {}}}, "its dynamic is"),
        ({"bits": 8}, r"qzeros must be of the shape \(.*\) and I32, but is of"),
        ({"group_size": "8"}, "its group_size must be a positive whole number or -1, not '8'"),
        ({"hadamard": True}, "it has the field hadamard"),
    ],
)
def test_gptq_that_is_not_read(tmp_path, fields, says):
    packed, _ = gptq(tmp_path)
    change(packed, **fields)
    refused(packed, says)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_words_of_three_axes(tmp_path, method):
    directory = write(tmp_path, {"m.qweight": np.zeros((2, 4, 8), np.int32)}, quant_method=method, bits=4)
    refused(directory, r"m.qweight has the shape \(2, 4, 8\), where two axes are needed")


def test_gptq_of_words_that_end_within_a_value(tmp_path):
    directory = write(tmp_path, {"m.qweight": np.zeros((4, 8), np.int32)}, quant_method="gptq", bits=3)
    refused(directory, "m.qweight of 4 words is not of values of 3 bits")


def test_gptq_of_groups_that_are_not_there(tmp_path):
    stored, _ = files.gptq("m.weight", np.eye(32, dtype=np.float32), 4, 8)
    directory = write(tmp_path, stored | {"m.g_idx": np.arange(32, dtype=np.int32) // 8 - 1}, quant_method="gptq", bits=4)
    refused(directory, "m.g_idx has groups that are not among the 4 of scales")


@pytest.mark.parametrize("fields", [{"group_size": 4}, {"desc_act": True}])
def test_gptq_without_groups(tmp_path, fields):
    packed, _ = gptq(tmp_path, g_idx=False)
    change(packed, **fields)
    refused(packed, "q_proj.g_idx is missing, and group_size .* does not say the 4 groups|down_proj.g_idx is missing")


# --- awq --------------------------------------------------------------------------------------------------------------


def awq(directory, group=8, **fields):
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return files.model(directory, lambda name, weight: files.awq(name, weight, group), config | fields)


def test_awq(tmp_path):
    check(*awq(tmp_path, version="GEMM", modules_to_not_convert=None), rtol=1e-6)


def test_awq_with_a_scale_for_each_output(tmp_path):
    encode = lambda name, weight: files.awq(name, weight, weight.shape[1])
    check(*files.model(tmp_path, encode, {"quant_method": "awq", "bits": 4, "group_size": -1}), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"bits": 8}, "its bits is 8; 4 can be read"),
        ({"version": "gemv"}, "its version is 'gemv'; 'gemm', 'GEMM' can be read"),
        ({"zero_point": False}, "its zero_point is False; True can be read"),
        ({"group_size": 16}, r"qzeros must be of the shape \(.*\) and I32, but is of"),
        ({"hadamard": True}, "it has the field hadamard"),
    ],
)
def test_awq_that_is_not_read(tmp_path, fields, says):
    packed, _ = awq(tmp_path)
    change(packed, **fields)
    refused(packed, says)


# --- memory -----------------------------------------------------------------------------------------------------------


def random_nf4(draw, name, shape):
    count = shape[0] * shape[1]
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "shape": shape}).encode()
    return {
        name: draw.integers(0, 256, (count // 2, 1), np.uint8),
        f"{name}.absmax": np.ones(count // 64, np.float32),
        f"{name}.quant_map": files.nf4(),
        f"{name}.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
    }


def random_fp8(draw, name, shape):
    return {name: (draw.integers(0, 127, shape, np.uint8), "F8_E4M3"), f"{name}_scale_inv": np.ones((1, 1), np.float32)}


@pytest.mark.parametrize(("make", "method"), [(random_nf4, "bitsandbytes"), (random_fp8, "fp8")])
def test_no_dense_model_is_held(tmp_path, make, method):
    """Among numpy's buffers, of which dense parameters are made; JAX's own are not traced."""
    config = tiny_lm.sizes(hidden_size=256, intermediate_size=512, num_hidden_layers=16, head_dim=64)
    draw, stored, dense = np.random.default_rng(0), {}, 0
    for shape, name in llama.parameters(config).values():
        tensor = name.name
        wide = np.ones(name.shape(shape), np.float32)
        dense += wide.nbytes
        stored |= make(draw, tensor, wide.shape) if tensor.endswith("_proj.weight") else {tensor: wide}
    directory = write(tmp_path / "model", stored, quant_method=method)
    fields = llama.hf_config(config) | json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields))
    lj.models.load(directory, quantize="int8")  # what is imported and traced once is no parameter
    tracemalloc.start()
    lj.models.load(directory, quantize="int8")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < dense / 4
