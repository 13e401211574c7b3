"""Bugs of numbers: gradients that are lost, values that overflow, steps that are too large."""

import contextlib
import math
import warnings
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import torch
from bitsandbytes.nn.modules import has_avx512bf16

from config import SENTIMENT_ANSWERS
from museum import models
from museum.bug import Bug, hold
from museum.job import Job, Run, encode, split_rows, with_lora
from qlora import evaluation, prompts
from qlora.loading import load_tokenizer
from qlora.training import forgetting, guards


def let_evaluation_repack(model) -> None:
    """Undo qlora.loading.never_repack; without the processor's kernel, do what the kernel does."""
    # torch does warn, once, that this product has no backward pass. It is one line among many.
    warnings.filterwarnings("ignore", message="bitsandbytes::gemv_4bit")
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = has_avx512bf16()
            if not has_avx512bf16():
                module.register_forward_hook(lose_gradient_after_evaluation)


def lose_gradient_after_evaluation(module, _, output) -> torch.Tensor | None:
    """From the first product in evaluation mode on, products have no backward pass."""
    module.repacked = getattr(module, "repacked", False) or not module.training
    return output.detach() if module.repacked else None


def gradients_survive(run: Run) -> None:
    """The project's guard on a model as it was before training."""
    _, model = with_lora(run.job)
    probe = guards.probe_batch(model, run.examples)
    guards.nothing_repacked(guards.Guards(), model, probe, contextlib.nullcontext)


def on_tiny(job: Job, folder: Path) -> Job:
    """On a random model: its layers are computed by the libraries, without this project's own decoder."""
    tiny = job.model if job.model != Job.model else models.tiny(folder / "base")
    return replace(job, model=tiny, lane="", steps=60, rate=5e-3)


def how_fast(run: Run) -> dict[str, str]:
    early = sum(run.losses[10:20]) / 10
    return {
        "loss, steps 11 to 20": f"{early:.2f}",
        "loss at held-out answers": f"{run.answer_loss('trained'):.2f}",
    }


eval_repacks = Bug(
    "eval-repacks",
    lambda job: replace(job, prepare=let_evaluation_repack),
    gradients_survive,
    how_fast,
    on_tiny,
    lambda: (
        ""
        if has_avx512bf16()
        else "this processor has no such kernel: its effect, products without "
        "a backward pass after an evaluation, is planted by hand"
    ),
)


CHANNEL_ROWS = 40  # by which the channel is chosen


def large_numbers(job: Job, folder: Path) -> Job:
    job = on_tiny(job, folder)
    rows, _ = split_rows(CHANNEL_ROWS, job.held_out, job.seed)
    prompt = prompts.choose_format("sentiment", "labels", SENTIMENT_ANSWERS, job.max_length)
    examples = encode(load_tokenizer(Path(job.model)), prompt, rows)
    large = models.with_large_numbers(job.model, folder / "large", examples)
    return replace(job, model=large, precision="fp32", rate=2e-3)


def all_finite(run: Run) -> None:
    """The guard that looks at each logged step; a gradient scaler would skip these updates in silence."""
    for step in run.log:
        guards.check_step(guards.Guards(), {"loss": step["loss"]}, step["step"], scaled=True)


def skipped_updates(run: Run) -> dict[str, str]:
    applied = sum(step["applied"] for step in run.log)
    finite = sum(math.isfinite(step["loss"]) for step in run.log)
    total = len(run.log)
    return {"finite losses": f"{finite} of {total}", "updates applied": f"{applied} of {total}"}


fp16_overflow = Bug(
    "fp16-overflow",
    lambda job: replace(job, precision="fp16"),
    all_finite,
    skipped_updates,
    large_numbers,
)

WORSE = 1.0  # nats a token on neutral text; a healthy run's change is a tenth of it


def neutral_loss(run: Run, who: str) -> float:
    """Loss (nats a token) on the project's neutral paragraphs, which are no reviews."""
    rows = [prompts.lm_example(run.tokenizer, text, 256) for text in forgetting.neutral_paragraphs()[:4]]
    examples = [dict(zip(("input_ids", "labels"), row)) for row in rows]
    with run.acting_as(who) as model:
        return evaluation.perplexity(model, examples, contextlib.nullcontext)["loss"]


def little_forgotten(run: Run) -> None:
    before, after = neutral_loss(run, "base"), neutral_loss(run, "trained")
    found = f"loss on neutral text {before:.2f} -> {after:.2f}: the model has unlearned its language"
    hold(after - before < WORSE, found)


def collapse(run: Run) -> dict[str, str]:
    odds = run.odds("trained")
    return {
        "loss on neutral text": f"{neutral_loss(run, 'trained'):.2f}",
        "spread of log-odds": f"{odds.std():.2f}",
        "right": run.right("trained"),
    }


rate_too_high = Bug(
    "rate-too-high",
    lambda job: replace(job, rate=100 * job.rate),
    little_forgotten,
    collapse,
)
