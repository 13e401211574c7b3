"""What the model can do: label scores, accuracy with its interval, baselines, perplexity, flips."""

from __future__ import annotations

import copy
import math
import statistics
from typing import Callable, Sequence

import numpy as np
import torch

from config import PAD_MULTIPLE
from qlora.data import Row, collate
from qlora.logits import causal_lm, hidden_states
from qlora.prompts import IGNORE

# Real tokens per evaluation batch: enough to fill a CPU's or a GPU's matrix units, little enough for any memory.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# A shorter common beginning is cheaper to compute again than to attend to through a cache.
SHORTEST_CACHED_PREFIX = 32


def wilson(correct: int, rows: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): wilson(90, 100) -> (0.826, 0.945)"""
    if rows == 0:
        return 0.0, 1.0
    p, spread = correct / rows, z * z / rows
    centre = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / rows + spread / (4 * rows)) / (1 + spread)
    return centre - half, centre + half


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with, at most all but the last of each: [1,2,3],[1,2,4] -> 2"""
    first, last = min(sequences), max(sequences)
    limit = min(len(s) for s in sequences) - 1
    same = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), limit)
    return min(same, limit)


@torch.no_grad()
def score_labels(model, prompts: list[list[int]], answers: list[list[int]], autocast: Callable, progress: Callable = lambda n: None) -> np.ndarray:
    """log P(answer | prompt) for each prompt and answer -> (prompts, answers).

    Where the answers differ in their first token (positive/negative), one forward pass over the prompt settles
    all of them; otherwise each answer is scored to its end. What all prompts begin with (system message, few-shot
    examples) goes through the model once, and its key-value cache serves every batch.
    """
    if len({a[0] for a in answers}) == len(answers):
        firsts = torch.tensor([a[0] for a in answers])
        return _score(model, prompts, [[] for _ in prompts], autocast, progress, firsts)
    columns = [_score(model, prompts, [a] * len(prompts), autocast, progress, None) for a in answers]
    return np.stack(columns, axis=1)


def _score(model, prompts, continuations, autocast, progress, firsts) -> np.ndarray:
    device = next(model.parameters()).device
    head = causal_lm(model).get_output_embeddings()
    model.eval()
    rows = [p + c for p, c in zip(prompts, continuations)]
    prefix = min(shared_prefix(rows), min(map(len, prompts)) - 1) if len(rows) > 1 else 0
    prefix = prefix if prefix >= SHORTEST_CACHED_PREFIX else 0
    result: list = [None] * len(rows)
    with autocast():
        cache = None
        if prefix:
            cache = hidden_states(model, torch.tensor([rows[0][:prefix]], device=device), use_cache=True).past_key_values
        for batch in _by_length(rows, prefix, device.type):
            ids = collate([{"input_ids": rows[i][prefix:], "labels": []} for i in batch], 0, PAD_MULTIPLE)["input_ids"].to(device)
            past = copy.deepcopy(cache)
            if past is not None:
                past.batch_repeat_interleave(len(batch))
            hidden = hidden_states(model, ids, past_key_values=past, use_cache=past is not None).last_hidden_state
            for place, i in enumerate(batch):
                start = len(prompts[i]) - 1 - prefix
                logits = head(hidden[place, start : start + max(1, len(continuations[i]))]).float().log_softmax(-1)
                if firsts is not None:
                    result[i] = logits[0, firsts.to(device)].cpu().numpy()
                else:
                    targets = torch.tensor(continuations[i], device=device)
                    result[i] = logits.gather(1, targets[:, None]).sum().item()
            progress(len(batch))
    return np.array(result)


def _by_length(rows: list, prefix: int, device: str):
    """Batches of row numbers, longest rows first, of about BATCH_TOKENS tokens each."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        longest = len(rows[batch[0]]) - prefix if batch else 0
        # A cached prefix is repeated for each row: its keys and values count as well.
        if batch and (len(batch) + 1) * (longest + prefix // 2) > BATCH_TOKENS[device]:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def accuracy_report(predicted: Sequence[int], truth: Sequence[int], answers: Sequence[str]) -> dict:
    """accuracy, its 95% Wilson interval and the confusion counts {truth: {prediction: rows}}."""
    correct = sum(p == t for p, t in zip(predicted, truth))
    low, high = wilson(correct, len(truth))
    confusion = {name: {other: 0 for other in answers} for name in answers}
    for p, t in zip(predicted, truth):
        confusion[answers[t]][answers[p]] += 1
    return {"accuracy": correct / len(truth), "low": low, "high": high, "correct": correct, "rows": len(truth), "confusion": confusion}


def bag_of_words(train: list[Row], held_out: list[Row]) -> list[int]:
    """Predictions of TF-IDF (words and pairs) + logistic regression on the same rows: what words alone can tell.

    It reads the whole review, while the language model reads what fits into max_length.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000))
    try:
        model.fit([row.text for row in train], [row.label for row in train])
    except ValueError as error:
        if "empty vocabulary" not in str(error):  # not one word of two letters: nothing to count but the labels
            raise
        return [statistics.mode(row.label for row in train)] * len(held_out)
    return model.predict([row.text for row in held_out]).tolist()


@torch.no_grad()
def perplexity(model, examples: list[dict], autocast: Callable, progress: Callable = lambda n: None) -> dict:
    """exp(mean cross-entropy per labelled token) over examples with input_ids and labels."""
    device = next(model.parameters()).device
    model.eval()
    total, tokens = 0.0, 0
    with autocast():
        for batch in _by_length([e["input_ids"] for e in examples], 0, device.type):
            inputs = collate([examples[i] for i in batch], 0)
            labels = inputs["labels"].to(device)
            # Divided by 1: the sum over labelled positions, made in chunks (logits.loss_at_labels).
            total += model(input_ids=inputs["input_ids"].to(device), labels=labels, num_items_in_batch=1).loss.item()
            tokens += int((labels[:, 1:] != IGNORE).sum())
            progress(len(batch))
    return {"perplexity": math.exp(total / tokens), "loss": total / tokens, "tokens": tokens, "rows": len(examples)}


def flips(before: np.ndarray, after: np.ndarray, truth: Sequence[int]) -> dict:
    """Rows that training put right and rows that it broke, each list with the largest change of mind first."""
    truth = np.asarray(truth)
    was, now = before.argmax(1) == truth, after.argmax(1) == truth
    swing = np.abs(_margin(after, truth) - _margin(before, truth))
    order = np.argsort(-swing)
    return {"fixed": [int(i) for i in order if now[i] and not was[i]], "broken": [int(i) for i in order if was[i] and not now[i]]}


def _margin(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """By how much (nats) the true answer leads the best other one."""
    rows = np.arange(len(truth))
    others = scores.copy()
    others[rows, truth] = -np.inf
    return scores[rows, truth] - others.max(1)
