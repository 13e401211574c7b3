"""Measures again what is in benchmarks/results, and says which results are older than the code.

    python benchmarks/results.py               # all that this machine can: many hours (make results)
    python benchmarks/results.py --list        # runs nothing: each file, its commit, and whether it is old
    python benchmarks/results.py --stale       # only what is missing or old
    python benchmarks/results.py claims lab    # only these

results.toml has each result's files, commands, code and needs, in the order in which they run. What can't be
measured here is left out, with the reason. After a failure the others go on, and the exit code is 1. A result
is old if a commit after its own changed the code that it measures; without git there is no telling.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processor import processor_kind
from result_ages import RESULTS, Result, committed, files_of, git, has_history, read_table, state_of

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from qlora.tables import table  # noqa: E402


def has_gpu(_root: Path) -> bool:
    found = shutil.which("nvidia-smi")
    return found is not None and subprocess.run([found], capture_output=True).returncode == 0


# What `needs` can name: (whether it is there, what is said where it is not).
NEEDS = {
    "gpu": (has_gpu, "no GPU"),
    "no gpu": (lambda root: not has_gpu(root), "it measures a CPU, and would use this machine's GPU"),
    "two cores": (lambda root: (os.cpu_count() or 1) > 1, "it is measured on two cores"),
    "llama.cpp": (lambda root: (root / "llama.cpp/build/proved").is_file(), "llama.cpp/build.sh has not run"),
    "qlora-out": (lambda root: (root / "qlora-out/report.json").is_file(), "no finished run in qlora-out/"),
    "long-run": (lambda root: (root / "long-run/report.json").is_file(), "no finished run in long-run/"),
    "git": (has_history, "no git repository"),
}


def missing_need(result: Result, root: Path, made: set[str] | frozenset = frozenset()) -> str:
    """Why `result` can't be measured here and now, but for what is `made` before; '' if it can."""
    for need in set(result.needs) - made:
        if need.isupper() and need not in os.environ:
            return f"set {need} to a Python in an environment of its own; the script says what it needs"
        if not need.isupper() and not NEEDS[need][0](root):
            return NEEDS[need][1]
    return ""


def measure(result: Result, root: Path) -> str:
    """Run its commands; '' or what failed. What they leave in $NEW is kept only if all succeed."""
    began = time.time()
    with tempfile.TemporaryDirectory() as new:
        for name in result.files:
            (Path(new) / name).parent.mkdir(parents=True, exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` is this one
        for command in result.run:
            print(f"  $ {command}", flush=True)
            done = subprocess.run(command, shell=True, cwd=root, env={**os.environ, "PATH": path, "NEW": new})
            if done.returncode:
                return f"exit code {done.returncode}: {command}"
        shutil.copytree(new, root / RESULTS, dirs_exist_ok=True, copy_function=shutil.copy)
    files = files_of(result, root, processor_kind())
    # A command that keeps earlier runs may have had nothing to add. File systems round times.
    written = [path for path in files if result.adds or path.stat().st_mtime >= began - 2]
    return "" if written else "it wrote none of its files"


def measure_again(result: Result, root: Path) -> str:
    """measure(); where a file keeps earlier runs, and the code has changed since, all are made again."""
    files = files_of(result, root, processor_kind())
    again = result.adds and state_of(result, files, root).word == "old"
    for path in files if again else ():
        path.unlink()  # it is old, so it is committed
    try:
        return measure(result, root)
    finally:  # also after Ctrl-C
        for path in files if again else ():
            if not path.exists():  # not one run was measured
                git(root, "checkout", "--", path)


def choose(results: list[Result], asked: argparse.Namespace, root: Path) -> tuple[list[Result], dict]:
    """(what to run, {name: why it is left out}), before anything runs."""
    if asked.name:
        return [result for result in results if result.name in asked.name], {}
    if asked.stale:
        own = {result.name: files_of(result, root, processor_kind()) for result in results}
        results = [r for r in results if state_of(r, own[r.name], root).word in ("missing", "old")]
    left = {r.name: f"runs only when it is named ({r.named})" for r in results if r.named}
    return [result for result in results if not result.named], left


def show_list(results: list[Result], root: Path) -> None:
    rows = []
    for result in results:
        files = files_of(result, root)
        state = state_of(result, files, root)
        for file in files or (root / RESULTS / name for name in result.files):
            there = str(file.relative_to(root / RESULTS)).format(processor=processor_kind())
            rows.append((result.name, there, " ".join(committed(root, file)), state.word, state.why))
    print(table(["result", "file", "committed", "is", "because"], rows, left=5, indent=0))
    made = {result.fresh for result in results if not result.named}
    for result in results:
        why = f"only when it is named: {result.named}" if result.named else missing_need(result, root, made)
        if why:
            print(f"not among those that run here: {result.name} ({why})")


def run_all(results: list[Result], left: dict[str, str], root: Path) -> int:
    """Run them one after the other, then report; 1 if one failed."""
    hours = sum(result.minutes for result in results) / 60
    print(f"{len(results)} results; on two slow cores all of them take {hours:.1f} hours", flush=True)
    done, left, failed = [], dict(left), {}
    for result in results:
        if why := missing_need(result, root):  # not before: an earlier result may make what it needs
            left[result.name] = why
            continue
        print(f"\n{result.name}: about {result.minutes} minutes", flush=True)
        began = time.monotonic()
        try:
            why = measure_again(result, root)
        except KeyboardInterrupt:
            failed[result.name] = "interrupted; what comes after it has not run"
            break
        if why:
            failed[result.name] = why
        else:
            done.append(f"{result.name} ({(time.monotonic() - began) / 60:.0f} min)")
    print(f"\nmeasured   {', '.join(done) or 'nothing'}")
    for word, reasons in (("left out", left), ("failed", failed)):
        for name, why in reasons.items():
            print(f"{word:<10} {name}: {why}")
    return 1 if failed else 0


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    results = read_table(root)
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("name", nargs="*", help=", ".join(result.name for result in results))
    flags.add_argument("--list", action="store_true", help="run nothing: each file, and whether it is old")
    flags.add_argument("--stale", action="store_true", help="only what is missing or old")
    asked = flags.parse_args(argv)
    if unknown := sorted(set(asked.name) - {result.name for result in results}):
        flags.error(f"no result {', '.join(unknown)}; there are {', '.join(r.name for r in results)}")
    if not has_history(root):
        print("note: this is no git repository with all its commits: no telling which results are old")
        if asked.stale:
            flags.error("--stale needs git; name what is to run")
    if asked.list:
        show_list([r for r in results if not asked.name or r.name in asked.name], root)
        return 0
    chosen, left = choose(results, asked, root)
    if there := [result for result in chosen if result.fresh and (root / result.fresh).exists()]:
        folders, names = (", ".join(words) for words in zip(*((f"{r.fresh}/", r.name) for r in there)))
        flags.error(f"move {folders} away: measured from the start are {names}")
    return run_all(chosen, left, root)


if __name__ == "__main__":
    sys.exit(main())
