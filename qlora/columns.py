"""Data files and hub datasets -> columns. Nothing is guessed: `NA` is a word and `01` stays `01`."""

import csv
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from config import PACKAGED_DATASETS
from qlora.cells import without_nulls
from qlora.cli import UsageError, first_line, require
from qlora.hub import asking
from qlora.large_files import Column as LargeColumn
from qlora.large_files import read_large
from qlora.talks import MEDIA
from qlora.text_files import encoding_of, json_rows, no_text, read_json, read_jsonl

# Columns of each format -> kind of rows, in the order in which they are looked for. data.to_row() reads them.
FORMATS = {
    ("text", "label"): "labels",
    ("prompt", "chosen", "rejected"): "pairs",  # before messages: some hub datasets have both
    ("chosen", "rejected"): "pairs",
    ("messages",): "chat",
    ("conversations",): "chat",
    ("prompt", "completion"): "chat",
    ("instruction", "response"): "chat",
    ("instruction", "output"): "chat",
    ("text",): "text",
}
BESIDE = ("system", "tools", "functions", *MEDIA)  # read beside conversations, where there are any
LARGE_FILE = 256 << 20  # bytes; above it a file is not read into memory
Column = Callable[[str], Sequence]  # the values of a named column


def kind_of(table: Iterable[str]) -> str:
    """The kind of rows in a table of usable() columns: "labels", "chat" or "text"."""
    return next(kind for columns, kind in FORMATS.items() if set(columns) <= set(table))


def read_file(path: Path, columns: Sequence[str] | None = None) -> dict[str, list]:
    """The usable columns of a file: {"text": [...], "label": [...]}, say; None where a value is missing."""
    name, ending = f"--dataset {path}", path.suffix.lower()
    require(not os.path.isdir(path), f"{name}: a folder; name a file")
    require(os.path.isfile(path), f"{name}: no such file or bundled dataset ({', '.join(PACKAGED_DATASETS)})")
    require(path.stat().st_size > 0, f"{name}: the file is empty")
    *most, last = READERS
    known = f"{', '.join(most)} or {last}"
    require(ending in READERS, f"{name}: expected {known}, found '{ending or 'no ending'}'")
    try:
        large = path.stat().st_size > LARGE_FILE and ending in BY_ROW
        table = usable(*(read_large_file if large else READERS[ending])(path), str(path), columns)
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: not readable as {ending[1:]} ({no_text(path, error)})") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{name}: not readable as {ending[1:]} ({first_line(error)})") from None
    if "label" in table and ending in (".csv", ".tsv"):
        table["label"] = whole_numbers(table["label"])
    return table


def read_csv(path: Path, delimiter: str = ",") -> tuple[list[str], Column]:
    """(names of the columns, the values of one); every field is a text, an empty one is None."""
    rows = list(csv_rows(path, delimiter))
    names, *rows = rows or [[]]

    def column(name: str) -> list:
        i = names.index(name)
        return [row[i] or None if i < len(row) else None for row in rows]

    return names, column


