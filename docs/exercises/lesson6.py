"""Lesson 6: is it better? Fill in the functions, then: pytest docs/exercises -k lesson6"""

# Exercise 6.1


def wilson(correct: int, rows: int) -> tuple[float, float]:
    """(low, high) of Wilson's 95% interval of an accuracy, with z = 1.96; the formula is in the lesson.

    wilson(90, 100) -> (0.826, 0.945)
    """
    raise NotImplementedError("exercise 6.1")


def rows_needed(accuracy: float, half_width: float) -> int:
    """The smallest number of rows with which 1.96 sqrt(p (1 - p) / n) is at most `half_width`.

    rows_needed(0.5, 0.1) -> 97
    """
    raise NotImplementedError("exercise 6.1")


# Exercise 6.2


def flips(before: list[int], after: list[int], truth: list[int]) -> tuple[int, int]:
    """(fixed, broken) of two models' answers to the same rows; there may be more than two labels.

    A row is fixed if it was wrong and is right now, and broken if it was right and is wrong now.
    flips([0, 1, 1], [1, 1, 0], truth=[1, 1, 1]) -> (1, 1)
    """
    raise NotImplementedError("exercise 6.2")


def chance(fixed: int, broken: int) -> float:
    """How likely a fair coin, thrown once for each flip, splits them at least as unevenly (two-sided).

    Of n throws, k heads have the probability math.comb(n, k) / 2**n. At least as uneven are all splits
    whose smaller part is at most ours: few heads, and as few tails. Without flips it is 1.
    chance(3, 0) -> 0.25: three heads or three tails of three
    """
    raise NotImplementedError("exercise 6.2")


# Exercise 6.3


def leaked(train: list[str], held_out: list[str]) -> list[int]:
    """Positions of held-out texts that are also training texts, if one looks closely.

    Two texts are the same if they differ only in upper and lower case, in blanks and line breaks (how many,
    which, at the ends), or in the HTML line break "<br />", which is a blank.
    leaked(["A fine film."], ["Dull.", "a  fine<br />film. "]) -> [1]
    """
    raise NotImplementedError("exercise 6.3")


def stop_at(points: list[tuple[int, float]], patience: int) -> tuple[int, int]:
    """(step at which early stopping ends the run, step whose adapter is saved).

    `points`: (step, held-out loss) of each scoring, in order. The run ends with the `patience`-th scoring
    in a row whose loss is not lower than the lowest before; with the last one if that never happens. Saved
    is the step with the lowest loss until then, the first of equal ones.
    stop_at([(10, 0.9), (20, 0.5), (30, 0.6), (40, 0.7)], patience=2) -> (40, 20)
    """
    raise NotImplementedError("exercise 6.3")
