"""Fills the measured numbers in README and docs from the files in benchmarks/results.

    python benchmarks/figures.py             # fill them in (make figures)
    python benchmarks/figures.py --check     # change nothing; exit 1 with a line for each difference

No measured number is typed. It stands between comments that GitHub does not show:

    <!--fig FILE KEY FORMAT-->90.2%<!--/fig-->     one value
    <!--block FILE                                 lines of a file in the code block that follows: all, or
    REGEX                                          each once those that match one of these (without any: all),
    -REGEX                                         and none of these
    -->
    <!--table FILE KEY                             a row for each item that KEY leads to
    heading: KEY FORMAT
    --><!--/table-->
    <!--flags FILE CLASS--><!--/flags-->           the flags of a settings class

FILE is below benchmarks/results, or else in the repository. KEY walks through JSON: `train.steps`,
`rungs[0].name`, `rungs[name=Q8_0].bytes`; `.` is the whole item, `#` a row's name in a JSON object; a name
after a list is looked up in each of its items. `A / B` and the like: see figure_values.OPERATIONS. In a text
file KEY is a regular expression, whose first group is shown. FORMAT: see figure_values.in_format().
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import zip_longest

from figure_values import ROOT, compute, in_format, look, match_in, read
from flag_tables import flag_table

PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "models/README.md",
    "benchmarks/recipe.md",
    "docs/*.md",
    "docs/lessons/*.md",
    "docs/slides/*.md",
    "SECURITY.md",
)
WIDEST = 110  # longer lines of a block are cut


def fig(file: str, key: str, style: str) -> str:
    found = read(file)
    return in_format(match_in(found, key)[1] if isinstance(found, str) else compute(found, key), style)


def block(file: str, patterns: str) -> str:
    text, listed = read(file), patterns.split("\n")[1:-1]
    kept, dropped = [p for p in listed if p[0] != "-"], [p[1:] for p in listed if p[0] == "-"]
    for pattern in kept:
        match_in(text, pattern)  # one that matches nothing is a mistake
    lines = dict.fromkeys(text.splitlines()) if listed else text.splitlines()
    lines = [line for line in lines if not kept or any(re.search(p, line) for p in kept)]
    lines = [line for line in lines if not any(re.search(p, line) for p in dropped)]
    return "".join(f"{line if len(line) <= WIDEST else line[: WIDEST - 2] + ' …'}\n" for line in lines)


def table(file: str, key: str, columns: str) -> str:
    items = look(read(file), key)
    rows = list(items.items()) if isinstance(items, dict) else [("", item) for item in items]
    heads = [line.split(": ", 1) for line in columns.splitlines()]
    lines = [[title for title, _ in heads], ["---"] * len(heads)]
    lines += [[cell(name, item, *spec.rsplit(" ", 1)) for _, spec in heads] for name, item in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(name: str, item, key: str, style: str) -> str:
    """Not every row has every value: a cell without one stays empty."""
    try:
        return name if key == "#" else in_format(compute(item, key), style)
    except LookupError:
        return ""


def flags(file: str, kind: str) -> str:
    return flag_table(ROOT / file, kind)


MARKERS = {
    fig: r"<!--fig (\S+) ([^\n]+?) (\S+?)-->(?P<shown>[^\n]*?)<!--/fig-->",
    block: r"<!--block (\S+)((?:(?!-->).)*)-->\n```\w*\n(?P<shown>.*?)```",
    table: r"<!--table (\S+) ([^\n]+)\n(.*?)-->\n(?P<shown>.*?)<!--/table-->",
    flags: r"<!--flags (\S+) (\w+)-->\n(?P<shown>.*?)<!--/flags-->",
}


def filled(text: str) -> tuple[str, list[tuple[int, str]]]:
    """(the text with every figure filled in, [(line, what differed or can't be shown)])"""
    problems, pieces, end = list(misplaced(text)), [], 0
    found = [(make, m) for make, pattern in MARKERS.items() for m in re.finditer(pattern, text, re.S)]
    for make, match in sorted(found, key=lambda item: item[1].start()):
        old, line = match["shown"], text.count("\n", 0, match.start("shown")) + 1
        name = " ".join(part for part in match.groups()[:2] if "\n" not in part)
        try:
            new = make(*match.groups()[:-1])
        except (LookupError, OSError, ValueError, TypeError, AttributeError) as error:
            problems.append((line, f"{name}: {type(error).__name__}: {error}"))
            new = old
        for i, (shown, there) in enumerate(
            zip_longest(old.splitlines(), new.splitlines(), fillvalue="nothing")
        ):
            if shown != there:
                problems.append((line + i, f"{name}: the text shows {shown}, the file has {there}"))
                break
        pieces += [text[end : match.start("shown")], new]
        end = match.end("shown")
    return "".join([*pieces, text[end:]]), sorted(problems)


def misplaced(text: str) -> Iterator[tuple[int, str]]:
    """Markers that lack a part, and those that Markdown would take for a line of HTML."""
    inside = [range(*m.span()) for pattern in MARKERS.values() for m in re.finditer(pattern, text, re.S)]
    for lost in re.finditer(r"<!--/?(fig|block|table|flags)\b", text):
        if not any(lost.start() in span for span in inside):
            yield text.count("\n", 0, lost.start()) + 1, f"{lost[0]}: this marker is not complete"
    for start in re.finditer(r"^ *([-*] )?<!--fig ", text, re.M):
        yield (
            text.count("\n", 0, start.start()) + 1,
            "a line must not begin with a figure: move a word before it",
        )


def main(check: bool) -> int:
    """Fill in or check every page; 1 if anything is wrong."""
    wrong = 0
    for page in (page for pattern in PAGES for page in sorted(ROOT.glob(pattern))):
        text = page.read_text()
        new, problems = filled(text)
        if not check and new != text:
            page.write_text(new)
            problems = filled(new)[1]  # what can't be filled in
        for line, what in problems:
            print(f"{page.relative_to(ROOT)}:{line}: {what}")
        wrong += len(problems)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
