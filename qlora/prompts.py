"""One prompt builder for training, evaluation, inference and export.

It uses the tokenizer's own chat template, since that is what llama-cli, llama-server and Ollama will apply.
It is saved with the adapter (qlora.json), so that a prompt can't differ between training and use.

Texts come from outside. A control token in one of them ("<|im_end|>" in a review) is text like any other:
only the template begins and ends turns (qlora/control_tokens.py).
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from config import SENTIMENT_ANSWERS, SENTIMENT_QUESTION, SENTIMENT_SYSTEM
from qlora.cells import Unusable
from qlora.cli import UserError, require
from qlora.control_tokens import encode, end_ids, end_pattern, marked, message_ids, text_ids, written
from qlora.logits import IGNORE
from qlora.thoughts import BEGIN, END, THINK, empty_thought, thinks

Examples = Sequence[tuple[str, int]]  # (text, label) for a few-shot prompt


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes token ids."""

    # sentiment: {user} asks, one of {answers} is the reply; chat: messages as they are; lm: plain text
    objective: str
    max_length: int  # tokens in all, answer included
    system: str = ""
    user: str = "{text}"
    answers: tuple[str, ...] = ()
    # Whether replies began with thoughts: the template's switch, where it has one, stands so when it is used.
    thinking: bool = False

    @property
    def asks(self) -> bool:
        """Whether there are answers to choose from, so that rows can be scored."""
        return self.objective == "sentiment"


def choose_format(objective: str, kind: str, answers: tuple, max_length: int, question=None) -> PromptFormat:
    """The prompt of a run: the reviews' question for negative/positive, one that lists the labels for others.

    `question` replaces either of them; it follows the text unless it says itself where {text} goes.
    """
    if objective == "lm" or kind in ("chat", "pairs"):
        return PromptFormat("lm" if objective == "lm" else "chat", max_length)
    reviews = answers == SENTIMENT_ANSWERS and question is None
    asked = question or (SENTIMENT_QUESTION if reviews else f"Which label fits: {', '.join(answers)}?")
    user = asked if "{text}" in asked else "{text}\n\n" + asked
    return PromptFormat("sentiment", max_length, SENTIMENT_SYSTEM if reviews else "", user, answers)


def with_thoughts(prompt: PromptFormat, rows: Sequence) -> PromptFormat:
    """The format of a chat run on `rows`: where replies bring thoughts, thinking stays on when it is used."""
    thinking = any(thinks(message) for row in rows for message in row.messages)
    return dataclasses.replace(prompt, thinking=thinking)


def clean(text: str) -> str:
    """'A fine film.<br /><br />See it.' -> 'A fine film.\\n\\nSee it.' (IMDB reviews carry HTML line breaks)

    Done once, where text comes in: in data.py for rows, in the inference script for what is typed.
    """
    return text.replace("<br />", "\n").strip()


def render(
    tokenizer, messages: Sequence[dict], add_generation_prompt: bool, thinking: bool = False
) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template; a plain layout where it has none."""
    talk, has_marks = marked(tokenizer, messages)
    return encode_talk(tokenizer, layout(tokenizer, talk, add_generation_prompt, thinking), has_marks)


def layout(tokenizer, messages: Sequence[dict], add_generation_prompt: bool, thinking: bool = False) -> str:
    """The text of a conversation; what marked() marked stays so."""
    if (template := tokenizer.chat_template) is not None:
        text = written(tokenizer, arranged(tokenizer, messages), add_generation_prompt, thinking)
        asks_for_reply = add_generation_prompt and not thinking
        return text + empty_thought(tokenizer, template) if asks_for_reply else text
    end = tokenizer.eos_token
    parts = [f"Answer: {m['content']}{end}" if m["role"] == "assistant" else m["content"] for m in messages]
    return "\n\n".join([*parts, "Answer:"] if add_generation_prompt else parts)


def encode_talk(tokenizer, text: str, has_marks: bool) -> list[int]:
    """Token ids of layout()'s text: a chat template writes BOS itself, else the tokenizer adds its own."""
    return encode(tokenizer, text, has_marks, add_special_tokens=tokenizer.chat_template is None)


