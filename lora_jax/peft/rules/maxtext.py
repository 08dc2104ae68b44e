"""MaxText 0.2.5: layers one by one (`scan_layers=False`), or stacked along the second axis.

What MaxText keeps otherwise than Hugging Face has no name here, so an adapter on it is refused: the query of a Llama or Gemma 2
is divided by the root of the head size, query and key of a Llama 3.1 have their halves interleaved (the paths don't tell which
Llama it is), the norms of a Gemma have the 1 added, and its embedding is multiplied by the root of its width.
"""

import dataclasses
import itertools

from lora_jax.huggingface.names import HFName
from lora_jax.peft.rules.building import Entries, Rules, dense, embedding, table, vector

_LAYER, _NAME = "decoder/layers_#", "model.layers.#"
_MLP = {"mlp/wi_0": "mlp.gate_proj", "mlp/wi_1": "mlp.up_proj", "mlp/wo": "mlp.down_proj"}
_HEADS = {"value": "v_proj", "key": "k_proj", "query": "q_proj"}


def _projections(*, norms: bool, refused: tuple[str, ...] = ()) -> Entries:
    """`{path in a layer: name in a layer}` of kernels, biases and, where wanted, norms."""
    rules: Entries = {}
    for module, there in _HEADS.items():
        if module not in refused:
            rules[f"self_attention/{module}/kernel"] = HFName(f"self_attn.{there}.weight", "d n h -> (n h) d")
            rules[f"self_attention/{module}/bias"] = HFName(f"self_attn.{there}.bias", "n h -> (n h)")
    rules["self_attention/out/kernel"] = HFName("self_attn.o_proj.weight", "n h d -> d (n h)")
    for module, there in _MLP.items():
        rules |= dense(module, there)
    if norms:
        for module, there in {"query": "q", "key": "k"}.items():
            rules |= vector(f"self_attention/{module}_norm/scale", f"self_attn.{there}_norm.weight")
        for module, there in {"pre": "input", "post": "post_attention"}.items():
            rules |= vector(f"{module}_self_attention_layer_norm/scale", f"{there}_layernorm.weight")
    return rules


def _decoder(refused: tuple[str, ...] = (), tied: str = "") -> Rules:
    layers = _projections(norms=True, refused=refused)
    entries = {f"{_LAYER}/{path}": dataclasses.replace(x, name=f"{_NAME}.{x.name}") for path, x in layers.items()}
    entries |= embedding("token_embedder/embedding", "model.embed_tokens.weight", tied)
    entries |= vector("decoder/decoder_norm/scale", "model.norm.weight")
    head = {} if tied else dense("decoder/logits_dense", "lm_head")
    return table(entries, head, stack=1) | {rf".*/self_attention/{module}/\w+": None for module in refused}


# Llama 2, 3 and 3.1.
MAXTEXT_LLAMA: Rules = _decoder(refused=("query", "key"))

# Qwen 2.5 and 3, the dense ones. TIED: `logits_via_embedding=True`.
MAXTEXT_QWEN: Rules = _decoder()
MAXTEXT_QWEN_TIED: Rules = _decoder(tied="lm_head.weight")


def _blocks(path: str, entry: HFName, numbers: list[int]) -> Rules:
    """The rule for the layers of these numbers, stacked."""
    left, right = entry.axes.split(" -> ")
    first, *rest = left.split()
    name = f"model.layers.{{l:{'|'.join(map(str, numbers))}}}.{entry.name}"
    return {path: dataclasses.replace(entry, name=name, axes=f"{' '.join([first, 'l', *rest])} -> {right}")}


_KEPT_OTHERWISE: Rules = {r".*norm\w*/scale": None, r"(?:params/)?token_embedder/embedding": None}


def maxtext_gemma3(layers: int) -> Rules:
    """The table for a Gemma 3: blocks of six layers are stacked, the rest are `layers_remainder`.

    Args:
      layers: how many the model has.

    >>> rule = maxtext_gemma3(26)["(?:params/)?decoder/layers/layers_5/mlp/wo/kernel"]
    >>> rule.name, rule.axes
    ('model.layers.{l:5|11|17|23}.mlp.down_proj.weight', 'i l o -> o i')
    """
    rules: Rules = {}
    stacked = layers - layers % 6
    for path, entry in _projections(norms=False).items():
        for i in range(6):
            rules |= _blocks(rf"(?:params/)?decoder/layers/layers_{i}/{path}", entry, list(range(i, stacked, 6)))
        for i in range(layers):
            one = dataclasses.replace(entry, name=f"model.layers.{i}.{entry.name}")
            rules[rf"(?:params/)?decoder/layers_{i}/{path}"] = one
            if i >= stacked:
                rules[rf"(?:params/)?decoder/layers_remainder/layers_{i - stacked}/{path}"] = one
    return rules | _KEPT_OTHERWISE


def maxtext_gemma2(layers: int) -> Rules:
    """The table for a Gemma 2: a local and a global layer are one there.

    Args:
      layers: how many the model has, local and global ones.

    >>> rule = maxtext_gemma2(4)["(?:params/)?decoder/layers/mlp_local/wo/kernel"]
    >>> rule.name, rule.axes
    ('model.layers.{l:0|2}.mlp.down_proj.weight', 'i l o -> o i')
    """
    rules: Rules = {}
    for (path, entry), (i, kind) in itertools.product(
        _projections(norms=False, refused=("query",)).items(), enumerate(("local", "global"))
    ):
        module, rest = path.split("/", 1)
        path = f"{module}_{kind}/{rest}"
        rules |= _blocks(rf"(?:params/)?decoder/layers/{path}", entry, list(range(i, layers, 2)))
        for number in range(i, layers, 2):
            one = dataclasses.replace(entry, name=f"model.layers.{number}.{entry.name}")
            rules[rf"(?:params/)?decoder/layers_{number // 2}/{path}"] = one
    return rules | {r".*/self_attention_(?:local|global)/query/\w+": None} | _KEPT_OTHERWISE
