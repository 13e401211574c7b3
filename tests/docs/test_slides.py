"""docs/slides: sixty slides, little text on each, numbers only from result files, built without a network."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from flag_tables import load
from test_docs import SETTINGS, code

from qlora.cli import parse

HERE = ROOT / "docs" / "slides"
build = load(HERE / "build.py")
TEXT = (HERE / "course.md").read_text()
SLIDES = re.split(r"^---$", TEXT.split("---\n", 2)[2], flags=re.M)
MOST_WORDS, MOST_LINES = 90, 12
SMALLEST = 24  # px, of a slide of 1280 x 720

UNIT = r"(?:%|[kMG]B\b|s\b|seconds?\b|minutes?\b|hours?\b|tokens/s|W\b|Wh\b|times\b)"
TYPED = {
    "1.6 GB": "a wrong claim that is quoted",
    "8 times": "a wrong claim that is quoted",
    "10 times": "advice of a paper, measured nowhere here",
    "50 W": "an assumption, and called one",
    "1 Wh": "a definition",
    "3,600 W": "the same definition",
    "93 watt hours": "physics",
}


def shown(slide: str) -> str:
    """What the class reads: without notes, directives, addresses of pictures and HTML's tags."""
    text = re.sub(r"<!--.*?-->", "", build.stripped(slide), flags=re.S)
    return re.sub(r"</?[a-z][^>]*>|!\[[^\]]*\]\([^)]*\)", " ", text)


def notes(slide: str) -> list[str]:
    comments = re.findall(r"<!--(.*?)-->", build.stripped(slide), re.S)
    return [text.strip() for text in comments if not re.match(r" *_?(class|paginate|footer):", text)]


def title(slide: str) -> str:
    return re.search(r"^# (.*)", slide, re.M)[1]


def by_title(function):
    return pytest.mark.parametrize("slide", SLIDES, ids=title)(function)


def test_there_are_sixty_in_the_order_of_the_lessons():
    assert len(SLIDES) == 60
    titles = [title(slide) for slide in SLIDES]
    assert [t[0] for t in titles if re.match(r"\d · ", t)] == [str(n) for n in range(1, 9)]
    assert len(titles) == len(set(titles))


@by_title
def test_a_slide_can_be_read_in_a_glance(slide):
    text = shown(slide)
    lines = [line for line in text.splitlines() if re.search(r"\w", line)]
    assert len(re.findall(r"\S*\w\S*", text)) <= MOST_WORDS
    assert len(lines) <= MOST_LINES


@by_title
def test_a_slide_has_one_note_with_what_to_say(slide):
    [note] = notes(slide)
    assert len(note.split()) >= 20
    # YAML would make a setting of it, and Marp would not show it.
    assert not re.match(r"\w+:", note)


def test_every_lesson_asks_the_class_and_shows_a_command():
    for number, lesson in enumerate(re.split(r"^# \d · .*$", TEXT, flags=re.M)[1:], 1):
        assert re.search(r"^> [^\n]*\?$", lesson, re.M), f"lesson {number} asks nothing"
        assert f"pytest docs/exercises -k lesson{number}" in lesson
        assert re.search(r"^```sh\n", lesson, re.M)


def test_commands_of_the_scripts_parse(monkeypatch):
    monkeypatch.chdir(ROOT)
    lines = [re.sub(r"^python ", "", line) for line in code(TEXT)]
    ours = [shlex.split(line) for line in lines if line.split(" ")[0] in SETTINGS]
    assert {program for program, *_ in ours} == set(SETTINGS)
    for program, *flags in ours:
        parse(SETTINGS[program], flags, None)


def typed_numbers(text: str) -> list[str]:
    """'It took 5 s, <!--fig …-->6 s<!--/fig-->' -> ['5 s']"""
    text = re.sub(r"<!--fig .*?<!--/fig-->", "", text)
    text = re.sub(r"<!--(table|block) .*?-->.*?(<!--/table-->|```\w*\n.*?```)", "", text, flags=re.S)
    text = re.sub(r'style="[^"]*"|!\[[^\]]*\]', "", text)
    return re.findall(rf"\d[\d.,]* ?(?:watt )?{UNIT}", text)


def test_typed_numbers_are_found():
    assert typed_numbers("5 s <!--fig a b c-->6 s<!--/fig--> 90.5% and 4 bits, 1,5 GB") == [
        "5 s",
        "90.5%",
        "1,5 GB",
    ]


@by_title
def test_no_measured_number_is_typed_neither_in_slides_nor_in_notes(slide):
    assert set(typed_numbers(slide)) <= set(TYPED)


