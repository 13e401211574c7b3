"""What an exhibit is made of, and how a bug is told from a healthy run."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from museum.job import Job, Run
from qlora.cli import UserError


class Caught(UserError):
    """A measurement of the museum's own found a bug."""


def hold(passed: bool, found: str) -> None:
    """A measurement of a few lines, where the project has no guard; raises Caught."""
    if not passed:
        raise Caught(found)


@dataclass(frozen=True)
class Bug:
    name: str
    plant: Callable[[Job], Job]
    check: Callable[[Run], None]  # raises UserError where the bug is there
    measure: Callable[[Run], dict[str, str]]  # {what: value}; the first differs most
    # The healthy job of this exhibit, of the usual one and a folder for models that it needs.
    stage: Callable[[Job, Path], Job] = lambda job, folder: job
    note: Callable[[], str] = lambda: ""  # what is not planted for real here, and why


def message_of(check: Callable[[Run], None], run: Run) -> str:
    """What a guard says when it fires; "" where it holds."""
    try:
        check(run)
    except UserError as error:
        return str(error)
    return ""
