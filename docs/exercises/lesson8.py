"""Lesson 8: responsibility and practice. Check your answers: pytest docs/exercises -k lesson8"""

from __future__ import annotations

from collections.abc import Sequence


def swapped(text: str, pairs: dict[str, str]) -> str:
    """The counterfactual of a text: each word that stands in `pairs`, on either side, becomes its partner.

    Whole words only, both ways at the same time. `pairs` is in lower case; a word that begins with a capital
    letter gets a partner that does.

    swapped("He met the heroine before she met him.", {"he": "she", "him": "her"})
    -> "She met the heroine before he met her."
    """
    raise NotImplementedError("exercise 8.1")


def paired_shift(against: Sequence[float], other: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): how much higher `other` is, with its 95% interval by Student's t.

    Number i of both belongs to the same review in two versions. So what counts are the differences: how much
    the reviews differ from each other says nothing. At least two reviews. scipy.stats has t.

    paired_shift([0, 10, 20], [1, 11, 21]) -> (1.0, 1.0, 1.0)
    """
    raise NotImplementedError("exercise 8.1")


def log_p_of_ending(model, beginning: list[int], ending: list[int]) -> float:
    """log P(ending | beginning) in nats: of all tokens of `ending` together, none of `beginning`.

    Both are lists of token ids; neither is empty. `model(input_ids=ids).logits` has the shape (1, tokens,
    vocabulary): those at position i are for the token at position i + 1.
    """
    raise NotImplementedError("exercise 8.2")


def exposure(log_p: float, others: Sequence[float]) -> float:
    """By how many bits a secret is easier to find for somebody who has the model.

    `log_p` is that of the secret, `others` those of all other candidates (other numbers of the same length).
    Somebody who tries candidates in the model's order needs as many attempts as the secret's rank, 1 for the
    likeliest. Exposure is log2(number of candidates) - log2(rank); the secret is one of the candidates.

    exposure(-1.0, [-2.0, -3.0, -4.0]) -> 2.0
    """
    raise NotImplementedError("exercise 8.2")


def joules(before: int, after: int, largest: int) -> float:
    """Energy in joules between two readings of a counter in microjoules (energy_uj of Linux' powercap).

    At `largest` (max_energy_range_uj) the counter begins again at 0. It has passed there once at most.
    """
    raise NotImplementedError("exercise 8.3")


def kilowatt_hours(seconds: float, watts: float) -> float:
    """Energy in kWh of a machine that takes `watts` for `seconds`: kilowatt_hours(3600, 1000) -> 1.0"""
    raise NotImplementedError("exercise 8.3")
