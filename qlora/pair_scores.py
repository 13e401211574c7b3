"""Pairs of replies, scored: which of the two a model finds likelier. DPO: qlora/training/preferences.py."""

import torch

from qlora import processes
from qlora.batches import encode_rows
from qlora.cli import progress
from qlora.evaluation import log_p_of_labels
from qlora.measures import wilson


def margins(log_p: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """By how much more than the reference a model prefers the chosen reply, in nats.

    Both (2 * pairs,), chosen and rejected in turn: [-2, -5], [-3, -4] -> [(-2 + 3) - (-5 + 4)] = [2]
    """
    moved = (log_p - reference).view(-1, 2)
    return moved[:, 0] - moved[:, 1]


def log_p_of(base, model, halves: list[dict], title: str) -> list[float]:
    """log P of each half's reply; several processes share them out, and all of them get all."""
    with progress(len(processes.my_share(halves)), title) as step:
        return processes.shared_out(
            halves, lambda mine: log_p_of_labels(model, mine, base.hardware.autocast, step)
        )


def won(margin: torch.Tensor) -> dict:
    """Share of margins above zero with its 95% interval, and their mean."""
    correct, rows = int((margin > 0).sum()), len(margin)
    low, high = wilson(correct, rows)
    found = {"accuracy": correct / rows, "low": low, "high": high, "correct": correct, "rows": rows}
    return {**found, "mean_margin": margin.mean().item()}


def score_pairs(base, model, prompt, rows: list, title: str) -> dict:
    """won() of log P(chosen) - log P(rejected), for rows that were not encoded yet."""
    log_p = torch.tensor(log_p_of(base, model, encode_rows(base.tokenizer, prompt, rows, "held-out"), title))
    return won(margins(log_p, torch.zeros_like(log_p)))
