"""What base and adapter hold for likely: of the labels, and of all tokens as the next one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qlora import evaluation, prompts
from qlora.generation import Sampling, entropy_bits, next_distribution
from qlora.logits import causal_lm
from qlora.playground.answers import Asked
from qlora.playground.models import Models

SHOWN = 10  # tokens


@dataclass
class Chances:
    """Rows: what can come next. Columns: the base and, where there is one, the adapter."""

    names: list[str]
    shares: list[list[float]]  # (names, columns)
    held: list[float]  # of each column: all of these together, of the whole distribution
    entropy_bits: list[float]  # of each column
    left: list[int]  # of each column: tokens that may still be drawn


def of_labels(models: Models, asked: Asked, logits: Tensor) -> Chances | None:
    """Of the adapter's labels, as `--answers` of qlora_inference.py writes them; None where it has none.

    `logits` (rows, vocabulary) stand after the prompt: they are enough where labels begin differently, unless
    a sum in 16 bits made them, which can hide what a young adapter changes. Else labels are scored anew.
    """
    if asked.prompt is None or not asked.prompt.asks:
        return None
    count = range(len(asked.prompt.answers))
    answers = [prompts.answer_ids(models.base.tokenizer, asked.prompt, label) for label in count]
    firsts = [answer[0] for answer in answers]
    if len(set(firsts)) == len(firsts) and causal_lm(models.model).dtype == torch.float32:
        logs = logits.double().log_softmax(-1)[:, firsts]
    else:
        logs = torch.tensor(score_both(models, asked, answers)).double()
    shares = logs.softmax(-1)
    bits, left = [entropy_bits(row) for row in shares], [len(firsts)] * len(shares)
    held = logs.exp().sum(-1).tolist()
    return Chances(list(asked.prompt.answers), shares.t().tolist(), held, bits, left)


def score_both(models: Models, asked: Asked, answers: list[list[int]]) -> list:
    """log P of each answer, by the base and by the adapter."""
    model, autocast = models.model, models.base.hardware.autocast
    with models.lock:
        model.set_adapter(asked.adapter.peft_name)
        with model.disable_adapter():
            base = evaluation.score_labels(model, [asked.ids], answers, autocast)[0]
        return [base.tolist(), evaluation.score_labels(model, [asked.ids], answers, autocast)[0].tolist()]


def of_tokens(tokenizer, logits: Tensor, sampling: Sampling, shown: int = SHOWN) -> Chances:
    """Of the next token after temperature, top-k and top-p; by `logits` (rows, vocabulary) that were kept.

    The tokens are those that are likeliest before anything is cut, of each row as many, the last row's order:
    they stay in place while the settings move.
    """
    best = [row.topk(min(shown, len(row))).indices.tolist() for row in logits]
    names = list(dict.fromkeys(token for tokens in zip(*best) for token in tokens))[:shown]
    names.sort(key=lambda token: -logits[-1, token].item())
    rows = [next_distribution(row, sampling.temperature, sampling.top_k, sampling.top_p) for row in logits]
    shares = [[row[token].item() for row in rows] for token in names]
    return Chances(
        [readable(tokenizer, token) for token in names],
        shares,
        [sum(column) for column in zip(*shares)],
        [entropy_bits(row) for row in rows],
        [int((row > 0).sum()) for row in rows],
    )


def readable(tokenizer, token: int) -> str:
    """A token's text with its blanks to be seen: ' good' -> '␣good', '\\n' -> '↵'"""
    text = tokenizer.decode([token], skip_special_tokens=False)
    text = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")
    return text or f"#{token}"
