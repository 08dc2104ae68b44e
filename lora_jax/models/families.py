"""The families of decoders: what each is made of, how its `config.json` says so, and what its tensors are called.

To add one, add a row to `FAMILIES`, from its modelling code and its `config.json`:

1. `parts`: the parts that all its models have, as fields of `DecoderConfig` (or a function of the fields, for those that
   `config.json` decides).
2. `fields`: where `config.json` calls a size by another name than `DecoderConfig`; `defaults`: what a missing field means.
3. `ignored`: fields of it that change nothing here. Any field that nothing reads is refused by name.
4. `names`: our modules (`embed_tokens`, `layers`, `norm`, `lm_head`, and in a layer `self_attn/q_proj`, `mlp/up_proj`, ...)
   where its tensors are called otherwise.
5. `inner`, `prefixes` and `spare`: of a decoder that is a part of a larger model, such as one of images.

Then make it a tiny model with transformers, and compare the logits.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from lora_jax.core.errors import InputError
from lora_jax.models.activations import FUNCTIONS
from lora_jax.models.config_fields import Fields
from lora_jax.models.decoder_config import SIZES, DecoderConfig
from lora_jax.models.experts import Experts
from lora_jax.models.rope_fields import read_rope, read_ropes
from lora_jax.models.rotary import LinearRope

Parts = Callable[[Fields], dict[str, Any]]
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of decoders.

    Args:
      architecture: the class in transformers.
      parts: fields of `DecoderConfig`, from those of a `config.json`.
      fields: the names in `config.json` of fields of `DecoderConfig`, where they differ.
      defaults: what fields of `config.json` are where it lacks them.
      ignored: fields of `config.json` that change nothing that is computed here.
      names: what the tensors of our modules are called, without `.weight`, where it is not as in Llama.
      partial: whether a part of each head may be rotated alone.
      conv1d: whether the kernels are stored as they are here, `(in, out)`.
      stored: the names and axes in files of the joined kernels of experts, where they are not as in memory.
      inner: the field of `config.json` that holds the decoder's own fields, where it is a part of a larger model.
      prefixes: how names of tensors may begin in files, and how the same ones begin in memory.
      spare: how the names of tensors of the model's other parts begin.
    """

    architecture: str
    parts: Parts = lambda fields: {}
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    partial: bool = False
    conv1d: bool = False
    stored: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    inner: str = ""
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    spare: tuple[str, ...] = ()

    def renamed(self, name: str) -> str:
        """What a tensor of a file is called in memory."""
        begin = next((prefix for prefix in self.prefixes if name.startswith(prefix)), "")
        return self.prefixes.get(begin, "") + name.removeprefix(begin)


def _activation(word: Any) -> str:
    if not isinstance(word, str) or word not in FUNCTIONS:
        raise InputError(f"the activation is {word!r}; {', '.join(map(repr, FUNCTIONS))} can be read")
    return word


def _bias(fields: Fields, default: bool = False) -> dict[str, Any]:
    bias = fields.flag("attention_bias", default)
    return {"qkv_bias": bias, "output_bias": bias}


def _all_slide(fields: Fields, default: int | None = None) -> dict[str, Any]:
    """Every layer has the window, if there is one."""
    window = fields.maybe_whole("sliding_window", default)
    return {"sliding_window": window, "sliding_layers": _layers(fields) if window else ()}


def _layers(fields: Fields, chosen: Callable[[int], bool] = lambda i: True) -> tuple[int, ...]:
    return tuple(filter(chosen, range(fields.layers())))


def _some_slide(fields: Fields, chosen: Callable[[int], bool], default: int | None = None) -> dict[str, Any]:
    """The layers that `layer_types` calls sliding, or without it those chosen."""
    if (kinds := fields.layer_types()) is not None:
        chosen = lambda i: kinds[i] == "sliding_attention"
    sliding = _layers(fields, chosen)
    window = fields.maybe_whole("sliding_window", default)
    return {"sliding_window": window, "sliding_layers": sliding} if sliding and window else {}


