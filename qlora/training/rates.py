"""--find-lr: the same few rows trained at five rates from the same start. It shows; the reader chooses."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from config import FIND_LR_ROWS
from qlora.cli import note
from qlora.measures import percent, with_interval
from qlora.splitting import evenly
from qlora.tables import table
from qlora.training.before_after import BeforeAfter
from qlora.training.guards import GuardError, Guards
from qlora.training.run_folder import Run
from qlora.training.trainer import QLoRATrainer

STEPS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # powers of ten from the rate that was asked for
HEADERS = {True: ("accuracy", "95% interval"), False: ("perplexity",)}  # whether rows have labels


def rates_around(middle: float) -> list[float]:
    """5e-4 -> [5e-05, 0.00016, 0.0005, 0.0016, 0.005]; those of 1 and more are left out"""
    return [rate for step in STEPS if (rate := float(f"{middle * 10**step:.2g}")) < 1]


def show_rates(s, model, comparison: BeforeAfter, examples: list[dict], arguments_of: Callable) -> None:
    """Train and score at each rate; a line on stderr as each ends, a table on stdout at the end.

    `arguments_of`: settings -> TrainingArguments. The base stays; the adapter gets its first values back
    before each rate, and rows come in the same order.
    """
    begun = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    held_out = evenly(comparison.held_out, FIND_LR_ROWS)
    comparison, tried = BeforeAfter(comparison.base, comparison.prompt, held_out), []
    with tempfile.TemporaryDirectory() as aside:
        for rate in rates_around(s.learning_rate):
            put_back(model, begun)
            at_rate = dataclasses.replace(s, learning_rate=rate, output_dir=Path(aside))
            tried.append(try_rate(at_rate, model, comparison, examples, arguments_of(at_rate)))
            note(f"rate       {in_words(tried[-1])}")
    put_back(model, begun)
    print(f"{len(examples)} training rows from the same start at each rate, {len(held_out)} held-out rows")
    print(table(*cells(tried, comparison.prompt.asks)), flush=True)
    note("next       choose one: python qlora_finetune.py --learning-rate RATE")


def put_back(model, begun: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in begun:
                parameter.copy_(begun[name])
                parameter.grad = None


def try_rate(s, model, comparison: BeforeAfter, examples: list[dict], arguments) -> dict:
    """{rate, first, last (loss), failed, score, seconds}; a loss that is not finite ends this rate alone."""
    arguments.set_save("no")
    arguments.set_evaluate("no")
    arguments.report_to = []
    started, guards, failed = time.perf_counter(), Guards(), None
    trainer = QLoRATrainer(model, arguments, examples, comparison.base, Run(s), guards)
    try:
        trainer.train()
    except GuardError:
        if not guards.of("finite"):
            raise
        failed = guards.of("finite")[0]["detail"]
    finally:
        trainer.watch.close()
    losses = [step["loss"] for step in trainer.history]
    few = max(1, min(10, len(losses) // 2))
    first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
    score = None if failed else comparison.score_now(model, f"rate {s.learning_rate:g}")
    found = {"rate": s.learning_rate, "first": first, "last": last, "failed": failed, "score": score}
    return found | {"seconds": time.perf_counter() - started}


def score_cells(score: dict | None, asks: bool) -> list[str]:
    """What a rate's rows say under HEADERS."""
    if score is None:
        return ["-"] * len(HEADERS[asks])
    if not asks:
        return [f"{score['perplexity']:.2f}"]
    return [percent(score["accuracy"]), f"{percent(score['low'])} to {percent(score['high'])}"]


def cells(tried: list[dict], asks: bool) -> tuple[list, list]:
    """(headers, rows) of the table."""
    rows = []
    for each in tried:
        losses = [f"{each['first']:.3f}", "not finite" if each["failed"] else f"{each['last']:.3f}"]
        row = [f"{each['rate']:g}", *losses, *score_cells(each["score"], asks), f"{each['seconds']:.0f}"]
        rows.append(row)
    return ["rate", "loss, first steps", "last steps", *HEADERS[asks], "s"], rows


def in_words(found: dict) -> str:
    """'0.0005: loss 3.210 -> 0.412, accuracy 88.0% (82.7% to 91.8%), 61 s'"""
    took = f"{found['seconds']:.0f} s"
    if found["failed"]:
        return f"{found['rate']:g}: {found['failed']}, {took}"
    score, asks = found["score"], "accuracy" in found["score"]
    said = f"accuracy {with_interval(score)}" if asks else f"perplexity {score['perplexity']:.2f}"
    return f"{found['rate']:g}: loss {found['first']:.3f} -> {found['last']:.3f}, {said}, {took}"
