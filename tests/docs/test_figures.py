"""benchmarks/figures.py: numbers in the text come from result files."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import figure_values
import figures
from flag_tables import flag_table

RESULT = {
    "accuracy": 0.9025,
    "bytes": 1_500_000,
    "scores": {"accuracy": 0.9, "low": 0.8625, "high": 0.95},
    "rows": [
        {"name": "A", "size": 10, "error": -0.3},
        {"name": "B + C", "size": 4, "error": 0.1, "load": 2.0},
    ],
    "layers.0.q_proj": {"a value": 3},
}


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results with one JSON file and one log."""
    (tmp_path / "run.json").write_text(json.dumps(RESULT))
    (tmp_path / "run.log").write_text(
        "fetching x\nloss 0.25 at the end\nloss 0.25 at the end\n  detail\n" + "z" * 120
    )
    monkeypatch.setattr(figure_values, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "key, style, shown",
    [
        ("accuracy", "percent", "90.2%"),  # 90.25 is rounded to the even digit
        ("bytes", "mb", "2 MB"),
        ("bytes", ",", "1,500,000"),
        ("scores", "interval", "90.0% (86.2 to 95.0)"),
        ("rows[0].name", "text", "A"),
        ("rows[name=B + C].size", "text", "4"),
        ("layers.0.q_proj.a value", ".1f", "3.0"),
        ("rows[0].size / rows[1].size", "times", "2.5 times"),
        ("rows[0].size - rows[1].size", "text", "6"),
        ("rows[0].size - rows[1].size - 2", "text", "4.0"),
        ("rows[0].size >= 10", "text", "yes"),
        ("rows[0].size / rows[1].size < 2.5", "text", "**no**"),
        ("count rows", "text", "2"),
        ("largest rows.error", "percent", "30.0%"),
    ],
)
def test_a_value_is_found_computed_and_written(results, key, style, shown):
    new, problems = figures.filled(f"x <!--fig run.json {key} {style}-->{shown}<!--/fig-->")
    assert problems == []
    assert f"-->{shown}<" in new


def test_a_number_that_differs_is_named_with_line_and_both_values(results):
    text = "first\nIt was <!--fig run.json accuracy percent-->91.0%<!--/fig-->.\n"
    new, problems = figures.filled(text)
    assert problems == [(2, "run.json accuracy: the text shows 91.0%, the file has 90.2%")]
    assert new == "first\nIt was <!--fig run.json accuracy percent-->90.2%<!--/fig-->.\n"
    assert figures.filled(new) == (new, [])


@pytest.mark.parametrize(
    "marker, words",
    [
        ("fig nothing.json accuracy percent", "no such file"),
        ("fig run.json precision percent", "'precision'"),
        ("fig run.json rows[name=D].size text", "IndexError"),
        ("fig run.log ^gain=(.*) text", "no line matches ^gain"),
        ("fig run.json scores percent", "TypeError"),
    ],
)
def test_a_wrong_file_or_key_is_one_clear_line(results, marker, words):
    text = f"x <!--{marker}-->1<!--/fig-->"
    new, [(line, problem)] = figures.filled(text)
    assert (new, line) == (text, 1)
    assert words in problem and "\n" not in problem


@pytest.mark.parametrize(
    "text", ["x <!--fig run.json accuracy percent-->90.2%\n", "x <!--fig run.json-->1<!--/fig-->"]
)
def test_an_incomplete_marker_is_told(results, text):
    assert "marker is not complete" in figures.filled(text)[1][0][1]


def test_a_line_must_not_begin_with_a_figure(results):
    """Markdown would take the whole line for HTML and show its links and stars as they are."""
    figure = "<!--fig run.json accuracy percent-->90.2%<!--/fig-->"
    for start in ("", "- ", "  "):
        assert "must not begin" in figures.filled(f"{start}{figure} of **all**")[1][0][1]


def test_text_files_give_groups_and_blocks(results):
    new, problems = figures.filled("x <!--fig run.log ^loss (\\S+) text-->0.25<!--/fig-->")
    assert problems == []
    new, _ = figures.filled("<!--block run.log\n-^fetching\n-detail\n-->\n```\nold\n```\n")
    assert new.split("```")[1] == f"\nloss 0.25 at the end\n{'z' * 108} …\n"  # each line once, long ones cut
    new, _ = figures.filled("<!--block run.log\n^loss\n-->\n```text\n```\n")
    assert new.split("```")[1] == "text\nloss 0.25 at the end\n"
    _, [(line, problem)] = figures.filled("<!--block run.log\n^gain\n-->\n```\n```\n")
    assert problem == "run.log: LookupError: no line matches ^gain"


def test_tables_have_a_row_for_each_item_and_empty_cells_where_a_value_is_missing(results):
    text = "<!--table run.json rows\nfile: name text\nload, s: load .1f\n-->\n<!--/table-->"
    assert "| file | load, s |\n| --- | --- |\n| A |  |\n| B + C | 2.0 |\n<!--" in figures.filled(text)[0]
    text = "<!--table run.json .\npart: # text\nvalue: a value text\n-->\n<!--/table-->"
    assert "| layers.0.q_proj | 3 |" in figures.filled(text)[0]


def test_flags_are_read_from_a_settings_class(tmp_path):
    (tmp_path / "some_settings.py").write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom typing import Literal, Optional\n"
        "@dataclass\nclass Some:\n"
        "    # How many.\n    # At least 1.\n    row_count: int = 4\n"
        "    # Which one.\n    kind: Literal['a', 'b'] = 'a'\n"
        "    # Perhaps.\n    name: Optional[str] = None\n"
        "    # All.\n    every: bool = False\n"
    )
    rows = flag_table(tmp_path / "some_settings.py", "Some").splitlines()[2:]
    assert rows == [
        "| `--row-count` | 4 | How many. At least 1. |",
        "| `--kind` | a | Which one. One of: a, b. |",
        "| `--name` |  | Perhaps. |",
        "| `--every` | off | All. |",
    ]


@dataclass
class Page:
    """A repository with one page."""

    root: object

    def write(self, text: str) -> None:
        (self.root / "README.md").write_text(text)

    def read(self) -> str:
        return (self.root / "README.md").read_text()


def test_check_changes_nothing_and_fails_filling_in_repairs(results, monkeypatch, capsys):
    page = Page(results)
    monkeypatch.setattr(figures, "ROOT", results)
    page.write("x <!--fig run.json accuracy percent-->1%<!--/fig-->\n")
    assert figures.main(check=True) == 1
    assert (
        capsys.readouterr().out == "README.md:1: run.json accuracy: the text shows 1%, the file has 90.2%\n"
    )
    assert "1%" in page.read() and "90.2%" not in page.read()
    assert figures.main(check=False) == 0
    assert "90.2%" in page.read()
    assert figures.main(check=True) == 0


def test_every_figure_in_readme_and_docs_is_what_its_file_has(capsys):
    assert figures.main(check=True) == 0, capsys.readouterr().out
