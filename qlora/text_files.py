"""Text files with rows in them: their encoding, and JSON in the forms that it comes in."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from qlora.cli import first_line
from qlora.talks import TALKS

Column = Callable[[str], list]  # the values of a named column


def encoding_of(path: Path) -> str:
    """UTF-8, or UTF-16 where the file begins with its byte order mark, as Excel writes it.

    Raises ValueError for UTF-16 without the mark: every other byte is zero.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if len(head) > 1 and 0 in (head[0], head[1]):
        raise ValueError("no UTF-8 text but zero bytes, as in UTF-16; save it as UTF-8")
    return "utf-8-sig"


def no_text(path: Path, error: UnicodeDecodeError) -> str:
    """Why a file is no text in UTF-8, and what to do."""
    if error.encoding != "utf-8":
        return f"no {error.encoding} text: {error.reason}; save it as UTF-8"
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError as found:
                byte = line[found.start]
                old = f"in Latin-1 it would be {chr(byte)!r}: " if byte >= 0xA0 else ""
                where = f"byte 0x{byte:02x} in line {number}"
                return f"no UTF-8 text; save it as UTF-8 ({where}; {old}iconv -f WINDOWS-1252 -t UTF-8)"
    return "no UTF-8 text; save it as UTF-8"


def read_jsonl(path: Path) -> tuple[list[str], Column]:
    return columns_of(list(json_rows(path)))


def json_rows(path: Path) -> Iterator[dict]:
    """The object in each line; raises ValueError where there is none."""
    with path.open(encoding=encoding_of(path)) as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = {**parse_json(line)} if line.strip() else None
            except (ValueError, TypeError, RecursionError) as error:
                fix = "; a list? rename the file to .json" if line.lstrip().startswith("[") else ""
                why = f": {said(error)}" if not isinstance(error, TypeError) else ""  # a number, say
                raise ValueError(f"line {number} is no JSON object{why}{fix}") from None
            if row is not None:
                yield row


def said(error: Exception) -> str:
    """What is wrong with a text of JSON, without a place in it: of one line the column says little."""
    if isinstance(error, RecursionError):
        return "nested too deep"
    return error.msg if isinstance(error, json.JSONDecodeError) else first_line(error)


def read_json(path: Path) -> tuple[list[str], Column]:
    """A list of objects; alone in an object, as in {"data": [...]}; or columns, as in {"text": [...], …}.

    Many files of this ending hold an object per line.
    """
    try:
        found = parse_json(path.read_text(encoding=encoding_of(path)))
    except json.JSONDecodeError as error:
        with path.open(encoding=encoding_of(path)) as lines:
            first = next(filter(str.strip, lines), "").strip()
        if error.msg == "Extra data" and first.startswith("{") and first.endswith("}"):
            return read_jsonl(path)
        raise
    except RecursionError:
        raise ValueError("nested too deep") from None
    if isinstance(found, dict):
        found = table_in(found)
    if isinstance(found, dict):
        return list(found), lambda name: found[name]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError('expected a list of objects, {"data": [...]}, or lists of one length by column')
    return columns_of(found)


def table_in(found: dict) -> dict | list | None:
    """{"version": 1, "data": [row, row]} -> [row, row]; {"text": […], "label": […]} as it is; a row -> [row]

    None where it could be read in several ways, as {"train": [row], "test": [row]}.
    """
    lists = {name: value for name, value in found.items() if isinstance(value, list)}
    inside = {name: {type(each) for each in value} for name, value in lists.items()}
    talks = any(name in found and inside.get(name) != {list} for name in TALKS)  # one conversation
    objects = [value for name, value in lists.items() if inside[name] == {dict}]
    if len(objects) == 1 and not talks:
        return objects[0]
    by_column = len(lists) == len(found) and len({len(value) for value in lists.values()}) == 1
    if by_column and not talks and not objects:
        return found
    return [found] if talks or not lists else None


def columns_of(rows: list[dict]) -> tuple[list[str], Column]:
    return list(dict.fromkeys(name for row in rows for name in row)), lambda name: [r.get(name) for r in rows]


def parse_json(text: str):
    """json.loads(), but a key that is there twice is an error: the first value would be lost."""

    def once(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"{max(names, key=names.count)!r} is there twice")
        return found

    return json.loads(text, object_pairs_hook=once)
