"""Check the rules for google-tunix and gemma against transformers, and write down their parameter trees.

The two sides don't fit into one environment, so there are two steps:

    python make_trees.py torch WORK     # torch 2.13.0, transformers 5.23.0: tiny random models, their logits
    python make_trees.py jax WORK OUT   # Python 3.12, google-tunix==0.1.7, gemma==4.0.1, lora_jax: fill the JAX models by the
                                        # rules, compare the logits, write OUT/{tunix_llama3,tunix_qwen3,gemma3}.json

A file: {variant: {"tree": {path: shape}, "tensors": {Hugging Face's name: shape}, "error": largest difference of the logits}}.
"""

import dataclasses
import json
import pathlib
import sys

import numpy as np

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTH = 9


def make_torch(work):
    import safetensors.torch
    import torch
    import transformers as t

    def rope(base):
        return {"rope_type": "default", "rope_theta": base}

    common = {**SIZES, "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 64}
    config = {**common, "rope_parameters": rope(1e6)}  # tunix's Llama 3 takes this base whatever its configuration says
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True}
    gemma = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 4}
    gemma |= {"query_pre_attn_scalar": 8, "rope_parameters": {"sliding_attention": rope(1e4), "full_attention": rope(1e6)}}
    models = {
        "tunix_llama3/separate": lambda: t.LlamaForCausalLM(t.LlamaConfig(**config, rms_norm_eps=1e-5)),
        "tunix_llama3/tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**config, rms_norm_eps=1e-5, tie_word_embeddings=True)),
        "tunix_qwen3/separate": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**config)),
        "tunix_qwen3/tied": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**config, tie_word_embeddings=True)),
        "tunix_qwen3/experts": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**config, **experts)),
        "gemma3/tied": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**common, **gemma)),
    }
    ids = torch.randint(1, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(7))
    for name, make in models.items():
        torch.manual_seed(0)
        model = make().eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(work / name)
        with torch.no_grad():
            tensors = {"input_ids": ids, "logits": model(ids).logits}
        safetensors.torch.save_file(tensors, work / name / "expected.safetensors")


def tunix(module, model, **kw):
    """A tunix model as a function of its parameters and the token ids."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import lora_jax as lj

    sizes = {
        "num_layers": 3,
        "vocab_size": 64,
        "embed_dim": 32,
        "hidden_dim": 48,
        "num_heads": 4,
        "head_dim": 8,
        "num_kv_heads": 2,
    }
    config = module.ModelConfig(**sizes, **kw, rope_theta=1_000_000)
    fn, params = lj.nnx.functional(getattr(module, model)(config, rngs=nnx.Rngs(0)))

    def apply(params, ids):
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((ids.shape[1],) * 2, bool)), (*ids.shape, ids.shape[1]))
        return fn(params, ids, positions, None, mask)[0]

    return apply, jax.eval_shape(lambda: params)


def gemma3():
    import jax
    import jax.numpy as jnp
    from gemma.gm.nn import _gemma, _modules, _transformer

    local, everywhere = _modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL
    sizes = {"num_embed": 64, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
    config = dataclasses.replace(
        _gemma.Gemma3_270M.config, **sizes, attention_types=(local, local, everywhere), sliding_window_size=4
    )
    model = _transformer.Transformer(config=config, dtype=jnp.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.ones((1, LENGTH), jnp.int32)))
    return lambda params, ids: model.apply(params, ids).logits, shapes


def fill(shapes, names, tensors):
    """The parameter tree with a checkpoint's tensors."""
    import jax

    from lora_jax.core import paths

    leaves, treedef = paths.flatten(shapes)
    for path, leaf in leaves.items():
        array = np.empty(leaf.shape, np.float32)
        for index, tensor in names[path].tensors(leaf.shape).items():
            picked = [slice(None)] * array.ndim
            for axis, i in zip(names[path].indexed, index):
                picked[axis] = i
            array[tuple(picked)] = names[path].restore(tensors[tensor], leaf.shape)
        leaves[path] = array
    return jax.tree_util.tree_unflatten(treedef, leaves.values())


def make_jax(work, out):
    import safetensors.numpy
    from tunix.models.llama3 import model as llama3
    from tunix.models.qwen3 import model as qwen3

    from lora_jax.core import paths
    from lora_jax.huggingface import names
    from lora_jax.peft import rules

    models = {
        "tunix_llama3/separate": (tunix(llama3, "Llama3", norm_eps=1e-5), rules.TUNIX_LLAMA3),
        "tunix_llama3/tied": (tunix(llama3, "Llama3", norm_eps=1e-5, weight_tying=True), rules.TUNIX_LLAMA3_TIED),
        "tunix_qwen3/separate": (tunix(qwen3, "Qwen3", norm_eps=1e-6), rules.TUNIX_QWEN3),
        "tunix_qwen3/tied": (tunix(qwen3, "Qwen3", norm_eps=1e-6, use_tied_embedding=True), rules.TUNIX_QWEN3_TIED),
        "tunix_qwen3/experts": (
            tunix(qwen3, "Qwen3", norm_eps=1e-6, num_experts=4, num_experts_per_tok=2),
            rules.TUNIX_QWEN3,
        ),
        "gemma3/tied": (gemma3(), rules.GEMMA3),
    }
    files = {}
    for name, ((apply, shapes), table) in models.items():
        tensors = safetensors.numpy.load_file(work / name / "model.safetensors")
        expected = safetensors.numpy.load_file(work / name / "expected.safetensors")
        logits = apply(fill(shapes, names.match(shapes, table), tensors), expected["input_ids"])
        error = float(np.abs(np.asarray(logits, np.float32) - expected["logits"]).max())
        print(f"{name}: logits of size {np.abs(expected['logits']).max():.3g} differ by {error:.3g}")
        library, variant = name.split("/")
        files.setdefault(library, {})[variant] = {
            "tree": {path: leaf.shape for path, leaf in paths.flatten(shapes)[0].items()},
            "tensors": {tensor: value.shape for tensor, value in tensors.items()},
            "error": error,
        }
    for library, variants in files.items():
        (out / f"{library}.json").write_text(json.dumps(variants, indent=1) + "\n")


if __name__ == "__main__":
    step, *folders = sys.argv[1:]
    {"torch": make_torch, "jax": make_jax}[step](*map(pathlib.Path, folders))
