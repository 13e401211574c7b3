"""Exercises of lesson 2: write the bodies, then `pytest docs/exercises -k lesson2`."""


def losses(scores, ids):
    """The loss of each token of a text but the first, in nats.

    `scores`: tensor (tokens, list of tokens), what the model says after each token of the text: the larger a
    number, the likelier that token comes next. `scores.log_softmax(-1)` turns them into ln p. `ids`: tensor
    (tokens,), the text. Returns a tensor (tokens - 1,).
    With scores that are all alike and a list of 4 tokens every loss is ln 4.
    """
    raise NotImplementedError("exercise 2.1")


def perplexity(texts) -> float:
    """The perplexity of several texts together; `texts` has the losses of each: [tensor (n,), tensor (m,), …]

    Every token counts the same, in a short text as in a long one.
    """
    raise NotImplementedError("exercise 2.1")


def int8_dynamic(x):
    """Activations x (tokens, columns) rounded to int8 with a scale for each token, and read back.

    The largest number of a token without its sign is the code 127 or -127. A token of zeros stays zeros.
    """
    raise NotImplementedError("exercise 2.2")


def int8_static(x, limit: float):
    """The same with one scale for all: `limit`, the largest number that was seen on example texts, is 127.

    What is larger than the limit becomes the limit, with its sign. Codes are whole numbers from -127 to 127.
    """
    raise NotImplementedError("exercise 2.2")


def straight_through(weight, grid):
    """grid(weight), but training sees no rounding.

    `weight`: tensor that is trained (requires_grad); `grid`: a function that rounds a tensor. What is
    returned has the numbers of grid(weight) to within 1e-6; after
    `straight_through(weight, grid).sum().backward()` weight.grad is 1 everywhere. Two tools: t.detach() has
    the same numbers, but training sees nothing of them; sums and differences let training through.
    """
    raise NotImplementedError("exercise 2.3")
