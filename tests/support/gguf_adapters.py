"""Bases of every family that llama.cpp files are written for, and adapters of them as GGUF files."""

import dataclasses

import gguf
import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.models import llama
from tests.support import gguf_write

FAMILIES = gguf_write.DATA.parent / "families"
METADATA = {"phi3": {"add_sliding_window": 0}, "gemma3": {"add_sliding_window_pattern": [True, True, True, False]}}
METADATA["llama_yarn"] = {
    "add_rope_scaling_type": gguf.RopeScalingType.YARN, "add_rope_scaling_factor": 4.0, "add_rope_scaling_orig_ctx_len": 32,
}  # fmt: skip
BASES = {case: case for case in gguf_write.CONVERTED if case != "phi3_longrope"} | {"qwen2": "qwen2", "mistral": "mistral"}
EVERYTHING = {
    "rank": 4,
    "alpha": 3.0,
    "targets": ["re:.*/kernel"],
    "rank_pattern": {"o_proj": 2},
    "alpha_pattern": {"down_proj": 5},
}


def source(case):
    """The same base as a Hugging Face directory."""
    return FAMILIES / case / "base" if case in gguf_write.CONVERTED else gguf_write.DATA / case


def drawn(model, lora):
    """Adapters as training leaves them: B is drawn, too."""
    adapters = lj.init(jax.random.key(0), lora, model.apply, model.variables, jnp.ones((1, 4), jnp.int32))
    moved = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    return {path: dataclasses.replace(pair, b=pair.where_adapted(moved[path].b, 0.0)) for path, pair in adapters.items()}


def save(file, model, adapters, **more):
    lj.peft.save_gguf(file, adapters, **llama.gguf_fields(model), **more)
    return file
