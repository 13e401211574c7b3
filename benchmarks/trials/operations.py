"""A run's file operations, counted by an audit hook: which there are, and something that happens at the k-th.

Python's own operations are seen (open for writing, rename, remove, mkdir, …) and fsync, which has no audit
event and is wrapped. The writes of Rust and C++ code (safetensors, tokenizers, torch.save) are not: small.py
and power.py are for them. After SQLite's tests (https://www.sqlite.org/testing.html, "I/O error testing").
"""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from trials.runner import Done
from trials.schedule import Kind
from trials.verdicts import Verdict, check_end
from trials.world import System, World

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link"}
EVENTS |= {"os.symlink", "trials.fsync"}
ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EFBIG", "ESTALE", "EMFILE")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(folder: Path, each: Callable[[int, str, str], None]) -> None:
    """Call each(number, event, path) before every operation that changes something below `folder`."""
    count, root = 0, str(folder)
    fsync = os.fsync

    def hook(event: str, args: tuple) -> None:
        nonlocal count
        if event in EVENTS and (path := _path(event, args)) and path.startswith(root):
            count += 1
            each(count, event.removeprefix("os.").removeprefix("trials."), path)

    def told(number) -> None:
        descriptor = number if isinstance(number, int) else number.fileno()
        sys.audit("trials.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(number)

    os.fsync = told
    sys.addaudithook(hook)


def _path(event: str, args: tuple) -> str | None:
    path = args[0]
    if event == "open" and (not isinstance(args[2], int) or not args[2] & WRITES):
        return None
    if isinstance(path, bytes):
        path = os.fsdecode(path)
    if not isinstance(path, (str, os.PathLike)):
        return None
    if event in ("os.remove", "os.rmdir") and args[1] != -1:  # rmtree works relative to an open folder
        path = os.path.join(os.readlink(f"/proc/self/fd/{args[1]}"), path)
    return os.path.abspath(path)


def list_operations(world: World, system: System) -> list[str]:
    """Of one undisturbed run: ['mkdir .qlora-part-x', 'open settings.json', …]"""
    if system.name not in world.operations:
        with world.folder() as folder:
            log = folder / "operations"

            def before() -> None:
                file = open(log, "w", buffering=1)  # noqa: SIM115 - open as long as its process
                watch(folder / "out", lambda _, event, path: file.write(f"{event} {Path(path).name}\n"))

            done = world.call(system.train(folder / "out", before=before))
            assert done.code == 0, done.err
            world.operations[system.name] = log.read_text().splitlines()
    return world.operations[system.name]


def at_operation(folder: Path, number: int, act: Callable[[str, str], None]) -> Callable[[], None]:
    """For Job.before: call act(event, path) before the `number`-th operation below `folder`."""
    return lambda: watch(folder, lambda n, event, path: act(event, path) if n == number else None)


def raise_error(name: str) -> Callable[[str, str], None]:
    code = getattr(errno, name)

    def act(_event: str, path: str) -> None:
        raise OSError(code, os.strerror(code), path)

    return act


def die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# --- kinds ---


def plan_each(world: World, _) -> list[dict]:
    return [{"k": k + 1, "of": name} for k, name in enumerate(list_operations(world, world.qlora))]


def plan_errors(world: World, draw: random.Random) -> list[dict]:
    first = draw.randrange(len(ERRORS))
    return [{**t, "error": ERRORS[(first + i) % len(ERRORS)]} for i, t in enumerate(plan_each(world, draw))]


def _own(world: World, system: System, trial: dict) -> int:
    """The plain Trainer has other operations: the one at the same share of its run."""
    if system.ours:
        return trial["k"]
    return 1 + (trial["k"] - 1) * len(list_operations(world, system)) // len(
        list_operations(world, world.qlora)
    )


def kill_at_operation(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        out = folder / "out"
        before = at_operation(out, _own(world, system, trial), die)
        world.call(system.train(out, before=before))
        return world.check_resumed(system, out)


def error_at_operation(world: World, system: System, trial: dict) -> Verdict:
    with world.folder() as folder:
        out = folder / "out"
        act = raise_error(trial["error"])
        done = world.call(system.train(out, before=at_operation(out, _own(world, system, trial), act)))
        verdict = check_end(done)
        return world.check_resumed(system, out) if verdict.survived else with_cause(verdict, done)


def with_cause(verdict: Verdict, done: Done) -> Verdict:
    return Verdict(verdict.name, f"{verdict.detail} (exit code {done.code})")


KINDS = (
    Kind(
        "kill at each file operation",
        "SIGKILL before the k-th open, rename, remove, mkdir, chmod or fsync, for all k; then --resume",
        plan_each,
        kill_at_operation,
        plain=40,
    ),
    Kind(
        "error at each file operation",
        f"the k-th operation of a run fails ({', '.join(ERRORS)} in turn), for all k; then --resume",
        plan_errors,
        error_at_operation,
        plain=40,
    ),
)
