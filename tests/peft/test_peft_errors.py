"""PEFT's own rules for which module gets what; errors that say what is wrong; files that mean harm."""

import dataclasses
import json
import pickle
import random
import shutil
import struct
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax import peft
from lora_jax.core.adapter import Rows
from lora_jax.peft.config import Settings
from tests.support import peft_cases

TRUTH = json.loads((peft_cases.DATA / "targets.json").read_text())
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.mark.parametrize("case", TRUTH["cases"], ids=range(len(TRUTH["cases"])))
def test_modules_ranks_and_scales_are_those_of_peft(case):
    settings = Settings.from_fields({**case["fields"], "peft_type": "LORA"}, "here")
    for module, answer in zip(TRUTH["modules"], case["answers"], strict=True):
        assert [settings.targets(module), settings.rank(module), settings.scale(module)] == answer, module


@pytest.fixture
def copied(tmp_path):
    """A copy of a case's directory, with `change(fields=, tensors=)` to spoil it."""

    class Copied:
        directory = tmp_path / "adapter"

        def take(self, case="llama-qv"):
            shutil.copytree(peft_cases.directory(case), self.directory)
            self.directory.chmod(0o755)
            for file in self.directory.iterdir():
                file.chmod(0o644)
            self.variables, self.names, _ = peft_cases.model(peft_cases.CASES[case]["model"])
            return self

        def fields(self, **changed):
            file = self.directory / CONFIG
            file.write_text(json.dumps(json.loads(file.read_text()) | changed))
            return self

        def tensors(self, fn):
            found = load_file(self.directory / WEIGHTS)
            fn(found)
            save_file(found, self.directory / WEIGHTS)
            return self

        def load(self, **options):
            return peft.load(self.directory, self.variables, names=self.names, **options)

    return Copied()


Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "the peft_type is 'IA3'; only 'LORA' and 'VERA' can be read"),
        ({"peft_type": None}, "the peft_type is None"),
        ({"alora_invocation_tokens": "start"}, "alora_invocation_tokens must be a list of whole numbers, not 'start'"),
        ({"alora_invocation_tokens": [1], "use_dora": True}, "PEFT has no aLoRA with use_dora"),
        ({"trainable_token_indices": [1]}, r"asks for tensors that .* lacks: .*token_adapter.trainable_tokens_delta"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, r"lacks: .*model.embed_tokens.token_adapter.trainable_tokens_delta"),
        ({"trainable_token_indices": {"tokens_embed": [1]}}, "trainable_token_indices: no module is called 'tokens_embed'"),
        ({"peft_type": "VERA", "alora_invocation_tokens": [1]}, r"sets fields that are not supported.* alora_invocation_tokens=\[1\]"),
        ({"trainable_token_indices": [1, 1]}, "trainable_token_indices must be a list of different whole numbers"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be a list of different whole numbers"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"use_qalora": True}, "use_qalora=True"),
        ({"something_new": 3}, "something_new=3"),
        ({"init_lora_weights": "corda"}, "init_lora_weights is 'corda': the adapter belongs to base weights that .* Convert it in PEFT"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights is 'loftq'"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights is 'pissa_niter_16'"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights is 'lora_ga'"),
        ({"init_lora_weights": 7}, "init_lora_weights is 7"),
        ({"r": 0}, "r must be a whole number of at least 1, not 0"),
        ({"r": True}, "r must be a whole number"),
        ({"r": 2**60}, "has the shape .* need"),
        ({"lora_alpha": "8"}, "lora_alpha must be a number, not '8'"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number"),
        ({"lora_dropout": 1.0}, "lora_dropout must be a number of at least 0 and below 1"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern must be an object of whole numbers"),
        ({"rank_pattern": {"(": 2}}, r"rank_pattern: .* is not a regular expression"),
        ({"target_modules": "(a+)+$" * 20}, "asks for|tensors that no parameter takes"),
        ({"target_modules": 3}, "target_modules must be a string or a list of strings"),
        ({"modules_to_save": ["(", "lm_head"]}, "modules_to_save: .* is not a regular expression"),
        ({"target_modules": "x{e<=20}"}, "target_modules: .* is not a regular expression"),
        ({"target_modules": "(?R)"}, "target_modules: .* is not a regular expression"),
        ({"target_modules": "q|" * 100_000}, "target_modules: a regular expression of 200000 characters is too long"),
        ({"bias": "some"}, "bias must be 'none', 'all' or 'lora_only', not 'some'"),
        ({"use_dora": True}, r"asks for tensors that .* lacks: base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ({"lora_bias": True}, "lacks: .*lora_B.bias"),
        ({"r": 8}, r"q_proj.lora_A.weight has the shape \(4, 32\); params/layer_0/self_attn/q_proj/kernel of the shape \(32, 32\)"),
        ({"target_modules": ["q_proj"]}, "has 6 tensors that no parameter takes: .*v_proj.lora_A.weight.* strict=False leaves them out"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "asks for tensors that .* lacks: .*k_proj.lora_A.weight"),
        ({"modules_to_save": ["lm_head"]}, "lacks: base_model.model.lm_head.weight"),
        ({"layers_to_transform": [0]}, "has 8 tensors that no parameter takes"),
    ],
)  # fmt: skip
def test_a_configuration_that_is_not_honoured_is_an_error(fields, message, copied):
    with pytest.raises(ValueError, match=message):
        copied.take().fields(**fields).load()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"save_projection": False}, "save_projection is off, so the file lacks VeRA's random matrices, which torch alone can draw"),
        ({"bias": "lora_only"}, "bias must be 'none', 'all' or 'vera_only', not 'lora_only'"),
        ({"use_dora": True}, "sets fields that are not supported.* use_dora=True"),
        ({"r": 5}, r"q_proj.vera_lambda_d has the shape \(6,\)"),
        ({"target_modules": ["q_proj", "v_proj"]}, "has 6 tensors that no parameter takes: .*down_proj.vera_lambda_b"),
        ({"target_modules": ["embed_tokens"]}, "PEFT has VeRA for linear layers only, and model.embed_tokens.weight is of another kind"),
    ],
)  # fmt: skip
def test_a_vera_configuration_that_is_not_honoured_is_an_error(fields, message, copied):
    with pytest.raises(ValueError, match=message):
        copied.take("llama-vera").fields(**fields).load()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("base_model.vera_A"), "lacks: base_model.vera_A"),
        (lambda t: t.update({"base_model.vera_A": t["base_model.vera_A"][:, :40]}), r"vera_A has the shape \(6, 40\), of which .*down_proj"),
        (lambda t: t.update({"base_model.vera_B": t["base_model.vera_B"][:, :5]}), r"vera_B has the shape \(32, 5\)"),
        (lambda t: t.update({"base_model.vera_C": t["base_model.vera_B"]}), "1 tensors that no parameter takes: base_model.vera_C"),
    ],
)  # fmt: skip
def test_veras_shared_matrices_must_fit(spoil, message, copied):
    with pytest.raises(ValueError, match=message):
        copied.take("llama-vera").tensors(spoil).load()


