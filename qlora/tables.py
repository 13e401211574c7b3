"""Tables, on the terminal and in Markdown."""

from collections.abc import Sequence

import tabulate as library
from tabulate import tabulate

library.MIN_PADDING = 0  # its default makes columns two wider than their headers


def table(headers: Sequence[str], rows: Sequence[Sequence], left: int = 1, indent: int = 2) -> str:
    """Aligned columns, the first `left` of them on their left edge, the others on their right.

    Cells are shown as they come, with the spaces that indent them: the caller knows what their digits mean.
    """
    align = ["left"] * left + ["right"] * (len(headers) - left)
    options = {"tablefmt": "plain", "disable_numparse": True, "preserve_whitespace": True}
    text = tabulate(rows, headers, colalign=align, **options)
    return "\n".join(" " * indent + line.rstrip() for line in text.splitlines())


def table_of(rows: Sequence[dict], columns: dict[str, str], left: int = 1) -> str:
    """A table of dicts. `columns`: how each column shows a row, as in {"MB": "{size:.1f}", "r": "{rank}"}"""
    return table(list(columns), [[cell.format(**row) for cell in columns.values()] for row in rows], left)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