def _qwen_window(fields: Fields) -> dict[str, Any]:
    fields.only("use_mrope", False)
    first = fields.maybe_whole("max_window_layers", 28, least=0) or 0
    if fields.flag("use_sliding_window"):
        return _some_slide(fields, lambda i: i >= first, 4096)
    fields.ignore("sliding_window", "layer_types")
    return {}


def _llama(fields: Fields) -> dict[str, Any]:
    fields.ignore("is_llama_config")
    fields.only("rope_interleaved", False)
    return _bias(fields) | {"mlp_bias": fields.flag("mlp_bias")}


def _qwen3(fields: Fields) -> dict[str, Any]:
    return {"qk_norm": "heads"} | _bias(fields) | _qwen_window(fields)


def _qwen3_moe(fields: Fields) -> dict[str, Any]:
    step, dense = fields.whole("decoder_sparse_step", 1), fields.get("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise InputError(f"mlp_only_layers must be a list of layers, not {dense!r}")
    slides = fields.flag("use_sliding_window")
    fields.ignore(*(() if slides else ("sliding_window",)), "max_window_layers", "layer_types")
    experts = Experts(
        count=fields.whole("num_experts", fields.maybe_whole("num_local_experts")),
        chosen=fields.whole("num_experts_per_tok"),
        width=fields.whole("moe_intermediate_size"),
        layers=_layers(fields, lambda i: i not in dense and (i + 1) % step == 0),
        weights="normalized" if fields.flag("norm_topk_prob") else "softmax",
        balance=fields.coefficient("router_aux_loss_coef", 0.001),
    )
    window = _all_slide(fields, 4096) if slides else {}
    return {"qk_norm": "heads", "experts": experts} | _bias(fields) | window


def _mixtral(fields: Fields) -> dict[str, Any]:
    experts = Experts(
        count=fields.whole("num_local_experts", 8),
        chosen=fields.whole("num_experts_per_tok", 2),
        width=fields.whole("intermediate_size"),
        layers=_layers(fields),
        balance=fields.coefficient("router_aux_loss_coef", 0.001),
    )
    return {"experts": experts} | _all_slide(fields)


def _gpt_oss(fields: Fields) -> dict[str, Any]:
    experts = Experts(
        count=fields.whole("num_local_experts", 128),
        chosen=fields.whole("num_experts_per_tok", fields.maybe_whole("experts_per_token", 4)),
        width=fields.whole("intermediate_size"),
        layers=_layers(fields),
        weights="chosen",
        bias=True,
        interleaved=True,
        limit=fields.number("swiglu_limit", 7.0),
        alpha=fields.number("swiglu_alpha", 1.702),
        balance=fields.coefficient("router_aux_loss_coef", 0.001),
    )
    even = _some_slide(fields, lambda i: i % 2 == 0, 128)
    return {"experts": experts, "sinks": True} | _bias(fields, default=True) | even


def _gemma(fields: Fields) -> dict[str, Any]:
    fields.only("use_bidirectional_attention", False)
    fields.ignore("cache_implementation", "hidden_act")
    return {"norm": "offset", "embedding_scale": fields.whole("hidden_size") ** 0.5} | _bias(fields)


def _gemma1(fields: Fields) -> dict[str, Any]:
    """Its first files say "gelu", and mean the approximation by tanh."""
    act = fields.get("hidden_activation") or fields.get("hidden_act") or "gelu_pytorch_tanh"
    return _gemma(fields) | ({"activation": "gelu_pytorch_tanh"} if act == "gelu" else {"activation": _activation(act)})


def _gemma2(fields: Fields) -> dict[str, Any]:
    fields.ignore("sliding_window_size")  # beside sliding_window
    caps = {"attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"}
    defaults = {"attention_cap": 50.0, "logit_cap": 30.0}
    scale = fields.number("query_pre_attn_scalar", 256) ** -0.5
    found = {name: fields.maybe_number(theirs, defaults[name]) for name, theirs in caps.items()}
    return {"norms": "both", "query_scale": scale} | found | _gemma(fields) | _some_slide(fields, lambda i: i % 2 == 0, 4096)


def _gemma3(fields: Fields) -> dict[str, Any]:
    fields.only("model_type", "gemma3_text")
    fields.only("attn_logit_softcapping", None)
    every = fields.whole("sliding_window_pattern", fields.maybe_whole("_sliding_window_pattern", 6))
    return {
        "norms": "both",
        "qk_norm": "heads",
        "query_scale": fields.number("query_pre_attn_scalar", 256) ** -0.5,
        "logit_cap": fields.maybe_number("final_logit_softcapping"),
        **_gemma(fields),
        **_some_slide(fields, lambda i: (i + 1) % every != 0, 4096),
        **read_ropes(fields, 1_000_000.0, fields.number("rope_local_base_freq", 10_000.0)),
    }


def _olmo2(fields: Fields) -> dict[str, Any]:
    return {"norms": "after", "qk_norm": "width"} | _bias(fields)


def _olmo3(fields: Fields) -> dict[str, Any]:
    return _olmo2(fields) | _some_slide(fields, lambda i: (i + 1) % 4 != 0, 4096) | read_ropes(fields, 500_000.0)


def _smollm3(fields: Fields) -> dict[str, Any]:
    every, count = fields.whole("no_rope_layer_interval", 4), fields.layers()
    rotated = fields.get("no_rope_layers")
    rotated = [(i + 1) % every != 0 for i in range(count)] if rotated is None else rotated
    if not isinstance(rotated, list) or len(rotated) != count:
        raise InputError(f"no_rope_layers must say 1 (rotated) or 0 for each of the {count} layers, not {rotated!r}")
    still = _layers(fields, lambda i: not rotated[i])
    parts = _llama(fields) | {"unrotated_layers": still}
    if fields.flag("use_sliding_window"):
        return parts | _some_slide(fields, lambda i: i in still)
    fields.ignore("sliding_window", "layer_types", "max_window_layers")
    return parts


def _granite(fields: Fields) -> dict[str, Any]:
    return _llama(fields) | {
        "embedding_scale": fields.number("embedding_multiplier", 1.0),
        "residual_scale": fields.number("residual_multiplier", 1.0),
        "query_scale": fields.number("attention_multiplier", 1.0),
        "logit_scale": 1 / fields.number("logits_scaling", 1.0),
    }


def _phi3(fields: Fields) -> dict[str, Any]:
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.only(name, False)
    for name in ("full_attn_mod", "interpolate_factor"):
        fields.only(name, 1)
    return {"fused": "blocks"} | _all_slide(fields)


def _starcoder2(fields: Fields) -> dict[str, Any]:
    bias = fields.flag("use_bias", True)
    fields.only("norm_type", "layer_norm")
    fields.only("mlp_type", "default")
    return {"norm": "layer", "gated": False, "mlp_bias": bias, "qkv_bias": bias, "output_bias": bias} | _all_slide(fields)


def _stablelm(fields: Fields) -> dict[str, Any]:
    for name in ("use_parallel_residual", "qk_layernorm"):
        fields.only(name, False)
    return {"norm": "layer", "qkv_bias": fields.flag("use_qkv_bias")}


def _gpt_neox(fields: Fields) -> dict[str, Any]:
    parallel = fields.flag("use_parallel_residual", True)
    parts = {"norm": "layer", "gated": False, "fused": "heads", "mlp_bias": True, "parallel": parallel}
    fields.ignore("num_key_value_heads", "is_decoder")
    return parts | _bias(fields, default=True) | {"num_key_value_heads": fields.whole("num_attention_heads")}


def _gpt2(fields: Fields) -> dict[str, Any]:
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    parts = {"norm": "layer", "gated": False, "fused": "blocks", "mlp_bias": True, "learnt_positions": True}
    inner = fields.maybe_whole("n_inner") or 4 * fields.whole("hidden_size")
    scale = None if fields.flag("scale_attn_weights", True) else 1.0
    return parts | {"intermediate_size": inner, "query_scale": scale, "qkv_bias": True, "output_bias": True}


_GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}
_TEXT = "model.language_model"
_GEMMA = {"head_dim": 256, "num_key_value_heads": 4, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"}
_PLAIN_MLP = {"mlp/up_proj": "mlp.c_fc", "mlp/down_proj": "mlp.c_proj"}
_EXPERTS = {f"experts/{name}_proj": f"mlp.experts.{name}_proj" for name in ("gate_up", "down")} | {"experts/router": "mlp.gate"}
_GEMMA3: dict[str, Any] = {
    "parts": _gemma3,
    "fields": {"activation": "hidden_activation"},
    "defaults": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
    },
}

