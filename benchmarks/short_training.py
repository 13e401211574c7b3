"""A training without the Trainer around it, for benchmarks that need many: same batches, same optimizer."""

import statistics  # noqa: I001  (qlora before torch)
import time

import qlora  # noqa: F401  (first: it sets what torch reads when it is imported)
import torch
from peft import get_peft_model
from transformers import get_linear_schedule_with_warmup, set_seed

from config import BUNDLED, MAX_GRAD_NORM, PAD_MULTIPLE, SENTIMENT_ANSWERS, TrainSettings
from qlora.batches import LengthBatches, collate, encode_rows
from qlora import variants
from qlora.data import load_rows, split
from qlora.evaluation import accuracy_report, score_labels
from qlora.fast import make_fast
from qlora.hardware import detect
from qlora.live_bytes import StepPeak
from qlora.loading import load_base
from qlora.lora import lora_config
from qlora.prompts import answer_ids, choose_format, sentiment_prompt


def train_and_score(settings: TrainSettings, held_out_rows: int, ready=lambda model: None) -> dict:
    """Losses of each step, accuracy and mean loss of the right label on held-out reviews, costs of each part.

    The split is that of seed 42 whatever the seed, which draws LoRA's A and the order of rows; so runs that
    differ in their seed are scored on the same rows. `ready` may change the model before its first step.
    """
    precision = "nf4" if settings.precision == "auto" else settings.precision
    base = load_base(BUNDLED, precision, detect(precision, lane=settings.lane))
    prompt = choose_format("sentiment", "labels", SENTIMENT_ANSWERS, settings.max_length)
    rows, held_out = split(load_rows("imdb"), settings.samples, held_out_rows, 42)
    examples = encode_rows(base.tokenizer, prompt, rows, "training")
    set_seed(settings.seed)
    begun = time.perf_counter()
    model = get_peft_model(base.model, lora_config(base.model, settings, begins=True))
    variants.begin(model, base, examples, settings)
    begun = time.perf_counter() - begun
    make_fast(model, base.hardware.lane)
    ready(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
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
    trained_in = time.perf_counter() - started
    prompts = [sentiment_prompt(base.tokenizer, prompt, row.text) for row in held_out]
    answers = [answer_ids(base.tokenizer, prompt, label) for label in (0, 1)]
    scores = score_labels(model, prompts, answers, base.hardware.autocast)
    labels = torch.tensor([row.label for row in held_out])
    report = accuracy_report(scores.argmax(1).tolist(), labels.tolist(), prompt.answers)
    return {
        "losses": losses,
        "last_quarter": statistics.mean(losses[-steps // 4 :]),
        **{key: report[key] for key in ("accuracy", "low", "high")},
        "held_out_loss": torch.nn.functional.cross_entropy(torch.from_numpy(scores).float(), labels).item(),
        "real_tokens": int(tokens),
        "peak_bytes": peak.bytes,
        "start_seconds": begun,
        "step_seconds": statistics.median(took),  # counting bytes makes a few steps slow
        "train_seconds": trained_in,
        "score_seconds": time.perf_counter() - started - trained_in,
    }
