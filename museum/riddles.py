"""Twelve riddles: ten bugs, one of them twice, and a run without a bug; and what is said to an answer."""

import difflib
import hashlib

from museum.texts import TEXTS
from qlora.cli import require

# Left out: what shows in the machine, in arithmetic or in another base, which no folder can hold.
NOT_ASKED = ("fp16-overflow", "eval-repacks", "merged-into-wrong-base")
HEALTHY = "healthy"
ASKED = [name for name in TEXTS if name not in NOT_ASKED]
COUNT = len(ASKED) + 2  # a healthy one and a second of a kind: counting does not replace measuring
TABLE = "docs/museum.md, 'Which measurement tells which bug'"


def hidden_order(names: list[str], about: str) -> list[str]:
    """In the order of hashes, so that nobody reads it here by accident."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{about}: {name}".encode()).hexdigest())


def answer_of(number: int) -> str:
    """The bug of a riddle, or HEALTHY."""
    again = hidden_order(ASKED, "again")[0] + " again"
    return hidden_order([*ASKED, HEALTHY, again], "riddles")[number - 1].split()[0]


def known(name: str, names: list[str]) -> str:
    """`name`; UsageError with the nearest of `names` where it is none of them."""
    near = difflib.get_close_matches(name, names, 1, 0.4)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    require(name in names, f"no bug is named {name}; {meant}")
    return name


def judge(number: int, answer: str) -> bool:
    """Say whether `answer` is right, and if not how one sees that, without giving the right one away."""
    right = answer_of(number)
    if answer == right == HEALTHY:
        print("right: nothing is wrong with this run, every measurement is as it should be.")
    elif answer == right:
        print(f"right: {TEXTS[right].title}.\nRead on: python -m museum {right}")
    elif answer in NOT_ASKED:
        print(f"{answer} is none of the ten.")
    elif answer == HEALTHY:
        print(f"not {HEALTHY}: one measurement is not as it should be. Take them one by one: {TABLE}")
    else:
        print(f"not {answer}. What would tell that bug: {TEXTS[answer].hint}.\nOther measurements: {TABLE}")
    return answer == right
