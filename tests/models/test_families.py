"""Each family of decoders against the logits that transformers and PEFT gave, in every form of the model."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.core import paths
from lora_jax.core.errors import InputError
from lora_jax.models import families, llama
from lora_jax.models.config_fields import OF_NO_ACCOUNT
from lora_jax.models.decoder import Norm
from lora_jax.models.rotary import LinearRope
from tests.support.identity import distance, random_adapters
from tests.support.marks import checkerboard, every_other

DATA = pathlib.Path(__file__).parents[1] / "data" / "families"
CASES = (
    "gemma", "gemma2", "gemma3", "gemma3_images", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama_yarn", "mistral_dynamic", "mixtral",
    "olmo2", "olmo3", "phi3", "phi3_longrope", "qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2",
)  # fmt: skip
FORMS = {"unrolled": {}, "scanned": {"scan_layers": True, "remat": "full"}}


def relative(got, want):
    return float(np.abs(np.asarray(got, np.float32) - want).max() / np.abs(want).max())


def truth(case):
    ids = load_file(DATA / case / "inputs.safetensors")["input_ids"]
    expected = load_file(DATA / case / "expected.safetensors")
    return jnp.asarray(ids, jnp.int32), expected["base_output"], expected["output"]


@pytest.mark.parametrize(("case", "form"), checkerboard(CASES, FORMS))
def test_logits_are_those_of_transformers_and_peft(case, form):
    ids, base, adapted = truth(case)
    loaded = llama.load(DATA / case / "base", **FORMS[form])
    adapters = lj.peft.load(DATA / case / "adapter", loaded.variables, names=loaded.names)
    apply = jax.jit(lj.lora(loaded.apply))
    assert relative(jax.jit(loaded.apply)(loaded.variables, ids), base) < 1e-5
    assert relative(apply(lj.attach(loaded.variables, adapters), ids), adapted) < 1e-5
    merged = lj.merge(loaded.variables, adapters)
    assert relative(jax.jit(loaded.apply)(merged, ids), adapted) < 1e-5


def experts_of(case, dtype, ids):
    """The experts that each token goes through, in order: `(layers, batch, length, chosen)`."""
    loaded = llama.load(DATA / case / "base", dtype=dtype)
    with jax.numpy_dtype_promotion("standard"):
        _, logits = jax.jit(lambda v: loaded.model.apply(v, ids, routing=True))(loaded.variables)
    return np.sort(jax.lax.top_k(logits.astype(jnp.float32), loaded.config.experts.chosen)[1])


@pytest.mark.parametrize("case", every_other(CASES))
def test_bfloat16(case):
    """Up to the token of a row, if any, that rounding sends to another expert, as it does in transformers."""
    ids, base, _ = truth(case)
    loaded = llama.load(DATA / case / "base", dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):  # within `jax.nn.dot_product_attention`
        got = np.asarray(jax.jit(loaded.apply)(loaded.variables, ids), np.float32)
    same = np.ones(ids.shape, bool)
    if loaded.config.experts is not None:
        routes = [experts_of(case, dtype, ids) for dtype in (jnp.float32, jnp.bfloat16)]
        same = np.logical_and.accumulate((routes[0] == routes[1]).all((0, 3)), axis=1)
        assert same.sum() >= 4
    assert np.linalg.norm((got - base)[same]) < 2e-2 * np.linalg.norm(base[same])


@pytest.mark.parametrize(("case", "form"), checkerboard(CASES, FORMS))
def test_adapters_are_written_as_they_were_read(case, form, tmp_path):
    loaded = llama.load(DATA / case / "base", **FORMS[form])
    adapters = lj.peft.load(DATA / case / "adapter", loaded.variables, names=loaded.names)
    lj.peft.save(tmp_path, adapters, names=loaded.names)
    written, read = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, DATA / case / "adapter"))
    assert written.keys() == read.keys()
    for name, tensor in read.items():
        np.testing.assert_allclose(written[name], tensor, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("case", every_other(CASES))
def test_padding_on_the_left_changes_nothing(case):
    ids, base, _ = truth(case)
    loaded = llama.load(DATA / case / "base")
    padded, mask = (jnp.pad(x, ((0, 0), (3, 0))) for x in (ids, jnp.ones_like(ids)))
    assert relative(jax.jit(loaded.apply)(loaded.variables, padded, mask)[:, 3:], base) < 1e-5


# With dynamic scaling the frequencies of a longer text are others, and keys in a cache keep those that they were made with.
@pytest.mark.parametrize(("case", "form"), checkerboard([case for case in CASES if "dynamic" not in case], FORMS))
def test_greedy_tokens_with_a_cache_are_those_without(case, form):
    ids, count = truth(case)[0], 20
    loaded = llama.load(DATA / case / "base", **FORMS[form])
    step, row = jax.jit(loaded.apply), jnp.pad(ids, ((0, 0), (0, count)))
    for last in range(ids.shape[1], ids.shape[1] + count):
        row = row.at[:, last].set(jnp.argmax(step(loaded.variables, row)[:, last - 1], axis=-1).astype(jnp.int32))
    made = llama.generate(loaded, loaded.variables, ids, max_new_tokens=count)
    np.testing.assert_array_equal(made.tokens, row[:, -count:])


@pytest.mark.parametrize("case", ["gemma2", "gpt_oss", "gemma3"])
def test_blocks_of_queries_give_the_same(case):
    ids, base, _ = truth(case)
    loaded = llama.load(DATA / case / "base", attention_block=4)
    assert relative(jax.jit(loaded.apply)(loaded.variables, ids), base) < 1e-5


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_parameters_are_those_of_the_module_and_of_the_file(case, scan_layers):
    loaded = llama.load(DATA / case / "base", scan_layers=scan_layers)
    made = jax.eval_shape(loaded.model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    shapes = lambda tree: {path: leaf.shape for path, leaf in paths.flatten(tree)[0].items()}
    assert shapes(made) == shapes(loaded.variables)
    config = families.read_config(families.hf_config(loaded.config))
    assert config == loaded.config


@pytest.mark.parametrize("case", every_other(CASES))
def test_losses_are_those_of_the_logits(case):
    ids, base, _ = truth(case)
    loaded = llama.load(DATA / case / "base")
    got = jax.jit(loaded.losses)(loaded.variables, ids, jnp.roll(ids, -1, axis=1))
    want = -jax.nn.log_softmax(jnp.asarray(base), axis=-1)
    want = jnp.take_along_axis(want, jnp.roll(ids, -1, axis=1)[:, :, None], axis=-1)[..., 0]
    assert distance(got, want) < 1e-5


@pytest.mark.parametrize("case", ["gemma3", "gpt_neox", "phi3", "gpt2", "gpt_oss", "mixtral"])
def test_gradients_are_those_of_merged_weights(case):
    ids, _, _ = truth(case)
    loaded = llama.load(DATA / case / "base")
    labels = jnp.roll(ids, -1, axis=1)
    config = lj.LoraConfig(rank=2, alpha=3)
    init = lambda variables: lj.init(jax.random.key(0), config, loaded.apply, variables, ids)
    adapters = random_adapters(jax.eval_shape(init, loaded.variables), jnp.float32)
    ours = lambda a: lj.lora(loaded.losses)(lj.attach(loaded.variables, a), ids, labels).mean()
    merged = lambda a: loaded.losses(lj.merge(loaded.variables, a), ids, labels).mean()
    (loss, grads), (want, wanted) = (jax.jit(jax.value_and_grad(f))(adapters) for f in (ours, merged))
    assert distance(loss, want) < 1e-5 and distance(grads, wanted) < 1e-4


# Fields that say nothing about the logits of these inputs: what files are for, the length of the longest text, ends, sizes that
# the family has no use for, and those of training.
SUMMARY = {f"summary_{name}" for name in ("activation", "first_dropout", "proj_to_labels", "type", "use_proj")}
NO_ACCOUNT = {
    "gemma3": {"_sliding_window_pattern"},  # beside layer_types
    "gpt2": {"resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn"} | SUMMARY,
    "gpt_neox": {"num_key_value_heads", "classifier_dropout", "hidden_dropout", "is_decoder"},
    "mixtral": {"router_jitter_noise"},
    "stablelm": {"hidden_dropout"},
    "phi3": {"original_max_position_embeddings", "embd_pdrop", "resid_pdrop"},
    "phi3_longrope": {"embd_pdrop", "resid_pdrop"},
    "qwen3": {"layer_types", "max_window_layers", "sliding_window", "use_sliding_window"},  # the last two need each other
    "qwen3_moe": {"sliding_window", "use_sliding_window"},
    "smollm3": {
        "layer_types",
        "sliding_window",
        "use_sliding_window",
        "no_rope_layer_interval",
    },  # the last beside no_rope_layers
    "starcoder2": {"embedding_dropout", "residual_dropout"},
}


@pytest.mark.parametrize("case", [case for case in CASES if case != "gemma3_images"])  # its text part is a gemma3
def test_every_field_is_honoured_or_refused(case, tmp_path):
    fields = json.loads((DATA / case / "base" / "config.json").read_text())
    config = families.read_config(fields)
    for name, value in fields.items():
        if name in {*OF_NO_ACCOUNT, *NO_ACCOUNT.get(case, ())}:
            continue
        for other in perturbed(value):
            try:
                changed = families.read_config({**fields, name: other})
            except (InputError, ValueError):
                continue
            assert changed != config, f"{name}: {other!r} changes nothing"


OF_THE_HUB = {
    "SmolLM2": ("llama_yarn", {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {}}, {"rope_interleaved": True}),
    "Qwen 2.5": ("qwen3", {"use_mrope": False}, {"use_mrope": True}),
    "Phi 3": ("phi3", {"attention_bias": False, "auto_map": {}, "original_max_position_embeddings": 4096}, {"attention_bias": True}),
    "Phi 4 mini": ("phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False}, {"lm_head_bias": True}),
    "Gemma 2": ("gemma2", {"hidden_act": "gelu_pytorch_tanh", "sliding_window_size": 4, "cache_implementation": "hybrid"}, {"x": 1}),
    "StarCoder 2": ("starcoder2", {"mlp_type": "default", "norm_type": "layer_norm", "layer_norm_epsilon": 1e-5}, {"mlp_type": "x"}),
    "gpt-oss": ("gpt_oss", {"experts_per_token": 2, "initial_context_length": 4096}, {"experts": 2}),
    "GPT-2": ("gpt2", {"n_ctx": 64, "task_specific_params": {}}, {"scale_attn_by_inverse_layer_idx": True}),
}  # fmt: skip


@pytest.mark.parametrize("model", OF_THE_HUB)
def test_fields_of_configurations_on_the_hub(model):
    case, extra, odd = OF_THE_HUB[model]
    fields = json.loads((DATA / case / "base" / "config.json").read_text())
    assert families.read_config(fields | extra) == families.read_config(fields)
    with pytest.raises(InputError, match=next(iter(odd))):
        families.read_config(fields | extra | odd)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_no_balance_loss(case):
    fields = json.loads((DATA / case / "base" / "config.json").read_text())
    config = families.read_config({**fields, "router_aux_loss_coef": 0.0})
    assert config.experts.balance == 0 and families.read_config(families.hf_config(config)) == config
    with pytest.raises(InputError, match="router_aux_loss_coef must be a positive number, not False"):
        families.read_config({**fields, "router_aux_loss_coef": False})


# --- a decoder within a model of images ---


IMAGES = DATA / "gemma3_images"


def changed_copy(directory, tensors=None, **fields):
    """The tiny Gemma 3 of images with other tensors or fields."""
    directory.mkdir()
    read = json.loads((IMAGES / "base" / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(read | fields))
    save_file(load_file(IMAGES / "base" / "model.safetensors") if tensors is None else tensors, directory / "model.safetensors")
    return directory


def test_the_configuration_of_gemma3_on_the_hub():
    """Gemma 3 4B's own file: what it leaves out are the defaults of transformers' Gemma3TextConfig."""
    rope = {"factor": 8.0, "rope_type": "linear"}
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": rope,
        "sliding_window": 1024,
    }
    tokens = {"boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144}
    fields = {"model_type": "gemma3", "mm_tokens_per_image": 256, "vision_config": {"hidden_size": 1152}, "dtype": "bfloat16"}
    config = families.read_config({**fields, **tokens, "text_config": {**text, "model_type": "gemma3_text"}})
    sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.vocab_size
    assert sizes == (8, 4, 256, 262208) and config.max_position_embeddings == 131072 and config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (2, (1, 106), 0)
    assert config.windows[:6] == (1024,) * 5 + (None,) and config.rope_scaling == LinearRope(factor=8.0)
    assert families.read_config(families.hf_config(config)) == config


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"hidden_size": 8}, r"does not know: hidden_size \(8\)"),
        ({"text_config": {"twist": 1}}, r"does not know: twist \(1\)"),
        ({"text_config": {"model_type": "llama"}}, "model_type is 'llama'; only 'gemma3_text' can be read"),
        ({"text_config": [1]}, r"text_config must be an object, not \[1\]"),
    ],
)
def test_a_wrong_configuration_of_a_part(fields, says, tmp_path):
    with pytest.raises(InputError, match=rf"config.json: .*{says}"):
        llama.load(changed_copy(tmp_path / "model", **fields))


def test_tensors_of_texts_have_the_names_of_any_version(tmp_path):
    old = load_file(IMAGES / "base" / "model.safetensors")
    assert "language_model.model.norm.weight" in old and "vision_tower.post_layernorm.bias" in old
    inside = lambda name: "model." + name.replace("language_model.model.", "language_model.")
    loaded = llama.load(changed_copy(tmp_path / "model", {inside(name): tensor for name, tensor in old.items()}))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, llama.load(IMAGES / "base").variables)


def test_an_adapter_of_the_part_for_images(tmp_path):
    shutil.copytree(IMAGES / "adapter", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for part in "AB":
        tensors[f"base_model.model.model.vision_tower.encoder.layers.0.mlp.fc1.lora_{part}.weight"] = np.ones(
            (3, 3), np.float32
        )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    loaded = llama.load(IMAGES / "base")
    with pytest.raises(InputError, match=r"vision_tower.*The model's part for images is not read: adapt its texts alone"):
        lj.peft.load(tmp_path, loaded.variables, names=loaded.names)


@pytest.mark.parametrize("case", ["qwen3", "qwen3_moe", "smollm3"])
def test_windows_that_are_switched_on(case):
    fields = json.loads((DATA / case / "base" / "config.json").read_text()) | {"use_sliding_window": True, "sliding_window": 3}
    fields.pop("layer_types", None)
    still = {"qwen3": (None,) * 4, "qwen3_moe": (3,) * 4, "smollm3": (None, None, None, 3)}
    assert families.read_config(fields).windows == still[case]


# What transformers takes for a field that a file leaves out.
LEFT_OUT = {
    "phi3": ("rms_norm_eps", 1e-5),
    "mixtral": ("rms_norm_eps", 1e-5),
    "gpt_oss": ("rms_norm_eps", 1e-5),
    "gemma": ("num_key_value_heads", 16),
    "gemma2": ("num_key_value_heads", 4),
    "gemma3": ("num_key_value_heads", 4),
    "qwen3_moe": ("num_key_value_heads", 4),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_fields_that_a_file_leaves_out(case):
    name, value = LEFT_OUT[case]
    fields = json.loads((DATA / case / "base" / "config.json").read_text()) | {"num_attention_heads": 64, "head_dim": 8}
    del fields[name]
    assert getattr(families.read_config(fields), name) == value


@pytest.mark.parametrize("case", ["llama_yarn", "qwen3_moe", "smollm3"])
def test_null_key_value_heads_are_as_many_as_heads(case):
    fields = json.loads((DATA / case / "base" / "config.json").read_text()) | {"num_attention_heads": 12, "head_dim": 8}
    assert families.read_config(fields | {"num_key_value_heads": None}).num_key_value_heads == 12


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}


@pytest.mark.parametrize("case", ["llama_yarn", "phi3"])
def test_the_original_length_is_one(case):
    """Transformers takes the one beside the rotary settings; a Phi-3 has it where it is not written too."""
    fields = json.loads((DATA / case / "base" / "config.json").read_text()) | {"rope_parameters": LONGROPE}
    fields.pop("original_max_position_embeddings", None)
    config = families.read_config(fields | {"original_max_position_embeddings": 8})
    assert config.rope_scaling.original_max_position_embeddings == 8
    odd = fields if case == "phi3" else fields | {"original_max_position_embeddings": 4096}
    with pytest.raises(InputError, match="original_max_position_embeddings is 4096, but 8 in the rotary settings"):
        families.read_config(odd)


@pytest.mark.parametrize("kind", ["dynamic", "longrope", "yarn"])
def test_scaled_rotations_need_the_longest_length(kind):
    fields = json.loads((DATA / "llama_yarn" / "base" / "config.json").read_text())
    del fields["max_position_embeddings"]
    settings = LONGROPE if kind == "longrope" else {"rope_type": kind, "factor": 2.0}
    with pytest.raises(InputError, match="lacks max_position_embeddings"):
        families.read_config(fields | {"rope_parameters": settings})


@pytest.mark.parametrize("activation", ["gelu_python", "quick_gelu", "leaky_relu", "mish", "tanh"])
def test_activations_beside_the_usual(activation):
    fields = json.loads((DATA / "gpt2" / "base" / "config.json").read_text())
    assert families.read_config(fields | {"activation_function": activation}).activation == activation


@pytest.mark.parametrize("kind", ["rms", "offset", "layer"])
def test_norms_in_bfloat16_are_rounded_once(kind, rng):
    config = dataclasses.replace(llama.sizes(DATA / "qwen3" / "base"), norm=kind)
    x, scale, bias = (
        jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(jax.random.split(rng, 3), ((4, 32), 32, 32))
    )
    params = {"scale": scale, "bias": bias} if kind == "layer" else {"scale": scale}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    got = Norm(config, jnp.bfloat16).apply({"params": params}, x)
    want = Norm(config, jnp.float32).apply({"params": wide[0]}, wide[1])
    np.testing.assert_array_equal(got, want.astype(jnp.bfloat16))


def perturbed(value):
    """Other values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 + 1]
    if isinstance(value, str):
        return [value + "x"]
    if isinstance(value, list):
        return [value[:-1]] + ([value[::-1]] if value != value[::-1] else []) if value else [[0]]
    if isinstance(value, dict):
        return [{**value, k: other} for k, v in value.items() for other in perturbed(v)] + [{**value, "twist": 1}]
    return [3]
