"""Text -> token ids. What looks like a control token in a text from outside is text like any other.

A tokenizer makes one token of "<|im_end|>" wherever it stands, so a review could end its own turn and go on
in another role. Here only the chat template writes such tokens: those in messages are marked before it sees
them, and what is marked is encoded as ordinary text. transformers does so for
apply_chat_template(..., sanitize_control_tokens=True); its functions are used here one by one, so that
replies keep the tokens of thoughts and tool calls, and a tokenizer needs no chat template.
"""

import datetime
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jinja2
from transformers.utils.chat_template_utils import encode_marked_chat, mark_control_tokens

from qlora.cells import check
from qlora.cli import UserError

# Llama 3's template writes today's date unless it is given one: every day would be another prompt.
TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024"}
# SmolLM3's and Granite's ask a clock instead.
TODAY = datetime.date(2024, 7, 26)
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")

# Tokens that a reply writes itself, by their names: <think>, [TOOL_CALLS], <|python_tag|>. They end no turn.
REPLY_TOKENS = re.compile("think|thought|tool.?(call|sep)|python_tag", re.IGNORECASE)

# transformers' two private characters around a control token that is to be text.
BEGIN, END = mark_control_tokens("x", re.compile("x")).split("x")
ESCAPED = json.dumps(BEGIN)[1:-1]  # no marker any more: what follows would be a control token
MARKED = re.compile(f"{BEGIN}([^{END}]*){END}")


class ControlTokens(NamedTuple):
    """Patterns that match the tokens which are text in messages."""

    messages: re.Pattern  # of system, user, tools: special tokens, and those that the template names
    replies: re.Pattern  # of assistant: role and turn-end tokens

    def among(self, message: dict) -> bool:
        """Whether there is one in the message, its role, tools and tool calls included."""
        others = texts_in({key: value for key, value in message.items() if key != "content"})
        return bool(self.of(message).search(message["content"]) or any(map(self.messages.search, others)))

    def of(self, message: dict) -> re.Pattern:
        return self.replies if message["role"] == "assistant" else self.messages


# Words of a message's own form, which a chat template looks for; all others come from outside.
FORM = {"role", "content", "tools", "tool_calls", "tool_call_id", "type", "function", "name", "description"}
FORM |= {"id", "arguments", "parameters", "properties", "required", "return"}


