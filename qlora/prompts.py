"""One prompt builder for training, evaluation, inference and export.

It uses the tokenizer's own chat template, since that is what llama-cli, llama-server and Ollama will apply,
and it travels with the adapter (qlora.json), so that a prompt can't differ between training and use.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass
from typing import Sequence

import jinja2

from qlora.cli import UsageError, UserError

IGNORE = -100  # label of a position that is not trained on (torch's cross_entropy ignores it)
# Llama 3's template writes today's date unless it is given one: an adapter would meet another prompt every day.
TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024"}


@dataclass(frozen=True)
class PromptFormat:
    """How a row becomes token ids."""

    objective: str  # "sentiment": {user} asks, one of {answers} is the reply; "chat": messages as they are; "lm": plain text
    max_length: int  # tokens in all, answer included
    system: str = ""
    user: str = "{text}"
    answers: tuple[str, ...] = ()

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict) -> "PromptFormat":
        return cls(**{**data, "answers": tuple(data.get("answers", ()))})


def clean(text: str) -> str:
    """'A fine film.<br /><br />See it.' -> 'A fine film.\\n\\nSee it.' (IMDB reviews carry HTML line breaks)"""
    return text.replace("<br />", "\n").strip()


def render(tokenizer, messages: Sequence[dict], add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template; a plain layout where it has none."""
    if tokenizer.chat_template is None:
        parts = [f"Answer: {m['content']}{tokenizer.eos_token}" if m["role"] == "assistant" else m["content"] for m in messages]
        return tokenizer("\n\n".join([*parts, "Answer:"] if add_generation_prompt else parts))["input_ids"]
    return _apply(tokenizer, arranged(tokenizer, messages), add_generation_prompt=add_generation_prompt, tokenize=True)


def arranged(tokenizer, messages: Sequence[dict]) -> list[dict]:
    """The messages as the chat template takes them: where it takes no system message, that stands before the first user's."""
    if messages[0]["role"] == "system" and not takes_system(tokenizer.chat_template):
        return [{**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]
    return list(messages)


def _apply(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **TEMPLATE_VARIABLES, **options)


@functools.lru_cache
def takes_system(template: str) -> bool:
    """Whether a chat template keeps a system message in its place, also when a reply follows.

    Gemma's raises on it; Mistral's moves it to the last user message and drops it once that is answered.
    """
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), bos_token="<s>", eos_token="</s>", chat_template=template)
    asked = [{"role": "system", "content": "SYSTEM"}, {"role": "user", "content": "USER"}]
    try:
        before = _apply(plain, asked, add_generation_prompt=True, tokenize=False)
        after = _apply(plain, [*asked, {"role": "assistant", "content": "REPLY"}], tokenize=False)
    except jinja2.TemplateError:
        return False
    return "SYSTEM" in before and after.startswith(before)


def sentiment_messages(prompt: PromptFormat, text: str, examples: Sequence[tuple[str, int]] = ()) -> list[dict]:
    """[system, (user, assistant)* of the examples, user]"""
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for example, label in examples:
        messages.append({"role": "user", "content": prompt.user.replace("{text}", clean(example))})
        messages.append({"role": "assistant", "content": prompt.answers[label]})
    return [*messages, {"role": "user", "content": prompt.user.replace("{text}", clean(text))}]


