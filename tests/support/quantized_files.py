"""Hugging Face directories with quantised weights, each format encoded as its specification says and by nothing that reads it."""

import json
import pathlib
import shutil
import statistics

import numpy as np
from safetensors.numpy import load_file, save_file

BASE = pathlib.Path(__file__).parents[1] / "data" / "peft" / "llama" / "base"
_NAMES = {"float32": "F32", "float16": "F16", "int32": "I32", "int64": "I64", "uint8": "U8", "int8": "I8", "bfloat16": "BF16"}


def save(file, tensors):
    """Write safetensors, also of types that NumPy lacks: a tensor is an array, or its bytes and the name of their type."""
    header, content = {}, b""
    for name, tensor in tensors.items():
        array, dtype = tensor if isinstance(tensor, tuple) else (tensor, _NAMES[tensor.dtype.name])
        data = array.tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [len(content), len(content) + len(data)]}
        content += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content)


def model(directory, encode, config, base=BASE):
    """A copy of a Llama of which each kernel of a layer is stored as `encode` says, and one with the same weights dense.

    Args:
      directory: where to make `packed` and `dense`.
      encode: `encode(name, weight)` -> the stored tensors by name, and what they stand for.
      config: the `quantization_config`.
    """
    packed, dense = directory / "packed", directory / "dense"
    for each in (packed, dense):
        shutil.copytree(base, each)
    stored, plain = {}, load_file(base / "model.safetensors")
    for name, tensor in list(plain.items()):
        own = {name: tensor}
        if name.endswith("_proj.weight"):
            own, plain[name] = encode(name, tensor)
        stored |= own
    save(packed / "model.safetensors", stored)
    save_file(plain, dense / "model.safetensors")
    fields = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))
    return packed, dense


# --- fp8 --------------------------------------------------------------------------------------------------------------


def e4m3():
    """The value of each byte: a sign, four bits of an exponent with the bias 7 and three of a fraction; two are no numbers."""
    found = np.empty(256)
    for byte in range(256):
        sign, exponent, fraction = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
        found[byte] = sign * (fraction / 8 * 2.0**-6 if exponent == 0 else (1 + fraction / 8) * 2.0 ** (exponent - 7))
    found[[0x7F, 0xFF]] = np.nan
    return found


