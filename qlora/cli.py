"""Command line: settings from flags, and one clear line for every mistake of the user."""

import contextlib
import dataclasses
import errno
import io
import os
import pickle
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import tyro

from config import NAMED_ADAPTERS
from qlora import aliases

# What numbers a flag takes, in every script that has it.
LIMITS: dict[str, tuple[Callable[[float], bool], str]] = {
    **dict.fromkeys(
        (
            "samples",
            "eval_samples",
            "grad_accum",
            "save_steps",
            "max_new_tokens",
            "eval_steps",
            "early_stopping",
        ),
        (lambda n: 1 <= n <= 10**9, "must be from 1 to 1,000,000,000"),
    ),
    "group_size": (lambda n: 8 <= n <= 1 << 20, "must be from 8 to 1,048,576"),
    "calibration_rows": (lambda n: 8 <= n <= 10**6, "must be from 8 to 1,000,000"),
    "calibration_length": (lambda n: 32 <= n <= 1 << 20, "must be from 32 to 1,048,576 tokens"),
    "gpus": (lambda n: 1 <= n <= 1024, "must be from 1 to 1,024"),
    "batch_size": (lambda n: 1 <= n <= 100_000, "must be from 1 to 100,000"),
    "lora_r": (lambda n: 1 <= n <= 1 << 16, "must be from 1 to 65,536"),
    "lora_alpha": (lambda n: 0 < n <= 10**6, "must be from 1 to 1,000,000"),
    "lora_dropout": (lambda n: 0 <= n < 1, "must be at least 0 and below 1"),
    "epochs": (lambda n: 0 < n <= 10**6, "must be above 0 and at most 1,000,000"),
    "max_steps": (lambda n: n == -1 or 0 < n <= 10**9, "must be -1 (off), or from 1 to 1,000,000,000"),
    "max_length": (lambda n: 8 <= n <= 1 << 20, "must be from 8 to 1,048,576 tokens"),
    "learning_rate": (lambda n: 0 < n < 1, "must be between 0 and 1"),
    "beta": (lambda n: 0 < n <= 100, "must be above 0 and at most 100"),
    "port": (lambda n: 1 <= n < 1 << 16, "must be from 1 to 65,535"),
    "seed": (lambda n: 0 <= n < 2**32, "must be between 0 and 2**32 - 1"),
    # far smaller ones make logits / temperature infinite
    "temperature": (lambda n: n == 0 or 0.001 <= n <= 100, "must be 0 (greedy), or from 0.001 to 100"),
    "top_p": (lambda n: 0 < n <= 1, "must be above 0 and at most 1"),
    "density": (lambda n: 0 < n <= 1, "must be above 0 and at most 1"),
    "top_k": (lambda n: 0 <= n <= 10**9, "must be 0 (off) or above, at most 1,000,000,000"),
}


class UserError(Exception):
    """Something the user can fix. Shown as one line on stderr; the process ends with `exit_code`."""

    exit_code = 1


class UsageError(UserError):
    """The command line itself is wrong."""

    exit_code = 2


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UsageError(message)


def first_line(error: Exception) -> str:
    """Of its message, at most 160 characters; its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__


_process = 0  # number among several that a launcher started: the first one prints


def set_process(number: int) -> None:
    global _process
    _process = number


def note(text: str = "") -> None:
    """Progress and explanations go to stderr, so that stdout holds answers only."""
    if _process == 0:
        print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def progress(rows: int, title: str, unit: str = "row") -> Iterator[Callable]:
    """A progress bar on stderr; yields the function that moves it on by a number of rows."""
    from tqdm import tqdm

    with tqdm(total=rows, desc=title, unit=unit, mininterval=2, disable=_process > 0) as bar:
        yield bar.update


def parse(kind: type, argv: Sequence[str] | None, text: str | None, default=None, prog: str | None = None):
    """Checked settings of type `kind` from the command line; `text` is for --help, `prog` how
    the program is called where that is not its file.

    `default` replaces the defaults of `kind`, a --config file replaces `default`, and flags replace both.
    Other programs' names for settings are understood (qlora/aliases.py). Raises UsageError with one line;
    exits with 0 after --help.
    """
    refuse_unreadable(kind, argv)
    argv = in_our_words(kind, argv, quiet=default is not None)
    try:  # huggingface_hub looks while it is imported
        _ = urlsplit(os.environ.get("HF_ENDPOINT", "")).port
    except ValueError:
        raise UsageError("HF_ENDPOINT is no address of a hub; unset it") from None
    captured = io.StringIO()
    start = default
    if changed := from_file(kind, argv, quiet=default is not None):
        start = dataclasses.replace(default or kind(), **changed)
    extra = {} if start is None else {"default": start}
    try:
        with contextlib.redirect_stderr(captured):
            settings = tyro.cli(kind, prog=prog, args=argv, description=text, **extra)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(of_choices(one_line(captured.getvalue()), kind)) from None
    settings = with_named_adapter(settings, default)
    for name, value in vars(settings).items():
        if name in LIMITS and value is not None:
            fits, words = LIMITS[name]
            require(fits(value), f"--{name.replace('_', '-')} {value}: {words}")
    return settings


def in_our_words(kind: type, argv: Sequence[str] | None, quiet: bool) -> list[str]:
    """The command line, other programs' names for our settings replaced; UsageError says how it is done."""
    fields = dataclasses.fields(kind)
    positional = any("Positional" in str(field.type) for field in fields)  # `--plain True` asks about "True"
    switches = {field.name for field in fields if field.type is bool and not positional}
    words, known = sys.argv[1:] if argv is None else argv, {field.name for field in fields}
    ours, not_needed, problems = aliases.translate(list(words), known, switches)
    require(not problems, "; ".join(problems))
    if not_needed and not quiet:
        note(f"note       not needed here: {', '.join(not_needed)}")
    return ours


