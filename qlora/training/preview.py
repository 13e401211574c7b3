"""--preview: what a run would see and do, on stdout. Nothing is trained or written."""

import bisect
import contextlib
import dataclasses
import io
import itertools
import math
import textwrap

from qlora import example_packs, processes
from qlora.batches import encode_rows, label_lines, learned_tokens
from qlora.cli import note
from qlora.loading import load_tokenizer
from qlora.logits import IGNORE
from qlora.prompts import PromptFormat, choose_format, with_thoughts
from qlora.sources import locate

NO_LIMIT = 1 << 30  # tokens of a row
BAR_WIDTH = 40
SHOWN = 600  # characters of a stretch of text; of a longer one its two ends


def show(s, rows: list, held_out: list, found) -> None:
    """Three rows, what is dropped or cut, lengths, tokens and steps; reads the model's tokenizer alone."""
    tokenizer = load_tokenizer(locate(s.model)[0])
    prompt = choose_format(s.objective, found.kind, found.answers, s.max_length, s.question)
    prompt = with_thoughts(prompt, rows) if found.kind in ("chat", "pairs") else prompt
    examples = encode_rows(tokenizer, prompt, rows, "training")
    whole = whole_rows(tokenizer, prompt, rows)
    show_three(tokenizer, prompt, examples, whole)
    count = f"{len(rows):,} to train on, {len(held_out):,} held out"
    print(f"\nrows       {count}, of {len(found.rows):,} different ones")
    unusable = found.lost or "no row was unusable"
    print(f"dropped    {found.duplicates_removed:,} duplicates; {unusable}")
    show_lengths([len(e["input_ids"]) for e in whole], prompt)
    learned, read = sum(map(learned_tokens, examples)), sum(len(e["input_ids"]) for e in examples)
    print(f"learned    {learned:,} of {read:,} tokens in an epoch ({learned / read:.1%})")
    batches = f"batches of {s.batch_size * processes.count()}"
    batches += f", {s.grad_accum} to an update" if s.grad_accum > 1 else ""
    filled = example_packs.pack(examples, s.max_length, s.seed) if s.packing else examples
    each = 2 if found.kind == "pairs" else 1  # halves
    until = f"--epochs {s.epochs:g}" if s.max_steps < 0 else f"--max-steps {s.max_steps}"
    print(f"steps      {steps(len(filled) // each, s):,} ({batches}, {until})")
    note("\nnext       the same command without --preview trains")


def show_three(tokenizer, prompt: PromptFormat, examples: list[dict], whole: list[dict]) -> None:
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i]["input_ids"]))
    first, middle, last = by_length[0], by_length[len(by_length) // 2], by_length[-1]
    for i, what in {first: "shortest", middle: "middle", last: "longest"}.items():
        show_row(tokenizer, examples[i], what, cut_of(prompt, whole, i))
    print("tokens     of the first one")
    for line in label_lines(tokenizer, examples[first]):
        print(f"           {line}")


def show_lengths(lengths: list[int], prompt: PromptFormat) -> None:
    does = "skipped" if prompt.objective == "chat" else "cut"
    longer = sum(length > prompt.max_length for length in lengths)
    share = f"{longer:,} of {len(lengths):,} rows ({longer / len(lengths):.0%})"
    print(f"{does:10} {share}, longer than --max-length {prompt.max_length}")
    print(f"lengths    in tokens, prompt and answer, before anything is {does}")
    for line in histogram(lengths, prompt.max_length):
        print(f"           {line}")


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
    """The text that is read (.) and that is learned (+), as its tokens say."""
    count, learned = len(example["input_ids"]), learned_tokens(example)
    print(f"{what:10} {count} tokens, {learned} learned (+), the rest only read (.){cut}")
    tokens = zip(example["input_ids"], example["labels"])
    for is_learned, run in itertools.groupby(tokens, lambda token: token[1] != IGNORE):
        text = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        text = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
        text = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        for line in textwrap.wrap(text, 90):
            print(f"           {'+' if is_learned else '.'} {line}")


def histogram(lengths: list[int], limit: int) -> list[str]:
    """A bar for each range of lengths: eighths of `limit`, a line that marks it, and doublings above it.

    [60, 70, 300], 256 -> ['  33 to 64    1  ####', '  65 to 96    1  ####', …, ' 257 to 512   1  ####']
    """
    ends = sorted({limit * i // 8 for i in range(1, 9)} | {limit << i for i in (1, 2, 3)} | {NO_LIMIT})
    bars = [bisect.bisect_left(ends, length) for length in lengths]
    counts, mark = [bars.count(bar) for bar in range(len(ends))], ends.index(limit)
    lines = []
    for bar in range(min(bars), max(*bars, mark) + 1):
        first, last = ends[bar - 1] + 1 if bar else 1, ends[bar]
        name = f"{first:,} or more" if last == NO_LIMIT else f"{first:,} to {last:,}"
        lines.append(f"{name:>16} {counts[bar]:7,}  {'#' * math.ceil(BAR_WIDTH * counts[bar] / max(counts))}")
        lines += [f"{'-' * 16} --max-length {limit}"] if bar == mark else []
    return [line.rstrip() for line in lines]


def steps(count: int, s) -> int:
    """Optimizer steps of a run on `count` rows, as the Trainer counts them."""
    if s.max_steps > 0:
        return s.max_steps
    batches = math.ceil(count / (s.batch_size * processes.count()))
    return math.ceil(s.epochs * math.ceil(batches / s.grad_accum))