def fp8(weight, size, scale_type="float32"):
    """Bytes, scales, and what they stand for: the scale of a block takes its largest value to 448."""
    values, levels = np.zeros_like(weight), e4m3()
    codes = np.empty(weight.shape, np.uint8)
    scales = np.empty([-(-n // one) for n, one in zip(weight.shape, size)], np.float32)
    for i, j in np.ndindex(*scales.shape):
        place = np.s_[i * size[0] : (i + 1) * size[0], j * size[1] : (j + 1) * size[1]]
        scale = np.abs(weight[place]).max() / 448
        scales[i, j] = 2 ** np.ceil(np.log2(scale)) if scale_type == "ue8m0" else scale
        codes[place] = np.nanargmin(np.abs(weight[place][..., None] / scales[i, j] - levels), -1)
        values[place] = levels[codes[place]].astype(np.float32) * scales[i, j]
    exponents = (np.log2(scales) + 127).round().astype(np.uint8)
    return (codes, "F8_E4M3"), ((exponents, "F8_E8M0") if scale_type == "ue8m0" else scales), values


# --- mxfp4 ------------------------------------------------------------------------------------------------------------


def e2m1(code):
    """The value of four bits: a sign, two of an exponent with the bias 1 and one of a fraction."""
    sign, exponent, fraction = -1 if code >> 3 else 1, code >> 1 & 3, code & 1
    return sign * (fraction * 0.5 if exponent == 0 else (1 + fraction / 2) * 2.0 ** (exponent - 1))


def mxfp4(weight):
    """Blocks and scales of `(experts, in, out)`, and what they stand for: the exponent of a block's largest value, less 2."""
    levels = np.array([e2m1(code) for code in range(16)])
    experts, inputs, outputs = weight.shape
    blocks, values = np.empty((experts, outputs, inputs // 32, 16), np.uint8), np.empty_like(weight)
    scales = np.empty(blocks.shape[:3], np.uint8)
    for e, o, b in np.ndindex(*scales.shape):
        part = weight[e, b * 32 : (b + 1) * 32, o]
        exponent = int(np.floor(np.log2(np.abs(part).max()))) - 2
        codes = np.abs(part[:, None] / 2.0**exponent - levels).argmin(-1)
        values[e, b * 32 : (b + 1) * 32, o] = levels[codes] * 2.0**exponent
        blocks[e, o, b] = codes[0::2] + 16 * codes[1::2]
        scales[e, o, b] = exponent + 127
    return blocks, scales, values


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


def nf4():
    """The 16 levels: quantiles of the normal distribution, 8 below zero and 9 above, with zero, over the largest (QLoRA)."""
    quantile = statistics.NormalDist().inv_cdf
    above, below = ([quantile(p) for p in np.linspace(0.9677083, 0.5, count)[:-1]] for count in (9, 8))
    return (np.array(sorted([*above, 0.0, *(-x for x in below)])) / max(above)).astype(np.float32)


def four_bits(name, weight, block, *, kind="nf4", nested_block=0, storage="uint8"):
    """The stored tensors of four bits a value, and what they stand for."""
    levels = nf4() if kind == "nf4" else np.array([e2m1(code) / 6 for code in range(16)], np.float32)
    flat = np.pad(weight.reshape(-1), (0, -weight.size % block)).reshape(-1, block)
    scales = np.abs(flat).max(-1)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": list(weight.shape)}
    stored = {f"{name}.quant_map": levels, f"{name}.absmax": scales}
    if nested_block:
        ramp, mean = np.linspace(-1, 1, 256), scales.mean()
        nested = (np.sign(ramp) * ramp**2).astype(np.float32)
        rest = np.pad(scales - mean, (0, -scales.size % nested_block)).reshape(-1, nested_block)
        outer = np.abs(rest).max(-1)
        codes = np.abs(rest[..., None] / outer[:, None, None] - nested).argmin(-1).astype(np.uint8)
        scales = ((nested[codes] * outer[:, None]).reshape(-1)[: scales.size] + np.float32(mean)).astype(np.float32)
        stored |= {
            f"{name}.absmax": codes.reshape(-1)[: scales.size],
            f"{name}.nested_absmax": outer,
            f"{name}.nested_quant_map": nested,
        }
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": float(mean)}
    codes = np.abs(flat[..., None] / np.abs(flat).max(-1)[:, None, None] - levels).argmin(-1)
    values = (levels[codes] * scales[:, None]).astype(np.float32).reshape(-1)[: weight.size].reshape(weight.shape)
    pairs = codes.reshape(-1)[: weight.size].reshape(-1, 2)
    packed = (pairs[:, 0] * 16 + pairs[:, 1]).astype(np.uint8).view(storage).reshape(-1, 1)
    text = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return {name: packed, f"{name}.quant_state.bitsandbytes__{kind}": text, **stored}, values


def eight_bits(name, weight):
    """The stored tensors of int8 with a scale for each row, and what they stand for."""
    scales = np.abs(weight).max(-1).astype(np.float32)
    codes = np.rint(weight / scales[:, None] * 127).astype(np.int8)
    module = name.removesuffix("weight")
    stored = {name: codes, f"{module}SCB": scales, f"{module}weight_format": np.zeros((), np.uint8)}
    return stored, (codes.astype(np.float64) * scales[:, None] / 127).astype(np.float32)


# --- gptq and awq -----------------------------------------------------------------------------------------------------


def _grouped(weight, bits, group, order):
    """Unsigned integers of `(in, out)`, scales and zeros of `(groups, out)`, the group of each input, and what they stand for."""
    columns = weight.T.astype(np.float64)
    place = np.empty(len(columns), np.int32)
    place[order] = np.arange(len(columns)) // group
    codes, values = np.empty(columns.shape, np.int64), np.empty(columns.shape)
    scales, zeros = (np.empty((place.max() + 1, columns.shape[1]), dtype) for dtype in (np.float16, np.int64))
    for i in range(len(scales)):
        part, top = columns[place == i], 2**bits - 1
        low, high = np.minimum(part.min(0), -1e-3), np.maximum(part.max(0), 1e-3)
        scales[i] = (high - low) / top
        zeros[i] = np.clip(np.rint(-low / scales[i].astype(np.float64)), 1, top)
        codes[place == i] = np.clip(np.rint(part / scales[i].astype(np.float64)) + zeros[i], 0, top)
        values[place == i] = (codes[place == i] - zeros[i]) * scales[i].astype(np.float64)
    return codes, scales, zeros, place, np.ascontiguousarray(values.T, np.float32)


def _words(numbers, bits):
    """Numbers along the last axis as one long number each, the first lowest, cut into words of 32 bits."""
    rows = []
    for row in numbers.reshape(-1, numbers.shape[-1]):
        long = sum(int(value) << bits * i for i, value in enumerate(row))
        rows.append([long >> 32 * i & 0xFFFFFFFF for i in range(len(row) * bits // 32)])
    return np.array(rows, np.uint32).astype(np.int32).reshape(*numbers.shape[:-1], -1)


def gptq(name, weight, bits, group, *, version="gptq", reordered=False, g_idx=True):
    """The stored tensors, and what they stand for."""
    count = weight.shape[1]
    order = np.random.default_rng(0).permutation(count) if reordered else np.arange(count)
    codes, scales, zeros, place, values = _grouped(weight, bits, group, order)
    module = name.removesuffix("weight")
    stored = {
        f"{module}qweight": np.ascontiguousarray(_words(codes.T, bits).T),
        f"{module}qzeros": _words(zeros - (version == "gptq"), bits),
        f"{module}scales": scales,
    }
    return stored | ({f"{module}g_idx": place} if g_idx else {}), values


def awq(name, weight, group):
    """The stored tensors, and what they stand for."""
    codes, scales, zeros, _, values = _grouped(weight, 4, group, np.arange(weight.shape[1]))
    module, order = name.removesuffix("weight"), [0, 2, 4, 6, 1, 3, 5, 7]
    words = lambda numbers: _words(numbers.reshape(len(numbers), -1, 8)[..., order].reshape(len(numbers), -1), 4)
    return {f"{module}qweight": words(codes), f"{module}qzeros": words(zeros), f"{module}scales": scales}, values
