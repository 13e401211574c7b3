"""README and docs: every command parses, every link and every named file is there."""

from __future__ import annotations

import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

from flag_tables import load

import config
from qlora.cli import parse

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += sorted((ROOT / "docs").glob("lessons/*.md"))
TEXTS = {page.relative_to(ROOT): page.read_text() for page in PAGES}
deployment = load(ROOT / "llama.cpp" / "settings.py")
SETTINGS = {
    "quant_llama32_4bit_lora.py": config.DemoSettings,
    "qlora_finetune.py": config.TrainSettings,
    "qlora_inference.py": config.InferSettings,
    "playground.py": config.PlaygroundSettings,
    "llama.cpp/export.py": deployment.ExportSettings,
    "llama.cpp/parity.py": deployment.ParitySettings,
}


def code(text: str) -> list[str]:
    """Lines of code blocks, continued ones joined, and inline code."""
    fences = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    lines = [line for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def commands() -> list[tuple[Path, str]]:
    """(page, command) of every command that runs one of our programs: 'a && b' are two."""
    ours = r"(?:\w+=\S+ )*(?:\S*python (?=\S+\.py))?((?<=python )\S+\.py\b.*|(?:llama\.cpp/\w+\.sh|make)\b.*)"
    found = []
    for page, text in TEXTS.items():
        for part in (part for line in code(text) for part in line.split(" && ")):
            part = re.sub(r"\s+#.*| < .*| > .*| 2>&1 .*", "", " ".join(part.split()))
            if (match := re.fullmatch(ours, part)) and (" " in part or part.startswith("llama.cpp/")):
                found.append((page, match[1]))
    return found


COMMANDS = commands()


def shown(item) -> str:
    return str(item)[:60]


@pytest.mark.parametrize("kind", SETTINGS.values(), ids=lambda kind: kind.__name__)
def test_settings_page_has_every_flag(kind):
    # once those of a base class were missing
    rows = TEXTS[Path("docs/settings.md")]
    for field in dataclasses.fields(kind):
        flag = field.name if field.name == "prompt" and kind is config.InferSettings else "--" + field.name
        assert f"| `{flag.replace('_', '-')}` |" in rows, flag


def test_commands_are_found():
    programs = {command.split()[0] for _, command in COMMANDS}
    assert {*SETTINGS, "make", "llama.cpp/build.sh", "llama.cpp/serve.sh"} <= programs


@pytest.mark.parametrize("page, command", [c for c in COMMANDS if c[1].split()[0] in SETTINGS], ids=shown)
def test_commands_of_the_scripts_parse(page, command, monkeypatch):
    monkeypatch.chdir(ROOT)
    program, *flags = shlex.split(command.replace(" --config qlora-out/config.yaml", ""))  # a run writes it
    assert (ROOT / program).is_file()
    if "--help" not in flags:
        parse(SETTINGS[program], flags, None)


def other_commands() -> list[tuple[Path, str]]:
    return [c for c in COMMANDS if c[1].split()[0] not in (*SETTINGS, "make")]


@pytest.mark.parametrize("page, command", other_commands(), ids=shown)
def test_commands_of_other_programs_have_known_flags(page, command):
    """Shell programs list their flags in --help; those of benchmarks stand in the file."""
    program, *words = shlex.split(command)
    assert (ROOT / program).is_file()
    known = (ROOT / program).read_text()
    if program.endswith(".sh"):
        known = subprocess.run([ROOT / program, "--help"], text=True, capture_output=True, check=True).stdout
    for flag in (word for word in words if word.startswith("--") and word != "--help"):
        assert re.search(rf"{flag}\b", known), f"{program} has no {flag}"


@pytest.mark.parametrize("page, command", [c for c in COMMANDS if c[1].startswith("make")], ids=shown)
def test_make_targets_exist(page, command):
    targets = set(re.findall(r"^([\w./-]+):(?!=)", (ROOT / "Makefile").read_text(), re.M))
    named = [word for word in shlex.split(command)[1:] if "=" not in word]
    assert named and set(named) <= targets


def anchors(page: Path) -> set[str]:
    """Headings as GitHub names them: '## A part: of it' -> 'a-part-of-it'"""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=str)
