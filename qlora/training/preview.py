"""--preview: what a run would see and do, on stdout. Nothing is trained or written."""

import contextlib
import dataclasses
import io
import math

from qlora import processes
from qlora.batches import encode_rows, label_lines, learned_tokens
from qlora.cli import note
from qlora.loading import load_tokenizer
from qlora.prompts import PromptFormat, choose_format, with_thoughts
from qlora.sources import locate

NO_LIMIT = 1 << 30  # tokens of a row
BARS, BAR_WIDTH = 10, 40


def show(s, rows: list, held_out: list, found) -> None:
    """Three rows, what is dropped or cut, lengths, tokens and steps; reads the model's tokenizer alone."""
    tokenizer = load_tokenizer(locate(s.model)[0])
    prompt = choose_format(s.objective, found.kind, found.answers, s.max_length, s.question)
    prompt = with_thoughts(prompt, rows) if found.kind == "chat" else prompt
    examples = encode_rows(tokenizer, prompt, rows, "training")
    whole = whole_rows(tokenizer, prompt, rows)
    lengths = sorted(len(e["input_ids"]) for e in whole)
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    for what, i in zip(("shortest", "middle", "longest"), (0, len(by_length) // 2, -1)):
        show_row(tokenizer, examples[by_length[i]], what, cut_of(prompt, whole, by_length[i]))
    count = f"{len(examples):,} rows to train on, {len(held_out):,} held out"
    print(f"\nrows       {count}, of {len(found.rows):,} different ones")
    duplicates = f"{found.duplicates_removed:,} duplicates"
    print(f"dropped    {duplicates}; {found.left_out or 'no row was unusable'}")
    longer = sum(length > s.max_length for length in lengths)
    does = "skipped" if prompt.objective == "chat" else "cut"
    print(f"{does:10} {longer:,} of {len(lengths):,} rows, longer than --max-length {s.max_length}")
    print(f"lengths    in tokens, prompt and answer, before anything is {does}")
    for line in histogram(lengths, s.max_length):
        print(f"           {line}")
    learned, read = sum(map(learned_tokens, examples)), sum(len(e["input_ids"]) for e in examples)
    print(f"tokens     {learned:,} learned of {read:,} in an epoch ({learned / read:.1%})")
    batch = s.batch_size * processes.count()
    each = f"batches of {batch}" + (f", {s.grad_accum} to an update" if s.grad_accum > 1 else "")
    print(f"steps      {steps(len(examples), s):,} ({each}, --epochs {s.epochs:g})")
    note("\nnext       the same command without --preview trains")


def whole_rows(tokenizer, prompt: PromptFormat, rows: list) -> list[dict]:
    """The rows as they would be without --max-length."""
    unlimited = dataclasses.replace(prompt, max_length=NO_LIMIT)
    with contextlib.redirect_stderr(io.StringIO()):  # its notes were shown already
        return encode_rows(tokenizer, unlimited, rows, "training")


def cut_of(prompt: PromptFormat, whole: list[dict], i: int) -> str:
    """What --max-length takes off the row number `i`; a conversation is kept whole or skipped."""
    length = 0 if prompt.objective == "chat" else len(whole[i]["input_ids"])
    side = "end" if prompt.objective == "lm" else "beginning"
    return f"; cut at the text's {side}, whole it has {length:,}" if length > prompt.max_length else ""


def show_row(tokenizer, example: dict, what: str, cut: str) -> None:
    learned = learned_tokens(example)
    print(f"{what:10} {len(example['input_ids'])} tokens, {learned} learned (+), the rest only read (.){cut}")
    for line in label_lines(tokenizer, example):
        print(f"           {line}")


def histogram(lengths: list[int], limit: int) -> list[str]:
    """One bar for each range of lengths, [60, 70, 300] and 256 say; a line marks the limit.

    The ranges are parts of `limit`, so that none lies on both sides of it; the last one is open.
    """
    width = max(1, -(-limit // 2 ** max(0, round(math.log2(BARS * limit / max(lengths[-1], limit))))))
    bars: dict[int, int] = {}
    for length in lengths:
        bar = (min(length, limit) - 1) // width if length <= limit else (limit - 1) // width + 1
        bar += (length - limit - 1) // width if length > limit else 0
        bars[min(bar, 2 * BARS)] = bars.get(min(bar, 2 * BARS), 0) + 1
    lines, inside = [], (limit - 1) // width
    for bar in range(max(bars) + 1):
        first = bar * width + 1 if bar <= inside else limit + (bar - inside - 1) * width + 1
        last = min((bar + 1) * width, limit) if bar <= inside else first + width - 1
        name = f"{first:,} to {last:,}" if bar < 2 * BARS else f"{first:,} or more"
        count = bars.get(bar, 0)
        mark = "#" * math.ceil(BAR_WIDTH * count / max(bars.values()))
        lines.append(f"{name:>16}  {count:6,}  {mark}".rstrip())
        if bar == inside:
            lines.append(f"{'-' * 16}  --max-length {limit}")
    return lines


def steps(count: int, s) -> int:
    """Optimizer steps of a run on `count` rows, as the Trainer counts them."""
    if s.max_steps > 0:
        return s.max_steps
    batches = math.ceil(count / (s.batch_size * processes.count()))
    return math.ceil(s.epochs * math.ceil(batches / s.grad_accum))
