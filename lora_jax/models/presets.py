"""Decoders known by name, for questions about their size."""

from typing import Any

from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.families import read_config

_LLAMA_3 = dict(
    model_type="llama", vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, rms_norm_eps=1e-5,
    rope_theta=500000.0,
)  # fmt: skip
_LLAMA_32 = _LLAMA_3 | dict(
    max_position_embeddings=131072, tie_word_embeddings=True, head_dim=128,
    rope_scaling=dict(
        rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    ),
)  # fmt: skip
_QWEN_3 = dict(
    model_type="qwen3", vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
    rms_norm_eps=1e-6, rope_theta=1000000.0,
)  # fmt: skip
_GEMMA_3 = dict(
    model_type="gemma3_text", vocab_size=262208, head_dim=256, max_position_embeddings=131072, rms_norm_eps=1e-6,
    rope_theta=1000000.0, rope_local_base_freq=10000.0, rope_scaling=dict(rope_type="linear", factor=8.0), sliding_window=1024,
    query_pre_attn_scalar=256,
)  # fmt: skip
_GPT_OSS = dict(
    model_type="gpt_oss", vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_attention_heads=64,
    num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rms_norm_eps=1e-5, rope_theta=150000.0,
    sliding_window=128, num_experts_per_tok=4, attention_bias=True,
    rope_scaling=dict(
        rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False, original_max_position_embeddings=4096
    ),
)  # fmt: skip


def _sizes(hidden: int, inner: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads}
    return sizes | more


_FIELDS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA_3 | _sizes(4096, 14336, 32, 32),
    "llama-3-70b": _LLAMA_3 | _sizes(8192, 28672, 80, 64),
    "llama-3.2-1b": _LLAMA_32 | _sizes(2048, 8192, 16, 32, head_dim=64),
    "llama-3.2-3b": _LLAMA_32 | _sizes(3072, 8192, 28, 24),
    "qwen2.5-7b": _sizes(3584, 18944, 28, 28) | dict(
        model_type="qwen2", vocab_size=152064, num_key_value_heads=4, max_position_embeddings=131072, rms_norm_eps=1e-6,
        rope_theta=1000000.0,
    ),
    "qwen3-0.6b": _QWEN_3 | _sizes(1024, 3072, 28, 16, tie_word_embeddings=True),
    "qwen3-4b": _QWEN_3 | _sizes(2560, 9728, 36, 32, tie_word_embeddings=True),
    "qwen3-8b": _QWEN_3 | _sizes(4096, 12288, 36, 32),
    "qwen3-32b": _QWEN_3 | _sizes(5120, 25600, 64, 64),
    "qwen3-30b-a3b": _QWEN_3 | _sizes(2048, 6144, 48, 32) | dict(
        model_type="qwen3_moe", num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True,
    ),
    "mistral-7b": _sizes(4096, 14336, 32, 32) | dict(
        model_type="mistral", vocab_size=32000, num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5,
        sliding_window=4096,
    ),
    "mistral-nemo-12b": _sizes(5120, 14336, 40, 32) | dict(
        model_type="mistral", vocab_size=131072, num_key_value_heads=8, head_dim=128, max_position_embeddings=131072,
        rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None,
    ),
    "mixtral-8x7b": _sizes(4096, 14336, 32, 32) | dict(
        model_type="mixtral", vocab_size=32000, num_key_value_heads=8, max_position_embeddings=32768, rms_norm_eps=1e-5,
        rope_theta=1000000.0, num_local_experts=8, num_experts_per_tok=2,
    ),
    "gemma-3-1b": _GEMMA_3 | _sizes(
        1152, 6912, 26, 4, num_key_value_heads=1, vocab_size=262144, max_position_embeddings=32768, sliding_window=512,
        rope_scaling=None,
    ),
    "gemma-3-4b": _GEMMA_3 | _sizes(2560, 10240, 34, 8, num_key_value_heads=4),
    "gemma-3-12b": _GEMMA_3 | _sizes(3840, 15360, 48, 16, num_key_value_heads=8),
    "gemma-3-27b": _GEMMA_3 | _sizes(5376, 21504, 62, 32, num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=168),
    "phi-4": _sizes(5120, 17920, 40, 40) | dict(
        model_type="phi3", vocab_size=100352, num_key_value_heads=10, max_position_embeddings=16384, rms_norm_eps=1e-5,
        rope_theta=250000.0,
    ),
    "gpt-oss-20b": _GPT_OSS | dict(num_hidden_layers=24, num_local_experts=32),
    "gpt-oss-120b": _GPT_OSS | dict(num_hidden_layers=36, num_local_experts=128),
    "smollm2-135m": _sizes(576, 1536, 30, 9) | dict(
        model_type="llama", vocab_size=49152, num_key_value_heads=3, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_theta=100000.0, tie_word_embeddings=True,
    ),
}  # fmt: skip
NAMES = tuple(_FIELDS)


def named(name: str) -> DecoderConfig:
    """The sizes of one of `NAMES`.

    >>> named("llama-3-8b").head_dim
    128
    """
    return read_config(_FIELDS[name])