def texts_in(value) -> Iterator[str]:
    """All texts in a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, each in value.items():
            yield from () if key in FORM else (key,)
            yield from texts_in(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from texts_in(each)


def mark_all(value, pattern: re.Pattern):
    """transformers' mark_control_tokens(), for keys as well: an argument's name comes from outside."""
    if isinstance(value, dict):
        return {
            key if key in FORM else mark_control_tokens(key, pattern): mark_all(each, pattern)
            for key, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [mark_all(each, pattern) for each in value]
    return mark_control_tokens(value, pattern)


def template_variables(thinking: bool = False) -> dict:
    """What a chat template is given besides the messages; fit for JSON, so that llama-server gets the same.

    Most templates that can switch thoughts off call it enable_thinking, and think where nothing is said.
    """
    return {**TEMPLATE_VARIABLES, "enable_thinking": thinking, "thinking": thinking}


def written(tokenizer, messages: Sequence[dict], add_generation_prompt: bool, thinking: bool = False) -> str:
    """The conversation as the chat template writes it, with the tools that its first message has."""
    tools = messages[0].get("tools")
    if tools:
        messages = [{k: v for k, v in messages[0].items() if k != "tools"}, *messages[1:]]
    options = {"tools": tools} if tools else {}
    options |= {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    options |= {"chat_template": dated(tokenizer.chat_template), **template_variables(thinking)}
    return tokenizer.apply_chat_template(messages, **options)


@functools.lru_cache
def dated(template: str) -> str:
    """A template that asks no clock: '{{ strftime_now("%Y") }}' -> "{{ '2024' }}" """
    return CLOCK.sub(lambda match: repr(TODAY.strftime(match[2])), template)


@functools.lru_cache
def control_tokens(tokenizer, template: str | None) -> ControlTokens:
    """The control tokens of a tokenizer with that chat template; without one, the special tokens."""
    added = [token for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    special = {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)
    plain, named = "", set()
    if template is not None:  # some tokenizers mark none of their role tokens as special
        talk = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]
        try:
            plain = written(tokenizer, talk, True)
        except jinja2.TemplateError:  # it takes no such talk
            plain = ""
        named = {token.content for token in added if token.content in template}
    around_turns = {token.content for token in added if token.content in plain}
    turns = {token for token in special | around_turns if not REPLY_TOKENS.search(token)}
    return ControlTokens(any_of(special | named | around_turns), any_of(turns))


def any_of(tokens: set[str]) -> re.Pattern:
    """A pattern for any of the tokens, longer ones first: a token may hold another one."""
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def end_ids(tokenizer) -> set[int]:
    """Tokens that end a turn: the end-of-text token and the other special ones (<|im_end|>, <|eot_id|>, …)

    but for those that a reply writes itself (<think>, [TOOL_CALLS]).
    """
    special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens))
    return {tokenizer.eos_token_id, *(i for i, token in special.items() if not REPLY_TOKENS.search(token))}


@functools.lru_cache
def end_pattern(tokenizer) -> re.Pattern:
    """Matches the text of any of end_ids()."""
    return any_of(set(tokenizer.convert_ids_to_tokens(sorted(end_ids(tokenizer)))))


def has_control_tokens(tokenizer, messages: Sequence[dict]) -> bool:
    """Whether text of a message would be a control token to who reads the written conversation."""
    found = control_tokens(tokenizer, tokenizer.chat_template)
    return any(found.among(message) for message in messages)


def marked(tokenizer, messages: Sequence[dict]) -> tuple[Sequence[dict], bool]:
    """(messages with markers around the control tokens in them, whether there are any).

    Without any the messages stay as they are. Otherwise the two characters that mark, which are private ones,
    are taken out of all texts: nobody else may mark.
    """
    if not has_control_tokens(tokenizer, messages):
        return messages, False
    found = control_tokens(tokenizer, tokenizer.chat_template)
    talk = []
    for message in messages:
        content = mark_control_tokens(message["content"], found.of(message))
        talk.append({**mark_all(message, found.messages), "content": content})
    return talk, True


def encode(tokenizer, text: str, has_marks: bool, add_special_tokens: bool = False) -> list[int]:
    """Token ids of a text; what stands between markers is encoded as ordinary text.

    `add_special_tokens`: with what the tokenizer adds by itself (BOS). Raises UserError for a tokenizer that
    can't write a marked token as text, Unusable where a template hides the markers.
    """
    if not has_marks:
        return tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    check(ESCAPED not in text.lower(), "a control token that the chat template writes as an escape in JSON")
    try:
        ids = encode_marked_chat(tokenizer, text)
    except ValueError:  # this tokenizer joins the token from its characters, too: it is read in two parts
        for token in set(MARKED.findall(text)):
            parts = encode_marked_chat(tokenizer, token[:1] + END + token[1:])
            if tokenizer.convert_tokens_to_ids(token) in parts:
                raise UserError(f"this tokenizer can't read {token!r} as text: delete it there") from None
        ids = encode_marked_chat(tokenizer, MARKED.sub(lambda m: m[1][:1] + END + m[1][1:], text))
    before, after = added_around(tokenizer) if add_special_tokens else ([], [])
    return before + ids + after


@functools.lru_cache
def added_around(tokenizer) -> tuple[list[int], list[int]]:
    """Token ids that the tokenizer puts before and after every text by itself: ([bos], [])"""
    bare, whole = (tokenizer("a", add_special_tokens=flag)["input_ids"] for flag in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    return whole[:start], whole[start + len(bare) :]


def text_ids(tokenizer, text: str) -> list[int]:
    """Token ids of plain text, with what the tokenizer adds (BOS); special tokens in it are text."""
    return _ids(tokenizer, text, control_tokens(tokenizer, None).messages, True)


def message_ids(tokenizer, text: str) -> list[int]:
    """Token ids of a user's text, without what stands around it."""
    return _ids(tokenizer, text, control_tokens(tokenizer, tokenizer.chat_template).messages, False)


def _ids(tokenizer, text: str, as_text: re.Pattern, add_special_tokens: bool) -> list[int]:
    found = bool(as_text.search(text))
    return encode(tokenizer, mark_control_tokens(text, as_text) if found else text, found, add_special_tokens)