def arranged(tokenizer, messages: Sequence[dict]) -> list[dict]:
    """The messages as the template takes them: without a system role, its text precedes the first user's.

    Tools, which stand in the first message, stay there.
    """
    if messages[0]["role"] == "system" and not takes_system(tokenizer.chat_template):
        first = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        return arranged(tokenizer, [{**messages[0], **messages[1], "content": first}, *messages[2:]])
    return list(messages)


@functools.lru_cache
def takes_system(template: str) -> bool:
    """Whether a chat template keeps a system message in its place, also when a reply follows.

    Gemma's raises on it; Mistral's moves it to the last user message and drops it once that is answered.
    """
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokens = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **tokens)
    asked = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"}]
    try:
        before = written(plain, asked, True)
        after = written(plain, [*asked, {"role": "assistant", "content": "REPLY"}], False)
    except jinja2.TemplateError:
        return False
    # What follows the two may differ: DeepSeek-R1's prompt ends with <think>, which a given reply lacks.
    kept = before[: max(before.rfind(word) + len(word) for word in ("SYSTEM", "USER"))]
    return "SYSTEM" in before and after.startswith(kept)


def sentiment_messages(prompt: PromptFormat, text: str, examples: Examples = ()) -> list[dict]:
    """[system, (user, assistant)* of the examples, user]"""
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for example, label in examples:
        messages.append({"role": "user", "content": prompt.user.replace("{text}", example)})
        messages.append({"role": "assistant", "content": prompt.answers[label]})
    return [*messages, {"role": "user", "content": prompt.user.replace("{text}", text)}]


def shorten(tokenizer, text: str, tokens: int) -> str:
    """The last `tokens` tokens of `text`, as text: a review's verdict stands at its end."""
    return last_of(tokenizer, text, message_ids(tokenizer, text), tokens)


def last_of(tokenizer, text: str, ids: list[int], tokens: int) -> str:
    """shorten(), where the text's ids are known."""
    if len(ids) <= tokens:
        return text
    kept = ids[len(ids) - max(tokens, 0) :]
    return tokenizer.decode(kept, skip_special_tokens=False).lstrip("\ufffd").strip()


def sentiment_prompt(tokenizer, prompt: PromptFormat, text: str, examples: Examples = ()) -> list[int]:
    """Token ids that end where the answer begins."""
    return render(tokenizer, fitted_messages(tokenizer, prompt, text, examples), True)


def fitted_messages(tokenizer, prompt: PromptFormat, text: str, examples: Examples = ()) -> list[dict]:
    """sentiment_messages() with as much of the review as max_length has room for.

    A review that does not fit loses its beginning. Few-shot examples come on top of max_length, so that the
    review itself is the same text in every column of the report.
    """
    answer, frame = _lengths(tokenizer, prompt)
    room = prompt.max_length - answer
    limit = f"--max-length {prompt.max_length}"
    require(frame < room, f"{limit} leaves no room for a text: the question alone takes {frame} tokens")
    # Cutting inside a word can make it more tokens when it is read again: cut until it fits.
    keep, ids = room - frame, message_ids(tokenizer, text)
    cut = last_of(tokenizer, text, ids, keep)
    while (excess := len(render(tokenizer, sentiment_messages(prompt, cut), True)) - room) > 0:
        keep -= excess
        cut = last_of(tokenizer, text, ids, keep)
    return sentiment_messages(prompt, cut, examples)


def typed_ids(tokenizer, prompt: PromptFormat | None, text: str) -> tuple[list[int], bool]:
    """(token ids of what was typed, as training wrote its rows; whether its beginning did not fit).

    Without a format it is an ordinary chat message.
    """
    if prompt and prompt.objective != "chat":
        text = clean(text)  # as rows are when they are read; a message stays as it is typed
    if prompt and prompt.asks:
        ids = sentiment_prompt(tokenizer, prompt, text)
        return ids, len(render(tokenizer, sentiment_messages(prompt, text), True)) > len(ids)
    if prompt and prompt.objective == "lm":
        return text_ids(tokenizer, text), False
    thinking = bool(prompt and prompt.thinking)
    return render(tokenizer, [{"role": "user", "content": text}], True, thinking), False


