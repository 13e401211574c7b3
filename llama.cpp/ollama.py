"""A chat template (Jinja) as Ollama's TEMPLATE (Go): without one Ollama guesses, or sends the prompt bare."""

import os

from qlora.cli import UserError
from qlora.control_tokens import template_variables
from qlora.prompts import takes_system

# Stand for each turn's text, in private characters that no template writes.
SYSTEM, ASK, REPLY, AGAIN = (f"\ue000{name}\ue000" for name in ("system", "ask", "reply", "again"))


def go_template(tokenizer) -> str:
    """The Go template that writes what the tokenizer's chat template does for system, user, assistant turns.

    The text around each turn is read off one rendered conversation. A template that treats turns by their
    place is refused (UserError) if that shows. BOS is left out if the tokenizer adds it: Ollama's does too.
    Source: https://docs.ollama.com/modelfile (TEMPLATE); ollama's template/template.go for .Messages.
    """
    turns = [("user", ASK), ("assistant", REPLY), ("user", AGAIN)]
    head, rest = written(tokenizer, turns).split(ASK)
    to_reply, rest = rest.split(REPLY)
    after_reply, to_answer = rest.split(AGAIN)
    if not to_reply.startswith(to_answer):
        raise UserError("this chat template writes earlier turns in another way; write the TEMPLATE by hand")
    lead = to_reply.removeprefix(to_answer)  # Mistral's: a space before a given reply, not before a new one
    # Every user turn begins alike: `begin` is what the places where one begins have in common.
    if takes_system(tokenizer.chat_template):
        with_system = written(tokenizer, [("system", SYSTEM), *turns])
        before_system, after_system = with_system.split(ASK)[0].split(SYSTEM)
        begin = common_end([head, after_reply, after_system]).split(tokenizer.eos_token)[-1]
        default = head.removesuffix(begin)  # a system message that is written where none is given
        start = '{{ $first := index .Messages 0 }}{{ if ne $first.Role "system" }}' + default + "{{ end }}"
        system = before_system + "{{ .Content }}" + after_system.removesuffix(begin)
        ask = begin
    else:  # the system message stands inside the first user turn
        begin = common_end([head, after_reply]).split(tokenizer.eos_token)[-1]
        start = head.removesuffix(begin) + "{{ $open := false }}"
        system = begin + "{{ .Content }}\n\n{{ $open = true }}"
        ask = "{{ if not $open }}" + begin + "{{ end }}{{ $open = false }}"
    turn = [
        '{{ if eq .Role "system" }}',
        system,
        '{{ else if eq .Role "user" }}',
        ask,
        "{{ .Content }}",
        to_answer,
    ]
    turn += ["{{ else }}", lead, "{{ .Content }}", after_reply.removesuffix(begin), "{{ end }}"]
    return "".join([start, "{{ range .Messages }}", *turn, "{{ end }}"])


def written(tokenizer, turns: list[tuple[str, str]]) -> str:
    """A conversation as text, without the BOS that the tokenizer adds by itself."""
    messages = [{"role": role, "content": content} for role, content in turns]
    options = {"tokenize": False, "add_generation_prompt": True, **template_variables()}
    text = tokenizer.apply_chat_template(messages, **options)
    return text.removeprefix(tokenizer.bos_token) if adds_bos(tokenizer) else text


def adds_bos(tokenizer) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def common_end(texts: list[str]) -> str:
    """common_end(['xab', 'yab']) -> 'ab'"""
    return os.path.commonprefix([t[::-1] for t in texts])[::-1]
