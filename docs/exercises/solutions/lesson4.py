"""Solutions of lesson 4."""

from __future__ import annotations

import torch


def attention(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    heads, tokens, d = queries.shape
    # Neighbouring heads share: 0 0 1 1, not 0 1 0 1.
    keys, values = (t.repeat_interleave(heads // t.shape[0], dim=0) for t in (keys, values))
    # A dot product of d numbers is about sqrt(d) large. Undivided, softmax would choose one token only.
    scores = queries @ keys.transpose(1, 2) / d**0.5  # (heads, tokens that ask, tokens that are looked at)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, float("-inf"))  # e^-inf = 0; a score of 0 would still get a share
    return torch.softmax(scores, dim=-1) @ values  # each asking token's shares add up to 1


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # No mean is subtracted: that is what LayerNorm does.
    return weight * x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    wide = x @ gate.T
    opened = wide * torch.sigmoid(wide)  # SiLU: how far each of the wide numbers is let through
    return (opened * (x @ up.T)) @ down.T


def weights_by_kind(config) -> tuple[int, int]:
    hidden, layers = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention_matrices = 2 * hidden * queries + 2 * hidden * keys  # q and o, k and v
    mlp_matrices = 3 * hidden * config.intermediate_size
    tables = 1 if config.tie_word_embeddings else 2  # a tied head is the embedding table itself
    rest = tables * config.vocab_size * hidden + (2 * layers + 1) * hidden
    return layers * (attention_matrices + mlp_matrices), rest


def gigabytes(config, bits: float) -> float:
    quantized, rest = weights_by_kind(config)
    return (quantized * bits + rest * 16) / 8 / 1e9
