"""One value of a result file, as text: where it stands, what is computed of it, how it is written."""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FORMATS = {
    "text": str,
    "percent": lambda v: f"{v:.1%}",
    "mb": lambda v: f"{v / 1e6:,.0f} MB",
    "gb": lambda v: f"{v / 1e9:.2f} GB",
    "minutes": lambda v: f"{v / 60:.0f} minutes",
    "times": lambda v: f"{v:.1f} times",
    "settings": lambda v: ", ".join(f"{name} {value}" for name, value in v.items()) or "the defaults",
    # A mean and half the width of its interval (one run alone has none), as shares and as they are.
    "spread": lambda v: f"{v['mean']:.1%}" + ("" if v["half"] is None else f" ± {100 * v['half']:.1f}"),
    "around": lambda v: f"{v['mean']:.3f}" + ("" if v["half"] is None else f" ± {v['half']:.3f}"),
    "interval": lambda v: f"{v['accuracy']:.1%} ({100 * v['low']:.1f} to {100 * v['high']:.1f})",
    "shift": lambda v: f"{v['mean']:+.2f} ({v['low']:+.2f} to {v['high']:+.2f})",
    "survival": lambda v: f"{v['share']:.0%} ({100 * v['low']:.0f} to {100 * v['high']:.0f})",
}
OPERATIONS = {
    " < ": lambda a, b: "yes" if a < b else "**no**",
    " >= ": lambda a, b: "yes" if a >= b else "**no**",
    " / ": lambda a, b: a / b,
    " - ": lambda a, *others: a - sum(others),
}
OF_A_LIST = {"count": len, "largest": lambda values: max(map(abs, values))}


def read(name: str):
    """A result file, or else a file of the repository: JSON as data, everything else as text."""
    path = RESULTS / name if (RESULTS / name).is_file() else ROOT / name
    if not path.is_file():
        raise LookupError("there is no such file in benchmarks/results")
    return json.loads(path.read_text()) if path.suffix == ".json" else path.read_text()


def look(value, path: str):
    """What `path` leads to: look({"a": [{"n": "x", "b": 1}]}, "a[n=x].b") -> 1; raises LookupError."""
    if path in ("", "."):
        return value
    if path[0] == "[":
        inside, _, rest = path[1:].partition("]")
        name, equals, wanted = inside.partition("=")
        items = [item for item in value if str(item.get(name)) == wanted] if equals else value[int(inside) :]
        return look(items[0], rest.removeprefix("."))
    if isinstance(value, list):
        return [look(item, path) for item in value]
    if not isinstance(value, dict):
        raise LookupError(f"{value!r} has no {path}")
    # A name may hold dots and spaces: the longest one that fits.
    name = max((k for k in value if f"{path}.".startswith((f"{k}.", f"{k}["))), key=len, default=None)
    return value[path] if name is None else look(value[name], path[len(name) :].removeprefix("."))


def compute(value, key: str):
    """look(), with OPERATIONS on two keys or numbers, and OF_A_LIST (`largest A`: of the absolute values)."""
    if re.fullmatch(r"\d[\d.]*", key):
        return float(key)
    for sign, result in OPERATIONS.items():
        if sign in key:
            return result(*(compute(value, part) for part in key.split(sign)))
    word, _, path = key.partition(" ")
    return OF_A_LIST[word](look(value, path)) if word in OF_A_LIST else look(value, key)


def in_format(value, style: str) -> str:
    """`value` as one of FORMATS writes it, or by Python's own format specification; None is empty."""
    if value is None:
        return ""
    return FORMATS[style](value) if style in FORMATS else format(value, style)


def match_in(text: str, pattern: str) -> re.Match:
    if match := re.search(pattern, text, re.M):
        return match
    raise LookupError(f"no line matches {pattern}")
