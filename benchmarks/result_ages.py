"""The table of results (results.toml), and which results are older than the code that they measure."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

RESULTS = "benchmarks/results"
TABLE = "benchmarks/results.toml"


@dataclass(frozen=True)
class Result:
    """One entry of results.toml, which explains the fields."""

    name: str
    files: list[str]
    run: list[str]
    code: list[str]
    minutes: int
    needs: list[str] | tuple[()] = ()
    adds: bool = False
    fresh: str = ""
    named: str = ""


@dataclass(frozen=True)
class State:
    """Of a result. `word`: fresh, old, missing, new (not committed yet), or unknown (no git)."""

    word: str
    why: str = ""


def read_table(root: Path) -> list[Result]:
    """Raises TypeError for a key that Result does not have, or for one that is missing."""
    return [Result(**entry) for entry in tomllib.loads((root / TABLE).read_text())["result"]]


def files_of(result: Result, root: Path, processor: str = "*") -> list[Path]:
    """Its files that are there, of every kind of processor or of the one that is named."""
    names = [name.format(processor=processor) for name in result.files]
    return sorted(path for name in names for path in (root / RESULTS).glob(name) if path.is_file())


def unmade(results: list[Result], root: Path) -> list[str]:
    """Files in benchmarks/results that no entry makes (but .jsonl: single trials, which git ignores)."""
    made = {path for result in results for path in files_of(result, root)}
    there = {path for path in (root / RESULTS).rglob("*") if path.is_file() and path.suffix != ".jsonl"}
    return sorted(str(path.relative_to(root / RESULTS)) for path in there - made)


def git(root: Path, *words: str | Path) -> str:
    """What git says; '' where it fails or there is none."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def has_history(root: Path) -> bool:
    """Whether `root` is a git repository with all its commits."""
    top = git(root, "rev-parse", "--show-toplevel")
    whole = git(root, "rev-parse", "--is-shallow-repository") == "false"
    return top != "" and Path(top) == root.resolve() and whole


def committed(root: Path, *files: Path) -> tuple[str, str]:
    """(short hash, date) of the last commit that changed one of these files; ('', '') if there is none."""
    commit, _, date = git(root, "log", "-1", "--format=%h %as", "--", *files).partition(" ")
    return commit, date


def state_of(result: Result, files: list[Path], root: Path) -> State:
    """Whether its code changed after the newest of `files`: a run may leave some files as they were."""
    if not files:
        return State("missing")
    if not has_history(root):
        return State("unknown")
    if git(root, "status", "--porcelain", "--", *files):
        return State("new", "not committed yet")
    if changed := git(root, "status", "--porcelain", "--", *result.code):
        return State("old", f"{changed.split()[1]} has changes that are not committed")
    # Not by date: an earlier change on another branch may have come here later.
    since = f"{committed(root, *files)[0]}..HEAD"
    later = git(root, "log", "--no-merges", "--format=%h of %as: %s", since, "--", *result.code).splitlines()
    if not later:
        return State("fresh")
    return State("old", f"later commits to what it measures: {len(later)}; the last {later[0][:60]}")
