"""A tiny Llama with a byte-level tokenizer, and texts that it can learn within seconds."""

import json
import random

import jax
import tokenizers

from lora_jax.command import hf_export
from lora_jax.models import llama

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANIMALS = {"cat": "meows", "dog": "barks", "cow": "moos", "owl": "hoots", "bee": "buzzes"}


def sentence(draw):
    animal = draw.choice(list(ANIMALS))
    return f"The {animal} {ANIMALS[animal]}."


def sizes(**changes):
    known = dict(
        model_type="llama", vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, rms_norm_eps=1e-5, rope_theta=10000.0, rope_scaling=None,
        qkv_bias=False, output_bias=False, mlp_bias=False, tie_word_embeddings=True, sliding_window=None, sliding_layers=(),
        bos_token_id=None, eos_token_ids=(2,), pad_token_id=None,
    )  # fmt: skip
    return llama.LlamaConfig(**{**known, **changes})


def tokenizer():
    """Bytes and a few merges."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(1)
    made.train_from_iterator([sentence(draw) for _ in range(50)], trainer)
    return made


def model(directory, **changes):
    """A Hugging Face directory."""
    directory.mkdir()
    made = llama.init(sizes(**changes), jax.random.key(0))
    # Logits of the size that training gives: what is learnt are low-rank changes alone.
    variables = jax.tree.map(lambda leaf: leaf * 8 if leaf.shape[0] == 300 else leaf, made.variables)
    hf_export.write(directory, variables, {}, made.names, llama.hf_config(made.config), {})
    tokenizer().save(str(directory / "tokenizer.json"))
    config = {"eos_token": {"content": "<|im_end|>", "special": True}, "chat_template": CHATML}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def texts(file, count=120):
    """Documents, as text, CSV or JSON lines, by the file's name."""
    draw = random.Random(0)
    documents = [" ".join(sentence(draw) for _ in range(draw.randint(1, 5))) + f" {i}" for i in range(count)]
    if file.suffix == ".txt":
        file.write_text("\n\n\n".join(documents))
    else:
        file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


def options(directory, out, **changes):
    """The arguments of `lora-jax` for a run on the two."""
    given = {
        "task": "lm", "model": directory / "model", "data": directory / "texts.jsonl", "rank": 4, "learning_rate": 0.02,
        "batch_size": 4, "steps": 30, "max_length": 48, "out": out,
    } | changes  # fmt: skip
    pairs = ((f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None)
    return ["finetune", *(str(x) for pair in pairs for x in pair)]


def home(directory):
    """A directory with the model and the data, as `options` takes it."""
    model(directory / "model")
    texts(directory / "texts.jsonl")
    return directory
