"""The flags of a settings class as a Markdown table; figures.py puts it between `flags` markers.

The comment above a field is its meaning here, as it is in --help.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import typing
from pathlib import Path


def flag_table(path: Path, kind: str) -> str:
    """A row for each field of the dataclass `kind` in the Python file `path`."""
    settings = getattr(load(path), kind)
    hints = typing.get_type_hints(settings)
    # Fields of a base class come first, as in --help.
    kinds = [each.__name__ for each in reversed(settings.__mro__) if each is not object]
    text = path.read_text()
    body = "".join(re.search(rf"^class {name}\b.*?(?=^\S|\Z)", text, re.M | re.S)[0] for name in kinds)
    rows, comments = ["| flag | default | meaning |", "|---|---|---|"], []
    for line in body.splitlines():
        if field := re.match(r"    (\w+): (.*?) = ", line):
            name = field[1] if "Positional" in field[2] else "--" + field[1].replace("_", "-")
            meaning = (" ".join(comments) + choices(hints[field[1]])).replace("|", "\\|")
            rows.append(f"| `{name}` | {default_shown(getattr(settings, field[1]))} | {meaning} |")
        comments = [*comments, line.strip("# ")] if line.startswith("    #") else []
    return "\n".join(rows) + "\n"


def load(path: Path):
    """The module in `path`, also where its folder is no package (llama.cpp/)."""
    root = str(Path(__file__).resolve().parent.parent)
    sys.path[:0] = [root] * (root not in sys.path)
    spec = importlib.util.spec_from_file_location(f"{path.parent.name.replace('.', '_')}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_shown(value) -> str:
    """('Q8_0', 'f16') -> 'Q8_0 f16', False -> 'off', None -> ''"""
    if value is None or isinstance(value, bool):
        return "" if value is None else "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def choices(hint) -> str:
    """Of Literal["a", "b"], alone or inside Optional or another Literal's Union: ' One of: a, b.'"""
    if "Literal" not in repr(hint):
        return ""
    parts = [part for each in typing.get_args(hint) for part in typing.get_args(each) or (each,)]
    return f" One of: {', '.join(str(part) for part in parts if part not in (type(None), ...))}."