DELTA = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"


@pytest.mark.parametrize(
    ("fields", "spoil", "message"),
    [
        ({}, lambda t: t.pop(DELTA), r"lacks: \*.token_adapter.trainable_tokens_delta"),
        ({}, lambda t: t.update({DELTA: t[DELTA][:3]}), r"trainable_tokens_delta has the shape \(3, 32\)"),
        ({"trainable_token_indices": [1, 2, 3, 64]}, len, r"embed_tokens/embedding: the rows must be different ones of 64"),
        ({"trainable_token_indices": None}, len, "1 tensors that no parameter takes: .*trainable_tokens_delta"),
        ({"modules_to_save": ["embed_tokens"]}, lambda t: t.update({DELTA.replace("token_adapter.trainable_tokens_delta", "weight"): np.ones((64, 32), np.float32)}),
         "params/embed_tokens/embedding would get rows and something else: PEFT has no such adapters"),
    ],
)  # fmt: skip
def test_rows_must_fit(fields, spoil, message, copied):
    with pytest.raises(ValueError, match=message):
        copied.take("llama-tokens").fields(**fields).tensors(spoil).load()


def test_whether_a_head_is_tied_to_a_table_with_rows_needs_their_values(copied):
    copied.take("llama-tokens")
    copied.variables = jax.eval_shape(lambda: copied.variables)
    with pytest.raises(
        ValueError, match="params/lm_head/kernel: whether it is tied to params/embed_tokens/embedding needs the"
    ):
        copied.load()


