"""What a row of chats may say beside who says what: weights, tools, and calls of them."""

import dataclasses
import datetime
import json

import pytest

from lora_jax.data import language
from lora_jax.data.tokenizer import TextTokenizer
from tests.support import tiny_lm

DAY = datetime.date(2025, 1, 1)
TOOLS = [{"type": "function", "function": {"name": "add"}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]}
WITH_TOOLS = (
    "{% if tools %}[{% for tool in tools %}{{ tool.function.name }}{% endfor %}]{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.role }} {{ m.content or '' }}{% for call in m.tool_calls or [] %}({{ call.function | tojson }}){% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer(tiny_lm.tokenizer(), {"eos_token": "<|im_end|>"}, WITH_TOOLS, tmp_path_factory.mktemp("model"))


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text} | more


def read(directory, **row):
    file = directory / "chats.jsonl"
    file.write_text(json.dumps(row))
    return language.read(file, "text", ("prompt", "completion"), "messages")


def encode(corpus, tokenizer):
    """The text, and what of it is learnt."""
    [[document]], *_ = language.encode(corpus, tokenizer, 200, DAY)
    decode = lambda ids: tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    return decode(document.tokens), decode(document.tokens[document.targets])


def test_a_message_of_the_weight_0_is_not_learnt(tokenizer, tmp_path):
    chat = [user("2+2"), assistant("5", weight=0), user("No"), assistant("4", weight=1), user("3+3"), assistant("6")]
    text, learnt = encode(read(tmp_path, messages=chat), tokenizer)
    assert "assistant 5<|im_end|>" in text and learnt == "4<|im_end|>6<|im_end|>"


def test_a_template_with_marks_that_are_not_one_for_each_message(tokenizer, tmp_path):
    marked = "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}all{% endgeneration %}"
    corpus = read(tmp_path, messages=[user("a"), assistant("b", weight=0), assistant("c")])
    with pytest.raises(ValueError, match=r"line 1: .* marks 1 turns for the assistant's 2 messages"):
        encode(corpus, dataclasses.replace(tokenizer, template=marked))


def test_tools_are_told_to_the_template(tokenizer, tmp_path):
    chat = [user("2+2"), assistant("4")]
    for tools in (TOOLS, json.dumps(TOOLS)):
        corpus = read(tmp_path, messages=chat, tools=tools)
        assert encode(corpus, tokenizer) == (
            "[add]<|im_start|>user 2+2<|im_end|><|im_start|>assistant 4<|im_end|>",
            "4<|im_end|>",
        )
    plain = read(tmp_path, messages=chat, tools=[])
    assert (plain.kind, plain.items, plain.tools) == ("chat", (chat,), ()) and corpus.digest() != plain.digest()
    with pytest.raises(ValueError, match="line 1: the chat template does not write the tools"):
        encode(corpus, dataclasses.replace(tokenizer, template=tiny_lm.CHATML))


def test_a_call_of_a_tool_needs_no_content(tokenizer, tmp_path):
    for called in (CALL, CALL | {"content": None}):
        chat = [user("2+2"), called, {"role": "tool", "content": "4"}, assistant("It is 4")]
        _, learnt = encode(read(tmp_path, messages=chat), tokenizer)
        assert learnt == '({"name": "add", "arguments": {"a": 2}})<|im_end|>It is 4<|im_end|>'


BAD = {
    "the weight of a message must be 0": {"messages": [user("a"), assistant("b", weight=2)]},
    "no message is the assistant's and of the weight 1": {"messages": [user("a"), assistant("b", weight=0)]},
    "the assistant says nothing in a message: fill it": {"messages": [user("a"), assistant(" ")]},
    "content are texts": {"messages": [user("a"), assistant(None)]},
    "the tools must be a list of objects, not 3": {"messages": [user("a"), assistant("b")], "tools": 3},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows(message, tmp_path):
    with pytest.raises(ValueError, match=f"line 1: .*{message}"):
        read(tmp_path, **BAD[message])
