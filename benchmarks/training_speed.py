"""Training speed and memory of each step from the plain stack to this repository's, on the same batches.

    python benchmarks/training_speed.py   # about 10 minutes on two cores; writes results/training_speed.json

Each variant runs in a process of its own (so that its peak memory is its own), in turn, three times over.
The matrix limit is what the frozen layers' matrix multiplications alone (forward, and backward to the input)
cost here with nothing between them: no training step with these shapes on this machine can be faster.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
import torch.nn.functional as F
from peft import get_peft_model

from config import BUNDLED, MAX_GRAD_NORM, PAD_MULTIPLE, SENTIMENT_ANSWERS, TrainSettings
from qlora.batches import LengthBatches, collate, encode_rows
from qlora.data import load_rows, split
from qlora.fast import make_fast
from qlora.hardware import detect, environment, peak_memory_bytes, precision_of
from qlora.loading import load_base
from qlora.logits import loss_at_labels
from qlora.lora import linear_names, lora_config
from qlora.prompts import choose_format

ROWS, STEPS, ROUNDS = 4, 8, 3
OURS = ("fast", "checkpointing")
VARIANTS = {
    "plain": "transformers + PEFT + bitsandbytes, logits at every position",
    "labels": "the same, logits at labelled positions only",
    "fast": "the same, frozen values dequantized once, fused LoRA, short attention in full "
    "(what qlora_finetune.py does)",
    "checkpointing": "fast, with --gradient-checkpointing",
}
LIMIT = "Tokens per second if the matrix multiplications with frozen weights were all there is to a step."


def batches(tokenizer) -> list[dict]:
    """Length-sorted batches of real reviews, as in training."""
    prompt = choose_format("sentiment", "labels", SENTIMENT_ANSWERS, TrainSettings.max_length)
    rows, _ = split(load_rows("imdb"), 400, 1, 42)
    examples = encode_rows(tokenizer, prompt, rows, "training")
    order = list(LengthBatches([len(e["input_ids"]) for e in examples], ROWS, 42))
    starts = range(0, ROWS * (STEPS + 1), ROWS)
    return [collate([examples[i] for i in order[s : s + ROWS]], 0, PAD_MULTIPLE) for s in starts]


def measure(variant: str) -> dict:
    """Tokens per second (median of STEPS after one to warm up) and the process's peak memory."""
    hardware = detect()
    base = load_base(BUNDLED, "nf4", hardware)
    work = batches(base.tokenizer)
    model = get_peft_model(base.model, lora_config(base.model, TrainSettings()))
    if variant == "labels":
        loss_at_labels(base.model)
    if variant in OURS:
        make_fast(model)
    if variant == "checkpointing":
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The plain stack trains under autocast (Trainer's bf16=True); else PEFT would multiply in slow fp32.
    plain = variant not in OURS and hardware.dtype != torch.float32
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    rates = []
    for batch in work:
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=hardware.dtype, enabled=plain):
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(batch["real_tokens"] / (time.perf_counter() - started))
    return {
        "tokens_per_second": statistics.median(rates[1:]),
        "peak_gb": peak_memory_bytes("cpu") / 1e9,
        "environment": environment(hardware),
    }


def matrix_limit() -> dict:
    """See LIMIT."""
    hardware = detect()
    base = load_base(BUNDLED, precision_of(hardware.dtype), hardware)
    tokens = sum(b["input_ids"].numel() for b in batches(base.tokenizer)[1:]) // STEPS
    names = set(linear_names(base.model))
    modules = base.model.named_modules()
    shapes = [tuple(m.weight.shape) for name, m in modules if name.rsplit(".", 1)[-1] in names]
    seconds = 0.0
    for rows, columns in set(shapes):
        sizes = (tokens, columns), (rows, columns), (tokens, rows)
        x, w, dy = (torch.randn(size).to(hardware.dtype) for size in sizes)
        runs = []
        for _ in range(12):
            started = time.perf_counter()
            F.linear(x, w)
            dy @ w
            runs.append(time.perf_counter() - started)
        seconds += shapes.count((rows, columns)) * statistics.median(runs[2:])
    return {"tokens_per_second": tokens / seconds, "environment": environment(hardware)}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1]) if sys.argv[1] in VARIANTS else matrix_limit()))
        return
    runs: dict = {name: [] for name in [*VARIANTS, "matrix limit"]}
    for _ in range(ROUNDS):
        for name in runs:
            command = [sys.executable, __file__, name]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            where = found.pop("environment")
            runs[name].append(found)
            print(name, {k: round(v, 2) for k, v in found.items()}, flush=True)
    median = {
        name: {k: statistics.median(r[k] for r in done) for k in done[0]} for name, done in runs.items()
    }
    result = {
        "what": {**VARIANTS, "matrix limit": LIMIT},
        "rows_per_batch": ROWS,
        "runs": runs,
        "environment": where,
        "median": median,
    }
    out = Path(__file__).parent / "results" / "training_speed.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(median, indent=2), f"\nwritten {out}")


if __name__ == "__main__":
    main()