def test_a_slow_regular_expression_is_stopped(copied):
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"target_modules: the regular expressions take too long, at .* on "):
        copied.take().fields(target_modules=r"(.*)" * 12 + r"\1\2Q?q_proj\d*.").load()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop(Q0), f"asks for tensors that {WEIGHTS} lacks: {Q0}"),
        (lambda t: t.update({Q0: t[Q0][:3]}), r"q_proj.lora_A.weight has the shape \(3, 32\)"),
        (lambda t: t.update({Q0: t[Q0].T.copy()}), r"has the shape \(32, 4\)"),
        (lambda t: t.update({Q0: t[Q0] * np.nan}), f"has NaN or infinite values in {Q0}"),
        (lambda t: t.update({Q0: t[Q0].astype(np.int32)}), r"an adapter is made of F64, F32, F16, BF16 tensors, unlike .*\(I32\)"),
        (lambda t: t.update({Q0: t[Q0].astype(np.float64)}), "has float64 tensors: set jax_enable_x64"),
        (lambda t: t.update({Q0.removeprefix("base_model."): t.pop(Q0)}), "has tensors outside of 'base_model.model.'"),
        (lambda t: t.update({f"base_model.model.x{i}": t[Q0] for i in range(10_000)}), "10000 tensors that no parameter takes: .* and 9992 more"),
        (lambda t: t.clear(), "lacks"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_errors(spoil, message, copied):
    with pytest.raises(ValueError, match=message):
        copied.take().tensors(spoil).load()


@pytest.mark.parametrize("field", ["rank_pattern", pytest.param("modules_to_save", marks=pytest.mark.slow)])
def test_a_hundred_thousand_patterns_end_in_time(field, copied):
    keys = [f"module_{i}_proj" for i in range(100_000)]
    began = time.monotonic()
    with pytest.raises(ValueError, match=f"{field}: the regular expressions take too long"):
        copied.take().fields(**{field: dict.fromkeys(keys, 2) if field == "rank_pattern" else keys}).load()
    assert time.monotonic() - began < 40


def test_bytes_before_the_json_are_no_matter(copied):
    copied.take()
    file = copied.directory / CONFIG
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert len(copied.load()) == 6


def test_no_initialiser_is_a_plain_start(copied):
    assert len(copied.take().fields(init_lora_weights=None).load()) == 6


def test_unused_tensors_may_be_left_out_with_a_warning(copied):
    copied.take().tensors(lambda t: t.update({"base_model.model.other.lora_A.weight": t[Q0]}))
    with pytest.warns(UserWarning, match="has 1 tensors that no parameter takes: base_model.model.other.lora_A.weight"):
        adapters = copied.load(strict=False)
    assert len(adapters) == 6


def test_a_changed_base_embedding_is_an_error(copied):
    copied.take("llama-embed-head")
    copied.tensors(
        lambda t: t.update({"base_model.model.lm_head.base_layer.weight": t["base_model.model.lm_head.base_layer.weight"] * 2})
    )
    with pytest.raises(
        ValueError, match=r"lm_head.base_layer.weight .* replaces the base's weight, but is not equal to params/lm_head/kernel"
    ):
        copied.load()


def test_a_pickle_is_never_opened(copied, tmp_path):
    class Harm:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path),))

    copied.take()
    (copied.directory / WEIGHTS).unlink()
    (copied.directory / "adapter_model.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(
        FileNotFoundError, match=r"has no adapter_model.safetensors; its adapter_model.bin is a pickle, .* never opened"
    ):
        copied.load()
    (copied.directory / "adapter_model.bin").rename(copied.directory / WEIGHTS)
    with pytest.raises(ValueError, match="is truncated or not a safetensors file"):
        copied.load()
    assert tmp_path.is_dir()


