"""What ends a text: which ids a run learns, generates by and hands on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.command import cli, export, generate, run
from lora_jax.command.options import GenerateOptions, RunConfig
from lora_jax.command.tasks import lm, registry
from lora_jax.core import paths
from lora_jax.models import llama
from tests.support import chat_templates, tiny_lm

pytestmark = pytest.mark.usefixtures("usual_promotion")
END, TURN_END = 0, 2  # of the tokenizer's special tokens


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base whose texts end otherwise than its chats, and chats to train on."""
    directory = tmp_path_factory.mktemp("home")
    tiny_lm.model(directory / "model", eos_token_ids=(END,), max_position_embeddings=128)
    config = {"eos_token": "<|endoftext|>", "chat_template": tiny_lm.CHATML}
    (directory / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "model" / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    talk = lambda i: [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "moos"}]
    (directory / "chats.jsonl").write_text("".join(json.dumps({"messages": talk(i)}) + "\n" for i in range(40)))
    return directory


def new_run(home, directory, **options):
    """A run that was not trained: its adapters change nothing."""
    config = RunConfig(task="lm", model=str(home / "model"), rank=2, **options)
    run.create(directory, config)
    loaded = llama.load(home / "model", tie=False if config.untie else None)
    adapters = lj.init(jax.random.key(0), config.lora, loaded.apply, loaded.variables, jnp.zeros((1, 4), jnp.int32))
    lj.checkpoint.save(directory / "adapters", adapters, config=config.lora)
    return directory


def prepared(home, data):
    config = RunConfig(task="lm", model=str(home / "model"), data=str(data), max_length=128)
    return registry.prepare(config)


def test_a_run_records_what_ends_its_turns(home, tmp_path):
    assert prepared(home, home / "chats.jsonl").config.ends == [TURN_END]
    (tmp_path / "pairs.csv").write_text("prompt,completion\n" + "".join(f"The cat {i},meows\n" for i in range(40)))
    assert prepared(home, tmp_path / "pairs.csv").config.ends == [END]


SAID = {
    "Qwen 3": "30 chats are several documents",
    "SmolLM 2": "30 chats have thinking or text that the chat template leaves out",
    "DeepSeek-R1-Distill": "60 turns do not follow the chat template's prompt for the assistant",
    "Gemma 3": "the chat template ends no turn with a token of its own",  # the tokenizer here has no <end_of_turn>
}


@pytest.mark.parametrize("family", SAID)
def test_what_a_template_does_to_chats_is_said(home, tmp_path, family):
    (home / "model" / "chat_template.jinja").write_text("{%- set bos_token = '' %}" + chat_templates.FAMILIES[family])
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "Thus."}] * 2
    talk = lambda i: [{**turn, "content": f"{turn['content']} {i}"} for turn in turns]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": talk(i)}) + "\n" for i in range(30)))
    description = "\n".join(prepared(home, tmp_path / "chats.jsonl").task.description)
    (home / "model" / "chat_template.jinja").unlink()
    assert SAID[family] in description, description


def test_generation_ends_at_a_learnt_token(home, tmp_path):
    """Here at the first one that the base says; which is not shown."""
    loaded, prompt = llama.load(home / "model"), tiny_lm.tokenizer().encode("The cat").ids
    said = int(loaded.apply(loaded.variables, jnp.asarray([prompt]))[0, -1].argmax())
    assert said not in loaded.config.eos_token_ids
    directory = new_run(home, tmp_path / "run", ends=[said])
    assert generate.generate(directory, "The cat", GenerateOptions(max_new_tokens=8)) == "The cat"


def test_ids_come_from_generation_config_first(home, tmp_path):
    config = RunConfig(task="lm", model=str(home / "model"), ends=(7,))
    base = lm.load_base(home / "model", config)
    assert base.model.config.eos_token_ids == (END,) and lm.end_ids(base, config) == (END, 7)
    for fields, ids in (({"eos_token_id": [5, 4]}, (5, 4)), ({"eos_token_id": 3}, (3,)), ({"do_sample": True}, (END,))):
        (home / "model" / "generation_config.json").write_text(json.dumps(fields))
        assert llama.load(home / "model").config.eos_token_ids == ids
    (home / "model" / "generation_config.json").write_text('{"eos_token_id": "<|im_end|>"}')
    with pytest.raises(ValueError, match=r"generation_config\.json: eos_token_id must be a token id or a list of them"):
        llama.load(home / "model")
    (home / "model" / "generation_config.json").unlink()


def read(file):
    return json.loads(file.read_text())


def test_merged_says_what_ends_a_text(home, tmp_path):
    export.export(new_run(home, tmp_path / "run", ends=[TURN_END]), "merged", tmp_path / "out")
    assert read(tmp_path / "out" / "generation_config.json") == {"eos_token_id": [END, TURN_END]}
    assert llama.load(tmp_path / "out").config.eos_token_ids == (END, TURN_END)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert read(tmp_path / "out" / name) == read(home / "model" / name) | {"eos_token": "<|im_end|>"}
    (home / "model" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": 0}')
    export.export(tmp_path / "run", "merged", tmp_path / "again")
    assert read(tmp_path / "again" / "generation_config.json") == {"temperature": 0.6, "eos_token_id": [END, TURN_END]}
    (home / "model" / "generation_config.json").unlink()


def test_a_template_that_writes_eos_token_keeps_it(home, tmp_path):
    template = tiny_lm.CHATML + "{{ eos_token }}"
    (home / "model" / "chat_template.jinja").write_text(template)
    export.export(new_run(home, tmp_path / "run", ends=[TURN_END]), "merged", tmp_path / "out")
    assert read(tmp_path / "out" / "tokenizer_config.json")["eos_token"] == "<|endoftext|>"
    (home / "model" / "chat_template.jinja").unlink()


def test_untie(home, tmp_path, capsys):
    """An adapter of a tied model's head alone: here, there and back."""
    options = {"model": str(home / "model"), "data": str(home / "chats.jsonl"), "max_length": 64, "untie": True}
    assert "params/lm_head/kernel" in paths.flatten(registry.prepare(RunConfig(task="lm", **options)).task.variables)[0]
    directory = new_run(home, tmp_path / "run", untie=True, targets=["lm_head"])
    adapters = lj.checkpoint.load(directory / "adapters")
    [path] = adapters
    assert path == "params/lm_head/kernel"
    changed = dataclasses.replace(adapters[path], b=jnp.ones_like(adapters[path].b))
    lj.checkpoint.save(directory / "adapters", {path: changed}, step=1)
    export.export(directory, "peft", tmp_path / "peft")
    arguments = ["import", tmp_path / "peft", "--model", home / "model", "--out", tmp_path / "back"]
    assert cli.main([str(word) for word in arguments]) == 2
    assert "--untie" in capsys.readouterr().err
    assert cli.main([*(str(word) for word in arguments), "--untie"]) == 0
    assert run.read_config(tmp_path / "back").untie
    both = [lj.checkpoint.load(one / "adapters")[path].delta() for one in (directory, tmp_path / "back")]
    assert jnp.array_equal(*both) and jnp.abs(both[0]).max() > 0.1
    export.export(directory, "merged", tmp_path / "merged")
    assert read(tmp_path / "merged" / "config.json")["tie_word_embeddings"] is False
    merged, base = llama.load(tmp_path / "merged"), llama.load(home / "model", tie=False)
    want = base.apply(lj.merge(base.variables, lj.checkpoint.load(directory / "adapters")), jnp.arange(9)[None])
    assert jnp.array_equal(merged.apply(merged.variables, jnp.arange(9)[None]), want)
