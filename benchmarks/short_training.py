"""A training without the Trainer around it, for benchmarks that need many: same batches, same optimizer."""

import statistics  # noqa: I001  (qlora before torch)
import time
from dataclasses import dataclass

import qlora  # noqa: F401  (first: it sets what torch reads when it is imported)
import numpy as np
import torch
from peft import get_peft_model
from transformers import get_linear_schedule_with_warmup, set_seed

from config import BUNDLED, LEARNING_RATE, MAX_GRAD_NORM, PAD_MULTIPLE, SENTIMENT_ANSWERS, TrainSettings
from qlora import qat, variants
from qlora.batches import LengthBatches, collate, encode_rows
from qlora.data import Row, load_rows, split
from qlora.evaluation import accuracy_report, score_labels
from qlora.fast import make_fast
from qlora.hardware import detect
from qlora.live_bytes import StepPeak
from qlora.loading import Base, load_base
from qlora.lora import lora_config
from qlora.prompts import PromptFormat, answer_ids, choose_format, sentiment_prompt

SPLIT = 42  # of all runs, whatever their seed, which draws LoRA's A and the order of rows


@dataclass
class Trained:
    """A model after its training, with what it takes to score it, and what it cost."""

    model: torch.nn.Module
    base: Base
    prompt: PromptFormat
    held_out: list[Row]
    losses: list[float]  # of each step
    costs: dict  # start_seconds, train_seconds, step_seconds, real_tokens, peak_bytes

    def scores(self, model=None) -> np.ndarray:
        """log P(answer) of the held-out rows (rows, 2), by another model of the same tokenizer if given."""
        tokenizer = self.base.tokenizer
        prompts = [sentiment_prompt(tokenizer, self.prompt, row.text) for row in self.held_out]
        answers = [answer_ids(tokenizer, self.prompt, label) for label in (0, 1)]
        return score_labels(model or self.model, prompts, answers, self.base.hardware.autocast)

    def report(self, scores: np.ndarray) -> dict:
        """Accuracy with its interval, and mean loss of the right label."""
        labels = [row.label for row in self.held_out]
        found = accuracy_report(scores.argmax(1).tolist(), labels, self.prompt.answers)
        loss = torch.nn.functional.cross_entropy(torch.from_numpy(scores).float(), torch.tensor(labels))
        return {**{key: found[key] for key in ("accuracy", "low", "high")}, "held_out_loss": loss.item()}


def train(settings: TrainSettings, held_out_rows: int, ready=lambda model: None) -> Trained:
    """Train on IMDB rows; `ready` may change the model before its first step.

    Runs that differ in their seed are scored on the same rows.
    """
    precision = "nf4" if settings.precision == "auto" else settings.precision
    base = load_base(BUNDLED, precision, detect(precision, lane=settings.lane))
    prompt = choose_format("sentiment", "labels", SENTIMENT_ANSWERS, settings.max_length)
    rows, held_out = split(load_rows("imdb"), settings.samples, held_out_rows, SPLIT)
    examples = encode_rows(base.tokenizer, prompt, rows, "training")
    set_seed(settings.seed)
    begun = time.perf_counter()
    config = lora_config(base.model, settings, begins=True)
    model = get_peft_model(base.model, qat.register(config, settings.qat))
    qat.use_grid(model, "default", settings.qat)
    variants.begin(model, base, examples, settings)
    begun = time.perf_counter() - begun
    make_fast(model, base.hardware.lane)
    ready(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate or LEARNING_RATE, weight_decay=0.0)
    batch = settings.batch_size
    order = list(LengthBatches([len(e["input_ids"]) for e in examples], batch, settings.seed))
    steps = len(order) // batch
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    losses, took, tokens, peak, started = [], [], 0, StepPeak("cpu"), time.perf_counter()
    model.train()
    for step in range(steps):
        given = collate([examples[i] for i in order[batch * step : batch * (step + 1)]], 0, PAD_MULTIPLE)
        tokens += given.pop("real_tokens")
        began = time.perf_counter()
        with peak.watch(given["input_ids"].shape[1], steady=step > 0):
            loss = model(**given).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        took.append(time.perf_counter() - began)
    costs = {"real_tokens": int(tokens), "peak_bytes": peak.bytes, "start_seconds": begun}
    # Counting bytes makes a few steps slow: the median.
    costs |= {"step_seconds": statistics.median(took), "train_seconds": time.perf_counter() - started}
    return Trained(model, base, prompt, held_out, losses, costs)


def train_and_score(settings: TrainSettings, held_out_rows: int, ready=lambda model: None) -> dict:
    """Losses of each step, accuracy and mean loss of the right label on held-out reviews, costs of both."""
    run = train(settings, held_out_rows, ready)
    started = time.perf_counter()
    report = run.report(run.scores())
    return {
        "losses": run.losses,
        "last_quarter": statistics.mean(run.losses[-len(run.losses) // 4 :]),
        **report,
        **run.costs,
        "score_seconds": time.perf_counter() - started,
    }
