"""Rows -> token ids and labels -> padded batches."""

from collections import Counter

import jinja2
import torch

from qlora import prompts as p
from qlora.cells import Unusable
from qlora.cli import UsageError, UserError, first_line, note
from qlora.control_tokens import marked
from qlora.conversations import chat_examples, refuse_unwritten
from qlora.data import Row
from qlora.logits import IGNORE


def encode_rows(tokenizer, prompt: p.PromptFormat, rows: list[Row], what: str) -> list[dict]:
    """[{input_ids, labels}]; `what` names the rows in messages.

    Rows that can't be shortened and exceed max_length are skipped, and so are those that the chat template
    can't write; notes say how many. A conversation can become several rows; a pair two, see encode_pairs().
    """
    if rows and rows[0].rejected:
        return encode_pairs(tokenizer, prompt, rows, what)
    encode = {
        "sentiment": lambda row: [p.sentiment_example(tokenizer, prompt, row.text, row.label)],
        "lm": lambda row: [p.lm_example(tokenizer, row.text, prompt.max_length)],
        "chat": lambda row: chat_examples(tokenizer, row.messages, prompt.max_length),
    }[prompt.objective]
    examples, refused = [], Counter()
    for row in rows:
        try:
            examples.append(encode(row))
        except (jinja2.TemplateError, Unusable) as error:
            refused[why_refused(error)] += 1
    if refused:
        why = ", ".join(f"{reason} ({count})" for reason, count in refused.most_common(5))
        if not examples:
            raise UserError(f"no {what} row fits this model: {why}; do the roles alternate, user first?")
        note(f"note       left out {refused.total()} of {len(rows):,} {what} rows: {why}")
    made = [dict(zip(("input_ids", "labels"), example)) for each in examples for example in each]
    if len(made) > len(examples):
        talks = f"{len(examples)} {what} conversations became {len(made)} rows"
        note(f"note       {talks}: the chat template writes")
        note("           earlier turns differently, so that each such reply needs a row with its own prompt")
    kept = [e for e in made if len(e["input_ids"]) <= prompt.max_length]
    if not kept:
        shortest = min(len(e["input_ids"]) for e in made)
        raise UsageError(f"--max-length {prompt.max_length}: the shortest {what} row has {shortest} tokens")
    if skipped := len(made) - len(kept):
        note(f"note       skipped {skipped} {what} rows longer than --max-length {prompt.max_length}")
    return kept


def why_refused(error: Exception) -> str:
    """Many chat templates raise where the roles do not alternate."""
    if isinstance(error, jinja2.TemplateError):
        return f"the chat template refuses it ({first_line(error)})"
    return str(error)


def prompt_and_reply(tokenizer, talk) -> tuple[list[int], list[int]]:
    talk, has_marks = marked(tokenizer, talk)
    refuse_unwritten(tokenizer, talk)
    return p.turn_ids(tokenizer, talk, has_marks)


def encode_pairs(tokenizer, prompt: p.PromptFormat, rows: list[Row], what: str) -> list[dict]:
    """[chosen, rejected, chosen, …], each {input_ids, labels, asked}: labels are the last reply's, `asked` is
    the number of tokens before it. Pairs that can't be trained on are skipped together, with a note.
    """
    kept, left_out, lengths, most = [], Counter(), [], prompt.max_length
    for row in rows:
        try:
            (asked, chosen), (other, rejected) = (
                prompt_and_reply(tokenizer, talk) for talk in (row.messages, row.rejected)
            )
        except (jinja2.TemplateError, Unusable) as error:
            left_out[f"left out: {why_refused(error)}"] += 1
            continue
        lengths.append(len(asked) + max(len(chosen), len(rejected)))
        if asked != other:
            left_out["whose prompts differ as the chat template writes them"] += 1
        elif chosen == rejected:
            left_out["whose replies are the same tokens"] += 1
        elif lengths[-1] > most:
            left_out[f"longer than --max-length {most}"] += 1
        else:
            kept += [
                {"input_ids": asked + reply, "labels": [IGNORE] * len(asked) + reply, "asked": len(asked)}
                for reply in (chosen, rejected)
            ]
    if not kept and not lengths:
        raise UserError(f"no {what} pair fits this model: {next(iter(left_out))}")
    if not kept:
        raise UsageError(f"--max-length {most}: the shortest {what} pair has {min(lengths)} tokens in a half")
    for reason, count in left_out.items():
        note(f"note       skipped {count} of {len(rows)} {what} pairs {reason}")
    return kept


