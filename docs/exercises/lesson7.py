"""Lesson 7: deploying. Check your answers: pytest docs/exercises -k lesson7"""

from __future__ import annotations

import torch
from torch import Tensor


def merged(
    original: Tensor, dequantized: Tensor, a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype
) -> Tensor:
    """The weight of one layer with its adapter merged into it, (out, in), of the type `dtype`.

    The adapter was trained with QLoRA. `original` is the layer's weight before it was quantized, and
    `dequantized` the values that its 4-bit codes stand for: both (out, in), both bf16. One is the right one.
    `a` is (r, in), `b` is (out, r), both fp32. Round once, at the end: bf16 + bf16 would round on the way.

    a and b of rank 2, alpha 4: the update counts twice.
    """
    raise NotImplementedError("exercise 7.1")


def left_of_update(weight: Tensor, update: Tensor, dtype: torch.dtype) -> float:
    """The share of `update` that is left when weight + update is rounded to `dtype`; 1 is all of it.

    `weight` and `update` are fp32 and of the same shape. The change is the sum, rounded, less the weight,
    rounded as well: an error that the weight has without any update is not the update's loss. The share is
    the slope of this change on the update, sum(change * update) / sum(update * update).

    left_of_update(tensor([1.0]), tensor([0.001]), torch.bfloat16) -> 0.0
    """
    raise NotImplementedError("exercise 7.1")


def cat(parts: list[tuple[Tensor, Tensor, float, float]]) -> tuple[Tensor, Tensor]:
    """(A, B) of one adapter that is the exact weighted sum of several, to be used with the scale 1.

    Each part is (a, b, scale, weight): a (r, in), b (out, r), scale its alpha / r. Ranks may differ, and
    weights may be negative (to take a skill away). B @ A has to be the sum of weight * scale * b @ a.
    """
    raise NotImplementedError("exercise 7.2")


def next_probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """What the next token is drawn from, (vocabulary,): the temperature first, then top-p.

    top_p keeps the fewest tokens, likeliest first, that reach this probability together. What is kept adds
    up to 1 again; all others are 0; every token stays in its place. Temperature 0 is greedy: 1 for the
    likeliest token.

    next_probabilities(tensor([0.5, 0.2, 0.3]).log(), 1.0, 0.7) -> [0.625, 0, 0.375]
    """
    raise NotImplementedError("exercise 7.3")