def shorten(tokenizer, text: str, tokens: int) -> str:
    """The last `tokens` tokens of `text`, as text (a verdict stands at a review's end more often than at its start)."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return text if len(ids) <= tokens else tokenizer.decode(ids[-tokens:], skip_special_tokens=False).lstrip("\ufffd")


def sentiment_prompt(tokenizer, prompt: PromptFormat, text: str, examples: Sequence[tuple[str, int]] = ()) -> list[int]:
    """Token ids that end where the answer begins."""
    return render(tokenizer, fitted_messages(tokenizer, prompt, text, examples), True)


def fitted_messages(tokenizer, prompt: PromptFormat, text: str, examples: Sequence[tuple[str, int]] = ()) -> list[dict]:
    """sentiment_messages() with as much of the review as max_length has room for.

    A review that does not fit loses its beginning; examples (few-shot) come on top of max_length, so that the
    review itself is the same text in every column of the report.
    """
    text = clean(text)
    answer, frame = _lengths(tokenizer, prompt)
    room = prompt.max_length - answer
    if frame >= room:
        raise UsageError(f"--max-length {prompt.max_length} leaves no room for a review: the question alone takes {frame} tokens")
    # Cutting inside a word can make it tokens longer when it is read again: cut until it fits.
    keep = room - frame
    cut = shorten(tokenizer, text, keep)
    while (excess := len(render(tokenizer, sentiment_messages(prompt, cut), True)) - room) > 0:
        keep -= excess
        cut = shorten(tokenizer, text, keep)
    return sentiment_messages(prompt, cut, examples)


def answer_ids(tokenizer, prompt: PromptFormat, label: int) -> list[int]:
    """Token ids of an answer and its end token, as the chat template writes them: 'positive' -> [16185, 2]"""
    messages = sentiment_messages(prompt, "x")
    return reply_ids(tokenizer, messages, prompt.answers[label])


@functools.lru_cache
def _lengths(tokenizer, prompt: PromptFormat) -> tuple[int, int]:
    """Tokens of the longest answer and of the question without a review; the same for every row."""
    answer = max(len(answer_ids(tokenizer, prompt, label)) for label in range(len(prompt.answers)))
    return answer, len(render(tokenizer, sentiment_messages(prompt, ""), True))


def end_ids(tokenizer) -> set[int]:
    """Tokens that end a turn: the end-of-text token and the other special tokens (<|im_end|>, <|eot_id|>, …)."""
    return {tokenizer.eos_token_id, *tokenizer.all_special_ids, *_added_special_ids(tokenizer)}


def _added_special_ids(tokenizer) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def reply_ids(tokenizer, messages: Sequence[dict], reply: str) -> list[int]:
    """What the template adds to the prompt for an assistant's `reply`, up to and with the first end token.

    The line break that some templates print after the end token is left out: at run time generation has
    stopped before it.
    """
    asked = render(tokenizer, messages, True)
    told = render(tokenizer, [*messages, {"role": "assistant", "content": reply}], False)
    added, ends = told[len(asked):], end_ids(tokenizer)
    if told[: len(asked)] != asked:
        # Without a special token between them, prompt and reply share a token (": " + "No" -> ":", " No"). Generation
        # starts after the prompt's own tokens, so that is where the reply's begin.
        before, after = tokenizer.decode(asked), tokenizer.decode(told)
        if not after.startswith(before):
            raise UserError("this tokenizer's chat template does not continue its own prompt; QLoRA labels can't be placed")
        added = tokenizer(after[len(before):], add_special_tokens=False)["input_ids"]
    stop = next((i for i, token in enumerate(added) if token in ends), None)
    return [*added, tokenizer.eos_token_id] if stop is None else added[: stop + 1]


def sentiment_example(tokenizer, prompt: PromptFormat, text: str, label: int) -> tuple[list[int], list[int]]:
    """(input ids, labels); labels are IGNORE but for the answer and its end token."""
    asked, answer = sentiment_prompt(tokenizer, prompt, text), answer_ids(tokenizer, prompt, label)
    return asked + answer, [IGNORE] * len(asked) + answer


def chat_example(tokenizer, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
    """(input ids, labels) of a conversation; every assistant turn is trained on, with its end token."""
    ids: list[int] = []
    labels: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked, reply = render(tokenizer, messages[:i], True), reply_ids(tokenizer, messages[:i], message["content"])
        if asked[: len(ids)] != ids:
            raise UserError("this tokenizer's chat template rewrites earlier turns; train on single-turn rows")
        labels += [IGNORE] * (len(asked) - len(ids)) + reply
        ids = asked + reply
    return ids, labels


def lm_example(tokenizer, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """(input ids, labels = input ids) of plain text with its end token; cut at the end if longer."""
    ids = tokenizer(clean(text))["input_ids"]
    if not ids or ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    ids = ids[:max_length]
    return ids, list(ids)
