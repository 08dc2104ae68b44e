"""keras-hub 0.29.1 with keras 3.15.1 and jax 0.12 (Python 3.12)."""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax
import jax.numpy as jnp
import keras_hub
from flax.traverse_util import flatten_dict, unflatten_dict

SIZES = {"vocabulary_size": 64, "num_layers": 3, "hidden_dim": 32, "intermediate_dim": 48}
HEADS = {"num_query_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_max_wavelength": 1e6, "layer_norm_epsilon": 1e-5}


def functional(model, inputs):
    """A model as a function, as the README has it."""
    tree = unflatten_dict({v.path: v.value for v in model.trainable_variables}, sep="/")
    fixed = [v.value for v in model.non_trainable_variables]

    def apply(params, ids):
        leaves = flatten_dict(params, sep="/")
        return model.stateless_call([leaves[v.path] for v in model.trainable_variables], fixed, inputs(ids))[0]

    return apply, jax.eval_shape(lambda: tree)


def decoder(name, **kw):
    backbone = getattr(keras_hub.models, f"{name}Backbone")(**{**SIZES, **HEADS, "dtype": "float32", **kw})
    model = getattr(keras_hub.models, f"{name}CausalLM")(backbone=backbone, preprocessor=None)
    return functional(model, lambda ids: {"token_ids": ids, "padding_mask": jnp.ones_like(ids)})


def gemma3():
    kw = {"use_post_ffw_norm": True, "use_post_attention_norm": True, "use_sliding_window_attention": True}
    return decoder("Gemma3", num_layers=8, head_dim=8, image_size=16, sliding_window_size=4, **kw)


def bert(make, pick=lambda out: out, extra=lambda ids: {}):
    backbone = keras_hub.models.BertBackbone(**SIZES, num_heads=4, max_sequence_length=64, dtype="float32")
    first = lambda ids: {"token_ids": ids, "padding_mask": jnp.ones_like(ids), "segment_ids": jnp.zeros_like(ids)}
    apply, shapes = functional(make(backbone), lambda ids: first(ids) | extra(ids))
    return lambda params, ids: pick(apply(params, ids)), shapes


def classifier():
    return bert(lambda x: keras_hub.models.BertTextClassifier(backbone=x, num_classes=3, preprocessor=None))


def backbone():
    return bert(lambda x: x, lambda out: jnp.concatenate([out["sequence_output"], out["pooled_output"][:, None]], 1))


def words():
    """Every place is a masked one. This head has its own GELU and epsilon, in transformers the model's."""

    def make(backbone):
        model = keras_hub.models.BertMaskedLM(backbone=backbone, preprocessor=None)
        head = model.get_layer("mlm_head")
        head._intermediate_dense.activation = lambda x: jax.nn.gelu(x, approximate=True)
        head._intermediate_layer_norm.epsilon = 1e-12
        return model

    places = lambda ids: {"mask_positions": jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)}
    return bert(make, extra=places)


MODELS = {
    "llama2": ("llama", "KERAS_LLAMA", lambda: decoder("Llama", **ROPE)),
    "llama3": ("llama", "KERAS_LLAMA", lambda: decoder("Llama3", **ROPE)),
    "llama3_tied": (
        "llama_tied",
        "KERAS_LLAMA_TIED",
        lambda: decoder("Llama3", tie_word_embeddings=True, **ROPE),
    ),
    "qwen3": ("qwen3", "KERAS_QWEN3", lambda: decoder("Qwen3", head_dim=8, tie_word_embeddings=False, **ROPE)),
    "qwen3_tied": ("qwen3_tied", "KERAS_QWEN3_TIED", lambda: decoder("Qwen3", head_dim=8, **ROPE)),
    "gemma3": ("gemma3_8_layers", "KERAS_GEMMA3", gemma3),
    "bert_backbone": ("bert", "KERAS_BERT_BACKBONE", backbone),
    "bert_words": ("bert_words", "KERAS_BERT_TIED", words),
    "bert_classifier": ("bert_classifier", "KERAS_BERT", classifier),
}
