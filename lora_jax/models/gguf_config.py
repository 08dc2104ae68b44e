"""The sizes and parts of the model in a GGUF file: its metadata as the `config.json` that `families` reads.

What llama.cpp's converters leave out, its own code knows by the architecture, and so do the functions here.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from lora_jax.core.errors import InputError, within
from lora_jax.huggingface.gguf_reader import GgufFile
from lora_jax.models import families
from lora_jax.models.decoder_config import MOST_LAYERS, DecoderConfig
from lora_jax.models.rotary import Llama3Rope, plain

# The architecture of model types that llama.cpp calls otherwise.
_OTHERWISE = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3", "olmo3": "olmo2"}
_OF_NO_ACCOUNT = ("vocab_size", "tensor_data_layout", "attention.causal", "rope.scaling.finetuned")


def read_config(tensors: GgufFile) -> DecoderConfig:
    """The sizes and parts of a model of one of `ARCHITECTURES`.

    Raises:
      InputError: another architecture, or a value that is missing, unknown, or that the model can't do.
    """
    kind = str(tensors.architecture)
    if kind not in ARCHITECTURES:
        known = ", ".join(map(repr, ARCHITECTURES))
        raise InputError(f"{tensors.file}: the architecture is {tensors.architecture!r}; these can be read: {known}")
    fields = _sizes(tensors) | ARCHITECTURES[kind](tensors)
    _refuse_others(tensors)
    theirs = families.FAMILIES[fields["model_type"]].fields
    with within(tensors.file):
        return families.read_config({theirs.get(name, name): value for name, value in fields.items()})


def architecture(config: DecoderConfig) -> str:
    """What llama.cpp calls the family of a model.

    Raises:
      InputError: it is none of `ARCHITECTURES`.
    """
    kind = _OTHERWISE.get(config.model_type, config.model_type)
    if kind not in ARCHITECTURES:
        known = [name for name in families.FAMILIES if _OTHERWISE.get(name, name) in ARCHITECTURES]
        raise InputError(f"{config.model_type} models can't be written for llama.cpp; these can: {', '.join(known)}")
    return kind


def _refuse_others(file: GgufFile) -> None:
    """Metadata of the architecture that nothing has read."""
    prefix = f"{file.architecture}."
    spare = {prefix + name for name in _OF_NO_ACCOUNT} | file.read_names
    if odd := sorted(name for name, value in file.metadata.items() if name.startswith(prefix) and name not in spare and value):
        listed = ", ".join(f"{name} ({file.metadata[name]!r:.40})" for name in odd)
        raise InputError(f"{file.file}: its header has values that this reader does not know: {listed}")


def _sizes(file: GgufFile) -> dict[str, Any]:
    """What all decoders have."""
    heads, width = file.size("attention.head_count"), file.size("embedding_length")
    head_dim = file.size("attention.key_length", width // heads)
    rotated = file.size("rope.dimension_count", head_dim)
    if file.size("attention.value_length", head_dim) != head_dim:
        raise InputError(f"{file.file}: keys and values of different sizes can't be read")
    special = lambda name: file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    ends = dict.fromkeys(id for id in (special("eos"), special("eot")) if id is not None)
    rms, layer = (file.value(f"attention.layer_norm_{kind}") for kind in ("rms_epsilon", "epsilon"))
    return {
        "vocab_size": file.shapes.get("model.embed_tokens.weight", (0,))[0],
        "hidden_size": width,
        "intermediate_size": file.size("feed_forward_length"),
        "num_hidden_layers": file.size("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.size("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": file.size("context_length"),
        "rms_norm_eps": _shortest(file, rms or layer or 1e-6),
        "rope_theta": _theta(file),
        "tie_word_embeddings": "lm_head.weight" not in file.shapes,
        "bos_token_id": special("bos"),
        "eos_token_id": list(ends),
        "pad_token_id": special("padding"),
        **({} if rotated == head_dim else {"partial_rotary_factor": rotated / head_dim}),
        **_scaling(file),
    }


def _shortest(file: GgufFile, value: Any) -> float:
    """A float32 as it was written: 1e-05, not 9.999999747378752e-06."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{file.file}: its header has {value!r} where a number is needed")
    return float(str(np.float32(value)))


def _numbers(file: GgufFile, names: dict[str, str]) -> dict[str, float]:
    """Numbers by their names in `config.json`, of those that are there."""
    found = {ours: file.value(theirs) for ours, theirs in names.items()}
    return {name: _shortest(file, value) for name, value in found.items() if value}


# --- rotary settings --------------------------------------------------------------------------------------------------


def _theta(file: GgufFile) -> float:
    return _shortest(file, file.value("rope.freq_base") or 10000.0)


def _scaling(file: GgufFile) -> dict[str, Any]:
    """The scaling of the rotary frequencies; some of it stands in tensors of divisors."""
    method = file.value("rope.scaling.type") or "none"
    file.value("rope.scaling.original_context_length")  # of no account for some methods, which have it nevertheless
    if "rope_freqs.weight" in file.shapes:
        return {"rope_scaling": _llama3(file)}
    if "rope_factors_long.weight" in file.shapes:
        original = file.size("rope.scaling.original_context_length")
        return {"rope_scaling": _longrope(file), "original_max_position_embeddings": original}
    if method not in ("none", "linear", "yarn"):
        raise InputError(f"{file.file}: the rope scaling is {method!r}; 'linear', 'yarn', Phi 3's and Llama 3's can be read")
    factor = _shortest(file, file.value("rope.scaling.factor") or file.value("rope.scale_linear") or 1.0)
    if method == "yarn":
        original = file.size("rope.scaling.original_context_length")
        return {"rope_scaling": {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}}
    return {} if factor == 1 else {"rope_scaling": {"rope_type": "linear", "factor": factor}}


