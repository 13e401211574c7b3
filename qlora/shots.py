"""Examples in the prompt beside fine-tuning: the base shown 0, 4, 16 … training rows, on the same rows."""

import contextlib
import random
import time

from qlora import data, evaluation, measures, prompts
from qlora.cli import UsageError, note
from qlora.splitting import evenly
from qlora.tables import table

# Tokens that an example may have, its end, where the verdict stands; the most that fit are taken.
LENGTHS = (64, 48, 32, 24, 16)
HEADERS = ("", "accuracy", "95% interval", "tokens a prompt", "s a row")


def rows_to_show(dataset: str, trained: dict, found, rows: list, counts) -> list:
    """Training rows, as many as the largest of `counts` or all there are, the labels in turn.

    `trained` is what an adapter's notes say of its data, `rows` are those that are scored. What training held
    out is never shown, also where fewer rows are scored.
    """
    held_out = max(len(rows), trained.get("eval_samples") or 0 if data.is_own(dataset, trained) else 0)
    left = len(found.rows) - (0 if found.held_out else held_out)
    if left < 1:
        raise UsageError(f"--shots: all rows of {dataset} are held out; lower --eval-samples")
    return data.split(found, min(max(*counts, 1), left), held_out, trained["seed"])[0]


def show(base, model, who: tuple, rows: tuple, counts) -> None:
    """A table on stdout: the base with so many examples, then the adapter with none; a line each as it comes.

    `who`: (prompt format, adapter or None); `rows`: (to score, to show).
    """
    (prompt, adapter), (scored, pool), lines = who, rows, []
    for count in counts:
        label, refused = f"base, {count} examples" if count else "base, no examples", ""
        shots, tokens = fitting(base, prompt, pool, min(count, len(pool)))
        longest = length(base, prompt, shots)
        if count > len(pool):
            cells, refused = (
                [f"{len(pool)} rows left", ""],
                f"only {len(pool)} training rows are left to show",
            )
        elif longest > base.context_length:
            cells = ["does not fit", f"{longest} of {base.context_length}"]
            refused = f"{longest} tokens with {tokens} of each, and the model reads {base.context_length}"
        if refused:
            lines.append([label, "-", *cells, "-"])
        else:
            with model.disable_adapter() if adapter else contextlib.nullcontext():
                lines.append([label, *measure(base, model, prompt, scored, shots)])
        each = f" of {tokens} tokens at most" if count and not refused else ""
        note(f"shots      {label}{each}: {refused or lines[-1][1]}")
    if adapter:
        lines.append([f"{adapter.name}, no examples", *measure(base, model, prompt, scored, [])])
    print(table(HEADERS, lines), flush=True)


def fitting(base, prompt: prompts.PromptFormat, pool: list, count: int) -> tuple[list[tuple[str, int]], int]:
    """(`count` examples (text, label), tokens of each at most), as long as the context has room for."""
    for tokens in LENGTHS:
        shots = examples(base.tokenizer, pool, count, tokens)
        if length(base, prompt, shots) <= base.context_length:
            break
    return shots, tokens


def examples(tokenizer, pool: list, count: int, tokens: int) -> list[tuple[str, int]]:
    """The first `count` rows, each its last `tokens` tokens, mixed: the last label shown weighs most."""
    chosen = evenly(pool, count)
    random.Random(count).shuffle(chosen)
    return [(prompts.shorten(tokenizer, row.text, tokens), row.label) for row in chosen]


def length(base, prompt: prompts.PromptFormat, shots: list) -> int:
    """Tokens of the longest prompt: the examples come on top of the row's own max_length."""
    shown = prompts.sentiment_prompt(base.tokenizer, prompt, "", shots)
    return prompt.max_length + len(shown)


def measure(base, model, prompt: prompts.PromptFormat, rows: list, shots: list) -> list[str]:
    """Cells of HEADERS: accuracy, its interval, mean tokens, seconds of scoring a row."""
    ids = [prompts.sentiment_prompt(base.tokenizer, prompt, row.text, shots) for row in rows]
    started = time.perf_counter()
    scores = evaluation.score_answers(base, model, prompt, ids, f"{len(shots)} examples")
    seconds = (time.perf_counter() - started) / len(rows)
    right = evaluation.accuracy_report(scores.argmax(1).tolist(), [row.label for row in rows], prompt.answers)
    low, high = measures.percent(right["low"]), measures.percent(right["high"])
    tokens = sum(map(len, ids)) / len(ids)
    return [measures.percent(right["accuracy"]), f"{low} to {high}", f"{tokens:.0f}", f"{seconds:.3f}"]