@pytest.mark.parametrize("name", ["../adapter", "/etc", "a/b", "..", ".", "", "a\\b", "c:x", "x\0y", 3])
def test_an_adapters_name_is_one_directory(name, copied, tmp_path):
    copied.take()
    with pytest.raises(ValueError, match="is not the name of a directory"):
        copied.load(adapter=name)
    with pytest.raises(ValueError, match="is not the name of a directory"):
        peft.save(tmp_path / "new", {"w": PAIR}, names={"w": NAME}, adapter=name)
    assert not (tmp_path / "new").exists()


def test_directories_that_are_no_adapter(copied, tmp_path):
    copied.take("llama-named")
    with pytest.raises(
        FileNotFoundError, match=r"has no adapter_config.json; it holds adapters by name: choose one with adapter='task_a'"
    ):
        copied.load()
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        copied.load(adapter="task_b")
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config.json$"):
        peft.load(tmp_path, copied.variables, names=copied.names)


def test_names_of_another_model(copied):
    copied.take()
    with pytest.raises(ValueError, match=r"the names are those of another model: .* params/layer_0/"):
        peft.load(copied.directory, {"params": {"w": jnp.ones(3)}}, names=copied.names)


def test_shapes_suffice_for_a_plain_adapter(copied):
    copied.take()
    want = copied.load()
    copied.variables = jax.eval_shape(lambda: copied.variables)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), copied.load(), want))


def test_replaying_needs_the_base(copied):
    copied.take("llama-pissa")
    copied.variables = jax.eval_shape(lambda: copied.variables)
    with pytest.raises(ValueError, match="init_lora_weights='pissa' needs the base's values, not shapes"):
        copied.load()


# --- writing ----------------------------------------------------------------------------------------------------------

PAIR = lj.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), lj.Layout((), (0,), (1,)), 0.5)
NAME = peft.HFName("w.weight", "i o -> o i")
EXPERTS = lj.LowRank(jnp.ones((2, 4, 2)), jnp.ones((2, 2, 3)), lj.Layout((0,), (1,), (2,)), 0.5)
FUSED = peft.HFName("experts.w", "e i o -> e o i", "parameter")
VERA = dataclasses.replace(PAIR, scale=1.0, lambda_d=jnp.ones(2), lambda_b=jnp.ones(3), frozen=("a", "b"))
ROWS = Rows(jnp.ones((2, 3)), (0, 4), lj.Layout((), (0,), (1,)))
TWO = {"w": NAME, "v": peft.HFName("v.weight", "i o -> o i")}
TABLE = {"w": NAME, "t": peft.HFName("embed.weight", kind="embedding")}


