"""A conversation -> token ids and labels. Every reply is learned, with its end token."""

import re
from collections.abc import Sequence

from qlora.cells import Unusable, check
from qlora.cli import first_line
from qlora.control_tokens import encode, end_ids, end_pattern, marked
from qlora.logits import IGNORE
from qlora.prompts import encode_talk, layout, turn_ids
from qlora.thoughts import BEGIN, END, thinks

Spans = list[tuple[int, int]]
Example = tuple[list[int], list[int]]  # input ids, and labels that are IGNORE but for replies


def chat_examples(tokenizer, messages: Sequence[dict], max_length: int | None = None) -> list[Example]:
    """[(input ids, labels)] of a conversation up to its last reply.

    One example holds all replies, unless the chat template writes earlier turns differently once others
    follow (see examples_by_turn). A conversation that is longer than `max_length` is going to be skipped: its
    replies are not looked for. Raises Unusable where the template leaves out a part of it.
    """
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        return [([], [])]
    talk, has_marks = marked(tokenizer, messages[: replies[-1] + 1])
    refuse_unwritten(tokenizer, talk)
    asked, reply = turn_ids(tokenizer, talk, has_marks)
    ids, labels = asked + reply, [IGNORE] * len(asked) + reply
    if len(replies) == 1 or max_length is not None and len(ids) > max_length:
        return [(ids, labels)]
    spans = spans_at_once(tokenizer, talk, has_marks, asked, ids)
    if spans is None:
        return examples_by_turn(tokenizer, talk, has_marks)
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return [(ids, labels)]


def refuse_unwritten(tokenizer, talk: Sequence[dict]) -> None:
    """Raise Unusable where the chat template leaves out tools, a call, a result or a later system message.

    Most templates know neither tools nor calls, and say nothing. So each part of such a conversation is
    replaced by a name that can't be in the template, and the name has to be in what it writes.
    """
    usual = ("user", "assistant")
    if all(m["role"] in usual and "tool_calls" not in m for m in talk[1:]) and "tools" not in talk[0]:
        return
    named, parts = [], {}
    for i, message in enumerate(talk):
        copy, what = dict(message), {"tool": "a tool's result", "system": "a system message"}
        if message["content"].strip():
            copy["content"] = f"{BEGIN}c{i}{END}"
            beside = (
                "text beside tool calls" if "tool_calls" in message else f"a message of the {message['role']}"
            )
            parts[copy["content"]] = what.get(message["role"], beside)
        if "tools" in message:
            copy["tools"] = [
                as_part(tool, f"t{i}.{n}", parts, "tools") for n, tool in enumerate(message["tools"])
            ]
        if "tool_calls" in message:
            calls = enumerate(message["tool_calls"])
            copy["tool_calls"] = [as_part(call, f"f{i}.{n}", parts, "tool calls") for n, call in calls]
        named.append(copy)
    try:
        text = layout(tokenizer, named, False)
    except Exception as error:  # a template is a program
        raise Unusable(f"the chat template refuses it ({first_line(error)})") from None
    left_out = list(dict.fromkeys(what for name, what in parts.items() if name not in text))
    check(not left_out, f"{' and '.join(left_out)}, which this model's chat template does not write")


def as_part(function: dict, name: str, parts: dict, what: str) -> dict:
    """A tool or a call under another name, and with it as its argument's; `parts` learns {name: what}."""
    name = f"{BEGIN}{name}{END}"
    inside = {**function["function"], "name": name}
    parts[name] = what
    if inside.get("arguments"):
        argument = f"{BEGIN}a{name[1:]}"
        inside["arguments"], parts[argument] = {argument: "x"}, what
    return {**function, "function": inside}


def examples_by_turn(tokenizer, talk: Sequence[dict], has_marks: bool) -> list[Example]:
    """An example for each reply, with the prompt that stands before it at run time.

    A reply that stands unchanged in the next one's prompt is learned there. Qwen3 takes thoughts out of
    earlier turns: a conversation of three replies becomes three examples. The conversation is written anew
    up to each reply.
    """
    examples: list[Example] = []
    for i, message in enumerate(talk):
        if message["role"] != "assistant":
            continue
        asked, reply = turn_ids(tokenizer, talk[: i + 1], has_marks)
        labels = [IGNORE] * len(asked) + reply
        if examples and asked[: len(examples[-1][0])] == examples[-1][0]:
            before = examples.pop()[1]
            labels[: len(before)] = before
        examples.append((asked + reply, labels))
    return examples


def spans_at_once(tokenizer, talk: Sequence[dict], has_marks: bool, asked: list, ids: list) -> Spans | None:
    """(start, stop) of each reply but the last in `ids`, in time that grows with the conversation's length.

    None where examples_by_turn() may find others: if prompts_of_replies() finds none, or if they are split
    otherwise in their place. `asked`: the last prompt's ids.
    """
    ends = end_ids(tokenizer)
    prompts, end = prompts_of_replies(tokenizer, talk)
    spans, position = [(0, 0)], 0
    for i, prompt in enumerate(prompts):
        # An end token parts the text: what follows it is split as if nothing stood before.
        before = (
            encode(tokenizer, end + prompt, has_marks)[1:] if i else encode_talk(tokenizer, prompt, has_marks)
        )
        start = position + len(before)
        if ids[position:start] != before:
            return None
        position = next((place for place in range(start, len(ids)) if ids[place] in ends), len(ids)) + 1
        spans.append((start, position))
    return spans[1:-1] if spans[-1] == (len(asked), len(ids)) else None


def prompts_of_replies(tokenizer, talk: Sequence[dict]) -> tuple[list[str], str]:
    """(what stands before each reply, from the end token of the reply before on; that end token).

    ([], "") unless the template leaves the replies as they are and puts the same around each of them.
    """
    replies = [i for i, m in enumerate(talk) if m["role"] == "assistant"]
    thinking = thinks(talk[-1])

    def text_of(messages: Sequence[dict], add_generation_prompt: bool) -> str:
        return layout(tokenizer, messages, add_generation_prompt, thinking)

    parts = re.split(f"[{BEGIN}{END}]", text_of([framed(m) for m in talk], False))
    as_they_are = parts[1::2] == [talk[i]["content"].rstrip() for i in replies]
    one_mode = all(thinks(talk[i]) == thinking for i in replies)
    if not (as_they_are and one_mode) or "".join(parts) != text_of(talk, False):
        return [], ""
    before, after = [parts[0]], []
    for part in parts[2::2]:
        end = end_pattern(tokenizer).search(part)
        if not end:
            return [], ""
        after.append(part[: end.end()].lstrip())  # a reply's own white space may come first
        before.append(part[end.end() :])
    first, without = (text_of(talk[: replies[0]], flag) for flag in (True, False))
    if not first.startswith(without):
        without = without.removesuffix(tokenizer.eos_token)  # Phi's closes the text with it
    opening = first.removeprefix(without)  # the generation prompt
    lead = parts[0].removeprefix(first)  # Mistral's: a space before a given reply, not before a new one
    alike = len(set(after)) == 1 and all(text.endswith(opening + lead) for text in before[:-1])
    if not alike or not parts[0].startswith(first):
        return [], ""
    return [text.removesuffix(lead) for text in before[:-1]], end[0]


def framed(message: dict) -> dict:
    """A reply between BEGIN and END; white space at its end, which some templates cut off, stays outside."""
    if message["role"] != "assistant":
        return message
    content = message["content"]
    text = content.rstrip()
    return {**message, "content": BEGIN + text + END + content[len(text) :]}