def from_file(kind: type, words: list[str], quiet: bool) -> dict:
    """{setting: value} of the file that --config names, without those that are flags as well."""
    path, flags = "", set()
    for word, following in zip(words, [*words[1:], ""]):
        flag, _, value = word.partition("=")
        flags |= {flag[2:].replace("-", "_")} if flag.startswith("--") else set()
        path = (value or following) if flag == "--config" else path
    if not path or "config" not in {field.name for field in dataclasses.fields(kind)}:
        return {}
    from qlora.settings_file import read_settings  # late: --help need not wait for YAML

    values, not_needed = read_settings(Path(path), kind)
    if not_needed and not quiet:
        note(f"note       not needed here: {', '.join(not_needed)}")
    return {name: value for name, value in values.items() if not {name, f"no_{name}"} & flags}


def with_named_adapter(settings, default):
    """--target-modules lite or full stands for modules and a rank; the settings that both mean."""
    modules = getattr(settings, "target_modules", None)
    if modules not in NAMED_ADAPTERS:
        return settings
    targets, r = NAMED_ADAPTERS[modules]
    both = f"--target-modules {modules} means r {r}, --lora-r says {settings.lora_r}: leave one out"
    require(settings.lora_r in (r, (default or type(settings)).lora_r), both)
    return dataclasses.replace(settings, target_modules=targets, lora_r=r)


def of_choices(message: str, kind: type) -> str:
    """With a flag's choices in their order: of one that may be left out tyro names a set, and None in it."""
    found = re.fullmatch(
        r"(invalid choice .* for argument '--([\w-]+)'\. Expected one of) \(.*?\)(.*)", message
    )
    hint = typing.get_type_hints(kind).get(found[2].replace("-", "_")) if found else None
    kinds = [each for each in (hint, *typing.get_args(hint)) if typing.get_origin(each) is typing.Literal]
    return f"{found[1]} {', '.join(map(str, typing.get_args(kinds[0])))}{found[3]}" if kinds else message


def one_line(boxed: str) -> str:
    """tyro's framed message as one line.

    '╭─ Value error ─╮ │ Error parsing --samples: … │ ────── │ …' -> 'Error parsing --samples: …'
    """
    rows = [re.sub(r"^[│\s]+|[│\s]+$", "", line) for line in boxed.splitlines()[1:]]
    is_rule = lambda row: re.fullmatch("[─-]{5,}", row) is not None
    if rows and is_rule(rows[0]):  # stdout is not in UTF-8: no frame, and a rule under the title
        del rows[0]
    rule = next((i for i, row in enumerate(rows) if is_rule(row)), len(rows))
    message = " ".join(rows[:rule])
    # tyro lists an unknown flag's value as if it were a second unknown flag: name the flags only.
    if message.startswith("Unrecognized options:"):
        words = [w.strip() for w in message.removeprefix("Unrecognized options:").split(",")]
        message = "unknown flag " + ", ".join([w for w in words if w.startswith("-")] or words)
        meant = dict.fromkeys(re.findall(r"^(--[a-z][\w-]*)", "\n".join(rows[rule:]), re.M))
        meant.pop("--help", None)
        if meant:
            message += "; did you mean " + " or ".join(meant) + "?"
    return f"{about_a_number(message).rstrip('.')} (all flags: --help)"


