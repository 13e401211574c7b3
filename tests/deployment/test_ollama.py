"""The Modelfile's template writes what the tokenizer's chat template writes.

It is rendered by an implementation of Go's text/template, not by Ollama.
"""

from __future__ import annotations

import sys

import gotpl
import pytest
from conftest import ROOT

from qlora import prompts as p

sys.path.insert(0, str(ROOT / "llama.cpp"))
from ollama import adds_bos, common_end, go_template

LLAMA_3 = (  # the shape of Llama 3's: BOS, a header for each turn, always a system turn with the date
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n"
    "{{ system }}<|im_end|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (  # the shape of Gemma's: no system role
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n{{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (  # the shape of Mistral v0.3's: system text goes to the last message, and only if that is a user's
    "{{ bos_token }}{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
USER, REPLY, MORE = (
    {"role": "user", "content": 'Is <this> "good"?'},
    {"role": "assistant", "content": "Yes & no."},
    {"role": "user", "content": "Why?\n"},
)
SYSTEM = {"role": "system", "content": "You judge."}


@pytest.mark.parametrize(
    "template", [None, LLAMA_3, GEMMA, MISTRAL], ids=["smollm2", "llama-3", "gemma", "mistral"]
)
@pytest.mark.parametrize(
    "talk",
    [[USER], [SYSTEM, USER], [USER, REPLY, MORE], [SYSTEM, USER, REPLY, MORE]],
    ids=["user", "system", "turns", "system-turns"],
)
def test_both_templates_write_the_same(bundled_folder, template, talk):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = template or tokenizer.chat_template
    wanted = tokenizer.decode(p.render(tokenizer, talk, True))
    assert (
        gotpl.render(
            go_template(tokenizer), {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in talk]}
        )
        == wanted
    )


def test_bos_is_left_to_a_tokenizer_that_adds_it(bundled_folder):
    """Ollama's tokenizer adds it too; written in the template as well, it would be there twice."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bundled_folder)
    tokenizer.chat_template = GEMMA
    assert not adds_bos(tokenizer) and go_template(tokenizer).startswith(tokenizer.bos_token)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert adds_bos(tokenizer) and not go_template(tokenizer).startswith(tokenizer.bos_token)


def test_common_end():
    assert common_end(["xab", "yab"]) == "ab" and common_end(["a", "b"]) == ""
