"""What an adapter directory has in place of its base's own comes along with the import: tokenizer, template, embeddings."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

import lora_jax as lj
from lora_jax.command import cli, export, inspect, run
from lora_jax.command.tasks import lm
from lora_jax.models import llama
from tests.support import tiny, tiny_lm

pytestmark = pytest.mark.usefixtures("usual_promotion")
TEMPLATE = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}<|turn|>"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PREFIX = "base_model.model."


def new_home(directory, tied):
    """A base, and adapters of it in `directory/peft`."""
    loaded = llama.load(tiny_lm.model(directory / "model", tie_word_embeddings=tied))
    config = lj.LoraConfig(rank=2, targets=["q_proj"])
    adapters = lj.init(jax.random.key(0), config, loaded.apply, loaded.variables, jnp.zeros((1, 4), jnp.int32))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    lj.peft.save(directory / "peft", adapters, names=loaded.names, base_model=str(directory / "model"), task_type="CAUSAL_LM")
    return directory


@pytest.fixture
def home(tmp_path):
    return new_home(tmp_path, tied=True)


def add_token(home):
    """A tokenizer with one token more, of the id 300 at least, as `add_special_tokens` makes it."""
    made = tiny_lm.tokenizer()
    made.add_tokens([f"<|{i}|>" for i in range(300 - made.get_vocab_size())])
    made.add_special_tokens([tokenizers.AddedToken("<|turn|>", normalized=False)])
    made.save(str(home / "peft" / "tokenizer.json"))
    return made


def resize(home, tied, by=1):
    """The file with an embedding and a head of 301 tokens, as PEFT writes them after `resize_token_embeddings`."""
    file = home / "peft" / "adapter_model.safetensors"
    base = safetensors.numpy.load_file(home / "model" / "model.safetensors")
    larger = {
        name: np.concatenate([base[name], np.full((by, 32), 0.5, np.float32)]) for name in (EMBEDDING, HEAD) if name in base
    }
    if tied:
        larger[HEAD] = larger[EMBEDDING]
    tensors = safetensors.numpy.load_file(file) | {PREFIX + name: tensor for name, tensor in larger.items()}
    safetensors.numpy.save_file(tensors, file)
    return larger


def call(*arguments):
    return cli.main([str(argument) for argument in arguments])


def import_(home, capsys, code=0):
    assert call("import", home / "peft", "--model", home / "model", "--out", home / "run") == code
    return capsys.readouterr().err


def base_of(directory):
    config = run.read_config(directory)
    return lm.load_base(lm.base_directory(config), config, own=run.own_base(directory))


@pytest.mark.parametrize("tied", [True, False])
def test_tokens_of_their_own(tmp_path, capsys, tied):
    """A token more, its embedding, and a template that writes it: used here, and handed on in both formats."""
    home = new_home(tmp_path, tied)
    made, larger = add_token(home), resize(home, tied)
    (home / "peft" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|turn|>", "chat_template": TEMPLATE}))
    said = import_(home, capsys)
    assert "their own tokenizer.json, tokenizer_config.json: kept with the run" in said
    assert "embeddings of 301 tokens, the base of 300: theirs are kept" in said
    assert f"chat template differs from that of {home / 'model'}" in said
    shutil.rmtree(home / "peft")
    base, adapters = base_of(home / "run"), lj.checkpoint.load(home / "run" / "adapters")
    ids = base.tokenizer.prompt("moos", chat=True)
    assert ids.tolist() == made.encode("<|turn|>moos<|turn|>").ids and 300 in ids and base.tokenizer.end == 300
    assert set(adapters) == {f"params/layer_{i}/self_attn/q_proj/kernel" for i in range(2)}
    np.testing.assert_array_equal(base.model.variables["params"]["embed_tokens"]["embedding"], larger[EMBEDDING])
    logits = base.model.apply(lj.merge(base.model.variables, adapters), ids[None])
    assert logits.shape == (1, len(ids), 301) and len(inspect.inspect(home / "run")) == 2

    export.export(home / "run", "merged", home / "merged")
    merged = llama.load(home / "merged")
    np.testing.assert_array_equal(merged.apply(merged.variables, ids[None]), logits)
    assert json.loads((home / "merged" / "config.json").read_text())["vocab_size"] == 301
    assert (home / "merged" / "tokenizer.json").read_bytes() == (home / "run" / "base" / "tokenizer.json").read_bytes()

    export.export(home / "run", "peft", home / "peft")
    shutil.rmtree(home / "run")
    assert "embeddings of 301 tokens" in import_(home, capsys)
    again = base_of(home / "run")
    found = again.model.apply(lj.merge(again.model.variables, lj.checkpoint.load(home / "run" / "adapters")), ids[None])
    np.testing.assert_array_equal(found, logits)


def test_a_template_alone(home, capsys):
    (home / "peft" / "chat_template.jinja").write_text(TEMPLATE)
    said = import_(home, capsys)
    assert "their own chat_template.jinja: kept" in said and "chat template differs" in said and "embeddings" not in said
    base = base_of(home / "run")
    assert base.tokenizer.template == TEMPLATE and base.tokenizer.special_tokens == {"eos_token": "<|im_end|>"}


def test_the_base_s_template_stays_where_they_have_none(home, capsys):
    (home / "peft" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert "template differs" not in import_(home, capsys)
    base = base_of(home / "run")
    assert base.tokenizer.template == tiny_lm.CHATML and base.tokenizer.end == 0


def test_files_of_the_base_are_not_kept(home, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / "model" / name, home / "peft" / name)
    assert import_(home, capsys) == "" and run.own_base(home / "run") is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_s_embeddings_are_not_kept(tmp_path, capsys, tied):
    home = new_home(tmp_path, tied)
    resize(home, tied, by=0)
    assert import_(home, capsys) == "" and run.own_base(home / "run") is None


def test_added_tokens_alone(home, capsys):
    free = tiny_lm.tokenizer().get_vocab_size()
    (home / "peft" / "added_tokens.json").write_text(json.dumps({"<|b|>": free + 1, "<|a|>": free}))
    import_(home, capsys)
    assert base_of(home / "run").tokenizer.ids(["x<|b|><|a|>"])[0][-2:].tolist() == [free + 1, free]
    (home / "peft" / "added_tokens.json").write_text(json.dumps({"<|a|>": free + 1}))
    shutil.rmtree(home / "run")
    assert f"gives '<|a|>' the id {free + 1}, but in the base's tokenizer it is {free}" in import_(home, capsys, code=2)
    assert not (home / "run").exists()


def test_tokens_without_embeddings_are_refused(home, capsys):
    add_token(home)
    said = import_(home, capsys, code=2)
    assert f"{home / 'peft'} has a token of the id 300, but there are embeddings of 300 tokens only" in said


def test_damaged_embeddings(home, capsys):
    add_token(home)
    resize(home, tied=True)
    import_(home, capsys)
    (home / "run" / "base" / "embeddings.safetensors").write_bytes(b"\0" * 40)
    assert call("generate", home / "run", "--prompt", "x") == 2
    assert "embeddings.safetensors can't be read" in capsys.readouterr().err


def test_untie_is_for_decoders(tmp_path, capsys):
    tiny.model(tmp_path / "model")
    assert call("import", tmp_path, "--model", tmp_path / "model", "--untie") == 2
    assert "has no head that could be its embedding" in capsys.readouterr().err


def test_an_embedding_without_its_head_is_refused(tmp_path, capsys):
    home = new_home(tmp_path, tied=False)
    resize(home, tied=False)
    file = home / "peft" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    del tensors[PREFIX + HEAD]
    safetensors.numpy.save_file(tensors, file)
    assert "lm_head.weight must be of the shape (301, 32), but there is none" in import_(home, capsys, code=2)
