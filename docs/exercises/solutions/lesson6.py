"""Answers to lesson 6."""

import math


def wilson(correct: int, rows: int) -> tuple[float, float]:
    z, p = 1.96, correct / rows
    below = 1 + z**2 / rows
    middle = (p + z**2 / (2 * rows)) / below  # pulled towards one half: a few rows prove little
    half = z * math.sqrt(p * (1 - p) / rows + z**2 / (4 * rows**2)) / below
    return middle - half, middle + half


def rows_needed(accuracy: float, half_width: float) -> int:
    # Rounded up: one row fewer would be too few. The width is squared, so half of it costs four times.
    return math.ceil(1.96**2 * accuracy * (1 - accuracy) / half_width**2)


def flips(before: list[int], after: list[int], truth: list[int]) -> tuple[int, int]:
    rows = [(old == true, new == true) for old, new, true in zip(before, after, truth)]
    # A change from one wrong answer to another is no flip: right or wrong is what counts.
    return rows.count((False, True)), rows.count((True, False))


def chance(fixed: int, broken: int) -> float:
    flipped, fewer = fixed + broken, min(fixed, broken)
    # Only flips are thrown. The rows on which both models agree say nothing about which is better.
    one_side = sum(math.comb(flipped, k) for k in range(fewer + 1)) / 2**flipped
    # Two-sided: nobody knew before which one would be ahead. An even split counts its middle twice.
    return min(1.0, 2 * one_side)


def leaked(train: list[str], held_out: list[str]) -> list[int]:
    seen = {plain(text) for text in train}  # a set: looking into a list for each text takes minutes
    return [place for place, text in enumerate(held_out) if plain(text) in seen]


def plain(text: str) -> str:
    # split() without an argument takes any run of blanks and line breaks, and drops those at the ends.
    return " ".join(text.replace("<br />", " ").lower().split())


def stop_at(points: list[tuple[int, float]], patience: int) -> tuple[int, int]:
    best, best_step, waited = math.inf, points[0][0], 0
    for step, loss in points:
        if loss < best:  # compared with the lowest so far, not with the scoring before
            best, best_step, waited = loss, step, 0
        else:
            waited += 1
        if waited == patience:
            break
    return step, best_step
