"""Files of prompts: a table with a column of texts, or plain text with one prompt a line."""

from dataclasses import dataclass, field
from pathlib import Path

from qlora import columns
from qlora.cli import UsageError, first_line, require
from qlora.data import Unusable, as_text

TEXT_COLUMNS = ("text", "review", "prompt", "instruction")  # looked for in this order
OPTIONAL = "input"  # follows an instruction


@dataclass
class Table:
    """A file of prompts: all its columns, and what is asked in each row."""

    names: list[str]
    rows: list[tuple]
    texts: list[str | None]  # None: there is none, `left_out` says why
    left_out: list[tuple[str, int]] = field(default_factory=list)


def read_table(path: Path, named=None) -> Table:
    """A .csv, .jsonl or .parquet file, or lines of text; `named`: --columns, as in ("text=review",)."""
    ending, name = path.suffix.lower(), f"--prompts {path}"
    try:
        if ending not in columns.READERS:
            lines = path.read_bytes().decode("utf-8-sig").splitlines()
            return with_texts(["row", "text"], list(enumerate(lines, 1)), "text")
        names, column = columns.READERS[ending](path)
        rows = list(zip(*(column(each) for each in names)))
    except UnicodeDecodeError:
        raise UsageError(f"{name}: not text in UTF-8") from None
    except (ValueError, OSError) as error:
        raise UsageError(f"{name}: not readable as {ending[1:]} ({first_line(error)})") from None
    require(bool(rows), f"{name}: it has no rows")
    require(len(set(names)) == len(names), f"{name}: several columns have the same name")
    return with_texts(names, rows, text_column(name, names, named))


def text_column(file: str, names: list[str], named=None) -> str:
    """Which column is asked: the one that --columns names, one of TEXT_COLUMNS, or the only one."""
    pairs = dict(pair.partition("=")[::2] for pair in named or ())
    require(set(pairs) <= {"text"} and all(pairs.values()), f"--columns with {file}: say text=COLUMN")
    wanted = [pairs["text"]] if "text" in pairs else [*TEXT_COLUMNS, *(names if len(names) == 1 else [])]
    found = [name for name in wanted if name in names]
    there = f"found the columns {', '.join(map(repr, names[:20]))[:400]}"
    require(bool(found), f"{file}: {there}; expected one called {' or '.join(wanted)}")
    return found[0]


def with_texts(names: list[str], rows: list[tuple], column: str) -> Table:
    """The table, and what is asked in each row: a cell of `column`, an instruction with its `input`."""
    table, at = Table(names, rows, []), names.index(column)
    extra = names.index(OPTIONAL) if column == "instruction" and OPTIONAL in names else None
    for number, row in enumerate(rows, 1):
        try:
            text = as_text(row[at], column).strip()
            if extra is not None and row[extra] not in (None, ""):
                text = f"{text}\n\n{as_text(row[extra], OPTIONAL)}"
        except Unusable as error:
            table.left_out.append((str(error), number))
            text = None
        if text == "":
            table.left_out.append((f"no {column}", number))
        table.texts.append(text or None)
    return table
