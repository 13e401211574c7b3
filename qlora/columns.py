"""Data files and hub datasets -> columns. Nothing is guessed: `NA` is a word and `01` stays `01`."""

import csv
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from config import PACKAGED_DATASETS
from qlora.cli import UsageError, first_line, require
from qlora.hub import asking
from qlora.large_files import read_large

# Columns of each format -> kind of rows, in the order in which they are looked for. data.to_row() reads them.
FORMATS = {
    ("text", "label"): "labels",
    ("messages",): "chat",
    ("prompt", "completion"): "chat",
    ("instruction", "response"): "chat",
    ("text",): "text",
}
LARGE_FILE = 256 << 20  # bytes; above it a file is not read into memory
OPTIONAL = "input"  # follows the instruction
Column = Callable[[str], Sequence]  # the values of a named column


def read_file(path: Path) -> dict[str, list]:
    """The usable columns of a file: {"text": [...], "label": [...]}, say; None where a value is missing."""
    name, ending = f"--dataset {path}", path.suffix.lower()
    require(os.path.isfile(path), f"{name}: no such file or bundled dataset ({', '.join(PACKAGED_DATASETS)})")
    require(path.stat().st_size > 0, f"{name}: the file is empty")
    require(ending in READERS, f"{name}: expected .csv, .jsonl or .parquet, found '{ending or 'no ending'}'")
    try:
        large = path.stat().st_size > LARGE_FILE
        return usable(*(read_large_file if large else READERS[ending])(path), str(path))
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not readable as {ending[1:]} (no UTF-8 text); save it as UTF-8") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{name}: not readable as {ending[1:]} ({first_line(error)})") from None


def read_csv(path: Path) -> tuple[list[str], Column]:
    """(names of the columns, the values of one); every field is a text, an empty one is None."""
    rows = list(csv_rows(path))
    names, *rows = rows or [[]]

    def column(name: str) -> list:
        i = names.index(name)
        values = [row[i] or None if i < len(row) else None for row in rows]
        return whole_numbers(values) if name == "label" else values

    return names, column


def csv_rows(path: Path) -> Iterator[list[str]]:
    """The fields of each row, the first one's are the names of the columns.

    Raises ValueError where rows could run into each other, as in `"a "quoted" word",1`.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 128 KiB
    names, line = None, 1
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            for row in filter(None, reader):
                names = row if names is None else names
                if any(row[len(names) :]):
                    raise csv.Error(f"{len(row)} fields for {len(names)} columns")
                line = reader.line_num + 1
                yield row
        except csv.Error as error:
            quoting = 'a text with commas needs quotes, and "" stands for a quote in it'
            raise ValueError(f"the row in line {line}: {error}; {quoting}") from None


def whole_numbers(labels: list) -> list:
    """['0.0', '1.0', None] -> ['0', '1', None]: so pandas writes whole numbers where one is missing"""
    return [whole_number(label) for label in labels] if are_whole(labels) else labels


def are_whole(labels: Iterable) -> bool:
    return all(re.fullmatch(r"-?\d+(\.0)?", label.strip()) for label in labels if label)


def whole_number(label: str | None) -> str | None:
    return label and label.strip().removesuffix(".0")


def read_jsonl(path: Path) -> tuple[list[str], Column]:
    rows = list(json_rows(path))
    return list(dict.fromkeys(name for row in rows for name in row)), lambda name: [r.get(name) for r in rows]


def json_rows(path: Path) -> Iterator[dict]:
    """The object in each line; raises ValueError where there is none."""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = {**json.loads(line)} if line.strip() else None
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON object: {first_line(error)}") from None
            if row is not None:
                yield row


def read_parquet(path: Path) -> tuple[list[str], Column]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path, page_checksum_verification=True).read()  # where it has checksums
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    return table.column_names, lambda name: table.column(name).to_pylist()


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


def read_large_file(path: Path) -> tuple[list[str], Column]:
    """What READERS give, row by row from the disk (qlora/large_files.py)."""
    ending = path.suffix.lower()
    names, values = read_large(path, {".csv": csv_rows, ".jsonl": json_rows}.get(ending))

    def column(name: str) -> Sequence:
        found = values(name)
        numbers = ending == ".csv" and name == "label" and are_whole(found)
        return found.then(whole_number) if numbers else found

    return names, column


def read_hub(name: str) -> tuple[dict[str, list], dict[str, list] | None]:
    import datasets

    datasets.disable_progress_bars()
    with asking(name, "dataset"):
        loaded = datasets.load_dataset(name)
    train, test = loaded["train"] if "train" in loaded else next(iter(loaded.values())), loaded.get("test")
    same = test is not None and set(train.column_names) <= set(test.column_names)
    return named_labels(train, name), named_labels(test, name) if same else None


def named_labels(part, dataset: str) -> dict[str, list]:
    """A hub dataset's usable columns, its numbered labels replaced by their names where it has them."""
    table = part.with_format("arrow")[:]

    def column(name: str) -> list:
        values, names = table.column(name).to_pylist(), getattr(part.features[name], "names", None)
        named = names and [names[i] if i is not None and 0 <= i < len(names) else None for i in values]
        return named or values

    return usable(table.column_names, column, dataset)


def usable(names: list[str], column: Column, dataset: str) -> dict[str, list]:
    """The columns of the first of FORMATS that is there."""
    for wanted in FORMATS:
        if set(wanted) <= set(names):
            wanted += (OPTIONAL,) if "instruction" in wanted and OPTIONAL in names else ()
            twice = [name for name in wanted if names.count(name) > 1]
            require(not twice, f"--dataset {dataset}: several columns are called {', '.join(twice)}")
            return {name: column(name) for name in wanted}
    known = ", or ".join("+".join(columns) for columns in FORMATS)
    found = ", ".join(name if name.isidentifier() else repr(name) for name in names[:20])
    raise UsageError(f"--dataset {dataset}: found the columns {found[:400]}; expected one of {known}")
