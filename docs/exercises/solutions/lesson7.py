"""Solutions of lesson 7."""

from __future__ import annotations

import torch
from torch import Tensor


def merged(
    original: Tensor, dequantized: Tensor, a: Tensor, b: Tensor, alpha: float, dtype: torch.dtype
) -> Tensor:
    # The adapter was trained beside the dequantized values, and has learned to correct their errors.
    # .float() before the sum: in bf16 a small update is rounded away before `dtype` is ever reached.
    return (dequantized.float() + alpha / len(a) * b @ a).to(dtype)


def left_of_update(weight: Tensor, update: Tensor, dtype: torch.dtype) -> float:
    # Both sides are rounded: a weight that `dtype` can't hold would be off without an adapter, too.
    change = (weight + update).to(dtype).float() - weight.to(dtype).float()
    return ((change * update).sum() / update.square().sum()).item()


def cat(parts: list[tuple[Tensor, Tensor, float, float]]) -> tuple[Tensor, Tensor]:
    # B @ A of matrices side by side is the sum of the products, without b1 @ a2 and b2 @ a1. The factor
    # stands on one side only: on both it would count twice, and a square root has no negative weights.
    a = torch.cat([a for a, *_ in parts], dim=0)
    b = torch.cat([weight * scale * b for _, b, scale, weight in parts], dim=1)
    return a, b


def next_probabilities(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).to(logits.dtype)
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    # A token goes if those before it reach top_p already; the first always stays.
    p = p.where(p.cumsum(-1) - p < top_p, 0)
    return torch.zeros_like(p).scatter(
        0, order, p / p.sum()
    )  # back from the sorted order to the tokens' places
