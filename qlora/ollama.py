"""A chat template (Jinja) as Ollama's TEMPLATE (Go): without one, Ollama guesses from a list of known templates, or sends the prompt bare."""

from __future__ import annotations

import os

from qlora.cli import UserError
from qlora.prompts import TEMPLATE_VARIABLES, takes_system

SYSTEM, ASK, REPLY, AGAIN = "\ue000system\ue000", "\ue000ask\ue000", "\ue000reply\ue000", "\ue000again\ue000"  # private characters: in no template


def go_template(tokenizer) -> str:
    """The Go template that writes what the tokenizer's chat template writes for system, user and assistant turns.

    The pieces around each turn are read off one rendered conversation, so a template that treats
    turns by their place is refused (UserError) where that shows. BOS is left out where the tokenizer adds it: Ollama's does too.
    Source: https://docs.ollama.com/modelfile (TEMPLATE), ollama's template/template.go for .Messages.
    """
    folds_system = not takes_system(tokenizer.chat_template)
    system = [] if folds_system else [{"role": "system", "content": SYSTEM}]
    turns = [{"role": "user", "content": ASK}, {"role": "assistant", "content": REPLY}, {"role": "user", "content": AGAIN}]
    plain = written(tokenizer, turns)
    head, rest = plain.split(ASK)
    to_reply, rest = rest.split(REPLY)
    after_reply, to_answer = rest.split(AGAIN)
    if not to_reply.startswith(to_answer):
        raise UserError("this chat template treats earlier turns differently; Ollama's TEMPLATE has to be written by hand")
    before_system, after_system = ("", "\n\n") if folds_system else written(tokenizer, system + turns).split(ASK)[0].split(SYSTEM)
    # Every user turn begins alike: what the three places where one begins have in common.
    begin = common_end([head, after_reply] if folds_system else [head, after_reply, after_system]).split(tokenizer.eos_token)[-1]
    lead = to_reply.removeprefix(to_answer)  # Mistral's: a space before a reply that is told, not before one that is to come
    default, end_reply = head.removesuffix(begin), after_reply.removesuffix(begin)
    if folds_system:  # the system message stands inside the first user turn
        return default + (
            '{{ range $i, $m := .Messages }}{{ if eq .Role "system" }}' + begin + "{{ .Content }}\n\n{{ else if eq .Role \"user\" }}"
            '{{ $folded := false }}{{ if eq $i 1 }}{{ $first := index $.Messages 0 }}{{ if eq $first.Role "system" }}{{ $folded = true }}{{ end }}{{ end }}'
            "{{ if not $folded }}" + begin + "{{ end }}{{ .Content }}" + to_answer + "{{ else }}" + lead + "{{ .Content }}" + end_reply + "{{ end }}{{ end }}"
        )
    return (
        '{{ $first := index .Messages 0 }}{{ if ne $first.Role "system" }}' + default + "{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "system" }}' + before_system + "{{ .Content }}" + after_system.removesuffix(begin)
        + '{{ else if eq .Role "user" }}' + begin + "{{ .Content }}" + to_answer + "{{ else }}" + lead + "{{ .Content }}" + end_reply + "{{ end }}{{ end }}"
    )


def written(tokenizer, messages: list[dict]) -> str:
    """A conversation as text, without the BOS that the tokenizer adds by itself."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **TEMPLATE_VARIABLES)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def common_end(texts: list[str]) -> str:
    """common_end(['xab', 'yab']) -> 'ab'"""
    return os.path.commonprefix([t[::-1] for t in texts])[::-1]