def test_a_folder_that_can_not_be_made_is_told_before_anything_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "install", lambda: pytest.fail("it installs"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        build.main(["--out", str(tmp_path / "file" / "slides")])
    assert stop.value.code == 2 and "no folder can be made there (Not a directory)" in capsys.readouterr().err


def test_markers_are_taken_out_and_nothing_else():
    figure, table = (
        "a <!--fig f k .1f-->4.5<!--/fig-->\nb",
        "<!--table f k\nx: y text\n-->\n| x |\n<!--/table-->",
    )
    assert build.stripped(f"{figure}\n{table}\n") == "a 4.5\nb\n| x |\n\n"
    assert (
        build.stripped("<!--block f\n^a\n-->\n```\na\n```\n<!-- say this -->")
        == "```\na\n```\n<!-- say this -->"
    )
    assert not re.search(r"<!--/?(fig|table|block)\b", build.stripped(TEXT))


def test_every_picture_is_there_and_every_drawing_is_used():
    files = build.pictures(TEXT)
    assert all(file.is_file() for file in files)
    assert {file.name for file in files} >= {file.name for file in (HERE / "pictures").iterdir()}


@pytest.mark.parametrize("file", sorted((HERE / "pictures").iterdir()), ids=lambda file: file.name)
def test_the_last_row_can_read_a_drawing(file):
    text = file.read_text()
    [width] = re.findall(rf"!\[w:(\d+)\]\(pictures/{file.name}\)", TEXT)
    scale = int(width) / int(re.search(r'viewBox="0 0 (\d+)', text)[1])
    sizes = re.findall(r"font(?:-size)?: (\d+)px", text)
    assert sizes and min(map(int, sizes)) * scale >= SMALLEST


def test_the_last_row_can_read_the_theme():
    sizes = re.findall(r"font(?:-size)?:[^;]*?([\d.]+)px", (HERE / "theme.css").read_text())
    assert len(sizes) > 10 and min(map(float, sizes)) >= SMALLEST


def test_packages_come_from_the_public_registry_with_hashes():
    lock = (HERE / "package-lock.json").read_text()
    places = re.findall(r'"resolved": "(.*?)"', lock)
    assert places and all(place.startswith("https://registry.npmjs.org/") for place in places)
    assert len(re.findall(r'"integrity": "sha512-', lock)) == len(places)


@pytest.fixture
def marp():
    """marp-cli as it is pinned; fetched once, which is all that needs a network."""
    try:
        build.install()
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_the_html_has_all_slides_notes_and_pictures_and_asks_for_nothing(marp, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(build, "browser", lambda: None)
    build.main(["--out", str(tmp_path)])
    assert "no PDF" in capfd.readouterr().err
    page = (tmp_path / "course.html").read_text()
    assert len(re.findall(r"<section\b", page)) == 60
    assert len(re.findall(r'class="bespoke-marp-note"', page)) == 60
    # What a browser would fetch. Namespaces of SVG and the generator's name are only names.
    fetched = re.findall(
        r'(?:src|href|poster)="((?!#|data:)[^"]*)|url\((?!["\']?(?:#|data:))([^)]*)|@import', page
    )
    assert fetched == []
    assert page.count('src="data:image/svg+xml;base64,') == len(list((HERE / "pictures").iterdir()))


# Boxes that reach into the footer or beyond an edge, of every slide; footers and page numbers are no boxes.
MEASURE = """<pre id="over"></pre><script>
const over = [];
document.querySelectorAll("section").forEach((section, i) => {
  const tell = (box, what) => over.push(`slide ${i + 1}: ${box.tagName} ${what}`);
  for (const box of section.querySelectorAll(":scope > *:not(footer), pre, img, td, .bars b, .bars span")) {
    if (box.offsetParent !== section) continue;
    if (box.offsetTop + box.offsetHeight > 662) tell(box, "too low");
    if (box.offsetLeft + box.offsetWidth > 1222) tell(box, "too wide");
    if (box.scrollWidth > box.clientWidth + 1 && box.clientWidth) tell(box, "cut");
  }
});
document.getElementById("over").textContent = over.join("\\n") || "all fits";
</script>"""


@pytest.mark.slow
def test_everything_fits_on_its_slide(marp, tmp_path):
    if not build.browser():
        pytest.skip("needs Chromium")
    source, page = tmp_path / "course.md", tmp_path / "course.html"
    source.write_text(build.moved(build.stripped(TEXT), tmp_path))
    build.marp(source, page, "--template", "bare")
    page.write_text(page.read_text() + MEASURE)
    command = [
        build.browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
    ]
    found = subprocess.run(
        [*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert re.search(r'<pre id="over">(.*?)</pre>', found.stdout, re.S)[1] == "all fits"
