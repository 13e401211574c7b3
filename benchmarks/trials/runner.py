"""A trial's process: a fork of a process that has imported everything, a tenth of a second instead of eight.

The child calls the script's own `run(main)` with sys.argv set, in a session of its own, with files as stdin,
stdout and stderr; so exit codes, signal handlers and messages are those that a user gets.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HANG = "hang"  # the exit code of a process that was still running after its time
TIMEOUT = 60  # seconds; the longest run takes two alone, and the machine may be busy


@dataclass
class Done:
    """How a process ended. `logits` is a sha256 of all logits that a model gave, where that was asked for."""

    code: int | str
    out: str
    err: str
    seconds: float
    logits: str = ""

    @property
    def traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.out + self.err or "panicked at" in self.err

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def last_line(self) -> str:
        return (self.err.strip().splitlines() or [""])[-1][:300]


@dataclass
class Job:
    """What to call and in what surroundings; `before` and `after` are called in the child."""

    script: str  # module with a main(), or (the plain Trainer) with a run() of its own
    args: list
    stdin: bytes = b""
    env: dict | None = None
    unset: tuple = ()
    cwd: Path | None = None
    before: Callable[[], None] | None = None
    after: Callable[[], None] | None = None  # once the script has ended by itself
    hash_logits: bool = False
    encoding: str = "utf-8"  # of stdout and stderr
    closed: tuple = ()  # file descriptors that are closed before the script starts


class Process:
    """A running child; wait() gives a Done."""

    def __init__(self, job: Job, folder: Path):
        tag = f"{os.getpid()}-{random.getrandbits(40):010x}"
        self.files = {n: folder / f".{n}-{tag}" for n in ("in", "out", "err", "logits")}
        self.files["in"].write_bytes(job.stdin)
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os._exit(_in_child(job, self.files))

    def send(self, number: int) -> None:
        """A signal to the child alone; nothing if it has ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def sleep_until(self, seconds: float) -> None:
        """Until so long after the start."""
        time.sleep(max(0.0, seconds - (time.monotonic() - self.started)))

    def wait(self, timeout: float = TIMEOUT) -> Done:
        code = None
        while code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() - self.started > timeout:
                os.killpg(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                code = HANG
            else:
                time.sleep(0.004)
        seconds = time.monotonic() - self.started
        texts = {n: p.read_text(errors="replace") if p.exists() else "" for n, p in self.files.items()}
        for path in self.files.values():
            path.unlink(missing_ok=True)
        return Done(code, texts["out"], texts["err"], seconds, texts["logits"])


def _in_child(job: Job, files: dict) -> int:
    code = 1
    try:
        os.setsid()
        _redirect(job, files)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for name in job.unset:
            os.environ.pop(name, None)
        os.environ.update(job.env or {})
        if job.cwd:
            os.chdir(job.cwd)
        sys.argv = [f"{job.script}.py", *map(os.fsdecode, map(_text, job.args))]
        random.seed()
        _own_lock()
        if job.hash_logits:
            _hash_logits(files["logits"])
        module = importlib.import_module(job.script)
        from qlora.cli import run

        if job.before:
            job.before()
        run(module.main) if hasattr(module, "main") else module.run()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # closed on purpose
            stream.flush()
    if job.after:
        job.after()
    return code


def _own_lock() -> None:
    """tqdm's lock is a semaphore that all forks share: a child killed with it would stop all others."""
    import threading

    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())


def _text(word):
    return word if isinstance(word, (str, bytes)) else str(word)


def _redirect(job: Job, files: dict) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, name, how in ((0, "in", os.O_RDONLY), (1, "out", flags), (2, "err", flags)):
        opened = os.open(files[name], how, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding=job.encoding, closefd=False)  # noqa: SIM115
    how = {"encoding": job.encoding, "errors": "backslashreplace", "buffering": 1, "closefd": False}
    sys.stderr = open(2, "w", **how)  # noqa: SIM115
    for number in job.closed:  # Python's own start would leave None in its place
        os.close(number)
        setattr(sys, ("stdin", "stdout", "stderr")[number], None)


def _hash_logits(path: Path) -> None:
    """Write the sha256 of what every causal language model's forward gives, rewritten after each call."""
    import torch

    digest = hashlib.sha256()

    def look(module, _inputs, output):
        if type(module).__name__.endswith("ForCausalLM") and getattr(output, "logits", None) is not None:
            digest.update(output.logits.detach().float().contiguous().numpy().tobytes())
            path.write_text(digest.hexdigest())

    torch.nn.modules.module.register_module_forward_hook(look)
