"""Answers to lesson 5."""

import torch


def padded(prompt: list[int], reply: list[int], length: int, pad_id: int) -> tuple[list[int], list[int]]:
    empty = length - len(prompt) - len(reply)
    # By position: we know how many tokens are the reply's. No id is ever compared, so the end token stays
    # learned even where the pad token has the same id.
    return prompt + reply + [pad_id] * empty, [-100] * len(prompt) + reply + [-100] * empty


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    guesses, targets = logits[:-1], labels[1:]  # the output at t is about t + 1
    counts = targets != -100
    guesses, targets = guesses[counts], targets[counts]
    # -ln softmax = ln(sum of exp) - logit. Minus the largest one first: exp(1000) is infinity.
    largest = guesses.max(dim=1, keepdim=True).values
    log_sum = (guesses - largest).exp().sum(dim=1).log() + largest[:, 0]
    # The mean runs over the labels that count, not over all tokens.
    return (log_sum - guesses[torch.arange(len(targets)), targets]).mean()


def loss_of_update(batches: list[tuple[float, int]]) -> float:
    # Back to sums first: every label weighs the same, whichever batch it was in.
    return sum(mean * count for mean, count in batches) / sum(count for _, count in batches)


def trained_bytes(shapes: list[tuple[int, int]], rank: int) -> dict[str, int]:
    # A is (rank, inputs), B is (outputs, rank).
    weights = sum(rank * (outputs + inputs) for outputs, inputs in shapes)
    # fp32: 4 bytes each. AdamW keeps two numbers a weight, the means of gradient and squared gradient.
    return {"adapters": 4 * weights, "gradients": 4 * weights, "optimizer": 8 * weights}


def largest_batch(peak_of_1: float, peak_of_2: float, capacity: float) -> int:
    each = peak_of_2 - peak_of_1  # activations of one row
    once = peak_of_1 - each  # weights, adapters, optimizer: paid once, whatever the batch
    return max(0, int((capacity - once) // each))
