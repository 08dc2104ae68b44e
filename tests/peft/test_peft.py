"""Adapters that Hugging Face PEFT wrote, against the outputs and merged weights that it gets from them, and back again."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import peft
from tests.support import peft_cases
from tests.support.marks import every_other
from tests.support.peft_cases import CASES

# Of one use of a tied parameter, or with a scale of its own for each.
TIED_USES = {
    "llama-tied-embed-only",
    "llama-tied-head-only",
    "llama-tied-saved-untied",
    "llama-tied-alphas",
    "llama-tied-ranks",
    "llama-tied-tokens-apart",
}
# Where the head is tied PEFT stores the rows of the embedding alone; a head of its own has them too.
ROWS_ONCE = {("llama-tied-tokens", "untied"), ("llama-tied-tokens-same", "untied")}
GROUPED = {"plain-grouped", "plain-dora-grouped"}
REPLAYED = {
    case
    for case, fields in CASES.items()
    if fields["lora"].get("init_lora_weights") in ("pissa", "olora") and not fields.get("convert")
}
# Experts of before PEFT 0.19.1 that are written as they are laid out today.
OTHERWISE = {"mixtral-experts-0180", "mixtral-square-0180", "mixtral-square-0190", "gpt-oss-square-0190"}
# Written twice by PEFT, or as it is in the base.
COPIES = re.compile(r".*(\.modules_to_save\.|\.original_module\.).*|.*\.base_layer\.weight")


def flavours(case):
    model = CASES[case]["model"]
    if case in TIED_USES:
        return ["untied"]
    if case == "llama-saved-targets":  # a layer saved whole, others with pairs
        return ["unrolled"]
    if model.startswith("llama"):
        return ["unrolled", "scanned"] + (["untied"] if model == "llama-tied" else [])
    return ["unrolled"]


RUNS = [(case, flavour) for case in CASES if case not in GROUPED for flavour in flavours(case)]


def load(case, flavour):
    variables, names, apply = peft_cases.model(CASES[case]["model"], flavour)
    return peft.load(peft_cases.directory(case), variables, names=names, **peft_cases.settings(case)), variables, names, apply


# The other flavours of a model hold the same adapters: that these are read right, the merged weights and the file show.
OUTPUTS = [pytest.param(*run, marks=[] if run[1] == flavours(run[0])[0] else pytest.mark.slow) for run in RUNS]


@pytest.mark.parametrize(("case", "flavour"), OUTPUTS)
def test_outputs_equal_peft(case, flavour):
    adapters, variables, _, apply = load(case, flavour)
    if apply is None:
        assert CASES[case]["model"] in ("gpt2", "mixtral", "vit", "plain", "mixtral-square", "gpt-oss-square")
        return
    want, inputs = peft_cases.expected(case), peft_cases.inputs(case)
    tokens = CASES[case]["lora"].get("alora_invocation_tokens")
    options = {} if tokens is None else {"active": lj.active_from(inputs["input_ids"], tuple(tokens))}
    got = jax.jit(lj.lora(apply, **options))(lj.attach(variables, adapters), **inputs)
    np.testing.assert_allclose(got, want["output"], rtol=0, atol=1e-5)
    assert np.abs(got - want["base_output"]).max() > 1e-3


@pytest.mark.parametrize(("case", "flavour"), every_other(RUNS))
def test_merged_weights_equal_peft(case, flavour):
    adapters, variables, names, _ = load(case, flavour)
    want = {
        name.removeprefix("delta:"): delta for name, delta in peft_cases.expected(case).items() if name.startswith("delta:")
    }
    if not want:
        assert not isinstance(CASES[case]["merge"], float) or CASES[case]["model"] == "llama-tied"
        return
    merged = peft_cases.tensors(lj.merge(variables, adapters), names)
    base = peft_cases.tensors(variables, names)
    tied = {name.tied for name in names.values()} | ({"lm_head.weight"} if case.startswith("gpt2") else set())
    assert set(want) - set(merged) <= tied
    for tensor in set(want) & set(merged):
        np.testing.assert_allclose(merged[tensor] - base[tensor], want[tensor], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("case", "flavour"), RUNS)
def test_saving_what_was_loaded_gives_the_same_tensors(case, flavour, tmp_path):
    adapters, variables, names, _ = load(case, flavour)
    lora = CASES[case]["lora"]
    alpha = lora.get("lora_alpha", lora["r"])  # VeRA has none
    config = lj.LoraConfig(rank=lora["r"], alpha=alpha, scaling="rslora" if lora.get("use_rslora") else "lora")
    options = peft_cases.settings(case)
    task = "CAUSAL_LM" if "alora_invocation_tokens" in lora else None
    peft.save(tmp_path, adapters, names=names, config=config, variables=variables, task_type=task, **options)
    again = peft.load(tmp_path, variables, names=names, **options)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        assert got.dtype == want.dtype and got.tobytes() == want.tobytes()
    if case in REPLAYED or case in OTHERWISE:
        return
    place = options["adapter"] or "."
    got, want = (load_file(root / place / "adapter_model.safetensors") for root in (tmp_path, peft_cases.directory(case)))
    twice = {"base_model.model.lm_head.token_adapter.trainable_tokens_delta"} if (case, flavour) in ROWS_ONCE else set()
    assert set(got) == {name for name in want if not COPIES.fullmatch(name)} | twice
    assert all(
        got[name].dtype == want[name].dtype and got[name].tobytes() == want[name].tobytes() for name in want if name in got
    )


@pytest.mark.parametrize("case", sorted(TIED_USES))
@pytest.mark.parametrize("flavour", ["unrolled", "scanned"])
def test_an_adapter_of_one_use_of_a_tied_parameter_is_refused(case, flavour):
    with pytest.raises(ValueError, match=r"the adapter .*, but params/embed_tokens/embedding is both .*tie=False"):
        load(case, flavour)


@pytest.mark.parametrize("case", sorted(GROUPED))
def test_an_adapter_that_mixes_the_groups_of_a_convolution_is_refused(case):
    with pytest.raises(ValueError, match="takes all channels to each group, which is no change of the kernel"):
        load(case, "unrolled")


def test_a_replayed_adapter_has_twice_the_rank():
    adapters, *_ = load("llama-pissa", "scanned")
    assert {adapter.rank for adapter in adapters.values()} == {2 * CASES["llama-pissa"]["lora"]["r"]}


def test_pairs_in_some_layers_and_whole_kernels_in_others_need_an_unrolled_model():
    with pytest.raises(ValueError, match="would get a pair in some layers and be trained whole in others"):
        load("llama-saved-targets", "scanned")


# --- our own adapters, written for PEFT -------------------------------------------------------------------------------


def moved(adapters):
    """Adapters off their start, as training would leave them: layers of rank 0 stay zero, and so does what is frozen."""
    draw = np.random.default_rng(3)
    leaves, treedef = jax.tree.flatten(adapters)
    rates = [0.1 if label == "adapter" else 0.0 for label in jax.tree.leaves(lj.labels(adapters))]
    steps = [rate * draw.normal(size=leaf.shape) for leaf, rate in zip(leaves, rates)]
    moved = treedef.unflatten(
        [jnp.asarray((leaf + step).astype(leaf.dtype)) for leaf, step in zip(map(np.asarray, leaves), steps)]
    )
    for path, adapter in moved.items():
        if isinstance(adapter, lj.LowRank) and adapter.ranks is not None:
            moved[path] = jax.tree.map(lambda leaf, pair=adapter: pair.where_adapted(leaf, 0.0), adapter)
    return moved


def our_adapters(flavour, **options):
    variables, names, apply = peft_cases.model("llama", flavour)
    config = lj.LoraConfig(**{"rank": 4, "targets": "all-linear", **options})
    ids = peft_cases.inputs("llama-qv")["input_ids"]
    return moved(lj.init(jax.random.key(0), config, apply, variables, ids)), config, variables, names


@pytest.mark.parametrize("flavour", ["unrolled", "scanned"])
def test_what_is_saved_loads_again(flavour, tmp_path):
    adapters, config, variables, names = our_adapters(
        flavour,
        alpha=6,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"up_proj": 1},
        layers=[0, 2],
        scaling="rslora",
        train=["norm/scale"],
    )
    peft.save(tmp_path, adapters, names=names, config=config, base_model="org/model", task_type="CAUSAL_LM")
    again = peft.load(tmp_path, variables, names=names)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(got, want)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "org/model" and fields["task_type"] == "CAUSAL_LM"
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"]) == (4, 6, True)
    assert fields["rank_pattern"] == {rf"^model\.layers\.{i}\.self_attn\.q_proj": 2 for i in (0, 2)}
    assert fields["modules_to_save"] == ["model.norm"]


@pytest.mark.parametrize("flavour", ["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ({"method": "vera", "dropout": 0.25, "layers": [0, 2]}, {"peft_type": "VERA", "r": 4, "vera_dropout": 0.25}),
        ({"trainable_token_indices": {"embed_tokens": [7, 2]}}, {"trainable_token_indices": {"model.embed_tokens": [7, 2]}}),
        ({"alora_invocation_tokens": [7, 2]}, {"alora_invocation_tokens": [7, 2]}),
    ],
)
def test_the_variants_load_again(flavour, options, fields, tmp_path):
    adapters, config, variables, names = our_adapters(flavour, targets=["q_proj", "up_proj"], **options)
    peft.save(tmp_path, adapters, names=names, config=config, task_type="CAUSAL_LM")
    assert json.loads((tmp_path / "adapter_config.json").read_text()).items() >= fields.items()
    again = peft.load(tmp_path, variables, names=names)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)
    for got, want in zip(jax.tree.leaves(again), jax.tree.leaves(adapters), strict=True):
        np.testing.assert_array_equal(got, want)


def test_scanned_and_unrolled_models_write_the_same_file(tmp_path):
    adapters, config, _, names = our_adapters("scanned", layers=[1])
    variables, unrolled, _ = peft_cases.model("llama", "unrolled")
    peft.save(tmp_path / "a", adapters, names=names, config=config)
    peft.save(tmp_path / "b", peft.load(tmp_path / "a", variables, names=unrolled), names=unrolled, config=config)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(("alpha", "rank"), [(16, 49), (7, 3), (0.1, 7), (1 / 3, 5)])
@pytest.mark.parametrize("scaling", ["lora", "rslora"])
def test_the_scale_comes_back_exactly(alpha, rank, scaling, tmp_path):
    config = lj.LoraConfig(rank=rank, alpha=alpha, scaling=scaling)
    pair = lj.LowRank(jnp.ones((64, rank)), jnp.ones((rank, 64)), lj.Layout((), (0,), (1,)), config.scale(rank, alpha))
    names = {"w": peft.HFName("w.weight", "i o -> o i")}
    peft.save(tmp_path, {"w": pair}, names=names, config=config)
    assert peft.load(tmp_path, {"w": jnp.zeros((64, 64))}, names=names)["w"].scale == pair.scale
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"] == alpha


def test_kernels_that_share_a_become_two_modules(tmp_path):
    """A kernel of keys and values in one, as Gemma has it, adapted by one pair with a shared A."""
    key = jax.random.key(0)
    pair = lj.LowRank(jax.random.normal(key, (6, 2)), jax.random.normal(key, (2, 2, 3, 4)), lj.Layout((), (2,), (0, 1, 3)), 0.5)
    names = {"kv": peft.HFName("attn.{c:k|v}_proj.weight", "c n d h -> (n h) d")}
    variables = {"kv": jnp.zeros((2, 3, 6, 4))}
    peft.save(tmp_path, {"kv": pair}, names=names)
    again = peft.load(tmp_path, variables, names=names)
    assert again["kv"].layout == lj.Layout((0,), (2,), (1, 3))
    np.testing.assert_allclose(lj.merge(variables, again)["kv"], lj.merge(variables, {"kv": pair})["kv"], rtol=1e-6)


def test_an_adapter_of_the_transpose_is_turned(tmp_path):
    """A tied table that was adapted by its use as the head: A and B change places."""
    pair = lj.LowRank(jnp.ones((5, 2)), jnp.arange(16.0).reshape(2, 8), lj.Layout((), (1,), (0,)), 0.5)
    names = {"table": peft.HFName("embed.weight", kind="embedding")}
    variables = {"table": jnp.zeros((8, 5))}
    peft.save(tmp_path, {"table": pair}, names=names)
    again = peft.load(tmp_path, variables, names=names)
    np.testing.assert_array_equal(lj.merge(variables, again)["table"], lj.merge(variables, {"table": pair})["table"])


def test_a_tied_embedding_is_written_for_both_uses(tmp_path):
    variables, names, apply = peft_cases.model("llama-tied", "scanned")
    ids = peft_cases.inputs("llama-tied-both")["input_ids"]
    config = lj.LoraConfig(rank=2, targets=["embed_tokens"])
    adapters = moved(lj.init(jax.random.key(0), config, apply, variables, ids))
    peft.save(tmp_path, adapters, names=names, config=config, variables=variables)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["ensure_weight_tying"] and fields["target_modules"] == ["lm_head", "model.embed_tokens"]
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert sorted(tensor.shape for tensor in stored.values()) == [(2, 32), (2, 64), (32, 2), (64, 2)]  # and no table
    [table] = adapters
    peft.save(tmp_path, adapters, names=names, config=config, variables=variables, changed=[table])
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert set(again) - set(stored) == {"base_model.model.model.embed_tokens.base_layer.weight"}  # once
    with pytest.raises(ValueError, match=r"changed: save.* has no such tables: params/embed_tokens/embedding"):
        peft.save(tmp_path, adapters, names=names, changed=[table])
    untied, untied_names, untied_apply = peft_cases.model("llama-tied", "untied")
    apart = peft.load(tmp_path, untied, names=untied_names)
    assert set(apart) == {"params/embed_tokens/embedding", "params/lm_head/kernel"}
    got, want = (lj.lora(f)(lj.attach(v, a), ids) for f, v, a in ((untied_apply, untied, apart), (apply, variables, adapters)))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("trained", [["bias"], ["query/bias"]])
def test_bias_modes(trained, tmp_path):
    variables, names, apply = peft_cases.model("bert")
    config = lj.LoraConfig(rank=2, targets=["query"], train=trained)
    adapters = moved(lj.init(jax.random.key(0), config, apply, variables, **peft_cases.inputs("bert-bias")))
    peft.save(tmp_path, adapters, names=names, config=config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == {"bias": "all"}.get(trained[0], "lora_only")
    again = peft.load(tmp_path, variables, names=names)
    assert jax.tree.structure(again) == jax.tree.structure(adapters)


def test_the_rest_of_a_module_comes_from_the_base(tmp_path):
    variables, names, apply = peft_cases.model("bert")
    config = lj.LoraConfig(rank=2, targets=["query"], train=["classifier/kernel"])
    adapters = moved(lj.init(jax.random.key(0), config, apply, variables, **peft_cases.inputs("bert-bias")))
    with pytest.raises(ValueError, match="it needs params/classifier/bias too: train them as well, or pass"):
        peft.save(tmp_path, adapters, names=names, config=config)
    peft.save(tmp_path, adapters, names=names, config=config, variables=variables)
    assert (
        peft.load(tmp_path, variables, names=names)["params/classifier/bias"].value.tobytes()
        == variables["params"]["classifier"]["bias"].tobytes()
    )


def test_one_magnitude_asks_for_all(tmp_path):
    adapters, variables, names, _ = load("llama-dora", "unrolled")
    path = next(iter(adapters))
    adapters[path] = dataclasses.replace(adapters[path], magnitude=None)
    with pytest.raises(ValueError, match=f"{path} has no magnitude, but other adapters have"):
        peft.save(tmp_path, adapters, names=names)
    peft.save(tmp_path, adapters, names=names, variables=variables)
    ids = peft_cases.inputs("llama-dora")["input_ids"]
    got, want = (
        lj.lora(peft_cases.model("llama")[2])(lj.attach(variables, a), ids)
        for a in (peft.load(tmp_path, variables, names=names), adapters)
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_a_task_head_is_written_though_it_is_not_trained(tmp_path):
    """PEFT saves the classifier of a SEQ_CLS adapter by itself, and fails to load a file without it."""
    variables, names, apply = peft_cases.model("bert")
    config = lj.LoraConfig(rank=2, targets=["query"])
    adapters = moved(lj.init(jax.random.key(0), config, apply, variables, **peft_cases.inputs("bert-bias")))
    with pytest.raises(ValueError, match="it needs params/classifier/bias, params/classifier/kernel too"):
        peft.save(tmp_path, adapters, names=names, task_type="SEQ_CLS")
    peft.save(tmp_path, adapters, names=names, task_type="SEQ_CLS", variables=variables)
    assert set(peft.load(tmp_path, variables, names=names)) - set(adapters) == {
        "params/classifier/kernel",
        "params/classifier/bias",
    }


@pytest.mark.parametrize("flavour", every_other(["scanned", "unrolled"]))
def test_trained_adapters_give_the_same_logits_after_a_round_trip(flavour, tmp_path, lenient):
    variables, names, apply = peft_cases.model("llama", flavour)
    ids = peft_cases.inputs("llama-qv")["input_ids"]
    config = lj.LoraConfig(rank=4, alpha=8, train=["norm/scale"])
    adapters = lj.init(jax.random.key(0), config, apply, variables, ids)

    def loss_fn(params, batch, key):
        logits = lj.lora(apply)(params, batch)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], batch[:, 1:]).mean()

    tx = optax.adamw(1e-2)
    state = lj.train.init_state(adapters, tx, key=jax.random.key(1))
    step, losses = lj.train.make_train_step(loss_fn, tx), []
    for _ in range(5):
        state, metrics = step(state, variables, ids)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.1
    peft.save(tmp_path, state.adapters, names=names, config=config, variables=variables)
    again = peft.load(tmp_path, variables, names=names)
    got, want = (jax.jit(lj.lora(apply))(lj.attach(variables, a), ids) for a in (again, state.adapters))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("case", "rename"), [
    ("bert-dora", lambda name: name.replace("model.bert.", "model.")),  # BertModel, which has no head
    ("llama-patterns", lambda name: name.replace("model.model.", "model.")),
    ("llama-qv", lambda name: name.replace("base_model.model.", "base_model.model.language_model.")),  # within a larger model
])  # fmt: skip
def test_model_classes_with_other_outermost_modules(case, rename, tmp_path):
    want, variables, names, _ = load(case, "unrolled")
    tensors = {
        rename(name): tensor for name, tensor in load_file(peft_cases.directory(case) / "adapter_model.safetensors").items()
    }
    if case.startswith("bert"):
        tensors = {name: tensor for name, tensor in tensors.items() if "classifier" not in name}
        want = {path: adapter for path, adapter in want.items() if "classifier" not in path}
    fields = json.loads((peft_cases.directory(case) / "adapter_config.json").read_text()) | {"modules_to_save": None}
    fields["rank_pattern"] = {key.replace("^model.", "^"): value for key, value in fields["rank_pattern"].items()}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    got = peft.load(tmp_path, variables, names=names)
    assert list(got) == list(want)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))


@pytest.mark.parametrize(("axes", "path"), [("l o -> o", "b"), ("o l -> o", None)])
def test_a_bias_goes_to_the_layers_own_if_its_axes_lie_alike(axes, path, tmp_path):
    names = {"w": peft.HFName("layers.{l}.w.weight", "l i o -> o i"), "b": peft.HFName("layers.{l}.w.bias", axes)}
    key = jax.random.key(0)
    pair = lj.LowRank(
        jnp.ones((3, 4, 2)), jnp.ones((3, 2, 3)), lj.Layout((0,), (1,), (2,)), bias=jax.random.normal(key, (3, 3))
    )
    peft.save(tmp_path, {"w": pair}, names=names)
    loaded = peft.load(tmp_path, {"w": jnp.zeros((3, 4, 3)), "b": jnp.zeros((3, 3))}, names=names)["w"]
    assert loaded.bias_path == path
    np.testing.assert_array_equal(loaded.bias, pair.bias)
