"""benchmarks/results.py: what is measured again, in which order, and what is older than its code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import result_ages
import results

TABLE = """
[[result]]
name = "speed"
files = ["speed.json"]
run = ["echo 1 >$NEW/speed.json"]
code = ["code.py"]
minutes = 1

[[result]]
name = "runs"
files = ["sub/runs.json"]
run = ["echo again >>benchmarks/results/sub/runs.json"]
code = ["code.py", "other.py"]
minutes = 1
adds = true

[[result]]
name = "fails"
files = ["fails.txt"]
run = ["echo half >$NEW/fails.txt", "exit 3", "touch never"]
code = ["code.py"]
minutes = 1

[[result]]
name = "run"
files = ["run.json"]
run = ["mkdir -p qlora-out && echo 1 >qlora-out/report.json", "cp qlora-out/report.json $NEW/run.json"]
code = ["code.py"]
minutes = 1
fresh = "qlora-out"

[[result]]
name = "after_run"
files = ["after_run.json"]
run = ["cp qlora-out/report.json $NEW/after_run.json"]
code = ["code.py"]
minutes = 1
needs = ["qlora-out"]

[[result]]
name = "elsewhere"
files = ["elsewhere.json"]
run = ["echo $OTHER_PYTHON >$NEW/elsewhere.json"]
code = ["code.py"]
minutes = 1
needs = ["OTHER_PYTHON"]

