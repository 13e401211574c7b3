"""Ten bugs as exercises: which riddle has which, and what is said to an answer."""

import difflib
import hashlib

from museum.texts import TEXTS
from qlora.cli import require

# Left out: what shows in the machine, in arithmetic or in another base, which no folder can hold.
NOT_ASKED = ("fp16-overflow", "eval-repacks", "merged-into-wrong-base")
COUNT = len(TEXTS) - len(NOT_ASKED)


def answer_of(number: int) -> str:
    """The bug of a riddle: in the order of hashes, so that nobody reads it here by accident."""
    digest = lambda name: hashlib.sha256(f"riddle: {name}".encode()).hexdigest()
    return sorted(set(TEXTS) - set(NOT_ASKED), key=digest)[number - 1]


def known(name: str) -> str:
    """The name of a bug; UsageError with the nearest one where there is no such bug."""
    near = difflib.get_close_matches(name, TEXTS, 1, 0.4)
    meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(TEXTS)}"
    require(name in TEXTS, f"no bug is named {name}; {meant}")
    return name


def judge(number: int, answer: str) -> bool:
    """Say whether `answer` is the bug of a riddle, and what to measure if not."""
    right, text = answer_of(number), TEXTS[known(answer)]
    if answer == right:
        print(f"right: {text.title}.\nRead on: python -m museum {right}")
        return True
    if answer in NOT_ASKED:  # a name that was never possible earns no hint
        print(f"{answer} is none of the ten.")
        return False
    print(f"not {answer}. A measurement that would tell: {TEXTS[right].hint}")
    return False
