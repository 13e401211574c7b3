"""Thirteen bugs that a loss curve does not show, each planted in a small fine-tuning and caught.

    python -m museum                              # the list
    python -m museum end-masked                   # plant one: what one sees, what catches it, cause, fix
    python -m museum --riddle 3                   # a run with one of ten bugs or none: find out which
    python -m museum --riddle 3 --answer NAME

Computes on the CPU, in less than two minutes each. Exits with 1 where a bug was not caught.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from museum.riddles import COUNT, HEALTHY, judge, known
from museum.settings import MuseumSettings
from museum.texts import TEXTS
from qlora.cli import UserError, parse, require, run
from qlora.files import read_json, write_json
from qlora.tables import table


def main(argv: Sequence[str] | None = None) -> None:
    s = parse(MuseumSettings, argv, __doc__, prog="python -m museum")
    check(s)
    if s.answer is not None:
        sys.exit(0 if judge(s.riddle, s.answer) else 1)
    if s.riddle is not None:
        from museum.evidence import pose

        return pose(s)
    if not (s.all or s.bug):
        return show_list()
    if not exhibit(s, list(TEXTS) if s.all else [s.bug]):
        sys.exit(1)


def check(s: MuseumSettings) -> None:
    asked = [s.bug is not None, s.all, s.riddle is not None]
    require(sum(asked) < 2, "a bug, --all, --riddle: one thing at a time")
    require(s.bug is None or bool(known(s.bug, list(TEXTS))), "")
    require(s.answer is None or s.riddle is not None, "--answer needs --riddle K")
    require(s.answer is None or bool(known(s.answer, [*TEXTS, HEALTHY])), "")
    fits = s.riddle is None or 1 <= s.riddle <= COUNT
    require(fits, f"--riddle {s.riddle}: there are {COUNT}, from 1 to {COUNT}")
    require(s.json is None or s.all or s.bug is not None, "--json needs a bug or --all")
    if s.json is not None:  # now, not when a minute's measurement would be lost
        above = s.json.absolute().parent
        require(above.is_dir(), f"--json {s.json}: there is no folder {above}; make it first")
        require(os.access(above, os.W_OK), f"--json {s.json}: {above} is not writable")
        earlier(s.json)


def show_list() -> None:
    print(
        table(
            ["bug", "what is wrong"], [[name, text.title] for name, text in TEXTS.items()], left=2, indent=0
        )
    )
    print(f"\nshow one   python -m museum {next(iter(TEXTS))}")
    print(f"find one   python -m museum --riddle 1 (to {COUNT})")


def exhibit(s: MuseumSettings, names: list[str]) -> bool:
    """Show these bugs; True if all were caught."""
    from museum.catalogue import BUGS
    from museum.exhibit import as_record, show, visit
    from museum.job import Job

    missed = []
    for name in names:
        found = visit(BUGS[name], Job(model=s.model))
        show(BUGS[name], found)
        missed += [name] * (not found["caught"])
        if s.json:
            keep(s.json, as_record(found))
        if name != names[-1]:
            print("\n" + "-" * 100 + "\n")
    return not missed


def keep(path: Path, record: dict) -> None:
    """Put a bug's record into the file, in place of its earlier one."""
    records = {each["name"]: each for each in [*earlier(path), record]}
    write_json(path, {"bugs": [records[name] for name in TEXTS if name in records]})


def earlier(path: Path) -> list[dict]:
    """The records that are in the file, none where there is none; UserError where it holds something else."""
    if not path.exists():
        return []
    fix = "--json needs a new file or one that it wrote itself"
    bugs = read_json(path, fix, dict[str, list[dict]]).get("bugs")
    if bugs is None or not all(isinstance(each.get("name"), str) for each in bugs):
        raise UserError(f"{path} holds no records of the museum; {fix}")
    return bugs


if __name__ == "__main__":
    run(main)
