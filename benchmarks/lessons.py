"""Runs the lessons of docs/lessons as notebooks, and keeps what their cells printed and drew.

    python benchmarks/lessons.py             # all; writes results/lessons, which the lessons show
    python benchmarks/lessons.py 3 5         # some of them
    python benchmarks/lessons.py --out DIR   # writes elsewhere, with the notebooks as they ran; CI does this

Cell NAME of lesson 3 writes 3.NAME.txt (what it printed; progress and notes on stderr are left out) and
3.NAME.png (what it drew). seconds.json has each lesson's seconds, cells.json a fingerprint of each cell: a
test fails where a cell was changed after its output was kept. With --out each output that is not the kept
one is named: times always differ, other words mean that the page shows what the code no longer does.
Needs requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import re
import sys
import time
from pathlib import Path

try:
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    from traitlets.config import Config
except ModuleNotFoundError:
    sys.exit("error: running the lessons needs nbclient: pip install -r requirements-dev.txt")

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "lessons"
BY_FILE = Config({"ConnectionFileMixin": {"transport": "ipc"}})  # the kernel opens no port, and warns of none
sys.path.insert(0, str(ROOT / "notebooks"))

from make_lessons import notebook, pages  # noqa: E402


def printed(cell: nbformat.NotebookNode) -> str:
    """What a cell wrote to stdout, and the value of its last line if it has one."""
    parts = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout"]
    parts += [o.data["text/plain"] + "\n" for o in cell.outputs if o.output_type == "execute_result"]
    return "".join(parts)


def fingerprint(cell: nbformat.NotebookNode) -> str:
    """Of what a cell does, not of how it is laid out: 12 hexadecimal digits."""
    source = cell.source if cell.source.startswith("%%") else ast.dump(ast.parse(cell.source))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def code_cells(made: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in made.cells if cell.cell_type == "code" and cell.id != "setup"]


def write_sorted(path: Path, changed: dict) -> None:
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(dict(sorted({**old, **changed}.items())), indent=2) + "\n")


def keep(cells: list[nbformat.NotebookNode], number: str, folder: Path) -> None:
    for cell in cells:
        if text := printed(cell):
            folder.joinpath(f"{number}.{cell.id}.txt").write_text(text)
        for output in cell.outputs:
            if picture := output.get("data", {}).get("image/png"):
                folder.joinpath(f"{number}.{cell.id}.png").write_bytes(base64.b64decode(picture))


def compared(made: Path, kept: Path) -> str:
    """How an output differs from the one that the lesson shows; "" where it does not."""
    if not made.exists():
        return "in the lesson, but no longer made"
    if not kept.exists():
        return "not in the lesson"
    if made.read_bytes() == kept.read_bytes():
        return ""
    if made.suffix == ".png":
        return "another picture than in the lesson"
    words = [re.sub(r"[-+]?[\d.]+(e[-+]?\d+)?", "#", path.read_text()).split() for path in (made, kept)]
    return f"other {'numbers' if words[0] == words[1] else 'words'} than in the lesson"


def show_differences(number: str, folder: Path) -> None:
    names = {path.name for place in (folder, RESULTS) for path in place.glob(f"{number}.*")}
    for name in sorted(names):
        if found := compared(folder / name, RESULTS / name):
            print(f"  {name}: {found}", flush=True)


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("lesson", nargs="*", help="numbers of lessons; none: all of them")
    flags.add_argument("--out", type=Path, help="write here, and keep the notebooks with their outputs")
    given = flags.parse_args(argv)
    chosen = {page.name.split("-")[0]: page for page in pages()}
    if unknown := set(given.lesson) - set(chosen):
        flags.error(f"no lesson {', '.join(sorted(unknown))}: there are {', '.join(chosen)}")
    folder = given.out or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    for number in given.lesson or chosen:
        made, began = notebook(chosen[number]), time.perf_counter()
        try:
            NotebookClient(made, timeout=1800, kernel_name="python3", config=BY_FILE).execute(cwd=str(ROOT))
        except CellExecutionError as error:
            print(f"lesson {number}:\n{error}", file=sys.stderr)
            return 1
        seconds, cells = round(time.perf_counter() - began, 1), code_cells(made)
        print(f"lesson {number}: {seconds:.0f} s", flush=True)
        keep(cells, number, folder)
        write_sorted(folder / "seconds.json", {number: seconds})
        write_sorted(folder / "cells.json", {f"{number}.{cell.id}": fingerprint(cell) for cell in cells})
        if given.out:
            show_differences(number, folder)
            nbformat.write(made, folder / f"{chosen[number].stem}.ipynb")
    return 0


if __name__ == "__main__":
    sys.exit(main())