def _llama3(file: GgufFile) -> dict[str, Any]:
    divisors = file.read("rope_freqs.weight").reshape(-1)
    frequencies = plain(_theta(file), 2 * divisors.size)
    values = {
        "factor": _shortest(file, float(divisors.max())),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    if not np.allclose(frequencies / Llama3Rope(**values).scale(frequencies), divisors, rtol=1e-4):
        raise InputError(f"{file.file}: the divisors in rope_freqs.weight are not those of Llama 3, so they can't be read")
    return {"rope_type": "llama3", **values}


def _longrope(file: GgufFile) -> dict[str, Any]:
    parts = {f"{part}_factor": file.read(f"rope_factors_{part}.weight").reshape(-1) for part in ("short", "long")}
    return {
        "rope_type": "longrope",
        **{name: [_shortest(file, float(divisor)) for divisor in divisors] for name, divisors in parts.items()},
        **_numbers(file, {"attention_factor": "rope.scaling.attn_factor"}),
    }


# --- architectures ----------------------------------------------------------------------------------------------------


def _bias(file: GgufFile) -> dict[str, Any]:
    where = {"attention_bias": "self_attn.q_proj", "mlp_bias": "mlp.up_proj"}
    return {name: True for name, module in where.items() if f"model.layers.0.{module}.bias" in file.shapes}


def _window(file: GgufFile) -> int | None:
    """The tokens that sliding layers see; none, or 0, where no layer slides."""
    return file.size("attention.sliding_window") if file.value("attention.sliding_window") else None


def _kinds(sliding: list[Any]) -> dict[str, Any]:
    return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding]}


def _llama(file: GgufFile) -> dict[str, Any]:
    window = _window(file)
    if file.value("expert_count"):
        experts = {"num_local_experts": file.size("expert_count"), "num_experts_per_tok": file.size("expert_used_count")}
        return {"model_type": "mixtral", "sliding_window": window, **experts}
    return {"model_type": "mistral", "sliding_window": window} if window else {"model_type": "llama", **_bias(file)}


def _qwen3moe(file: GgufFile) -> dict[str, Any]:
    """llama.cpp makes the weights of the chosen experts add up to 1."""
    normalized = file.value("expert_weights_norm")
    return {
        "model_type": "qwen3_moe",
        "num_experts": file.size("expert_count"),
        "num_experts_per_tok": file.size("expert_used_count"),
        "moe_intermediate_size": file.size("expert_feed_forward_length"),
        "norm_topk_prob": True if normalized is None else normalized,
    }


def _query_scalar(file: GgufFile, large: int) -> int:
    """That of Gemma 2 and 3, which files do not have: a head's size, but in the largest model the width for each head."""
    heads, width = file.size("attention.head_count"), file.size("embedding_length")
    return width // heads if file.size("block_count") == large else file.size("attention.key_length", width // heads)


def _gemma2(file: GgufFile) -> dict[str, Any]:
    caps = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
    window = _window(file)
    known = {} if window is None else {"sliding_window": window}
    return {"model_type": "gemma2", "query_pre_attn_scalar": _query_scalar(file, 46), **_numbers(file, caps), **known}


def _gemma3(file: GgufFile) -> dict[str, Any]:
    """Its rope scaling is of the layers that do not slide."""
    window, pattern = _window(file), file.value("attention.sliding_window_pattern")
    numbers = {"rope_local_base_freq": "rope.freq_base_swa", "final_logit_softcapping": "final_logit_softcapping"}
    if window is None:
        kinds = _kinds([False] * min(file.size("block_count"), MOST_LAYERS))
    elif isinstance(pattern, list):
        kinds = _kinds(pattern)
    else:
        kinds = {"sliding_window_pattern": file.size("attention.sliding_window_pattern", 6)}
    parts = {"query_pre_attn_scalar": _query_scalar(file, 62), "sliding_window": window}
    return {"model_type": "gemma3_text", **parts, **_numbers(file, numbers), **kinds}


def _olmo2(file: GgufFile) -> dict[str, Any]:
    """With a window it is an OLMo 3."""
    window, pattern = _window(file), file.value("attention.sliding_window_pattern")
    if window is None:
        return {"model_type": "olmo2", **_bias(file)}
    kinds = _kinds(pattern) if isinstance(pattern, list) else {}
    return {"model_type": "olmo3", "sliding_window": window, **kinds, **_bias(file)}


def _phi3(file: GgufFile) -> dict[str, Any]:
    """Older files than the window's entry were made for code that knew the window by the number of layers."""
    if file.value("attention.sliding_window") is None:
        raise InputError(f"{file.file} has no phi3.attention.sliding_window (0: none): it is too old, convert the model again")
    return {"model_type": "phi3", "sliding_window": _window(file)}


def _granite(file: GgufFile) -> dict[str, Any]:
    scales = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return {"model_type": "granite", **_numbers(file, scales), **_bias(file)}


ARCHITECTURES: dict[str, Callable[[GgufFile], dict[str, Any]]] = {
    "llama": _llama,
    "qwen2": lambda file: {"model_type": "qwen2"},
    "qwen3": lambda file: {"model_type": "qwen3", **_bias(file)},
    "qwen3moe": _qwen3moe,
    "gemma": lambda file: {"model_type": "gemma"},
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "olmo2": _olmo2,
    "granite": _granite,
    "smollm3": lambda file: {"model_type": "smollm3"},
    "starcoder2": lambda file: {"model_type": "starcoder2", "use_bias": bool(_bias(file))},
}
