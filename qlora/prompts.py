"""One prompt builder for training, evaluation, inference and export.

It uses the tokenizer's own chat template, since that is what llama-cli, llama-server and Ollama will apply.
It is saved with the adapter (qlora.json), so that a prompt can't differ between training and use.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

from config import SENTIMENT_ANSWERS, SENTIMENT_QUESTION, SENTIMENT_SYSTEM
from qlora.cli import UserError, require
from qlora.logits import IGNORE

# Llama 3's template writes today's date unless it is given one: every day would be another prompt.
TEMPLATE_VARIABLES = {"date_string": "26 Jul 2024"}
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

    @property
    def asks(self) -> bool:
        """Whether there are answers to choose from, so that rows can be scored."""
        return self.objective == "sentiment"

    @classmethod
    def from_json(cls, data: dict) -> "PromptFormat":
        """From what asdict() gave; JSON has no tuples."""
        return cls(**{**data, "answers": tuple(data.get("answers", ()))})


def choose_format(objective: str, kind: str, answers: tuple, max_length: int, question=None) -> PromptFormat:
    """The prompt of a run: the reviews' question for negative/positive, one that lists the labels for others.

    `question` replaces either of them; it follows the text unless it says itself where {text} goes.
    """
    if objective == "lm" or kind == "chat":
        return PromptFormat("lm" if objective == "lm" else "chat", max_length)
    reviews = answers == SENTIMENT_ANSWERS and question is None
    asked = question or (SENTIMENT_QUESTION if reviews else f"Which label fits: {', '.join(answers)}?")
    user = asked if "{text}" in asked else "{text}\n\n" + asked
    return PromptFormat("sentiment", max_length, SENTIMENT_SYSTEM if reviews else "", user, answers)


def clean(text: str) -> str:
    """'A fine film.<br /><br />See it.' -> 'A fine film.\\n\\nSee it.' (IMDB reviews carry HTML line breaks)

    Done once, where text comes in: in data.py for rows, in the inference script for what is typed.
    """
    return text.replace("<br />", "\n").strip()


def render(tokenizer, messages: Sequence[dict], add_generation_prompt: bool) -> list[int]:
    """Token ids of a conversation by the tokenizer's chat template; a plain layout where it has none."""
    if tokenizer.chat_template is not None:
        messages = arranged(tokenizer, messages)
        return _apply(tokenizer, messages, add_generation_prompt=add_generation_prompt, tokenize=True)
    end = tokenizer.eos_token
    parts = [f"Answer: {m['content']}{end}" if m["role"] == "assistant" else m["content"] for m in messages]
    return tokenizer("\n\n".join([*parts, "Answer:"] if add_generation_prompt else parts))["input_ids"]


def arranged(tokenizer, messages: Sequence[dict]) -> list[dict]:
    """The messages as the template takes them: without a system role, its text precedes the first user's."""
    if messages[0]["role"] == "system" and not takes_system(tokenizer.chat_template):
        first = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        return [{**messages[1], "content": first}, *messages[2:]]
    return list(messages)


def _apply(tokenizer, messages, **options):
    return tokenizer.apply_chat_template(messages, return_dict=False, **TEMPLATE_VARIABLES, **options)


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
        before = _apply(plain, asked, add_generation_prompt=True, tokenize=False)
        after = _apply(plain, [*asked, {"role": "assistant", "content": "REPLY"}], tokenize=False)
    except jinja2.TemplateError:
        return False
    return "SYSTEM" in before and after.startswith(before)


def sentiment_messages(prompt: PromptFormat, text: str, examples: Examples = ()) -> list[dict]:
    """[system, (user, assistant)* of the examples, user]"""
    messages = [{"role": "system", "content": prompt.system}] if prompt.system else []
    for example, label in examples:
        messages.append({"role": "user", "content": prompt.user.replace("{text}", example)})
        messages.append({"role": "assistant", "content": prompt.answers[label]})
    return [*messages, {"role": "user", "content": prompt.user.replace("{text}", text)}]