def in_pairs(halves: list[dict]) -> list[dict]:
    """[chosen, rejected, chosen, …] -> pairs, each as long as its longer half; collate() parts them again."""
    pairs = zip(halves[::2], halves[1::2])
    return [{**max(pair, key=lambda half: len(half["input_ids"])), "halves": pair} for pair in pairs]


def most_labels(examples: list[dict]) -> int:
    """Labelled positions of the row that has most of them."""
    return max(sum(label != IGNORE for label in e["labels"][1:]) for e in examples)


def show_labels(tokenizer, example: dict, edge: int = 6) -> None:
    """X-ray of the first row, on stderr."""
    length, learned = len(example["labels"]), learned_tokens(example)
    note(f"labels     first training row: {length} tokens, {learned} learned (+), the rest only read (.)")
    for line in label_lines(tokenizer, example, edge):
        note(f"           {line}")


def learned_tokens(example: dict) -> int:
    return sum(label != IGNORE for label in example["labels"])


def label_lines(tokenizer, example: dict, edge: int = 6) -> list[str]:
    """['.    0       1  "<|im_start|>"', …]: tokens of a row that are only read (.) or learned (+)."""
    rows, lines = list(zip(example["input_ids"], example["labels"])), []
    skip = range(edge, len(rows) - 2 * edge) if len(rows) > 4 * edge else range(0)
    for i, (token, label) in enumerate(rows):
        if i not in skip:
            mark = "+" if label != IGNORE else "."
            lines.append(f"{mark} {i:4d}  {token:6d}  {tokenizer.decode([token])!r}")
        elif i == skip.start:
            lines.append(f"  … {len(skip)} more")
    return lines


BLANK = {"input_ids": [0], "labels": [IGNORE]}  # teaches nothing and counts for nothing
BLANK_PAIR = {**BLANK, "halves": (BLANK, BLANK)}


class LengthBatches(torch.utils.data.Sampler):
    """Order of rows in which neighbours have about the same length, so that batches need little padding.

    Rows are shuffled, cut into windows of 50 batches, sorted by length inside a window, and the batches are
    shuffled again. The longest batch comes first: what does not fit into memory fails at once. The order
    depends on seed and epoch alone, so a resumed run sees the same batches. (transformers'
    LengthGroupedSampler has no seed by epoch.)

    With several processes a batch is all that they read in one step, and the order holds each one's share in
    turn, alike in lengths. Row number len(lengths), a BLANK one, fills the last batch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int, processes: int = 1):
        self.lengths, self.seed, self.epoch = lengths, seed, 0
        self.batch_size, self.processes = batch_size * processes, processes
        # One process alone may have a short batch; several need as many rows each.
        self.blanks = -len(lengths) % self.batch_size if processes > 1 else 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) + self.blanks

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = 50 * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            by_length = sorted(order[start : start + window], key=lambda i: -self.lengths[i])
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        # At most one batch is short. It goes last, because the Trainer cuts the order into batches itself.
        whole = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        longest = max(whole, key=lambda b: self.lengths[b[0]], default=None)
        shuffled.sort(key=lambda b: b is not longest)
        if self.blanks:
            rest[-1] += [len(self.lengths)] * self.blanks
        shares = [b[number :: self.processes] for b in shuffled + rest for number in range(self.processes)]
        return iter([i for share in shares for i in share])


def collate(examples: list[dict], pad_id: int, multiple: int = 1) -> dict:
    """input_ids and labels (batch, tokens), padded on the right to a `multiple`; real_tokens: their number.

    Of packed rows also position_ids, which go on through the padding: it belongs to a row's last example.
    Padding is masked by position, never by token id: where the pad token is the end token (as in many GGUF
    files), masking by id would hide the end of every answer and the model would never learn to stop.
    Of pairs both halves in turn, and `reference` (batch,): log P of each reply by the initial model.
    """
    pairs = any("halves" in e for e in examples)
    examples = [half for e in examples for half in e.get("halves", (e,))]
    longest = max(len(e["input_ids"]) for e in examples)
    longest += -longest % multiple
    input_ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORE)
    for row, example in enumerate(examples):
        input_ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
        labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
    real_tokens = sum(len(e["input_ids"]) for e in examples if e is not BLANK)
    batch = {"input_ids": input_ids, "labels": labels, "real_tokens": real_tokens}
    if any("position_ids" in e for e in examples):
        positions = torch.arange(longest).repeat(len(examples), 1)
        for row, example in enumerate(examples):
            if given := example.get("position_ids"):
                # From its last example's first position on, as if that one were alone.
                positions[row] -= len(given) - 1 - given[-1]
                positions[row, : len(given)] = torch.tensor(given)
        batch["position_ids"] = positions
    if pairs:
        batch["reference"] = torch.tensor([e.get("reference", 0.0) for e in examples])
    return batch
