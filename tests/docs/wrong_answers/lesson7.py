"""Plausible wrong answers to lesson 7's exercises."""

from __future__ import annotations

import torch


def e1_merged__without_alpha_over_r(original, dequantized, a, b, alpha, dtype):
    return (dequantized.float() + b @ a).to(dtype)


def e1_merged__into_the_original(original, dequantized, a, b, alpha, dtype):
    return (original.float() + alpha / len(a) * b @ a).to(dtype)


def e1_merged__added_in_bf16(original, dequantized, a, b, alpha, dtype):
    return (dequantized + (alpha / len(a) * b @ a).to(dequantized.dtype)).to(dtype)


def e1_merged__alpha_alone(original, dequantized, a, b, alpha, dtype):
    return (dequantized.float() + alpha * b @ a).to(dtype)


def e1_left_of_update__against_the_unrounded_weight(weight, update, dtype):
    change = (weight + update).to(dtype).float() - weight
    return ((change * update).sum() / update.square().sum()).item()


def e1_left_of_update__mean_of_shares(weight, update, dtype):
    change = (weight + update).to(dtype).float() - weight.to(dtype).float()
    return (change / update).mean().item()


def e2_cat__scale_forgotten(parts):
    return torch.cat([a for a, *_ in parts]), torch.cat([w * b for _, b, _, w in parts], dim=1)


def e2_cat__factor_on_both_sides(parts):
    a = torch.cat([w * s * a for a, _, s, w in parts])
    return a, torch.cat([w * s * b for _, b, s, w in parts], dim=1)


def e2_cat__root_of_the_size(parts):
    a = torch.cat([abs(w * s) ** 0.5 * a for a, _, s, w in parts])
    return a, torch.cat([abs(w * s) ** 0.5 * b for _, b, s, w in parts], dim=1)


def e3_next_probabilities__not_added_up_to_one(logits, temperature, top_p):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    return torch.zeros_like(p).scatter(0, order, p.where(p.cumsum(-1) - p < top_p, 0))


def e3_next_probabilities__sorted(logits, temperature, top_p):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    p = (logits / temperature).softmax(-1).sort(descending=True).values
    p = p.where(p.cumsum(-1) - p < top_p, 0)
    return p / p.sum()


def e3_next_probabilities__top_p_first(logits, temperature, top_p):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    p, order = logits.softmax(-1).sort(descending=True)
    kept = torch.zeros_like(p).scatter(0, order, p.where(p.cumsum(-1) - p < top_p, 0))
    return (kept.log() / temperature).softmax(-1)


def e3_next_probabilities__only_while_below(logits, temperature, top_p):
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).float()
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    p = p.where(p.cumsum(-1) <= top_p, 0)  # drops the token that reaches top_p
    return torch.zeros_like(p).scatter(0, order, p / p.sum())