def test_relative_links_lead_somewhere(page):
    for words, target in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", TEXTS[page]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(there), f"{page}: {there.name} has no heading for #{anchor}"
        # [`load_base`](../qlora/loading.py): the function is in that file.
        name = re.fullmatch(r"`(?:\w+\.)?(\w+)(?:\(\))?`", words)
        if name and there.suffix == ".py":
            defined = re.search(rf"^\s*(?:def|class) {name[1]}\b|^{name[1]}\b.* = ", there.read_text(), re.M)
            assert defined, f"{page}: {path} does not define {name[1]}"


GENERATED = r"llama\.cpp/(build|source|api-key|server-)|config\.yaml$"
NAMES = {
    path.name for folder in ("", "qlora/**/", "llama.cpp/", "benchmarks/") for path in ROOT.glob(f"{folder}*")
}


@pytest.mark.parametrize("page", TEXTS, ids=str)
def test_named_files_exist(page):
    """Files of the repository that are named in code: `qlora/fast.py`, `config.py`, `serve.sh`."""
    below = r"(?:qlora|llama\.cpp|benchmarks|tests|docs|\.ci|\.github)/[\w./-]*"
    for words in code(TEXTS[page]):
        for name in re.findall(rf"(?<![\w./-])(?:{below}|\w+\.(?:py|toml|yaml|sh)\b)", words):
            there = name in NAMES if "/" not in name else (ROOT / name.rstrip(".")).exists()
            assert there or re.match(GENERATED, name), f"{page} names {name}"


def test_readme_is_a_door():
    assert len(TEXTS[Path("README.md")].splitlines()) <= 150


def test_readme_names_every_room_and_page():
    readme = TEXTS[Path("README.md")]
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("qlora/**/*.py")}
    for folder in (*map(str, folders), "llama.cpp", "benchmarks", "models", "docs", "tests"):
        assert re.search(rf"^{re.escape(folder)}/ ", readme, re.M), f"the file tree lacks {folder}/"
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme


def test_serving_flags_are_in_help():
    """docs/serving.md lists the flags of serve.sh."""
    help_text = subprocess.run([ROOT / "llama.cpp/serve.sh", "--help"], text=True, capture_output=True).stdout
    for flag in set(re.findall(r"`(--[a-z-]+)`", TEXTS[Path("docs/serving.md")])) - {"--help", "--lora"}:
        assert flag in help_text


def test_pre_commit_has_the_ruff_of_the_requirements():
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.M)[1]
    assert f"rev: v{pinned}" in (ROOT / ".pre-commit-config.yaml").read_text()


def test_workflow_runs_ci():
    assert "bash .ci/run" in (ROOT / ".github/workflows/ci.yml").read_text()
    assert (ROOT / ".ci/run").is_file()


def test_messages_are_those_of_the_programs():
    """The table in docs/troubleshooting.md quotes messages; … stands for what differs from case to case."""
    sources = [
        *ROOT.glob("*.py"),
        *ROOT.glob("qlora/**/*.py"),
        *ROOT.glob("llama.cpp/*.*"),
        ROOT / "Makefile",
    ]
    joined = "\n".join(path.read_text() for path in sources if path.suffix in (".py", ".sh", ""))
    joined = re.sub(r"\"\s*\n\s*f?\"", "", joined)  # one message over two lines
    table = TEXTS[Path("docs/troubleshooting.md")].split("## Messages")[1]
    messages = re.findall(r"^\| ([^|]+) \|", table, re.M)[1:]
    assert len(messages) > 10
    for message in messages:
        for part in (part.strip(" :()") for part in message.split("…")):
            assert part in joined, f"no program says {part!r} (in {message!r})"
