"""Chat templates: what they write, and where the assistant speaks, against texts written by hand."""

import datetime
import functools
import json

import numpy as np
import pytest
import tokenizers

from lora_jax.data import language
from lora_jax.data.chat import ChatTemplate
from lora_jax.data.tokenizer import TextTokenizer
from tests.support import tiny_lm
from tests.support.chat_templates import FAMILIES

DAY = datetime.date(2024, 7, 26)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long!"},
]


THOUGHTFUL = [
    TALK[0],
    {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello, you."},
    TALK[2],
    {"role": "assistant", "content": "<think>\nAn end.\n</think>\n\nSo long!"},
]


def turns(source, messages, **special):
    """The texts, and what is learnt of each."""
    found = ChatTemplate(source, special, DAY).turns(messages)
    return [(text, [text[start:end] for start, end in spans]) for text, spans, _ in found]


def test_chatml():
    [(text, said)] = turns(tiny_lm.CHATML, TALK)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, you.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long!<|im_end|>\n"
    )
    assert said == ["Hello, you.<|im_end|>\n", "So long!<|im_end|>\n"]


BOS, EOS = "<s>", "</s>"
THINK = "<think>\n\n</think>\n\n"
CHATML_USER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
OSS = "<|start|>system<|message|>Current date: 2024-07-26<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"
# Of each family: the text up to the first turn; and what is learnt of each text, of a plain talk and of one with thinking.
LEARNT = {
    "Llama 3": (
        BOS + "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        [["Hello, you.<|eot_id|>", "So long!<|eot_id|>"]],
        None,
    ),
    "Qwen 2.5": (
        "<|im_start|>system\nBe of help.<|im_end|>\n" + CHATML_USER,
        [["Hello, you.<|im_end|>\n", "So long!<|im_end|>\n"]],
        None,
    ),
    "Qwen 3": (
        CHATML_USER,
        [[THINK + "Hello, you.<|im_end|>\n"], [THINK + "So long!<|im_end|>\n"]],
        [["<think>\nA greeting.\n</think>\n\nHello, you.<|im_end|>\n"], ["<think>\nAn end.\n</think>\n\nSo long!<|im_end|>\n"]],
    ),
    "Gemma 3": (
        BOS + "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        [["Hello, you.<end_of_turn>\n", "So long!<end_of_turn>\n"]],
        None,
    ),
    "Mistral": (BOS + "[INST] Hi [/INST]", [[" Hello, you." + EOS, " So long!" + EOS]], None),
    "Phi 4": (
        "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>",
        [["Hello, you.<|im_end|>", "So long!<|im_end|>"]],
        None,
    ),
    "SmolLM 2": (
        "<|im_start|>system\nBe of help.<|im_end|>\n" + CHATML_USER,
        [["Hello, you.<|im_end|>\n", "So long!<|im_end|>\n"]],
        None,
    ),
    "SmolLM 3": (  # its marks take in the head of the turn
        "<|im_start|>system\nToday Date: 26 July 2024\nReasoning Mode: /think<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n",
        [["<|im_start|>assistant\nHello, you.<|im_end|>\n", "<|im_start|>assistant\nSo long!<|im_end|>\n"]],
        None,
    ),
    "DeepSeek-R1-Distill": (
        BOS + "<|User|>Hi<|Assistant|>",
        [["Hello, you.<|end_of_sentence|>", "So long!<|end_of_sentence|>"]],
        [["A greeting.\n</think>\n\nHello, you.<|end_of_sentence|>"], ["An end.\n</think>\n\nSo long!<|end_of_sentence|>"]],
    ),
    "gpt-oss": (
        OSS,
        [["<|channel|>final<|message|>Hello, you.<|return|>"], ["<|channel|>final<|message|>So long!<|return|>"]],
        None,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    """What is learnt, by hand; and that each turn stands behind what the template asks the assistant with."""
    before, plain, thoughtful = LEARNT[family]
    special = {"bos_token": BOS, "eos_token": EOS}
    texts = turns(FAMILIES[family], TALK, **special)
    assert [said for _, said in texts] == plain and texts[0][0].startswith(before + plain[0][0])
    if thoughtful is None:  # no rule for it: it is a part of what is said
        thoughts = zip(TALK[1::2], THOUGHTFUL[1::2])
        thoughtful = json.loads(
            functools.reduce(lambda text, two: text.replace(*map(_inner, two)), thoughts, json.dumps(plain))
        )
    texts = turns(FAMILIES[family], THOUGHTFUL, **special)
    assert [said for _, said in texts] == thoughtful
    template = ChatTemplate(FAMILIES[family], special, DAY)
    if not template.marked:
        for i in (1, 3):
            prompt = template.render(THOUGHTFUL[:i], add_generation_prompt=True)
            assert any(prompt + said in text for text, learnt in texts for said in learnt)


def _inner(message):
    return json.dumps(message["content"])[1:-1]


def test_thinking_in_a_field_of_its_own():
    talk = [TALK[0], {**TALK[1], "reasoning_content": "A greeting.", "thinking": "A greeting."}]
    [(_, qwen)], [(_, oss)] = turns(FAMILIES["Qwen 3"], talk), turns(FAMILIES["gpt-oss"], talk)
    assert qwen == ["<think>\nA greeting.\n</think>\n\nHello, you.<|im_end|>\n"]
    assert oss == [
        "<|channel|>analysis<|message|>A greeting.<|end|><|start|>assistant<|channel|>final<|message|>Hello, you.<|return|>"
    ]


def test_thinking_goes_away_between_turns():
    """The context of each turn is the one that it is said in."""
    (first, _), (second, _) = turns(FAMILIES["Qwen 3"], THOUGHTFUL)
    assert first == CHATML_USER + "<think>\nA greeting.\n</think>\n\nHello, you.<|im_end|>\n"
    assert second == (
        CHATML_USER + "Hello, you.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
        "<think>\nAn end.\n</think>\n\nSo long!<|im_end|>\n"
    )


def test_a_prompt_that_opens_the_thinking():
    """As Qwen 3's models for thinking alone: what follows the opening is learnt; DeepSeek's drop an answer's opening."""
    source = FAMILIES["Qwen 3"].replace(
        "{{- '<|im_start|>assistant\\n' }}\n    {%- if ena", "{{- '<|im_start|>assistant\\n<think>\\n' }}\n    {%- if ena"
    )
    assert source != FAMILIES["Qwen 3"]
    assert [said for _, said in turns(source, THOUGHTFUL)] == [
        ["A greeting.\n</think>\n\nHello, you.<|im_end|>\n"],
        ["An end.\n</think>\n\nSo long!<|im_end|>\n"],
    ]
    template = ChatTemplate(FAMILIES["DeepSeek-R1-Distill"], {"bos_token": BOS}, DAY)
    assert [written.unprompted for written in template.turns(TALK)] == [2]
    assert [written.unprompted for written in template.turns(THOUGHTFUL)] == [0, 0]
    tag = [TALK[0], {"role": "assistant", "content": "<table>"}]  # begins as <think> does
    [written] = template.turns(tag)
    assert [written.text[a:b] for a, b in written.spans] == ["<table><|end_of_sentence|>"]


def test_generation_marks_decide():
    source = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    [(text, said)] = turns(source, TALK)
    assert text == "[user]Hi[assistant]Hello, you..[user]Bye[assistant]So long!." and said == ["Hello, you..", "So long!."]
    template = ChatTemplate(source, {}, DAY)
    assert template.render(TALK[:2]) == "[user]Hi[assistant]Hello, you.."


REFUSED = {
    "turns that change": (
        "{% for m in messages %}{{ m.content if loop.last else m.content|upper }}{% endfor %}",
        r"what is before the assistant's turn \(message 2\) in another way once that is there \('i' becomes 'IHello, you.'\)",
    ),
    "answers without a question": (
        "{{ messages[0].content }}{% for m in messages[1:] %}{{ m.content }}{% endfor %}{{ raise_exception('no question') if messages|length == 1 }}",
        r"turn \(message 2\) begins can't be found from the messages before it: .* messages: no question",
    ),
    "raises": ("{{ raise_exception('roles must alternate') }}", "does not take these messages: roles must alternate"),
    "undefined": ("{{ messages[0].absent.absent }}", "does not take these messages"),
    "unsafe": ("{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}", "does not take these messages"),
    "changes its input": ("{{ messages.append(1) }}", "does not take these messages"),
    "no Jinja": ("{% if %}", "is not a Jinja template"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    source, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        turns(source, TALK)


def test_noncharacters_are_refused():
    with pytest.raises(ValueError, match="U\\+FDD0"):
        turns(tiny_lm.CHATML, [{"role": "user", "content": "a\ufdd0b"}])


def test_roles_that_no_template_knows_are_refused():
    bot = [TALK[0], {"role": "bot", "content": "Hello"}, *TALK[1:2]]
    with pytest.raises(ValueError, match="there is no role 'bot', but system, user, assistant, tool and those that the chat"):
        turns(tiny_lm.CHATML, bot)
    [(text, *_)] = turns("{% if messages[0].role == 'bot' %}{% endif %}" + tiny_lm.CHATML, bot)
    assert "bot\nHello" in text


def test_filters_are_those_of_transformers():
    source = "{{ messages | tojson }}\n    {% if true %}\nx\n    {% endif %}\n{% for i in range(9) %}{% break %}{% endfor %}"
    assert ChatTemplate(source, {}, DAY).render([{"é": "<&>'"}]) == '[{"é": "<&>\'"}]\nx\n'


@pytest.mark.parametrize("template", [tiny_lm.CHATML, FAMILIES["Llama 3"]])
def test_learnt_tokens_are_the_turns(template, tmp_path):
    """Byte by byte: the decoded targets are what the assistant says, and nothing else is."""
    tokenizer = TextTokenizer(
        tiny_lm.tokenizer(), {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}, template, tmp_path
    )
    talk = [dict(m, content=m["content"] + " é🙂  ok ") for m in TALK]
    corpus = language.Corpus("chat", (talk,), (1,))
    [[document]], counts, _ = language.encode(corpus, tokenizer, 10_000, DAY)
    decode = lambda ids: tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    [(text, said)] = turns(template, talk, bos_token="<|endoftext|>")
    assert decode(document.tokens) == text and counts == language.Counts()
    edges = np.flatnonzero(np.diff(document.targets.astype(int), prepend=0, append=0))
    assert [decode(document.tokens[a:b]) for a, b in edges.reshape(-1, 2)] == said


ENDS = {  # the one token that ends a turn, and not the line break after it
    "Llama 3": "<|eot_id|>", "Qwen 2.5": "<|im_end|>", "Qwen 3": "<|im_end|>", "Gemma 3": "<end_of_turn>", "Mistral": EOS,
    "Phi 4": "<|im_end|>", "SmolLM 2": "<|im_end|>", "SmolLM 3": "<|im_end|>", "DeepSeek-R1-Distill": "<|end_of_sentence|>",
    "gpt-oss": "<|return|>",
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_ends_of_turns(family, tmp_path):
    made = tiny_lm.tokenizer()
    made.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in ("<|end|>", "<|message|>", *ENDS.values())])
    tokenizer = TextTokenizer(made, {"eos_token": EOS, "bos_token": BOS}, FAMILIES[family], tmp_path)
    found = language.encode(language.Corpus("chat", (TALK, THOUGHTFUL), (1, 2)), tokenizer, 10_000, DAY)
    assert found.ends == (made.token_to_id(ENDS[family]),)
    assert found.counts == language.Counts(
        apart={"Qwen 3": 2, "gpt-oss": 2, "DeepSeek-R1-Distill": 1}.get(family, 0),
        unprompted=2 * (family == "DeepSeek-R1-Distill"),
    )


def test_what_a_template_leaves_out_is_counted(tmp_path):
    talk = [TALK[0], {**TALK[1], "reasoning_content": "A greeting."}]
    counts = {}
    for family in ("SmolLM 2", "Qwen 3"):
        tokenizer = TextTokenizer(tiny_lm.tokenizer(), {}, FAMILIES[family], tmp_path)
        counts[family] = language.encode(language.Corpus("chat", (talk,), (1,)), tokenizer, 10_000, DAY).counts.shortened
    assert counts == {"SmolLM 2": 1, "Qwen 3": 0}


def test_chats_in_several_documents_are_cut_one_by_one(tmp_path):
    tokenizer = TextTokenizer(tiny_lm.tokenizer(), {}, FAMILIES["gpt-oss"], tmp_path)
    whole = language.encode(language.Corpus("chat", (TALK,), (1,)), tokenizer, 10_000, DAY).documents[0]
    cut = language.encode(language.Corpus("chat", (TALK,), (1,)), tokenizer, len(whole[0].tokens) + 1, DAY)
    assert [len(document.tokens) for document in cut.documents[0]] == [len(whole[0].tokens)]  # of the second nothing is learnt
    assert cut.counts == language.Counts(cut=1, apart=1)