def shorten(tokenizer, text: str, tokens: int) -> str:
    """The last `tokens` tokens of `text`, as text: a review's verdict stands at its end."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) <= tokens:
        return text
    return tokenizer.decode(ids[-tokens:], skip_special_tokens=False).lstrip("\ufffd").strip()


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
    keep = room - frame
    cut = shorten(tokenizer, text, keep)
    while (excess := len(render(tokenizer, sentiment_messages(prompt, cut), True)) - room) > 0:
        keep -= excess
        cut = shorten(tokenizer, text, keep)
    return sentiment_messages(prompt, cut, examples)


def answer_ids(tokenizer, prompt: PromptFormat, label: int) -> list[int]:
    """Token ids of an answer and its end token, as the chat template writes them: 'positive' -> [16185, 2]"""
    return reply_ids(tokenizer, sentiment_messages(prompt, "x"), prompt.answers[label])


@functools.lru_cache
def _lengths(tokenizer, prompt: PromptFormat) -> tuple[int, int]:
    """Tokens of the longest answer and of the question without a review; the same for every row."""
    answer = max(len(answer_ids(tokenizer, prompt, label)) for label in range(len(prompt.answers)))
    return answer, len(render(tokenizer, sentiment_messages(prompt, ""), True))


def end_ids(tokenizer) -> set[int]:
    """Tokens that end a turn: the end-of-text token and the other special ones (<|im_end|>, <|eot_id|>, …)"""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {tokenizer.eos_token_id, *tokenizer.all_special_ids, *added}


def reply_ids(tokenizer, messages: Sequence[dict], reply: str) -> list[int]:
    """What the template adds to the prompt for an assistant's `reply`, up to and with the first end token.

    The line break that some templates print after the end token is left out: at run time generation has
    stopped before it.
    """
    asked = render(tokenizer, messages, True)
    told = render(tokenizer, [*messages, {"role": "assistant", "content": reply}], False)
    added, ends = told[len(asked) :], end_ids(tokenizer)
    if told[: len(asked)] != asked:
        # Without a special token between them, prompt and reply share a token (": " + "No" -> ":", " No").
        # Generation starts after the prompt's own tokens, so that is where the reply's tokens begin.
        before, after = tokenizer.decode(asked), tokenizer.decode(told)
        if not after.startswith(before):
            raise UserError("this chat template does not continue its own prompt: labels can't be placed")
        added = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
    stop = next((i for i, token in enumerate(added) if token in ends), None)
    return [*added, tokenizer.eos_token_id] if stop is None else added[: stop + 1]


def sentiment_example(tokenizer, prompt: PromptFormat, text: str, label: int) -> tuple[list[int], list[int]]:
    """(input ids, labels); labels are IGNORE but for the answer and its end token."""
    asked, answer = sentiment_prompt(tokenizer, prompt, text), answer_ids(tokenizer, prompt, label)
    return asked + answer, [IGNORE] * len(asked) + answer


def chat_example(tokenizer, messages: Sequence[dict]) -> tuple[list[int], list[int]]:
    """(input ids, labels) of a conversation; every assistant turn is trained on, with its end token."""
    ids, labels = [], []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = render(tokenizer, messages[:i], True)
        reply = reply_ids(tokenizer, messages[:i], message["content"])
        if asked[: len(ids)] != ids:
            raise UserError("this chat template rewrites earlier turns: train on single-turn rows")
        labels += [IGNORE] * (len(asked) - len(ids)) + reply
        ids = asked + reply
    return ids, labels


def lm_example(tokenizer, text: str, max_length: int) -> tuple[list[int], list[int]]:
    """(input ids, labels = input ids) of plain text with its end token; cut at the end if longer."""
    ids = tokenizer(text)["input_ids"]
    if ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    return ids[:max_length], ids[:max_length]
