"""Runs of decoders of other families than Llama: trained, exported both ways, merged as transformers reads them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lora_jax as lj
from lora_jax.command import cli, hf_export, metrics, run
from lora_jax.models import families, llama
from lora_jax.models.experts import balance_loss
from lora_jax.planning import decoder_step
from tests.support import tiny_lm
from tests.support.identity import distance, random_adapters
from tests.support.marks import slow_unless

pytestmark = pytest.mark.usefixtures("usual_promotion")
DATA = pathlib.Path(__file__).parents[1] / "data" / "families"
CASES = slow_unless(
    lambda case: case == "gemma3_images",
    ["gemma3", "gemma3_images", "gpt2", "gpt_neox", "gpt_oss", "mixtral", "phi3"],
)


@pytest.fixture
def home(request, tmp_path):
    """A tiny model of a family, with the vocabulary of the tests' tokenizer, and data."""
    return home_of(request.param, tmp_path)


def home_of(case, tmp_path):
    fields = json.loads((DATA / case / "base" / "config.json").read_text())
    fields = families.replaced(fields, {"vocab_size": 300, "eos_token_id": 2})
    config = families.read_config(fields)
    loaded, others = llama.init(config, jax.random.key(3)), hf_export.other_parts(DATA / case / "base", config)
    tiny_lm.model(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    names = llama.file_names(loaded)
    hf_export.write(tmp_path / "model", loaded.variables, {}, names, families.hf_config(config), {}, others)
    (tmp_path / "model" / "preprocessor_config.json").write_text("{}")
    tiny_lm.texts(tmp_path / "texts.jsonl")
    return tmp_path


@pytest.mark.parametrize("home", CASES, indirect=True)
def test_a_run_of_a_family(home, capsys):
    assert cli.main(tiny_lm.options(home, home / "run", steps=3)) == 0
    for form in ("peft", "merged"):
        assert cli.main(["export", str(home / "run"), "--format", form, "--out", str(home / form)]) == 0
    base, merged = llama.load(home / "model"), llama.load(home / "merged")
    adapters = lj.peft.load(home / "peft", base.variables, names=base.names)
    assert distance(adapters, run.load_adapters(home / "run", base.variables)) < 1e-6
    kept = lambda name: {key: tensor for key, tensor in load_file(home / name / "model.safetensors").items() if "vision" in key}
    assert len(kept("model")) == (21 if merged.config.model_type == "gemma3" else 0)
    jax.tree.map(np.testing.assert_array_equal, kept("merged"), kept("model"))
    assert (home / "merged" / "preprocessor_config.json").read_text() == "{}"
    ids = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)
    adapted = lj.lora(base.apply)(lj.attach(base.variables, adapters), ids)
    assert distance(merged.apply(merged.variables, ids), adapted) < 1e-4
    assert distance(adapted, base.apply(base.variables, ids)) > 1e-3
    capsys.readouterr()
    assert cli.main(["generate", str(home / "run"), "--prompt", "The cat", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out


# --- the balance of experts -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return home_of("mixtral", tmp_path_factory.mktemp("experts"))


@pytest.mark.slow
def test_the_balance_loss_is_reported_and_can_be_trained(experts, tmp_path, capsys):
    found = {}
    for coefficient in (None, 30.0):
        out = tmp_path / str(coefficient)
        assert cli.main(tiny_lm.options(experts, out, steps=4, balance_loss=coefficient)) == 0
        assert "  balance 2." in capsys.readouterr().out
        found[coefficient] = metrics.read(out)
    first, *plain = found[None]
    assert "balance_loss" not in first and all("balance_loss" in line for line in plain)
    one, other = plain[0], found[30.0][1]  # of the same first step
    assert one["balance_loss"] == pytest.approx(other["balance_loss"], rel=1e-6) and one["balance_loss"] > 2
    assert other["loss"] == pytest.approx(one["loss"] + 30 * one["balance_loss"], rel=1e-6)
    assert run.read_config(tmp_path / "30.0").balance_loss == 30
    assert cli.main(["finetune", "--resume", str(tmp_path / "30.0"), "--steps", "1"]) == 0
    assert metrics.read(tmp_path / "30.0")[-1]["balance_loss"] > 2


@pytest.mark.slow
def test_the_balance_losses_of_a_sweep(experts, tmp_path):
    words = tiny_lm.options(experts, tmp_path / "sweep", steps=2, balance_loss=2)
    assert cli.main(["sweep", *words[1:], "--seed", "0", "1"]) == 0
    lines = [metrics.read(tmp_path / "sweep" / name)[1] for name in "12"]
    assert all(line["balance_loss"] > 2 for line in lines) and lines[0] != lines[1]


def test_a_model_without_experts_has_no_balance_loss(tmp_path, capsys):
    tiny_lm.home(tmp_path)
    (tmp_path / "texts.jsonl").write_text("is not read")
    for out, more in ((tmp_path / "run", []), (None, ["--plan"])):
        assert cli.main([*tiny_lm.options(tmp_path, out, balance_loss=0.1), *more]) == 2
        assert "--balance-loss is for mixtures of experts, and a 'llama' has none: leave it out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["finetune", "--balance-loss", "-1", "--task", "lm"]) == 2
    assert "balance_loss must be a number of at least 0, not -1.0" in capsys.readouterr().err


def test_the_loss_with_the_balance_of_a_step():
    """The mean and the formula of the balance loss over the tokens that are there, in value and gradient of merged weights."""
    loaded = llama.load(DATA / "mixtral" / "base")
    step = decoder_step.DecoderStep(
        model=decoder_step.ModelOptions(), lora=lj.LoraConfig(rank=2, alpha=3), rows=2, length=8, balance=0.5
    )
    adapters = random_adapters(step.adapters(loaded, 0), jnp.float32)
    ids = jnp.arange(16, dtype=jnp.int32).reshape(2, 8) * 3 % 64
    segments = jnp.array([[1] * 5 + [2] * 3, [1] * 6 + [0] * 2])
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 2, 3, 4, 5, 0, 0]])
    batch = {"input_ids": ids, "segment_ids": segments, "positions": positions, "targets": (positions > 0)}

    def plain(adapters):
        merged = lj.merge(loaded.variables, adapters)
        places = {"segment_ids": segments, "positions": positions}
        losses = loaded.losses(merged, ids, jnp.roll(ids, -1, 1), **places)
        learnt = jnp.pad(batch["targets"][:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
        _, routing = loaded.model.apply(merged, ids, routing=True, **places)
        uneven = balance_loss(routing, 2, segments > 0)
        return (losses * learnt).sum() / learnt.sum() + 0.5 * uneven, uneven

    def ours(adapters):
        loss, aux = step.loss(loaded)(lj.attach(loaded.variables, adapters), batch, jax.random.key(0))
        return loss.mean(), aux["balance_loss"].mean()

    (got, balance), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(adapters)
    (want, uneven), wanted = jax.jit(jax.value_and_grad(plain, has_aux=True))(adapters)
    assert distance((got, balance), (want, uneven)) < 1e-5 and distance(grads, wanted) < 1e-4
