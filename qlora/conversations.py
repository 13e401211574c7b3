"""A conversation -> token ids and labels. Every reply is learned, with its end token."""

import re
from collections.abc import Sequence

from qlora.cli import UserError
from qlora.control_tokens import encode, end_ids, end_pattern, marked
from qlora.logits import IGNORE
from qlora.prompts import encode_talk, layout, turn_ids

# Stand around each reply while its place is looked for: private characters that no template writes.
BEGIN, END = "\ue001", "\ue002"
Spans = list[tuple[int, int]]


def chat_example(tokenizer, messages: Sequence[dict], max_length: int | None = None) -> tuple[list, list]:
    """(input ids, labels) of a conversation up to its last reply; labels are IGNORE but for the replies.

    One that is longer than `max_length` is going to be skipped: its replies are not looked for. Raises
    UserError where the chat template writes earlier turns differently once others follow.
    """
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not replies:
        return [], []
    talk, has_marks = marked(tokenizer, messages[: replies[-1] + 1])
    asked, reply = turn_ids(tokenizer, talk, has_marks)
    ids = asked + reply
    if max_length is not None and len(ids) > max_length:
        return ids, [IGNORE] * len(ids)
    spans = spans_at_once(tokenizer, talk, has_marks, asked, ids) if len(replies) > 1 else []
    if spans is None:
        spans = spans_by_turn(tokenizer, talk, has_marks, ids)
    labels = [IGNORE] * len(asked) + reply
    for start, stop in spans:
        labels[start:stop] = ids[start:stop]
    return ids, labels


def spans_by_turn(tokenizer, talk: Sequence[dict], has_marks: bool, ids: list[int]) -> Spans:
    """(start, stop) of each reply but the last in `ids`; the conversation is written anew up to each."""
    spans = []
    for i, message in enumerate(talk[:-1]):
        if message["role"] != "assistant":
            continue
        asked, reply = turn_ids(tokenizer, talk[: i + 1], has_marks)
        if ids[: len(asked) + len(reply)] != asked + reply:
            raise UserError("this chat template rewrites earlier turns: train on single-turn rows")
        spans.append((len(asked), len(asked) + len(reply)))
    return spans


def spans_at_once(tokenizer, talk: Sequence[dict], has_marks: bool, asked: list, ids: list) -> Spans | None:
    """The same from the whole conversation's text, in time that grows with its length.

    None where that may differ: if prompts_of_replies() finds none, or if they are split otherwise in their
    place. `asked`: the last prompt's ids.
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
    parts = re.split(f"[{BEGIN}{END}]", layout(tokenizer, [framed(m) for m in talk], False))
    as_they_are = parts[1::2] == [talk[i]["content"].rstrip() for i in replies]
    if not as_they_are or "".join(parts) != layout(tokenizer, talk, False):
        return [], ""
    before, after = [parts[0]], []
    for part in parts[2::2]:
        end = end_pattern(tokenizer).search(part)
        if not end:
            return [], ""
        after.append(part[: end.end()].lstrip())  # a reply's own white space may come first
        before.append(part[end.end() :])
    first = layout(tokenizer, talk[: replies[0]], True)
    opening = first.removeprefix(layout(tokenizer, talk[: replies[0]], False))  # the generation prompt
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