def about_a_number(message: str) -> str:
    """tyro's complaint without its parser's words; other messages as they are.

    "Error parsing --seed: invalid literal for int() with base 10: 'x'" -> '--seed x: must be a whole number'
    """
    if several := re.fullmatch(
        r"Error parsing (--[\w-]+): no type matching .*\[INT \[INT.* instantiated from \[(.*?)\]\. .*",
        message,
    ):
        return f"{several[1]} {several[2].replace(',', '')}: must be whole numbers"
    found = re.fullmatch(
        r"Error parsing (--[\w-]+):.*(int\(\) with base 10|to float): ['\"](.*)['\"]", message
    )
    if not found:
        return message
    flag, kind, value = found.groups()
    return f"{flag} {value}: must be a {'whole ' * kind.startswith('int')}number"


def refuse_unreadable(kind: type, argv: Sequence[str] | None) -> None:
    """Words that are no text, and flags with one long dash for two (–samples), as editors write them."""
    flags = {"--" + field.name.replace("_", "-") for field in dataclasses.fields(kind)}
    for word in sys.argv[1:] if argv is None else argv:
        is_text = not any("\ud800" <= letter <= "\udfff" for letter in word)
        fix = "a file: rename it; a terminal: set its locale to UTF-8"
        require(is_text, f"{word!r}: not text in UTF-8 ({fix})")
        meant = "--" + word.lstrip("–—-").split("=")[0].replace("_", "-")
        if word[:1] in ("–", "—") and meant in flags:
            raise UsageError(f"{word} begins with a long dash; type two short ones: {meant}")


CONTINUE = "continue with: "
SMALLER_STEP = "lower --batch-size or --max-length, add --gradient-checkpointing, or choose a smaller --model"


def run(main: Callable[[Sequence[str] | None], None], less_memory: str = SMALLER_STEP) -> None:
    """Call `main`; turn what went wrong into one line on stderr and an exit code (0, 1, 2 or 130).

    `less_memory`: what to do in this script when memory runs out.
    """
    # As Ctrl-C: temporary files are deleted, a server that was started stops.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    hangup = getattr(signal, "SIGHUP", None)  # a lost connection; not on Windows, and nohup ignores it
    if hangup and signal.getsignal(hangup) == signal.SIG_DFL:
        signal.signal(hangup, signal.default_int_handler)
    for name in ("stdout", "stderr"):  # None where they were closed before the start
        setattr(sys, name, getattr(sys, name) or open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that is not in UTF-8 can't show every review
        sys.stdout.reconfigure(errors="backslashreplace")
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
        fail(f"out of memory: {less_memory}", 1)
    except OSError as error:
        what = os.strerror(error.errno) if error.errno in errno.errorcode else first_line(error)
        fail(f"{what}: {str(error.filename or 'while reading or writing')[:200]}; {untouched(error)}", 1)
    except pickle.UnpicklingError:
        fail("a checkpoint holds a pickle that could run code; delete that folder and run again", 1)
    except Exception as error:  # writers in Rust and C++ raise their own kinds
        text = str(error)
        # safetensors and tokenizers (Rust) quote the system's number.
        if number := re.search(r"\(os error (\d+)\)", text):
            fail(f"{os.strerror(int(number[1]))}: while reading or writing; {untouched(error)}", 1)
        if isinstance(error, UnicodeEncodeError) and "surrogates" in text:
            fail("a name in a path or in the environment is not text in UTF-8; rename it", 1)
        # torch.save (C++) names only its source file or its stream's method.
        if any(
            words in text for words in ("No space left on device", "inline_container.cc", "basic_ios::clear")
        ):
            fail(f"No space left on device, or a limit reached: while writing; {untouched(error)}", 1)
        out_of_memory = "out of memory" in text.lower() or "can't allocate memory" in text
        if isinstance(error, RuntimeError) and out_of_memory:
            fail(f"out of memory: {less_memory}", 1)
        raise


def untouched(error: Exception) -> str:
    """What is left, and how to go on: as the error's notes say (Exception.add_note), or the usual."""
    ways = [note for note in getattr(error, "__notes__", ()) if note.startswith(CONTINUE)]
    return f"what was complete before is untouched; fix this and {(ways or ['run again'])[-1]}"


def fail(message: str, code: int) -> None:
    message = " ".join(message.split())  # what it quotes may hold line breaks
    note(f"error: {message}" if code != 130 else message)
    if _process and code == 1:  # the first one says the rest
        print(f"error: process {_process}: {message}", file=sys.stderr, flush=True)
    elif _process and code == 2:  # it says the same: when one ends, torchrun stops the others
        time.sleep(2)
    sys.exit(code)
