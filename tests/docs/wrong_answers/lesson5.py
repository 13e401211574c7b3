"""Plausible mistakes in lesson 5's exercises; its tests have to notice each."""

import torch
import torch.nn.functional as F


def e1_padded__masked_by_pad_id(prompt, reply, length, pad_id):
    ids = (prompt + reply + [pad_id] * length)[:length]
    labels = [-100] * len(prompt) + ids[len(prompt) :]
    return ids, [-100 if token == pad_id else label for token, label in zip(ids, labels)]


def e1_padded__everything_learned(prompt, reply, length, pad_id):
    ids = (prompt + reply + [pad_id] * length)[:length]
    return ids, list(ids)


def e1_padded__shifted_by_hand(prompt, reply, length, pad_id):
    ids = (prompt + reply + [pad_id] * length)[:length]
    labels = [-100] * (len(prompt) - 1) + reply
    return ids, labels + [-100] * (length - len(labels))


def e2_loss__not_shifted(logits, labels):
    return F.cross_entropy(logits, labels, ignore_index=-100)


def e2_loss__masked_ones_counted(logits, labels):
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / (len(labels) - 1)


def e2_loss__in_bits(logits, labels):
    return F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100) / torch.tensor(2.0).log()


def e2_loss__overflows(logits, labels):
    counts = labels[1:] != -100
    p = logits[:-1].exp() / logits[:-1].exp().sum(1, keepdim=True)
    return -p[counts, labels[1:][counts]].log().mean()


def e2_loss_of_update__mean_of_means(batches):
    return sum(mean for mean, _ in batches) / len(batches)


def e3_trained_bytes__one_number_in_the_optimizer(shapes, rank):
    weights = sum(rank * (outputs + inputs) for outputs, inputs in shapes)
    return {"adapters": 4 * weights, "gradients": 4 * weights, "optimizer": 4 * weights}


def e3_trained_bytes__the_whole_matrix(shapes, rank):
    weights = sum(outputs * inputs for outputs, inputs in shapes)
    return {"adapters": 4 * weights, "gradients": 4 * weights, "optimizer": 8 * weights}


def e3_largest_batch__weights_for_each_row(peak_of_1, peak_of_2, capacity):
    return int(capacity // peak_of_1)


def e3_largest_batch__one_more(peak_of_1, peak_of_2, capacity):
    return max(0, round((capacity - peak_of_1) / (peak_of_2 - peak_of_1)) + 1)
