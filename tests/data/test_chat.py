"""Chat templates: what they write, and where the assistant speaks, against texts written by hand."""

import datetime

import numpy as np
import pytest

from lora_jax.data import language
from lora_jax.data.chat import ChatTemplate
from lora_jax.data.tokenizer import TextTokenizer
from tests.support import tiny_lm

DAY = datetime.date(2024, 7, 26)
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}{{- 'Today Date: ' + date_string + '\n\n' }}{{- system_message }}"
    "{{- '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n{%- endif %}\n"
)
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello, you."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long!"},
]


def turns(source, messages, **special):
    text, spans = ChatTemplate(source, special, DAY).turns(messages)
    return text, [text[start:end] for start, end in spans]


def test_chatml():
    text, said = turns(tiny_lm.CHATML, TALK)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello, you.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nSo long!<|im_end|>\n"
    )
    assert said == ["Hello, you.<|im_end|>\n", "So long!<|im_end|>\n"]


def test_llama_3():
    text, said = turns(LLAMA3, TALK, bos_token="<|begin_of_text|>")
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "Hello, you.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo long!<|eot_id|>"
    )
    assert said == ["Hello, you.<|eot_id|>", "So long!<|eot_id|>"]


def test_generation_marks_decide():
    source = "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    assert turns(source, TALK) == (
        "[user]Hi[assistant]Hello, you..[user]Bye[assistant]So long!.",
        ["Hello, you..", "So long!."],
    )
    template = ChatTemplate(source, {}, DAY)
    assert template.render(TALK[:2]) == "[user]Hi[assistant]Hello, you.."


REFUSED = {
    "turns that change": (
        "{% for m in messages %}{{ m.content if loop.last else m.content|upper }}{% endfor %}",
        "is not certain",
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


def test_filters_are_those_of_transformers():
    source = "{{ messages | tojson }}\n    {% if true %}\nx\n    {% endif %}\n{% for i in range(9) %}{% break %}{% endfor %}"
    assert ChatTemplate(source, {}, DAY).render([{"é": "<&>'"}]) == '[{"é": "<&>\'"}]\nx\n'


@pytest.mark.parametrize("template", [tiny_lm.CHATML, LLAMA3])
def test_learnt_tokens_are_the_turns(template, tmp_path):
    """Byte by byte: the decoded targets are what the assistant says, and nothing else is."""
    tokenizer = TextTokenizer(
        tiny_lm.tokenizer(), {"eos_token": "<|im_end|>", "bos_token": "<|endoftext|>"}, template, tmp_path
    )
    talk = [dict(m, content=m["content"] + " é🙂  ok ") for m in TALK]
    corpus = language.Corpus("chat", (talk,), (1,))
    [[document]], counts = language.encode(corpus, tokenizer, 10_000, DAY)
    decode = lambda ids: tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False)
    text, said = turns(template, talk, bos_token="<|endoftext|>")
    assert decode(document.tokens) == text and counts == language.Counts()
    edges = np.flatnonzero(np.diff(document.targets.astype(int), prepend=0, append=0))
    assert [decode(document.tokens[a:b]) for a, b in edges.reshape(-1, 2)] == said
