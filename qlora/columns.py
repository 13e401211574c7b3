"""Data files and hub datasets -> columns. Nothing is guessed: `NA` is a word and `01` stays `01`."""

import csv
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from config import PACKAGED_DATASETS
from qlora.cli import UsageError, first_line, require
from qlora.hub import asking

# Columns of each format -> kind of rows, in the order in which they are looked for. data.to_row() reads them.
FORMATS = {
    ("prompt", "chosen", "rejected"): "pairs",  # before messages: some hub datasets have both
    ("chosen", "rejected"): "pairs",
    ("text", "label"): "labels",
    ("messages",): "chat",
    ("prompt", "completion"): "chat",
    ("instruction", "response"): "chat",
    ("text",): "text",
}
OPTIONAL = "input"  # follows the instruction
Column = Callable[[str], list]  # the values of a named column


def read_file(path: Path) -> dict[str, list]:
    """The usable columns of a file: {"text": [...], "label": [...]}, say; None where a value is missing."""
    name, ending = f"--dataset {path}", path.suffix.lower()
    require(os.path.isfile(path), f"{name}: no such file or bundled dataset ({', '.join(PACKAGED_DATASETS)})")
    require(path.stat().st_size > 0, f"{name}: the file is empty")
    require(ending in READERS, f"{name}: expected .csv, .jsonl or .parquet, found '{ending or 'no ending'}'")
    try:
        return usable(*READERS[ending](path), str(path))
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not readable as {ending[1:]} (no UTF-8 text); save it as UTF-8") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{name}: not readable as {ending[1:]} ({first_line(error)})") from None


def read_csv(path: Path) -> tuple[list[str], Column]:
    """(names of the columns, the values of one); every field is a text, an empty one is None.

    Raises ValueError where rows could run into each other, as in `"a "quoted" word",1`.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses texts of 128 KiB
    rows, line = [], 1
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            for row in filter(None, reader):
                rows.append(row)
                if any(row[len(rows[0]) :]):
                    raise csv.Error(f"{len(row)} fields for {len(rows[0])} columns")
                line = reader.line_num + 1
        except csv.Error as error:
            quoting = 'a text with commas needs quotes, and "" stands for a quote in it'
            raise ValueError(f"the row in line {line}: {error}; {quoting}") from None
    names, *rows = rows or [[]]

    def column(name: str) -> list:
        i = names.index(name)
        values = [row[i] or None if i < len(row) else None for row in rows]
        return whole_numbers(values) if name == "label" else values

    return names, column


def whole_numbers(labels: list) -> list:
    """['0.0', '1.0', None] -> ['0', '1', None]: so pandas writes whole numbers where one is missing"""
    if not all(re.fullmatch(r"-?\d+(\.0)?", label.strip()) for label in labels if label):
        return labels
    return [label and label.strip().removesuffix(".0") for label in labels]


def read_jsonl(path: Path) -> tuple[list[str], Column]:
    rows = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows += [{**json.loads(line)}] if line.strip() else []
            except (ValueError, TypeError, RecursionError) as error:
                raise ValueError(f"line {number} is no JSON object: {first_line(error)}") from None
    return list(dict.fromkeys(name for row in rows for name in row)), lambda name: [r.get(name) for r in rows]


def read_parquet(path: Path) -> tuple[list[str], Column]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        table = ParquetFile(path, page_checksum_verification=True).read()  # where it has checksums
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None
    return table.column_names, lambda name: table.column(name).to_pylist()


READERS = {".csv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}


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
