"""What the model can do: label scores, accuracy with its interval, perplexity."""

import copy
import math
import os
from collections.abc import Sequence

import numpy as np
import torch

from config import PAD_MULTIPLE
from qlora import processes
from qlora import prompts as p
from qlora.batches import collate
from qlora.cli import progress
from qlora.cpu.attach import usable
from qlora.logits import (
    IGNORE,
    causal_lm,
    hidden_states,
    labelled_states,
    log_p_of_rows,
    logits_from,
    states_at,
)
from qlora.measures import wilson

# Tokens per evaluation batch: enough to fill a CPU's or a GPU's matrix units, little enough for any memory.
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
Ids = list[list[int]]
# A shorter common beginning is cheaper to compute again than to attend to through a cache.
SHORTEST_CACHED_PREFIX = 32
# The decoder for CPUs attends from all tokens of each row: a cache is cheaper for many examples.
LONGEST_UNCACHED_PREFIX = 1024


def shared_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with, at most all but the last of each: [1,2,3],[1,2,4] -> 2"""
    return min(len(os.path.commonprefix(sequences)), min(map(len, sequences)) - 1)


@torch.no_grad()
def score_labels(model, prompts: Ids, answers: Ids, autocast, progress=lambda n: None) -> np.ndarray:
    """log P(answer | prompt) for each prompt and answer -> (prompts, answers).

    Where the answers differ in their first token (positive/negative), one forward pass over the prompt
    settles all of them; otherwise each answer is scored to its end. What all prompts begin with (system
    message, few-shot examples) goes through the model once, and its key-value cache serves every batch.
    """
    firsts = [a[0] for a in answers]
    if len(set(firsts)) == len(answers):
        return _log_p(model, prompts, [], firsts, autocast, progress)
    return np.stack([_log_p(model, prompts, a, a, autocast, progress).sum(1) for a in answers], axis=1)


def score_answers(base, model, prompt: p.PromptFormat, prompts: Ids, title: str) -> np.ndarray:
    """score_labels() for the answers of `prompt`, with a progress bar; `model`: the base's own or PEFT's.

    Several processes share the prompts out, and all of them get all scores.
    """
    answers = [p.answer_ids(base.tokenizer, prompt, label) for label in range(len(prompt.answers))]
    with progress(len(processes.my_share(prompts)), title) as step:
        return np.array(
            processes.shared_out(
                prompts, lambda mine: list(score_labels(model, mine, answers, base.hardware.autocast, step))
            )
        )


def _log_p(model, prompts: Ids, answer: list[int], wanted: list[int], autocast, progress) -> np.ndarray:
    """log P of the tokens `wanted` after each prompt -> (prompts, wanted).

    Each at its own position of `answer`; without an answer all of them as the prompt's next token.
    """
    device = next(model.parameters()).device
    lm = causal_lm(model)
    model.eval()
    rows = [prompt + answer for prompt in prompts]
    prefix = min(shared_prefix(rows), min(map(len, prompts)) - 1) if len(rows) > 1 else 0
    prefix = prefix if prefix >= SHORTEST_CACHED_PREFIX else 0
    result: list = [None] * len(rows)
    count = max(1, len(answer))  # positions of a row whose next token is asked for
    with autocast():
        cache, cut = None, prefix
        if usable(lm) and prefix <= LONGEST_UNCACHED_PREFIX:  # it computes the prefix once a batch by itself
            cut = 0
        elif prefix:
            ids = torch.tensor([rows[0][:prefix]], device=device)
            cache = hidden_states(model, ids, use_cache=True).past_key_values
        for batch in _by_length(rows, prefix, device.type):
            padded = collate([{"input_ids": rows[i][cut:], "labels": []} for i in batch], 0, PAD_MULTIPLE)
            ids = padded["input_ids"].to(device)
            asked = torch.zeros_like(ids, dtype=torch.bool)
            for place, i in enumerate(batch):
                start = len(prompts[i]) - 1 - cut
                asked[place, start : start + count] = True
            past = copy.deepcopy(cache)
            if past is not None:
                past.batch_repeat_interleave(len(batch))
                out = hidden_states(model, ids, past_key_values=past, use_cache=True)
                states = out.last_hidden_state[asked]
            else:
                states = states_at(model, ids, asked)
            logs = logits_from(lm, states).log_softmax(-1).view(len(batch), count, -1)
            for i, of_row in zip(batch, logs.cpu()):
                result[i] = of_row[list(range(len(answer))) or 0, wanted].numpy()
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
    correct = sum(said == true for said, true in zip(predicted, truth))
    low, high = wilson(correct, len(truth))
    confusion = {name: dict.fromkeys(answers, 0) for name in answers}
    for said, true in zip(predicted, truth):
        confusion[answers[true]][answers[said]] += 1
    result = {"accuracy": correct / len(truth), "low": low, "high": high}
    return result | {"correct": correct, "rows": len(truth), "confusion": confusion}


@torch.no_grad()
def log_p_of_labels(model, examples: list[dict], autocast, progress=lambda n: None) -> list[float]:
    """log P of all labelled tokens of each example together."""
    device, lm = next(model.parameters()).device, causal_lm(model)
    model.eval()
    result = [0.0] * len(examples)
    with autocast():
        for batch in _by_length([e["input_ids"] for e in examples], 0, device.type):
            inputs = collate([examples[i] for i in batch], 0, PAD_MULTIPLE)
            sums = log_p_of_rows(lm, inputs["input_ids"].to(device), inputs["labels"].to(device))
            for i, value in zip(batch, sums.tolist()):
                result[i] = value
            progress(len(batch))
    return result


@torch.no_grad()
def perplexity(model, examples: list[dict], autocast, progress=lambda n: None) -> dict:
    """exp(mean cross-entropy per labelled token) over examples with input_ids and labels."""
    device = next(model.parameters()).device
    model.eval()
    total, tokens = 0.0, 0
    mine = processes.my_share(examples)
    with autocast():
        for batch in _by_length([e["input_ids"] for e in mine], 0, device.type):
            inputs = collate([mine[i] for i in batch], 0)
            ids, labels = inputs["input_ids"].to(device), inputs["labels"].to(device)
            # Divided by 1: the sum over labelled positions, made in chunks (logits.loss_at_labels).
            total += model(input_ids=ids, labels=labels, num_items_in_batch=1).loss.item()
            tokens += int((labels[:, 1:] != IGNORE).sum())
            progress(len(batch))
    if not processes.is_sharded():
        total, tokens = processes.added_up([total, tokens], device)
    mean = total / tokens
    return {"perplexity": math.exp(mean), "loss": mean, "tokens": int(tokens), "rows": len(examples)}


@torch.no_grad()
def loss_and_labels(model, examples: list[dict], answers: Ids, autocast) -> tuple[float, list[int] | None]:
    """(mean cross-entropy per labelled token, number of each example's likeliest answer), by one pass.

    Each example's labels are one of the `answers`. None for the second where these begin alike. All of
    several processes get the whole result.
    """
    firsts, lm, device = [a[0] for a in answers], causal_lm(model), next(model.parameters()).device
    model.eval()

    def score(mine: list[dict]) -> list[tuple[float, int, int]]:
        """[(summed loss, labelled tokens, likeliest answer)]"""
        found: list = [None] * len(mine)
        for batch in _by_length([e["input_ids"] for e in mine], 0, device.type):
            inputs = collate([mine[i] for i in batch], 0, PAD_MULTIPLE)
            ids, labels = inputs["input_ids"].to(device), inputs["labels"].to(device)
            states, targets = labelled_states(lm, ids, labels)
            logs = logits_from(lm, states).log_softmax(-1).cpu()
            lost = -logs.gather(1, targets.cpu()[:, None]).squeeze(1)
            counts = (labels[:, 1:] != IGNORE).sum(1).tolist()
            for i, of_row, loss in zip(batch, logs.split(counts), lost.split(counts)):
                found[i] = loss.sum().item(), len(loss), int(of_row[0, firsts].argmax())
        return found

    with autocast():
        rows = processes.shared_out(examples, score)
    mean = sum(loss for loss, _, _ in rows) / sum(tokens for _, tokens, _ in rows)
    differ = len(set(firsts)) == len(answers)
    return mean, [label for _, _, label in rows] if differ else None
