"""Command line: settings from flags, and one clear line for every mistake of the user's."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
from typing import Callable, Sequence, TypeVar

import tyro

Settings = TypeVar("Settings")


class UserError(Exception):
    """Something the user can mend. Shown as one line on stderr; the process ends with `exit_code`."""

    exit_code = 1


class UsageError(UserError):
    """The command line itself is wrong."""

    exit_code = 2


def note(text: str = "") -> None:
    """Progress and explanations go to stderr, so that stdout holds answers only."""
    print(text, file=sys.stderr, flush=True)


def one_line(boxed: str) -> str:
    """tyro's framed message as one line.

    '╭─ Value error ─╮ │ Error parsing --samples: … │ ────── │ …' -> 'Error parsing --samples: …'
    """
    rows = [re.sub(r"^[│\s]+|[│\s]+$", "", line) for line in boxed.splitlines()[1:]]
    rule = next((i for i, row in enumerate(rows) if row.startswith("──")), len(rows))
    message = " ".join(rows[:rule])
    # tyro lists an unknown flag's value as if it were a second unknown flag; name the flags only.
    if message.startswith("Unrecognized options:"):
        words = [w.strip() for w in message.removeprefix("Unrecognized options:").split(",")]
        message = "unknown flag " + ", ".join([w for w in words if w.startswith("-")] or words)
        meant = dict.fromkeys(re.findall(r"^(--[a-z][\w-]*)", "\n".join(rows[rule:]), re.M))
        meant.pop("--help", None)
        if meant:
            message += "; did you mean " + " or ".join(meant) + "?"
    return f"{message.rstrip('.')} (all flags: --help)"


def parse(kind: type[Settings], argv: Sequence[str] | None, description: str | None, default: Settings | None = None) -> Settings:
    """Settings of type `kind` from the command line; raises UsageError with one line, exits 0 after --help."""
    refuse_long_dashes(kind, argv)
    captured = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(kind, args=argv, description=description, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(one_line(captured.getvalue())) from None


def refuse_long_dashes(kind: type, argv: Sequence[str] | None) -> None:
    """'–samples': an editor made one dash out of two. Only names of flags are meant: a prompt may begin with a dash."""
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    for word in sys.argv[1:] if argv is None else argv:
        meant = "--" + word.lstrip("–—-").split("=")[0].replace("_", "-")
        if word[:1] in ("–", "—") and meant in flags:
            raise UsageError(f"{word} begins with a long dash; type two short ones: {meant}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def run(main: Callable[[Sequence[str] | None], None]) -> None:
    """Call `main`, turn what went wrong into one line on stderr and an exit code (0, 1, 2 or 130)."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: temporary files go, a server that was started stops
    try:
        main(None)
    except UserError as error:
        fail(str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        fail(str(stop) or "interrupted", 130)
    except BrokenPipeError:  # `| head` closed stdout: nothing to tell, and no second error while exiting
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        fail("out of memory: lower --batch-size or --max-length, or take a smaller --model", 1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR):
            raise
        fail(f"{os.strerror(error.errno)}: {error.filename or 'while writing'}; what was complete before is untouched, mend this and run again", 1)
    except Exception as error:  # writers in Rust and C++ raise kinds of their own
        if disk_full(error):
            fail(f"{os.strerror(errno.ENOSPC)}: while writing; what was complete before is untouched, mend this and run again", 1)
        if not isinstance(error, RuntimeError) or "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
            raise
        fail("out of memory: lower --batch-size or --max-length, add --gradient-checkpointing, or take a smaller --model", 1)


def disk_full(error: Exception) -> bool:
    """safetensors and tokenizers (Rust) quote the system's message; torch.save (C++) names only its own source file."""
    return "No space left on device" in str(error) or "inline_container.cc" in str(error)


def fail(message: str, code: int) -> None:
    message = " ".join(message.split())  # what it quotes may hold line breaks
    note(f"error: {message}" if code != 130 else message)
    sys.exit(code)
