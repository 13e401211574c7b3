"""Wrong answers to the exercises of lesson 2: e1_losses__… is losses with a mistake."""

import math

import torch


def e1_losses__of_the_same_place(scores, ids):
    log_p = scores[:-1].log_softmax(-1)
    return -log_p[torch.arange(len(ids) - 1), ids[:-1]]


def e1_losses__shifted_the_wrong_way(scores, ids):
    log_p = scores[1:].log_softmax(-1)
    return -log_p[torch.arange(len(ids) - 1), ids[:-1]]


def e1_perplexity__mean_of_the_texts(texts):
    return sum(math.exp(text.mean().item()) for text in texts) / len(texts)


def e1_perplexity__every_text_counts_the_same(texts):
    return math.exp(sum(text.mean().item() for text in texts) / len(texts))


def e2_int8_dynamic__one_scale_for_all(x):
    scale = x.abs().max().clamp(min=1e-30)
    return (x / scale * 127).round() / 127 * scale


def e2_int8_dynamic__a_scale_for_each_column(x):
    scale = x.abs().amax(0, keepdim=True).clamp(min=1e-30)
    return (x / scale * 127).round() / 127 * scale


def e2_int8_dynamic__largest_with_its_sign(x):
    scale = x.amax(1, keepdim=True).clamp(min=1e-30)
    return (x / scale * 127).round().clamp(-127, 127) / 127 * scale


def e2_int8_static__not_cut(x, limit):
    return (x / limit * 127).round() / 127 * limit


def e2_int8_static__codes_wrap_around(x, limit):
    return (x / limit * 127).round().to(torch.int32).to(torch.int8) / 127 * limit


def e2_int8_static__measured_on_itself(x, limit):
    limit = x.abs().max()
    return (x / limit * 127).round() / 127 * limit


def e3_straight_through__rounded_alone(weight, grid):
    return grid(weight)


def e3_straight_through__nothing_detached(weight, grid):
    return weight + (grid(weight) - weight)


def e3_straight_through__the_rounding_is_lost(weight, grid):
    return weight + (weight - grid(weight)).detach() * 0


def e3_straight_through__other_sign(weight, grid):
    return weight + (weight - grid(weight)).detach()
