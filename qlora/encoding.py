"""Rows -> token ids and labels by a run's objective, and the label X-ray."""

from __future__ import annotations

import jinja2

from config import SENTIMENT_ANSWERS, SENTIMENT_SYSTEM, SENTIMENT_USER
from qlora import prompts as p
from qlora.cli import UsageError, UserError, note
from qlora.data import Row


def choose_format(objective: str, kind: str, answers: tuple[str, ...], max_length: int) -> p.PromptFormat:
    """The prompt of a run: IMDB's question for negative/positive, a question that lists the labels for others."""
    if objective == "lm":
        return p.PromptFormat("lm", max_length)
    if kind == "chat":
        return p.PromptFormat("chat", max_length)
    if answers == SENTIMENT_ANSWERS:
        return p.PromptFormat("sentiment", max_length, SENTIMENT_SYSTEM, SENTIMENT_USER, answers)
    return p.PromptFormat("sentiment", max_length, "", "{text}\n\nWhich label fits: " + ", ".join(answers) + "?", answers)


def encode_rows(tokenizer, prompt: p.PromptFormat, rows: list[Row], what: str) -> list[dict]:
    """[{input_ids, labels}]; rows that can't be shortened and exceed max_length are left out, and counted aloud."""
    def encode(row: Row):
        if prompt.objective == "sentiment":
            return p.sentiment_example(tokenizer, prompt, row.text, row.label)
        if prompt.objective == "lm":
            return p.lm_example(tokenizer, row.text, prompt.max_length)
        return p.chat_example(tokenizer, row.messages)

    try:
        made = [dict(zip(("input_ids", "labels"), encode(row))) for row in rows]
    except jinja2.TemplateError as error:  # many templates raise where the roles do not take turns
        raise UserError(f"this model's chat template refuses a {what} row ({error}); do its roles take turns, user first?") from None
    kept = [e for e in made if len(e["input_ids"]) <= prompt.max_length]
    if not kept:
        shortest = min(len(e["input_ids"]) for e in made)
        raise UsageError(f"--max-length {prompt.max_length}: no {what} row is that short (shortest: {shortest} tokens)")
    if len(kept) < len(made):
        note(f"note       {len(made) - len(kept)} {what} rows longer than --max-length {prompt.max_length} left out")
    return kept


def show_labels(tokenizer, example: dict, edge: int = 6) -> None:
    """X-ray of one row: which tokens are read (.), and which are learned (+)."""
    rows = list(zip(example["input_ids"], example["labels"]))
    learned = sum(label != p.IGNORE for _, label in rows)
    note(f"labels     first training row: {len(rows)} tokens, {learned} of them trained on (+), the rest only read (.)")
    skip = range(edge, len(rows) - 2 * edge) if len(rows) > 4 * edge else range(0)
    for i, (token, label) in enumerate(rows):
        if i in skip:
            if i == skip.start:
                note(f"             … {len(skip)} more")
        else:
            note(f"           {'+' if label != p.IGNORE else '.'} {i:4d}  {token:6d}  {tokenizer.decode([token])!r}")
