"""Plausible wrong answers to lesson 8's exercises."""

from __future__ import annotations

import math
import re

import numpy as np
import torch


def e1_swapped__one_after_the_other(text, pairs):
    for one, other in pairs.items():
        text = re.sub(rf"\b{one}\b", other, text)
        text = re.sub(rf"\b{other}\b", one, text)
    return text


def e1_swapped__inside_of_words(text, pairs):
    both = {**pairs, **{value: key for key, value in pairs.items()}}
    found = re.compile("|".join(sorted(both, key=len, reverse=True)), re.I)
    return found.sub(lambda m: both[m[0].lower()].capitalize() if m[0][0].isupper() else both[m[0]], text)


def e1_paired_shift__two_samples(against, other):
    a, b = np.array(against), np.array(other)
    half = 1.96 * math.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    mean = float(b.mean() - a.mean())
    return mean, mean - half, mean + half


def e1_paired_shift__normal_quantile(against, other):
    d = np.subtract(other, against)
    half = 1.96 * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def e1_paired_shift__wrong_direction(against, other):
    from scipy.stats import t

    d = np.subtract(against, other)
    half = t.ppf(0.975, len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    return float(d.mean()), float(d.mean() - half), float(d.mean() + half)


def _logs(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)


def e2_log_p_of_ending__off_by_one(model, beginning, ending):
    logs = _logs(model, beginning + ending)
    return sum(logs[len(beginning) + i, token].item() for i, token in enumerate(ending))


def e2_log_p_of_ending__mean(model, beginning, ending):
    logs = _logs(model, beginning + ending)
    return sum(logs[len(beginning) - 1 + i, token].item() for i, token in enumerate(ending)) / len(ending)


def e2_log_p_of_ending__beginning_too(model, beginning, ending):
    ids = beginning + ending
    logs = _logs(model, ids)
    return sum(logs[i, token].item() for i, token in enumerate(ids[1:]))


def e2_exposure__rank_from_the_other_end(log_p, others):
    rank = 1 + sum(other < log_p for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)


def e2_exposure__secret_is_no_candidate(log_p, others):
    return math.log2(len(others)) - math.log2(1 + sum(other > log_p for other in others))


def e3_joules__runs_backwards(before, after, largest):
    return (after - before) / 1e6


def e3_joules__in_microjoules(before, after, largest):
    return after - before if after >= before else after + largest - before


def e3_kilowatt_hours__hours_forgotten(seconds, watts):
    return seconds * watts / 1000