def answer_ids(tokenizer, prompt: PromptFormat, label: int) -> list[int]:
    """Token ids of an answer and its end token, as the chat template writes them: 'positive' -> [16185, 2]"""
    return list(_answer_ids(tokenizer, prompt, label))


@functools.lru_cache
def _answer_ids(tokenizer, prompt: PromptFormat, label: int) -> list[int]:
    reply = {"role": "assistant", "content": prompt.answers[label]}
    return turn_ids(tokenizer, *marked(tokenizer, [*sentiment_messages(prompt, "x"), reply]))[1]


@functools.lru_cache
def _lengths(tokenizer, prompt: PromptFormat) -> tuple[int, int]:
    """Tokens of the longest answer and of the question without a review; the same for every row."""
    answer = max(len(answer_ids(tokenizer, prompt, label)) for label in range(len(prompt.answers)))
    return answer, len(render(tokenizer, sentiment_messages(prompt, ""), True))


def turn_ids(tokenizer, talk: Sequence[dict], has_marks: bool) -> tuple[list[int], list[int]]:
    """(prompt, reply) of a talk that ends with a reply, as marked() gives it.

    The reply is what the template adds to the prompt, up to and with the first end token: the template's own,
    since one in the reply's text is marked. The line break that some templates print after it is left out: at
    run time generation has stopped before it.
    """
    thinking = thinks(talk[-1])
    prompt, whole = layout(tokenizer, talk[:-1], True, thinking), layout(tokenizer, talk, False, thinking)
    asked, told = (encode_talk(tokenizer, text, has_marks) for text in (prompt, whole))
    added, ends = told[len(asked) :], end_ids(tokenizer)
    opened = thinking and prompt.rstrip().endswith(THINK)  # the reply goes on inside the thought
    if opened or told[: len(asked)] != asked:
        # Without a special token between them, prompt and reply share a token (": " + "No" -> ":", " No").
        # Generation starts after the prompt's own tokens, so that is where the reply's tokens begin.
        before, after = tokenizer.decode(asked), tokenizer.decode(told)
        if not opened and after.startswith(before) and (whole.startswith(prompt) or not has_marks):
            text = whole[len(prompt) :] if has_marks else after[len(before) :]
        else:
            text = given_reply(tokenizer, talk, prompt, thinking)
        added = encode(tokenizer, text, has_marks)
    stop = next((i for i, token in enumerate(added) if token in ends), None)
    return asked, [*added, tokenizer.eos_token_id] if stop is None else added[: stop + 1]


def given_reply(tokenizer, talk: Sequence[dict], prompt: str, thinking: bool) -> str:
    """The last reply and its end, where the template leaves out of the talk what its prompt says.

    DeepSeek-R1's opens a thought in the prompt and writes none in front of a reply that is there.
    """
    if "tool_calls" in talk[-1]:
        raise Unusable("tool calls after a prompt that the chat template does not continue")
    reply = talk[-1]["content"].strip()
    framed = {**talk[-1], "content": BEGIN + "x" + END}
    _, found, rest = layout(tokenizer, [*talk[:-1], framed], False, thinking).partition(END)
    if not found:
        raise UserError("this chat template does not continue its own prompt: labels can't be placed")
    if prompt.rstrip().endswith(THINK):
        reply = reply.removeprefix(THINK).lstrip("\n")
    end = end_pattern(tokenizer).search(rest)
    return reply + (rest[: end.end()] if end else rest)


def sentiment_example(tokenizer, prompt: PromptFormat, text: str, label: int) -> tuple[list[int], list[int]]:
    """(input ids, labels); labels are IGNORE but for the answer and its end token."""
    asked, answer = sentiment_prompt(tokenizer, prompt, text), answer_ids(tokenizer, prompt, label)
    return asked + answer, [IGNORE] * len(asked) + answer


def lm_example(tokenizer, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """(input ids, labels = input ids) of plain text with its end token; cut at the end if longer."""
    ids = text_ids(tokenizer, text)
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids[:max_length], ids[:max_length]
