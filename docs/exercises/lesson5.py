"""Lesson 5: a training step. Fill in the functions, then: pytest docs/exercises -k lesson5"""

import torch

# Exercise 5.1


def padded(prompt: list[int], reply: list[int], length: int, pad_id: int) -> tuple[list[int], list[int]]:
    """(input ids, labels) of a row, both with `length` numbers: prompt, reply, then padding on the right.

    `reply` already ends with the end token. Labels are aligned with the input ids (the library shifts them);
    a position that must not be learned has -100. `pad_id` may be the id of the end token!

    padded([5, 6], [7, 2], 5, pad_id=0) -> ([5, 6, 7, 2, 0], [-100, -100, 7, 2, -100])
    """
    raise NotImplementedError("exercise 5.1")


# Exercise 5.2


def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of one row, without torch's cross_entropy or log_softmax.

    `logits` (tokens, vocabulary); `labels` (tokens,), -100 where masked, aligned with the input ids: the
    output at position t is a guess about the label at t + 1. Logits can be as large as 1000.

    For three tokens, two of them possible (a vocabulary of 2), all logits 0 and labels [-100, 1, -100] the
    only label that counts has probability 1/2: ln 2 = 0.693
    """
    raise NotImplementedError("exercise 5.2")


def loss_of_update(batches: list[tuple[float, int]]) -> float:
    """The loss of one update whose gradients were accumulated over `batches`.

    Each is (mean loss of its labels, how many labels count). The result is what one large batch of all
    these rows would give. loss_of_update([(1.0, 1), (2.0, 1)]) -> 1.5
    """
    raise NotImplementedError("exercise 5.2")


# Exercise 5.3


def trained_bytes(shapes: list[tuple[int, int]], rank: int) -> dict[str, int]:
    """Bytes that LoRA of this rank takes, beside the frozen weights, when AdamW trains it in fp32.

    `shapes`: (outputs, inputs) of each frozen matrix that gets an A and a B.
    -> {"adapters": …, "gradients": …, "optimizer": …}

    trained_bytes([(2, 3)], rank=1) -> {"adapters": 20, "gradients": 20, "optimizer": 40}
    """
    raise NotImplementedError("exercise 5.3")


def largest_batch(peak_of_1: float, peak_of_2: float, capacity: float) -> int:
    """How many rows fit into `capacity`, if one row has this peak and two have that one (all in GB).

    The peak is a straight line in the number of rows: what is there anyway, and the same again for each row.
    0 if not even one row fits. largest_batch(5.0, 6.0, capacity=10.0) -> 6
    """
    raise NotImplementedError("exercise 5.3")
