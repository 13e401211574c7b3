"""Solutions of lesson 8."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import t


def swapped(text: str, pairs: dict[str, str]) -> str:
    both = {**pairs, **{value: key for key, value in pairs.items()}}

    def partner(match: re.Match) -> str:
        word, other = match[0], both.get(match[0].lower(), match[0])
        return other[0].upper() + other[1:] if word[0].isupper() else other

    # One pass over the words: a second replacement would turn the first one's results back.
    return re.sub(r"\w+", partner, text)


def paired_shift(against: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    differences = np.subtract(other, against)
    n, mean = len(differences), differences.mean()
    # ddof=1: the mean was taken from the same numbers. t, not 1.96: their spread is an estimate, too.
    half = t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return float(mean), float(mean - half), float(mean + half)


def log_p_of_ending(model, beginning: list[int], ending: list[int]) -> float:
    ids = torch.tensor([beginning + ending])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].float().log_softmax(-1)
    # The last token of the beginning predicts the first one of the ending.
    places = range(len(beginning) - 1, len(beginning) + len(ending) - 1)
    return sum(logs[place, token].item() for place, token in zip(places, ending, strict=True))


def exposure(log_p: float, others: Sequence[float]) -> float:
    rank = 1 + sum(other > log_p for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)


def joules(before: int, after: int, largest: int) -> float:
    used = after - before if after >= before else after + largest - before  # it began again at 0
    return used / 1e6


def kilowatt_hours(seconds: float, watts: float) -> float:
    return watts / 1000 * seconds / 3600
