"""What a cell of a table may hold, and why a row can't be trained on."""

import re
from decimal import Decimal

PLAIN = (str, bytes, int, float, Decimal)  # what a cell of text may hold


class Unusable(ValueError):
    """Why a row can't be trained on, in a few words: "no label"."""


def check(fits, reason: str) -> None:
    if not fits:
        raise Unusable(reason)


def as_text(value, column: str) -> str:
    """What a cell holds, as text: b'a' -> 'a', 1 and 1.0 -> '1'. Raises Unusable."""
    check(value is not None and value == value, f"no {column}")  # NaN is unlike itself
    check(isinstance(value, PLAIN), f"a {type(value).__name__} as {column}")
    if isinstance(value, bytes):
        value = value.decode(errors="surrogateescape")
    elif not isinstance(value, str):
        value = str(value).removesuffix(".0")
    check(is_text(value), f"a {column} that is no UTF-8")
    return value


def is_text(value) -> bool:
    """Half a character ("\\ud83d", legal in JSON) is none: it can't be tokenized."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def without_nulls(value):
    """{"a": 1, "b": None} -> {"a": 1}: an Arrow struct has all keys that any row has."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value