@pytest.mark.parametrize(
    ("adapters", "names", "message"),
    [
        ({"w": dataclasses.replace(PAIR, magnitude=jnp.ones(3), bias=jnp.ones(3))}, {"w": NAME}, "no adapters with both magnitudes and biases"),
        ({"w": dataclasses.replace(PAIR, a=jnp.full((4, 2), jnp.nan))}, {"w": NAME}, "these adapters hold NaN or infinite values: w"),
        ({"w": PAIR}, {"w": peft.HFName("weight", "i o -> o i")}, "w: the name 'weight' has no module"),
        ({"w": PAIR}, {}, "names has no Hugging Face name for w"),
        ({"w": jax.eval_shape(lambda: PAIR)}, {"w": NAME}, "these adapters are abstract: w"),
        ({"w": lj.Full(jnp.ones((4, 3)))}, {"w": NAME}, "PEFT needs a low-rank pair, and these adapters have none"),
        ({"w": PAIR, "v": dataclasses.replace(PAIR, dropout=0.1)}, {"w": NAME, "v": peft.HFName("v.weight", "i o -> o i")}, r"one dropout for all adapters, but these have \[0.0, 0.1\]"),
        ({"w": dataclasses.replace(EXPERTS, magnitude=jnp.ones((2, 3)))}, {"w": FUSED}, "PEFT has no magnitude for experts.w .parameter."),
        ({"w": dataclasses.replace(EXPERTS, dropout=0.1)}, {"w": FUSED}, "PEFT has no dropout for parameters such as experts.w"),
        ({"w": dataclasses.replace(EXPERTS, scale=jnp.array([1.0, 2.0]))}, {"w": FUSED}, "an adapter file has one alpha for all of experts.w"),
        ({"w": EXPERTS, "v": EXPERTS}, {"w": FUSED, "v": peft.HFName("experts.v", "e i o -> e o i", "parameter")}, "w, v are parameters of one module: give their names an `order`"),
        ({"w": dataclasses.replace(PAIR, bias=jnp.ones(3))}, {"w": peft.HFName("w.weight", kind="embedding")}, "PEFT has no bias for w.weight .embedding."),
        ({"w": dataclasses.replace(PAIR, magnitude=jnp.ones(3))}, {"w": peft.HFName("w.weight", kind="embedding", tied="v.weight")}, "w is also v.weight: PEFT ties pairs only"),
        ({"w": PAIR, "b": lj.Full(jnp.ones(3))}, {"w": NAME, "b": peft.HFName("norm.bias"), "c": peft.HFName("norm.weight"), "d": peft.HFName("x.bias")}, "so it needs c too"),
        ({"w": PAIR, "b": lj.Full(jnp.ones(3))}, {"w": NAME, "b": peft.HFName("norm.weight"), "c": peft.HFName("x.norm.weight")} | {"c": peft.HFName("xnorm.weight")}, "PEFT would save xnorm along with norm, whose name ends alike"),
        ({"w": VERA, "v": PAIR}, TWO, "v has no vectors of VeRA's, but other adapters have"),
        ({"w": dataclasses.replace(VERA, scale=0.5)}, TWO, "w: PEFT's VeRA has no scale, but this adapter has 0.5"),
        ({"w": VERA, "v": dataclasses.replace(VERA, a=2 * VERA.a)}, TWO, "v: VeRA has one A for all kernels in PEFT"),
        ({"w": VERA, "v": dataclasses.replace(VERA, b=2 * VERA.b)}, TWO, "v: VeRA has one B for all kernels in PEFT"),
        ({"w": dataclasses.replace(VERA, bias=jnp.ones(3))}, TWO, "no adapters with both biases and VeRA's vectors"),
        ({"w": VERA, "t": ROWS}, TABLE, "no adapters with both trained rows and VeRA's vectors"),
        ({"t": VERA}, TABLE, "t: PEFT has VeRA's vectors for linear layers only, not for embedding weights"),
        ({"w": dataclasses.replace(PAIR, invocation=(1,))}, TWO, "causal language models only: pass task_type='CAUSAL_LM'"),
        ({"w": dataclasses.replace(PAIR, invocation=(1,)), "v": PAIR}, TWO, "one invocation sequence for all pairs, but these have several"),
        ({"t": ROWS}, TABLE, "PEFT needs a low-rank pair, and these adapters have none"),
        ({"w": PAIR, "t": dataclasses.replace(ROWS, layout=lj.Layout((), (1,), (0,)))}, TABLE, "t: PEFT trains rows of tables, and embed.weight is none"),
        ({"w": PAIR, "t": ROWS}, TABLE | {"u": peft.HFName("xembed.weight")}, "PEFT would train rows of xembed along with embed, whose name ends alike"),
        ({"w": PAIR, "t": ROWS}, {"w": NAME, "t": peft.HFName("head.weight"), "u": peft.HFName("head.bias")}, "t: PEFT leaves out the bias of a linear layer whose rows it trains: head.bias"),
        ({"w": PAIR, "t": dataclasses.replace(ROWS, values=jnp.ones((2, 3, 2)), layout=lj.Layout((), (1,), (0, 2)))}, {"w": NAME, "t": peft.HFName("layers.{l}.t.weight", "l v d -> v d")}, "t of the shape .* is more than the table layers.0.t.weight, so it can't have its rows"),
        ({"w": PAIR, "t": ROWS, "u": lj.Full(jnp.ones(3))}, TABLE | {"u": peft.HFName("embed.norm")}, "can't give a pair or rows to a module that it saves whole: t"),
        ({"w": lj.LowRank(jnp.ones((3, 4, 2)), jnp.ones((2, 5)), lj.Layout((), (0, 1), (2,)), 0.5)}, {"w": peft.HFName("w.weight", "h d o -> d (h o)")}, "does not go with w.weight, whose A lies along the axes"),
    ],
)  # fmt: skip
def test_what_peft_cannot_hold_is_refused(adapters, names, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "out", adapters, names=names)
    assert not (tmp_path / "out").exists()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("w.weight", "i o -> o"), "must name each axis of the parameter once"),
        (("w.{l}.weight", "i o -> o i"), r"all but those that the name's fields index \(l\)"),
        (("w.weight", "i o = o i"), "can't be read"),
        (("w.weight", "", "dense"), "kind must be one of 'linear'"),
    ],
)
def test_names_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        peft.HFName(*arguments)


