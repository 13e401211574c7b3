"""docs/lessons: short sentences, terms defined where they are first used, cells whose output is shown."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
sys.path.insert(0, str(ROOT / "benchmarks"))

import lessons
import make_lessons

PAGES = make_lessons.pages()
TEXTS = {page.name: page.read_text() for page in PAGES}
RESULTS = ROOT / "benchmarks" / "results" / "lessons"
MOST_WORDS = 18  # in a sentence, on average
MINUTES, WORDS_A_MINUTE = 10, 200


def prose(text: str) -> str:
    """The text without code blocks, tables, markers, headings and addresses of links."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"^(\||#|!\[).*$", "", text, flags=re.M)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"^ *(?:[-*]|\d+\.) ", "\n", text, flags=re.M)  # each item begins a paragraph


def sentences(text: str) -> list[str]:
    """'A b. It is 4.5 bits (see c): d.' -> ['A b.', 'It is 4.5 bits (see c): d.']"""
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s*\n", prose(text))]
    return [s for part in paragraphs for s in re.split(r"(?<=[.!?])[)*\"']* (?=[A-Z`*\"(\d])", part) if s]


def test_sentences_are_counted_as_a_reader_would():
    found = sentences(
        "# T\n\nA bit. It has 4.5 [bits](x.md), really.\n\n- one\n- two\n\n```\na. B. C.\n```\n"
    )
    assert found == ["A bit.", "It has 4.5 bits, really.", "one", "two"]


def test_there_are_eight():
    assert [name[:2] for name in TEXTS] == [f"{n}-" for n in range(1, 9)]


@pytest.mark.parametrize("name", TEXTS)
def test_a_lesson_is_read_in_ten_minutes_in_short_sentences(name):
    found = sentences(TEXTS[name])
    words = sum(len(s.split()) for s in found)
    assert words / len(found) <= MOST_WORDS
    assert words <= MINUTES * WORDS_A_MINUTE


@pytest.mark.parametrize("name", TEXTS)
def test_a_lesson_has_its_parts(name):
    headings = re.findall(r"^## (.*)", TEXTS[name], re.M)
    assert headings[-3:] == ["Exercises", "What to remember", "Read on"]
    exercises = TEXTS[name].split("## Exercises")[1].split("\n## ")[0]
    assert re.findall(r"^(\d)\. ", exercises, re.M) == ["1", "2", "3"]
    assert f"pytest docs/exercises -k lesson{name[0]}" in exercises


@pytest.mark.parametrize("name", TEXTS)
def test_every_cell_that_has_an_output_shows_it(name):
    text = TEXTS[name]
    cells = [cell for cell, *_ in re.findall(make_lessons.CELL, text, re.S)]
    assert cells and len(cells) == len(set(cells))
    for path in RESULTS.glob(f"{name[0]}.*"):
        assert path.name.split(".")[1] in cells, f"no cell writes {path.name} any more"
        assert f"lessons/{path.name}" in text, f"{path.name} is not shown"


@pytest.mark.parametrize(
    "made, found",
    [
        ("loss 0.50\n", ""),
        ("loss 4.1e-3\n", "other numbers than in the lesson"),
        ("less 0.50\n", "other words than in the lesson"),
        (None, "in the lesson, but no longer made"),
    ],
)
def test_an_output_that_is_no_longer_the_lessons_is_named(tmp_path, made, found):
    kept, new = tmp_path / "kept.txt", tmp_path / "new.txt"
    kept.write_text("loss 0.50\n")
    if made:
        new.write_text(made)
    assert lessons.compared(new, kept) == found
    assert lessons.compared(kept, tmp_path / "none.txt") == "not in the lesson"


def test_a_cell_is_what_it_was_when_its_output_was_kept():
    kept = json.loads((RESULTS / "cells.json").read_text())
    now = {
        f"{page.name[0]}.{cell.id}": lessons.fingerprint(cell)
        for page in PAGES
        for cell in lessons.code_cells(make_lessons.notebook(page))
    }
    changed = sorted(name for name in kept.keys() | now.keys() if kept.get(name) != now.get(name))
    assert not changed, "run `python benchmarks/lessons.py` again for these"


def test_notebooks_are_what_the_lessons_make():
    subprocess.run([sys.executable, ROOT / "notebooks" / "make_lessons.py", "--check"], check=True)


GLOSSARY = ROOT / "docs" / "glossary.md"


def terms() -> list[tuple[str, str]]:
    """(term, file of its lesson) of each row; '8-bit integer (int8)' has two names, the first counts."""
    rows = re.findall(r"^\| ([^|]+?) \| [^|]+ \| \[[^\]]+\]\(lessons/([^)#]+)", GLOSSARY.read_text(), re.M)
    return [(re.sub(r" \(.*", "", term), lesson) for term, lesson in rows]


def first_use(term: str) -> tuple[str, str]:
    """(lesson, the words around the first use) in the order of reading."""
    pattern = re.compile(rf"(?<![\w`/-])\**{re.escape(term)}(?:s|es)?(?![\w`]|-\w)", re.I)
    for name, text in TEXTS.items():
        text = " ".join(prose(text).split())
        if match := pattern.search(text):
            return name, text[max(0, match.start() - 40) : match.end() + 60]
    return "", ""


def test_the_glossary_is_sorted_and_large_enough():
    names = [term for term, _ in terms()]
    assert names == sorted(names, key=str.lower) and len(names) >= 60


@pytest.mark.parametrize("term, lesson", terms())
def test_a_term_is_defined_where_it_is_first_used(term, lesson):
    """The definition is where the term is bold: `**rank**`."""
    where, around = first_use(term)
    assert where == lesson, f"{term} is first used in {where}: {around}"
    assert re.search(rf"\*\*{re.escape(term)}(?:s|es)?\b", around, re.I), f"{term} is not bold in: {around}"
