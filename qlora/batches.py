"""Rows -> token ids and labels -> padded batches."""

import jinja2
import torch

from qlora import prompts as p
from qlora.cli import UsageError, UserError, note
from qlora.conversations import chat_examples
from qlora.data import Row
from qlora.logits import IGNORE


def encode_rows(tokenizer, prompt: p.PromptFormat, rows: list[Row], what: str) -> list[dict]:
    """[{input_ids, labels}]; `what` names the rows in messages.

    Rows that can't be shortened and exceed max_length are skipped, and a note says how many. A conversation
    can become several rows.
    """

    encode = {
        "sentiment": lambda row: [p.sentiment_example(tokenizer, prompt, row.text, row.label)],
        "lm": lambda row: [p.lm_example(tokenizer, row.text, prompt.max_length)],
        "chat": lambda row: chat_examples(tokenizer, row.messages, prompt.max_length),
    }[prompt.objective]
    try:
        examples = [encode(row) for row in rows]
        made = [dict(zip(("input_ids", "labels"), example)) for each in examples for example in each]
    except jinja2.TemplateError as error:  # many templates raise where the roles do not alternate
        refusal = f"this model's chat template refuses a {what} row ({error})"
        raise UserError(f"{refusal}; do its roles alternate, user first?") from None
    if len(made) > len(rows):
        note(f"note       {len(rows)} {what} conversations became {len(made)} rows: the chat template writes")
        note("           earlier turns differently, so that each such reply needs a row with its own prompt")
    kept = [e for e in made if len(e["input_ids"]) <= prompt.max_length]
    if not kept:
        shortest = min(len(e["input_ids"]) for e in made)
        raise UsageError(f"--max-length {prompt.max_length}: the shortest {what} row has {shortest} tokens")
    if skipped := len(made) - len(kept):
        note(f"note       skipped {skipped} {what} rows longer than --max-length {prompt.max_length}")
    return kept


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

    Padding is masked by position, never by token id: where the pad token is the end token (as in many GGUF
    files), masking by id would hide the end of every answer and the model would never learn to stop.
    """
    longest = max(len(e["input_ids"]) for e in examples)
    longest += -longest % multiple
    input_ids = torch.full((len(examples), longest), pad_id)
    labels = torch.full((len(examples), longest), IGNORE)
    for row, example in enumerate(examples):
        input_ids[row, : len(example["input_ids"])] = torch.tensor(example["input_ids"])
        labels[row, : len(example["labels"])] = torch.tensor(example["labels"])
    real_tokens = sum(len(e["input_ids"]) for e in examples if e is not BLANK)
    return {"input_ids": input_ids, "labels": labels, "real_tokens": real_tokens}