def test_names_and_shapes_must_agree():
    with pytest.raises(ValueError, match=r"a parameter of the shape \(2, 3, 4\) does not have the axes 'i o -> o i'"):
        NAME.tensors((2, 3, 4))
    with pytest.raises(ValueError, match="the axis 'c' has the size 3, but 2 words"):
        peft.HFName("{c:k|v}.weight", "c i o -> o i").tensors((3, 4, 5))
    with pytest.raises(ValueError, match="no rule matches the parameters v: add one"):
        peft.match({"v": jnp.ones(2)}, {"w": "w.weight"})
    with pytest.raises(ValueError, match=r"a and b have the same name x.weight"):
        peft.match({"a": jnp.ones(2), "b": jnp.ones(2)}, {".": "x.weight"})


# --- files that mean harm ---------------------------------------------------------------------------------------------


def header(data):
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def packed(fields, body):
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + body


def mutations(rng, weights, config):
    """One spoiled pair of files."""
    fields, body = header(weights)
    name = rng.choice([key for key in fields if key != "__metadata__"])
    other = rng.choice([key for key in fields if key != "__metadata__"])
    config = json.loads(config)
    kind = rng.randrange(16)
    if kind == 0:
        return weights[: rng.randrange(len(weights))], json.dumps(config)
    if kind == 1:
        return struct.pack("<Q", rng.choice([0, 7, 2**63, 2**64 - 1, len(weights), rng.randrange(10_000)])) + weights[
            8:
        ], json.dumps(config)
    if kind == 2:
        fields[name]["shape"] = rng.choice([[2**60], [2**60, 2**60], [0], [-1, 4], [1] * 100, [2**64], [], "x", [1.5]])
    if kind == 3:
        fields[name]["data_offsets"] = rng.choice([[0, 2**62], [-4, 4], [8, 4], fields[other]["data_offsets"], [0], None, "x"])
    if kind == 4:
        fields[name]["dtype"] = rng.choice(["F64", "I64", "BOOL", "F8_E4M3", "nothing", "", None, "BF16"])
    if kind == 5:
        start = fields[name]["data_offsets"][0]
        body = body[:start] + struct.pack("<f", rng.choice([float("nan"), float("inf"), -float("inf")])) + body[start + 4 :]
    if kind == 6:
        odd = rng.choice(
            [
                "../../../etc/passwd",
                "base_model.model.../x",
                "base_model.model.",
                "",
                "base_model.model." + "x." * 5000,
                "\0",
                "é" * 300,
            ]
        )
        fields[odd] = fields.pop(name)
    if kind == 7:
        fields |= {f"base_model.model.unknown.{i}.lora_A.weight": fields[name] for i in range(10_000)}
    if kind == 8:
        return pickle.dumps({"weights": [1, 2, 3]}), json.dumps(config)
    if kind == 9:
        cut = rng.randrange(len(weights))
        return weights[:cut] + rng.randbytes(rng.randrange(64)) + weights[cut:], json.dumps(config)
    if kind == 10:
        text = json.dumps(config)
        cut = rng.randrange(len(text))
        return weights, rng.choice(
            [text[:cut], "[" * 100_000, "", "null", "[1]", text + "}", "\ufeff" + text, '{"peft_type": NaN}']
        )
    if kind == 11:
        config[rng.choice(list(config))] = rng.choice(
            [None, -1, 2**70, "x" * 100_000, [[]], {"a": {"b": []}}, 1e308, True, ["../x"]]
        )
    if kind == 12:
        config["target_modules"] = rng.choice(
            ["(a|aa)+$", "(" * 500, ".*" * 300, "[", "(?P<x>.)(?P=x)", "a{1000000}", ["(a+)+$"], ["../../x"], [""]]
        )
    if kind == 13:
        config["rank_pattern"] = {rng.choice([r"(\w+\.?)+!", ".*", "(?:" * 400, "q_proj"]): rng.choice([1, 10**18, 3])}
    if kind == 14:
        config |= {f"field_{i}": i for i in range(10_000)}
    if kind == 15:
        position = rng.randrange(8, len(weights))
        return weights[:position] + bytes([weights[position] ^ (1 << rng.randrange(8))]) + weights[position + 1 :], json.dumps(
            config
        )
    return packed(fields, body), json.dumps(config)