[[result]]
name = "long"
files = ["long.json"]
run = ["echo 1 >$NEW/long.json"]
code = ["code.py"]
minutes = 100
named = "it takes long"
"""


@dataclass
class Repository:
    """A small repository with results.toml, code.py and other.py."""

    root: Path

    def write(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def read(self, name: str) -> str:
        return (self.root / "benchmarks/results" / name).read_text().strip()

    def git(self, *words: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *words], cwd=self.root, check=True, capture_output=True)

    def commit(self, **texts: str) -> None:
        """Write NAME.py with that text, and commit everything."""
        for name, text in texts.items():
            self.write(f"{name}.py", text)
        self.git("add", "-A")
        self.git("commit", "-qm", "a change", "--allow-empty")

    def state(self, name: str) -> result_ages.State:
        result = next(r for r in result_ages.read_table(self.root) if r.name == name)
        return result_ages.state_of(result, result_ages.files_of(result, self.root), self.root)


@pytest.fixture
def here(tmp_path) -> Repository:
    made = Repository(tmp_path)
    made.write("benchmarks/results.toml", TABLE)
    made.write("benchmarks/results/speed.json", "0")
    made.write("benchmarks/results/sub/runs.json", "first\n")
    made.git("init", "-q")
    made.commit(code="a = 1", other="b = 1")
    return made


def test_a_result_is_old_once_its_code_was_committed_after_it(here):
    assert here.state("speed").word == "fresh"  # the same commit
    here.commit(other="b = 2")
    assert here.state("speed").word == "fresh" and here.state("runs").word == "old"
    here.commit(code="a = 2")
    assert here.state("speed").word == "old"
    assert "later commits to what it measures: 1; the last" in here.state("speed").why
    here.write("benchmarks/results/speed.json", "1")
    assert here.state("speed").word == "new"
    here.commit()
    assert here.state("speed").word == "fresh"
    here.write("code.py", "a = 3")
    assert here.state("speed").why == "code.py has changes that are not committed"


def test_a_change_of_another_branch_counts_though_its_date_is_earlier(here):
    here.git("checkout", "-qb", "aside")
    here.write("code.py", "a = 2")
    here.git("add", "-A")
    here.git("commit", "-qm", "long ago", "--date", "2001-01-01")
    here.git("checkout", "-q", "-")
    here.write("benchmarks/results/speed.json", "1")
    here.commit()
    assert here.state("speed").word == "fresh"
    here.git("merge", "-q", "aside", "--no-edit")
    assert here.state("speed").word == "old"


def test_list_shows_each_file_and_runs_nothing(here, capsys):
    here.commit(code="a = 2")
    assert results.main(["--list"], here.root) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("speed ") and " old " in line for line in lines)
    assert any(line.startswith("runs ") and "sub/runs.json" in line for line in lines)
    assert any(line.startswith("run ") and line.endswith("missing") for line in lines)
    assert "not among those that run here: long (only when it is named: it takes long)" in lines
    assert not any("after_run (" in line for line in lines)  # an earlier one makes what it needs
    assert here.read("speed.json") == "0"


def test_without_git_it_says_so_and_measures_all_the_same(here, capsys):
    shutil.rmtree(here.root / ".git")
    assert results.main(["--list", "speed"], here.root) == 0
    out = capsys.readouterr().out
    assert out.count("no telling which results are old") == 1 and "unknown" in out
    with pytest.raises(SystemExit):
        results.main(["--stale"], here.root)
    assert results.main(["speed"], here.root) == 0
    assert here.read("speed.json") == "1"


def test_all_run_in_order_what_fails_stops_only_itself_and_is_told_at_the_end(here, capfd, monkeypatch):
    monkeypatch.delenv("OTHER_PYTHON", raising=False)
    assert results.main([], here.root) == 1
    report = capfd.readouterr().out.split("\nmeasured")[1]
    assert "speed (0 min), runs (0 min), run (0 min), after_run (0 min)" in report
    assert "left out   long: runs only when it is named (it takes long)" in report
    assert "left out   elsewhere: set OTHER_PYTHON" in report
    assert "failed     fails: exit code 3: exit 3" in report
    assert here.read("after_run.json") == "1"
    assert not (here.root / "benchmarks/results/fails.txt").exists()  # half a result is none
    assert not (here.root / "never").exists()


def test_names_choose_and_an_environment_variable_meets_a_need(here, monkeypatch):
    monkeypatch.setenv("OTHER_PYTHON", "/a/python")
    assert results.main(["long", "elsewhere"], here.root) == 0
    assert here.read("elsewhere.json") == "/a/python" and here.read("long.json") == "1"
    assert here.read("speed.json") == "0"


def test_only_stale_ones_and_their_earlier_runs_go(here):
    here.commit(other="b = 2")
    assert results.main(["--stale"], here.root) == 1  # `fails` is missing and fails again
    assert here.read("speed.json") == "0"  # fresh
    assert here.read("sub/runs.json") == "again"  # from the start: its code has changed
    assert results.main(["runs"], here.root) == 0
    assert here.read("sub/runs.json") == "again\nagain"  # goes on


def test_an_old_result_comes_back_where_nothing_new_was_measured(here):
    here.write(
        "benchmarks/results.toml", TABLE.replace("echo again >>benchmarks/results/sub/runs.json", "false")
    )
    here.commit(other="b = 2")
    assert results.main(["runs"], here.root) == 1
    assert here.read("sub/runs.json") == "first"


def test_ctrl_c_takes_no_old_result_away(here, capsys, monkeypatch):
    here.commit(other="b = 2")

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(results, "measure", interrupted)
    before = here.read("sub/runs.json")
    assert results.main(["runs"], here.root) == 1
    assert here.read("sub/runs.json") == before
    assert "failed     runs: interrupted" in capsys.readouterr().out


def test_a_command_that_writes_nothing_has_failed(here, capsys):
    here.write("benchmarks/results.toml", TABLE.replace("echo 1 >$NEW/speed.json", "true"))
    os.utime(here.root / "benchmarks/results/speed.json", (10**9, 10**9))  # long ago
    assert results.main(["speed"], here.root) == 1
    assert "failed     speed: it wrote none of its files" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prepare, asked, words",
    [
        ("qlora-out", [], "move qlora-out/ away: measured from the start are run"),
        (None, ["sped"], "no result sped; there are speed"),
    ],
)
def test_mistakes_are_told_before_anything_runs(here, capsys, prepare, asked, words):
    if prepare:
        (here.root / prepare).mkdir()
    with pytest.raises(SystemExit) as stop:
        results.main(asked, here.root)
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert here.read("speed.json") == "0"


def test_every_result_file_is_made_by_a_command_and_every_named_path_is_there(tmp_path):
    entries = result_ages.read_table(ROOT)
    assert result_ages.unmade(entries, ROOT) == []
    assert len({entry.name for entry in entries}) == len(entries)
    for entry in entries:
        assert [path for path in entry.code if not (ROOT / path).exists()] == [], entry.name
        scripts = [word for line in entry.run for word in line.split() if word.endswith(".py")]
        assert [name for name in scripts if not (ROOT / name).is_file()] == [], entry.name
        assert all(need.isupper() or need in results.NEEDS for need in entry.needs), entry.name
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/typed.json").write_text("{}")
    assert result_ages.unmade(entries, tmp_path) == ["typed.json"]


def test_no_result_names_a_folder_of_the_machine_that_measured_it():
    folder = re.compile(rb"(?<![\w.])/(?:tmp|home|root|Users)/")
    files = [
        path for path in (ROOT / result_ages.RESULTS).rglob("*") if path.suffix in (".json", ".md", ".txt")
    ]
    assert len(files) > 50
    assert [path.name for path in files if folder.search(path.read_bytes())] == []
