"""Plausible wrong answers to lesson 4; tests/docs/test_exercises.py says how they are named."""

from __future__ import annotations

import torch


def attend(queries, keys, values, root=0.5, causal=True, over=-1, blocked=float("-inf"), share=True):
    """A right attention, whose parts the wrong ones replace."""
    heads, tokens, d = queries.shape
    times = heads // keys.shape[0]
    keys, values = (t.repeat_interleave(times, 0) if share else t.repeat(times, 1, 1) for t in (keys, values))
    scores = queries @ keys.transpose(1, 2) / d**root
    if causal:
        scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), blocked)
    return torch.softmax(scores, dim=over) @ values


def e1_attention__sees_the_future(queries, keys, values):
    return attend(queries, keys, values, causal=False)


def e1_attention__later_scores_are_zero(queries, keys, values):
    return attend(queries, keys, values, blocked=0.0)


def e1_attention__scores_not_divided(queries, keys, values):
    return attend(queries, keys, values, root=0.0)


def e1_attention__divided_by_d(queries, keys, values):
    return attend(queries, keys, values, root=1.0)


def e1_attention__heads_take_turns(queries, keys, values):
    return attend(queries, keys, values, share=False)


def e1_attention__softmax_over_the_askers(queries, keys, values):
    return attend(queries, keys, values, over=-2)


def e2_rms_norm__subtracts_the_mean(x, weight, eps):
    return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, None, eps)


def e2_rms_norm__sum_instead_of_mean(x, weight, eps):
    return weight * x / torch.sqrt(x.pow(2).sum(-1, keepdim=True) + eps)


def e2_rms_norm__eps_after_the_root(x, weight, eps):
    return weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + eps)


def e2_rms_norm__one_root_for_all_tokens(x, weight, eps):
    return weight * x / torch.sqrt(x.pow(2).mean() + eps)


def e2_mlp__silu_over_the_product(x, gate, up, down):
    return torch.nn.functional.silu((x @ gate.T) * (x @ up.T)) @ down.T


def e2_mlp__silu_over_up(x, gate, up, down):
    return ((x @ gate.T) * torch.nn.functional.silu(x @ up.T)) @ down.T


def e2_mlp__sigmoid(x, gate, up, down):
    return (torch.sigmoid(x @ gate.T) * (x @ up.T)) @ down.T


def count(config, keys, tables):
    hidden, layers = config.hidden_size, config.num_hidden_layers
    queries = config.num_attention_heads * config.head_dim
    each = 2 * hidden * (queries + keys) + 3 * hidden * config.intermediate_size
    return layers * each, tables * config.vocab_size * hidden + (2 * layers + 1) * hidden


def e3_weights_by_kind__keys_as_wide_as_queries(config):
    return count(config, config.num_attention_heads * config.head_dim, 2 - config.tie_word_embeddings)


def e3_weights_by_kind__tied_head_counted_twice(config):
    return count(config, config.num_key_value_heads * config.head_dim, 2)


def e3_weights_by_kind__untied_head_forgotten(config):
    return count(config, config.num_key_value_heads * config.head_dim, 1)


def e3_gigabytes__all_in_few_bits(config, bits):
    keys = config.num_key_value_heads * config.head_dim
    return sum(count(config, keys, 2 - config.tie_word_embeddings)) * bits / 8 / 1e9