@pytest.mark.parametrize("seed", range(10))
def test_spoiled_files_give_clear_errors_or_load(seed, tmp_path):
    """25 each, 250 in all: no crash, no hang, nothing run or written, and an error that says where."""
    case = [
        "llama-qv",
        "llama-patterns",
        "llama-saved-modules",
        "llama-dora",
        "bert-bias",
        "llama-embed-head",
        "llama-pissa",
        "llama-lora-bias",
        "llama-tokens-head",
        "llama-vera",
    ][seed]
    variables, names, _ = peft_cases.model(peft_cases.CASES[case]["model"])
    weights, config = ((peft_cases.directory(case) / file).read_bytes() for file in (WEIGHTS, CONFIG))
    good = peft.load(peft_cases.directory(case), variables, names=names)
    rng = random.Random(seed)
    directory = tmp_path / "adapter"
    directory.mkdir()
    for _ in range(25):
        spoiled, text = mutations(rng, weights, config)
        (directory / WEIGHTS).write_bytes(spoiled)
        (directory / CONFIG).write_text(text, encoding="utf-8")
        began = time.monotonic()
        try:
            adapters = peft.load(directory, variables, names=names)
        except ValueError as error:
            assert len(str(error)) > 20 and len(str(error)) < 20_000
        else:
            assert set(adapters) == set(good)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(adapters))
        assert time.monotonic() - began < 20
        assert sorted(file.name for file in tmp_path.rglob("*")) == ["adapter", CONFIG, WEIGHTS]
