"""Trials are shared out to forked workers; each result is appended to a file as soon as it is there."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trials.verdicts import Verdict
from trials.world import World


@dataclass(frozen=True)
class Kind:
    """A kind of fault or attack.

    `plan` gives the trials, each a small JSON object; `run` makes one of them happen. `plain`: how many
    of them are made against the plain HF Trainer too; 0 where that makes no sense.
    """

    name: str
    what: str  # one line for the table
    plan: Callable[[World, random.Random], list[dict]]
    run: Callable[[World, object, dict], Verdict]
    plain: int = 0
    skip: Callable[[], str | None] = lambda: None  # why it can't be done here
    setup: Callable | None = None  # a context manager of the world, for what all of its trials use
    long: bool = False  # trials of several seconds are started first


@dataclass(frozen=True)
class Trial:
    kind: Kind
    system: str  # "qlora" or "plain"
    number: int
    what: dict


def spread(items: list, count: int) -> list:
    """`count` of them, evenly: a cap must not take the beginning only."""
    if len(items) <= count:
        return items
    return [items[i * len(items) // count] for i in range(count)]


def trials_of(kind: Kind, world: World, cap: int | None, systems: tuple) -> list[Trial]:
    planned = kind.plan(world, random.Random(f"{world.seed} {kind.name}"))
    planned = spread(planned, cap or len(planned))
    made = [Trial(kind, "qlora", i, what) for i, what in enumerate(planned) if "qlora" in systems]
    if kind.plain and "plain" in systems:
        fits = [what for what in planned if not what.get("qlora_only")]
        count = kind.plain if cap is None else min(kind.plain, max(1, cap // 3))
        made += [Trial(kind, "plain", i, what) for i, what in enumerate(spread(fits, count))]
    return made


def arranged(trials: list[Trial]) -> list[Trial]:
    """Long ones first; the others mixed, so that an interrupted run has seen something of each kind."""
    by_kind: dict = {}
    for trial in trials:
        by_kind.setdefault((trial.kind.name, trial.system), []).append(trial)
    place = {}
    for group in by_kind.values():
        for i, trial in enumerate(group):
            place[id(trial)] = (not trial.kind.long, i / len(group))
    return sorted(trials, key=lambda trial: place[id(trial)])


def perform(world: World, trial: Trial) -> dict:
    started = time.monotonic()
    try:
        verdict = trial.kind.run(world, getattr(world, trial.system), trial.what)
    except Exception:  # a mistake of the harness must not pass for a result
        verdict = Verdict("harness", traceback.format_exc()[-1500:])
    record = {"kind": trial.kind.name, "system": trial.system, "number": trial.number, "trial": trial.what}
    record |= {"verdict": verdict.name, "detail": verdict.detail[:600]}
    return record | {"seconds": round(time.monotonic() - started, 3)}


def perform_all(world: World, trials: list[Trial], workers: int, out: Path) -> list[dict]:
    """Results of all trials; `out` is a .jsonl file that grows while they are made."""
    trials = arranged(trials)
    out.write_text("")
    take, give = os.pipe()
    children = []
    for _ in range(workers):
        if (pid := os.fork()) == 0:
            os.close(give)
            os._exit(_work(world, trials, take, out))
        children.append(pid)
    os.close(take)
    _hand_out(len(trials), give, out, workers)
    for pid in children:
        os.waitpid(pid, 0)
    return [json.loads(line) for line in out.read_text().splitlines()]


def _hand_out(count: int, pipe: int, out: Path, workers: int) -> None:
    """Numbers of trials into a pipe, a few ahead of what is done, so that Ctrl-C stops soon."""
    started = shown = time.monotonic()
    given = 0
    with open(out) as results:
        done = 0
        while done < count:
            while given < min(count, done + 4 * workers):
                os.write(pipe, struct.pack("q", given))
                given += 1
            done += sum(1 for _ in results)
            if time.monotonic() - shown > 10 or done == count:
                shown = time.monotonic()
                passed = shown - started
                print(f"{done}/{count} trials, {passed:.0f} s", file=sys.stderr, flush=True)
            time.sleep(0.05)
    os.close(pipe)


def _work(world: World, trials: list[Trial], pipe: int, out: Path) -> int:
    file = os.open(out, os.O_WRONLY | os.O_APPEND)
    try:
        while len(number := os.read(pipe, 8)) == 8:
            record = perform(world, trials[struct.unpack("q", number)[0]])
            os.write(file, (json.dumps(record, default=str) + "\n").encode())
    except KeyboardInterrupt:
        pass
    return 0
