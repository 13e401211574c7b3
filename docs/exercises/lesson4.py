"""Exercises of lesson 4: what a model is made of. Fill in the bodies.

pytest docs/exercises -k lesson4
"""

from __future__ import annotations

import torch


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """4.1: what each token takes from itself and from the tokens before it.

    queries: (heads, tokens, d); keys and values: (kv_heads, tokens, d); heads is a multiple of kv_heads.
    Grouped: with 4 heads and 2 key-value heads, heads 0 and 1 use keys and values 0, heads 2 and 3 use 1.
    Returns (heads, tokens, d). Position i must not see positions after i. Do it with matrix products and
    torch.softmax, not with torch's own attention.

    Example, one head, two tokens, d = 1: queries [[[0], [1]]], keys [[[1], [1]]], values [[[2], [4]]]
    -> [[[2], [3]]]: token 0 sees only itself; token 1 has equal scores, so half of each value.
    """
    raise NotImplementedError("exercise 4.1")


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """4.2: x of shape (tokens, hidden), divided by the root of the mean of its squares, times `weight`.

    Each token has a root of its own. `eps` is added to the mean of the squares before the root is taken.

    Example: x [[3, -4]], weight [1, 2], eps 0: the mean square is 12.5, its root 3.5355
    -> [[0.8485, -2.2627]]
    """
    raise NotImplementedError("exercise 4.2")


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """4.2: the three matrices of a decoder layer's MLP and SiLU, for x of shape (tokens, hidden).

    gate and up: (wide, hidden); down: (hidden, wide). Returns (tokens, hidden). SiLU(z) = z / (1 + e^-z) goes
    over one of the two wide results only: over the gate's.
    """
    raise NotImplementedError("exercise 4.2")


def weights_by_kind(config) -> tuple[int, int]:
    """4.3: how many numbers a Llama has (in the matrices that 4 bits shrink, in all the rest).

    `config` has vocab_size, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads,
    head_dim, num_hidden_layers and tie_word_embeddings. The rest: embeddings; the language-model head, unless
    it is tied to them; two norms in each decoder layer, and one at the end.

    Example: Llama 3.2 3B -> (2818572288, 394177536)
    """
    raise NotImplementedError("exercise 4.3")


def gigabytes(config, bits: float) -> float:
    """4.3: 10^9 bytes that the weights take with `bits` for those that are quantized, constants included.

    The others stay in 16 bits.

    Example: Llama 3.2 3B at 4.127 bits (NF4 with double quantization) -> 2.24, not 3.2 x 4.127 / 8 = 1.66
    """
    raise NotImplementedError("exercise 4.3")
