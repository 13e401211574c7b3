"""Writes notebooks/lessons/*.ipynb: a notebook for each lesson in docs/lessons.

    python notebooks/make_lessons.py            # write them (make figures does it too)
    python notebooks/make_lessons.py --check    # change nothing; exit 1 if a file is not what this makes

A lesson's Markdown is the only source. A code block after the line <!--cell NAME--> becomes a cell: `python`
as it is, `sh` as a bash cell. Everything else becomes text, without the outputs and pictures that
`python benchmarks/lessons.py` wrote into the page: a notebook makes its own.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

try:
    import nbformat
except ModuleNotFoundError:
    sys.exit("error: notebooks need nbformat: pip install -r requirements-dev.txt")

ROOT = Path(__file__).resolve().parent.parent
LESSONS = ROOT / "docs" / "lessons"
NOTEBOOKS = ROOT / "notebooks" / "lessons"

CELL = r"<!--cell ([\w-]+)-->\n```(python|sh)\n(.*?)```\n"
OUTPUT = r"<!--block lessons/\S+\n.*?-->\n```\w*\n.*?```\n|^!\[[^\]]*\]\(\S*results/lessons/\S+\)\n"
MARKER = r"<!--(?:block|table|flags)\b.*?-->\n|<!--/?(?:fig|block|table|flags)\b.*?-->"
LINK = r"(\]\()(?!https?://|#|mailto:)([^)\s]+\))"

SETUP = """
# The commands below are those of a terminal in the repository's folder.
import os
import sys
from pathlib import Path

folders = [folder for folder in (Path.cwd(), *Path.cwd().parents) if (folder / "qlora_finetune.py").is_file()]
if not folders:
    raise SystemExit("This notebook needs the repository: open it where it lies, in notebooks/lessons.")
os.chdir(folders[0])
sys.path.insert(0, os.getcwd())
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
"""


def pages() -> list[Path]:
    """The lessons in their order: 1-….md, 2-….md, …"""
    return sorted(LESSONS.glob("[0-9]*.md"))


def notebook(page: Path) -> nbformat.NotebookNode:
    """The lesson as a notebook in which nothing has run: cells have the names of their markers."""
    made = nbformat.v4.new_notebook()
    made.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made.metadata.language_info = {"name": "python"}
    parts = re.split(CELL, page.read_text(), flags=re.S)
    made.cells = [*text("text-0", parts[0]), nbformat.v4.new_code_cell(SETUP.strip(), id="setup")]
    for name, language, source, after in zip(*(parts[i::4] for i in range(1, 5)), strict=True):
        shell = "%%bash -e\n" if language == "sh" else ""
        made.cells.append(nbformat.v4.new_code_cell(shell + source.rstrip(), id=name))
        made.cells += text(f"after-{name}", after)
    return made


def text(name: str, source: str) -> list[nbformat.NotebookNode]:
    """One Markdown cell, or none for an empty text. Links lead to the same files as in docs/lessons."""
    source = re.sub(OUTPUT, "", source, flags=re.S | re.M)
    source = re.sub(MARKER, "", source, flags=re.S)
    source = re.sub(LINK, r"\1../../docs/lessons/\2", source).strip()
    return [nbformat.v4.new_markdown_cell(source, id=name)] if source else []


def main(argv: Sequence[str] | None = None) -> None:
    flags = sys.argv[1:] if argv is None else list(argv)
    if set(flags) - {"--check"}:
        sys.exit("error: the only flag is --check")
    NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    for page in pages():
        path, made = NOTEBOOKS / f"{page.stem}.ipynb", nbformat.writes(notebook(page)) + "\n"
        if not flags:
            path.write_text(made)
        elif not path.exists() or path.read_text() != made:
            sys.exit(f"error: {path.relative_to(ROOT)} is not up to date: run `make figures`")


if __name__ == "__main__":
    main()
