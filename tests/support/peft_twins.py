"""GPT-2 and Mixtral as plain JAX functions of the parameters of the torch models, for `peft_interop.py`."""

import dataclasses

import jax
import jax.numpy as jnp

import lora_jax as lj
from lora_jax.peft import rules


def nest(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(leaf)
    return tree


def attend(q, k, v, heads, kv_heads):
    """Causal attention of (batch, length, heads * size)."""
    split = lambda x, n: x.reshape(*x.shape[:2], n, -1)
    out = jax.nn.dot_product_attention(split(q, heads), split(k, kv_heads), split(v, kv_heads), is_causal=True)
    return out.reshape(q.shape)


def layer_norm(x, p):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def gpt2(params, ids):
    """GPT-2 with the parameter names and kernels (out, in) of transformers' Flax model."""
    top = params["transformer"]
    dense = lambda x, p: x @ p["kernel"].T + p["bias"]
    x = top["wte"]["embedding"][ids] + top["wpe"]["embedding"][jnp.arange(ids.shape[1])]
    for i in range(len(top["h"])):
        p = top["h"][str(i)]
        q, k, v = jnp.split(dense(layer_norm(x, p["ln_1"]), p["attn"]["c_attn"]), 3, axis=-1)
        x = x + dense(attend(q, k, v, 4, 4), p["attn"]["c_proj"])
        x = x + dense(jax.nn.gelu(dense(layer_norm(x, p["ln_2"]), p["mlp"]["c_fc"])), p["mlp"]["c_proj"])
    return layer_norm(x, top["ln_f"]) @ top["wte"]["embedding"].T


def load_gpt2(model, _):
    state = {name: value.numpy() for name, value in model.state_dict().items() if name != "lm_head.weight"}
    leaves = {}
    for name, value in state.items():
        path = name.replace(".", "/")
        last = "scale" if ".ln_" in name else "embedding" if "wte" in name or "wpe" in name else "kernel"
        leaves[path.replace("weight", last)] = value.T if last == "kernel" and name.endswith("weight") else value
    return gpt2, nest(leaves), lj.peft.match(nest(leaves), rules.FLAX_GPT2)


def rotate(x, heads):
    """Rotary positions on (batch, length, heads * size)."""
    x = x.reshape(*x.shape[:2], heads, -1)
    size = x.shape[-1]
    angles = jnp.arange(x.shape[1])[:, None] / 1e6 ** (jnp.arange(0, size, 2) / size)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).reshape(*x.shape[:2], -1)


def rms_norm(x, weight):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weight


def experts(x, gate, p):
    """The two best experts of each token, from kernels (experts, out, in)."""
    probabilities = jax.nn.softmax(x @ gate.T)
    best, chosen = jax.lax.top_k(probabilities, 2)
    weights = (jax.nn.one_hot(chosen, gate.shape[0]) * (best / best.sum(-1, keepdims=True))[..., None]).sum(-2)
    inner = jnp.einsum("bld,eod->bleo", x, p["gate_up_proj"])
    first, second = jnp.split(inner, 2, axis=-1)
    outer = jnp.einsum("bleo,edo->bled", jax.nn.silu(first) * second, p["down_proj"])
    return jnp.einsum("bled,ble->bld", outer, weights)


def mixtral(params, ids):
    model = params["model"]
    x = model["embed_tokens"]["weight"][ids]
    for i in range(len(model["layers"])):
        p = model["layers"][str(i)]
        attn, moe = p["self_attn"], p["mlp"]
        h = rms_norm(x, p["input_layernorm"]["weight"])
        q, k, v = (h @ attn[f"{name}_proj"]["weight"].T for name in "qkv")
        x = x + attend(rotate(q, 4), rotate(k, 2), v, 4, 2) @ attn["o_proj"]["weight"].T
        x = x + experts(rms_norm(x, p["post_attention_layernorm"]["weight"]), moe["gate"]["weight"], moe["experts"])
    return rms_norm(x, model["norm"]["weight"]) @ params["lm_head"]["weight"].T


def load_mixtral(model, _):
    leaves = {name.replace(".", "/"): value.numpy() for name, value in model.state_dict().items()}
    table = {
        r"(.*)/experts/gate_up_proj": lj.peft.HFName(r"\1.experts.gate_up_proj", kind="parameter", order=0),
        r"(.*)/experts/down_proj": lj.peft.HFName(r"\1.experts.down_proj", kind="parameter", order=1),
        r"model/embed_tokens/weight": lj.peft.HFName("model.embed_tokens.weight", kind="embedding"),
        r"(.*)": r"\1",
    }
    names = lj.peft.match(nest(leaves), table)
    names = {path: dataclasses.replace(name, name=name.name.replace("/", ".")) for path, name in names.items()}
    return mixtral, nest(leaves), names