FAMILIES: dict[str, Family] = {
    "llama": Family(architecture="LlamaForCausalLM", parts=_llama),
    "mistral": Family(
        architecture="MistralForCausalLM",
        parts=lambda fields: _all_slide(fields, None if fields.has("sliding_window") else 4096),
        defaults={"num_key_value_heads": 8},
    ),
    "qwen2": Family(architecture="Qwen2ForCausalLM", parts=lambda fields: {"qkv_bias": True} | _qwen_window(fields)),
    "qwen3": Family(architecture="Qwen3ForCausalLM", parts=_qwen3, defaults={"head_dim": 128}),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        parts=_qwen3_moe,
        defaults={"num_key_value_heads": 4},
        names=_EXPERTS,
        stored={
            "experts/gate_up_proj": ("mlp.experts.{e}.{c:gate|up}_proj.weight", "e i c o -> o i"),
            "experts/down_proj": ("mlp.experts.{e}.down_proj.weight", "e i o -> o i"),
        },
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        parts=_mixtral,
        defaults={"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
        ignored=("router_jitter_noise",),
        names=_EXPERTS,
        stored={
            "experts/router": ("block_sparse_moe.gate.weight", "i o -> o i"),
            "experts/gate_up_proj": ("block_sparse_moe.experts.{e}.{c:w1|w3}.weight", "e i c o -> o i"),
            "experts/down_proj": ("block_sparse_moe.experts.{e}.w2.weight", "e i o -> o i"),
        },
    ),
    "gpt_oss": Family(
        architecture="GptOssForCausalLM",
        parts=_gpt_oss,
        defaults={"head_dim": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
        | {"rope_theta": 150_000.0, "rope_parameters": _GPT_OSS_ROPE},
        ignored=("initial_context_length",),
        names=_EXPERTS | {"experts/router": "mlp.router"},
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        parts=_gemma1,
        defaults={"head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True},
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        parts=_gemma2,
        fields={"activation": "hidden_activation"},
        defaults=_GEMMA,
    ),
    "gemma3_text": Family(architecture="Gemma3ForCausalLM", **_GEMMA3),
    "gemma3": Family(
        architecture="Gemma3ForConditionalGeneration",
        **_GEMMA3,
        names={"embed_tokens": f"{_TEXT}.embed_tokens", "norm": f"{_TEXT}.norm", "layers": f"{_TEXT}.layers"},
        ignored=(
            "vision_config", "mm_tokens_per_image", "boi_token_index", "eoi_token_index", "image_token_index", "boi_token_id",
            "eoi_token_id", "image_token_id",
        ),
        inner="text_config",
        prefixes={
            "language_model.lm_head.": "lm_head.",
            "language_model.model.": f"{_TEXT}.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
        spare=("model.vision_tower.", "model.multi_modal_projector."),
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        parts=_phi3,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        partial=True,
        ignored=("embd_pdrop", "resid_pdrop", "original_max_position_embeddings"),
    ),
    "olmo2": Family(architecture="Olmo2ForCausalLM", parts=_olmo2, defaults={"rms_norm_eps": 1e-5}),
    "olmo3": Family(architecture="Olmo3ForCausalLM", parts=_olmo3, defaults={"rms_norm_eps": 1e-5}),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        parts=_smollm3,
        defaults={"num_key_value_heads": 4, "rope_theta": 2_000_000.0, "tie_word_embeddings": True},
    ),
    "granite": Family(architecture="GraniteForCausalLM", parts=_granite),
    "starcoder2": Family(
        architecture="Starcoder2ForCausalLM",
        parts=_starcoder2,
        fields={"rms_norm_eps": "norm_epsilon"},
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "norm_epsilon": 1e-5,
        },
        ignored=("residual_dropout", "embedding_dropout", "layer_norm_epsilon"),
        names=_PLAIN_MLP,
    ),
    "stablelm": Family(
        architecture="StableLmForCausalLM",
        parts=_stablelm,
        partial=True,
        fields={"rms_norm_eps": "layer_norm_eps"},
        defaults={"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        ignored=("hidden_dropout",),
    ),
    "gpt_neox": Family(
        architecture="GPTNeoXForCausalLM",
        parts=_gpt_neox,
        partial=True,
        fields={"rms_norm_eps": "layer_norm_eps"},
        defaults={"hidden_act": "gelu", "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25},
        ignored=("hidden_dropout", "classifier_dropout"),
        names={
            "embed_tokens": "gpt_neox.embed_in",
            "norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
            "layers": "gpt_neox.layers",
            "self_attn/qkv_proj": "attention.query_key_value",
            "self_attn/o_proj": "attention.dense",
            "mlp/up_proj": "mlp.dense_h_to_4h",
            "mlp/down_proj": "mlp.dense_4h_to_h",
        },
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        parts=_gpt2,
        fields={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "rms_norm_eps": "layer_norm_epsilon",
            "activation": "activation_function",
        },
        defaults={"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True},
        ignored=(
            "attn_pdrop", "embd_pdrop", "resid_pdrop", "reorder_and_upcast_attn", "n_ctx", "summary_activation",
            "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "task_specific_params",
        ),
        conv1d=True,
        names={
            "embed_tokens": "transformer.wte",
            "embed_positions": "transformer.wpe",
            "norm": "transformer.ln_f",
            "layers": "transformer.h",
            "input_layernorm": "ln_1",
            "post_attention_layernorm": "ln_2",
            "self_attn/qkv_proj": "attn.c_attn",
            "self_attn/o_proj": "attn.c_proj",
            **_PLAIN_MLP,
        },
    ),
}  # fmt: skip
FAMILY = tuple(FAMILIES)


def read_config(fields: Mapping[str, Any]) -> DecoderConfig:
    """The sizes and parts from the fields of a `config.json`, in the spelling of any version of transformers.

    Raises:
      InputError: another architecture, a field that is missing, out of range or unknown, or one that asks for what the model
        can't do.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> config = read_config(dict(model_type="llama", rope_theta=5e5, **sizes))
    >>> config.num_key_value_heads, config.head_dim, config.rope_theta
    (2, 2, 500000.0)
    """
    model_type = fields.get("model_type")
    if model_type not in FAMILIES:
        raise InputError(f"the model_type is {model_type!r}; this loader reads {', '.join(map(repr, FAMILY))}")
    family, source = FAMILIES[model_type], {name: value for name, value in fields.items() if name != "quantization_config"}
    fields = _own_fields(fields, family)
    read = Fields(fields, {"activation": "hidden_act", **family.fields}, family.defaults)
    parts = family.parts(read)
    ids = {name: token_ids({name: read.get(name)}, name) for name in _IDS}
    heads, width = read.whole("num_attention_heads"), read.whole("hidden_size")
    sizes: dict[str, Any] = {
        "num_attention_heads": heads,
        "hidden_size": width,
        "num_key_value_heads": heads if read.is_null("num_key_value_heads") else read.whole("num_key_value_heads", heads),
        "head_dim": read.whole("head_dim", width // heads),
        "max_position_embeddings": read.whole("max_position_embeddings", 2048),
        "vocab_size": read.whole("vocab_size"),
        "num_hidden_layers": read.layers(),
        "intermediate_size": parts.get("intermediate_size") or read.whole("intermediate_size"),
        "rms_norm_eps": read.number("rms_norm_eps", 1e-6),
        "activation": parts.get("activation") or _activation(read.get("activation") or "silu"),
        "tie_word_embeddings": read.flag("tie_word_embeddings"),
        "bos_token_id": next(iter(ids["bos_token_id"]), None),
        "eos_token_ids": ids["eos_token_id"],
        "pad_token_id": next(iter(ids["pad_token_id"]), None),
    }
    if not parts.get("learnt_positions") and "rope_theta" not in parts:
        parts = read_rope(read, sizes["head_dim"], family.partial) | parts
    read.ignore("quantization_config", *family.ignored)  # which says how files are stored
    read.refuse_others()
    return DecoderConfig(model_type=model_type, source=json.dumps(source), **sizes | parts)


def _own_fields(fields: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """The fields of the decoder alone; of a larger model, where ids and tied heads are said of the whole, those go first."""
    if not family.inner:
        return fields
    whole = Fields(fields, {}, {})
    tied = whole.get("tie_word_embeddings")
    whole.ignore(family.inner, "quantization_config", *family.ignored)
    whole.refuse_others()
    own = fields.get(family.inner) or {}
    if not isinstance(own, dict):
        raise InputError(f"{family.inner} must be an object, not {own!r}")
    ids = {name: fields[name] for name in _IDS if fields.get(name) is not None}
    return own | {"tie_word_embeddings": tied} | ids


def rename(model_type: str) -> Callable[[str], str]:
    """What the tensors of files of a type of models are called in memory."""
    return FAMILIES[model_type].renamed if model_type in FAMILIES else str


def replaced(fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` with other values of some fields; the vocabulary's size is the decoder's own."""
    inner = FAMILIES[fields["model_type"]].inner
    if not inner:
        return {**fields, **values}
    own = {name: values[name] for name in ("vocab_size", "tie_word_embeddings") if name in values}
    outer = {name: value for name, value in values.items() if name != "vocab_size"}
    return {**fields, **outer, inner: {**(fields.get(inner) or {}), **own}}


def token_ids(fields: Mapping[str, Any], name: str) -> tuple[int, ...]:
    """The token ids of a field that holds none, one or a list.

    Raises:
      InputError: it holds something else.
    """
    value = fields.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise InputError(f"{name} must be a token id or a list of them, not {value!r}")
    return tuple(ids)


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a `config.json` that transformers, and `load`, read as this model.

    Args:
      config: the sizes and parts; those of a model that was read keep the fields of their file.

    Raises:
      InputError: a model that was not read from a file is of a family other than Llama, Mistral and Qwen 2.

    >>> sizes = dict(vocab_size=8, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> config = read_config(dict(model_type="mistral", sliding_window=3, num_key_value_heads=1, **sizes))
    >>> read_config(hf_config(config)) == config
    True
    """
    ids = config.eos_token_ids
    own = {
        "architectures": [FAMILIES[config.model_type].architecture],
        **{name: getattr(config, name) for name in ("vocab_size", "tie_word_embeddings", "bos_token_id", "pad_token_id")},
        "eos_token_id": None if not ids else ids[0] if len(ids) == 1 else list(ids),
    }
    return replaced(json.loads(config.source) if config.source else _llama_fields(config), own)


def _llama_fields(config: DecoderConfig) -> dict[str, Any]:
    """The fields of a model of the Llama family that was not read from a `config.json`."""
    if config.model_type not in ("llama", "mistral", "qwen2"):
        raise InputError(f"a {config.model_type!r} that was not read from a config.json can't be written as one")
    rope: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        kind = "linear" if isinstance(config.rope_scaling, LinearRope) else "llama3"
        values = {k: v for k, v in dataclasses.asdict(config.rope_scaling).items() if k != "attention_factor"}
        rope["rope_scaling"] = {"rope_type": kind, "type": kind, **values}
    extra: dict[str, Any] = {}
    if config.model_type == "llama":
        extra = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    elif config.model_type == "mistral":
        extra = {"sliding_window": config.sliding_window}
    elif config.sliding_layers:
        kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
        extra = {"use_sliding_window": True, "sliding_window": config.sliding_window, "layer_types": kinds}
    sizes = {name: getattr(config, name) for name in (*SIZES, "model_type")}
    return {**sizes, "rms_norm_eps": config.rms_norm_eps, "hidden_act": "silu", **rope, **extra}