def csv_rows(path: Path, delimiter: str = ",") -> Iterator[list[str]]:
    """The fields of each row, the first one's are the names of the columns.

    Raises ValueError where rows could run into each other, as in `"a "quoted" word",1`.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 128 KiB
    names, line = None, 1
    with path.open(encoding=encoding_of(path), newline="") as lines:
        reader = csv.reader(lines, strict=True, delimiter=delimiter)
        try:
            for row in filter(None, reader):
                names = row if names is None else names
                if any(row[len(names) :]):
                    raise csv.Error(f"{len(row)} fields for {len(names)} columns")
                line = reader.line_num + 1
                yield row
        except csv.Error as error:
            between = {",": "commas", "\t": "tabs"}[delimiter]
            quoting = f'a text with {between} needs quotes, and "" stands for a quote in it'
            raise ValueError(f"the row in line {line}: {error}; {quoting}") from None


def whole_numbers(labels: Sequence) -> Sequence:
    """['0.0', '1.0', None] -> ['0', '1', None]: so pandas writes whole numbers where one is missing"""
    if not are_whole(labels):
        return labels
    large = isinstance(labels, LargeColumn)
    return labels.then(whole_number) if large else [whole_number(label) for label in labels]


def are_whole(labels: Iterable) -> bool:
    return all(re.fullmatch(r"-?\d+(\.0)?", label.strip()) for label in labels if label)


def whole_number(label: str | None) -> str | None:
    return label and label.strip().removesuffix(".0")


def read_parquet(path: Path) -> tuple[list[str], Column]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path, page_checksum_verification=True).read()  # where it has checksums
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    return table.column_names, lambda name: values_of(table.column(name))


def values_of(column) -> list:
    """The values of an Arrow column."""
    return [without_nulls(value) for value in column.to_pylist()]


READERS = {
    ".csv": read_csv,
    ".tsv": functools.partial(read_csv, delimiter="\t"),
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
}
# Those that can be read in parts; a .json file is one list.
BY_ROW = {
    ".csv": csv_rows,
    ".tsv": functools.partial(csv_rows, delimiter="\t"),
    ".jsonl": json_rows,
    ".parquet": None,
}


def read_large_file(path: Path) -> tuple[list[str], Column]:
    """What READERS give, row by row from the disk (qlora/large_files.py)."""
    return read_large(path, BY_ROW[path.suffix.lower()])


def read_hub(
    name: str, columns: Sequence[str] | None = None
) -> tuple[dict[str, list], dict[str, list] | None]:
    import datasets

    datasets.disable_progress_bars()
    with asking(name, "dataset"):
        loaded = datasets.load_dataset(name)
    train, test = loaded["train"] if "train" in loaded else next(iter(loaded.values())), loaded.get("test")
    same = test is not None and set(train.column_names) <= set(test.column_names)
    return named_labels(train, name, columns), named_labels(test, name, columns) if same else None


def named_labels(part, dataset: str, columns: Sequence[str] | None = None) -> dict[str, list]:
    """A hub dataset's usable columns, its numbered labels replaced by their names where it has them."""
    table = part.with_format("arrow")[:]

    def column(name: str) -> list:
        values, names = values_of(table.column(name)), getattr(part.features[name], "names", None)
        named = names and [names[i] if i is not None and 0 <= i < len(names) else None for i in values]
        return named or values

    return usable(table.column_names, column, dataset, columns)


def usable(
    names: list[str], column: Column, dataset: str, columns: Sequence[str] | None = None
) -> dict[str, list]:
    """The columns of the first of FORMATS that is there, and that has all those of `columns`."""
    source = sources(columns or ())
    require(bool(names), f"--dataset {dataset}: it has no rows")
    found = ", ".join(name if name.isidentifier() else repr(name) for name in names[:20])[:400]
    for target, name in source.items():
        no_such = f"--columns {target}={name}: {dataset} has no such column; it has {found}"
        require(name in names, no_such)
    there = {*source, *(name for name in names if name not in source.values())}
    for wanted, kind in FORMATS.items():
        beside = (
            (*BESIDE, "input") if "instruction" in wanted else BESIDE if kind in ("chat", "pairs") else ()
        )
        if set(wanted) <= there and set(source) <= {*wanted, *beside}:
            wanted += tuple(name for name in beside if name in there)
            twice = [name for name in wanted if names.count(source.get(name, name)) > 1]
            require(not twice, f"--dataset {dataset}: several columns are called {', '.join(twice)}")
            judged = "completion" in wanted and "label" in there and not source and "text" not in there
            ways = "keep the good ones, without the column label, or make pairs (prompt, chosen, rejected)"
            require(not judged, f"--dataset {dataset}: replies that are marked good or bad (label): {ways}")
            return {name: column(source.get(name, name)) for name in wanted}
    known = ", or ".join("+".join(columns) for columns in FORMATS)
    other = next((mark for mark in ";\t|" if len(names) == 1 and mark in names[0]), None)
    fix = (
        f"separate them by commas, not by {other!r}" if other else "name them with --columns, as text=review"
    )
    raise UsageError(f"--dataset {dataset}: found the columns {found}; expected one of {known}; {fix}")


def sources(columns: Sequence[str]) -> dict[str, str]:
    """["text=review", "label=stars"] -> {"text": "review", "label": "stars"}; raises UsageError."""
    known = dict.fromkeys([*(name for wanted in FORMATS for name in wanted), "input", *BESIDE])
    found: dict[str, str] = {}
    for pair in columns:
        target, _, name = pair.partition("=")
        form = f"--columns {pair}: expected NAME=COLUMN, as in text=review label=stars"
        require(bool(target and name), form)
        require(target in known, f"--columns {pair}: {target} is not looked for, but {', '.join(known)}")
        require(target not in found, f"--columns {pair}: {target} is named twice")
        found[target] = name
    return found
