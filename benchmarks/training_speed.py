"""Training speed and memory of each step from the plain stack to this repository's, on the same batches.

    python benchmarks/training_speed.py            # about 10 minutes on two cores; writes results/training_speed.json

Each variant runs in a process of its own (so that its peak memory is its own), in turn, three times over.
The matrix limit is what the frozen layers' products alone (forward, and backward to the input) cost here with
nothing between them: no training step with these shapes on this machine can be faster.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: E402,F401

ROWS, STEPS, ROUNDS = 4, 8, 3
VARIANTS = {
    "plain": "transformers + PEFT + bitsandbytes, logits at every position",
    "labels": "the same, logits at labelled positions only",
    "fast": "the same, frozen values dequantized once, fused LoRA, short attention in full (what qlora_finetune.py does)",
    "checkpointing": "fast, with --gradient-checkpointing",
}
OURS = ("fast", "checkpointing")


def batches(tokenizer):
    """Length-sorted batches of real reviews, as in training."""
    from config import PAD_MULTIPLE, SENTIMENT_ANSWERS, SENTIMENT_SYSTEM, SENTIMENT_USER, TrainSettings
    from qlora.data import LengthBatches, collate, load_rows, split
    from qlora.prompts import PromptFormat, sentiment_example

    prompt = PromptFormat("sentiment", TrainSettings().max_length, SENTIMENT_SYSTEM, SENTIMENT_USER, SENTIMENT_ANSWERS)
    rows, _ = split(load_rows("imdb"), 400, 1, 42)
    examples = [dict(zip(("input_ids", "labels"), sentiment_example(tokenizer, prompt, r.text, r.label))) for r in rows]
    order = list(LengthBatches([len(e["input_ids"]) for e in examples], ROWS, 42))
    return [collate([examples[i] for i in order[start : start + ROWS]], 0, PAD_MULTIPLE) for start in range(0, ROWS * (STEPS + 1), ROWS)]


def measure(variant: str) -> dict:
    """Tokens per second (median of STEPS after one for warming up) and the process's peak memory."""
    import torch
    from peft import LoraConfig, get_peft_model

    from config import BUNDLED, TrainSettings
    from qlora.fast import speed_up_base, speed_up_lora
    from qlora.hardware import detect, environment, peak_memory_bytes
    from qlora.loading import load_base
    from qlora.logits import loss_at_labels
    from qlora.lora import resolve_targets

    hardware, settings = detect(), TrainSettings()
    base = load_base(BUNDLED, "nf4", hardware)
    work = batches(base.tokenizer)
    if variant in OURS:
        speed_up_base(base.model)
    if variant != "plain":
        loss_at_labels(base.model)
    r = settings.lora_r
    model = get_peft_model(base.model, LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules=resolve_targets(base.model, "all-linear")))
    if variant == "checkpointing":
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if variant in OURS:
        speed_up_lora(model)
    # The plain stack trains under autocast (Trainer's bf16=True); without it PEFT would multiply in fp32, slower still.
    plain_autocast = torch.autocast("cpu", dtype=hardware.dtype, enabled=variant not in OURS and hardware.dtype != torch.float32)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    model.train()
    rates = []
    for batch in work:
        started = time.perf_counter()
        with plain_autocast:
            loss = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(batch["real_tokens"] / (time.perf_counter() - started))
    return {"tokens_per_second": statistics.median(rates[1:]), "peak_gb": peak_memory_bytes("cpu") / 1e9, "environment": environment(hardware)}


def matrix_limit() -> float:
    """Tokens per second if the frozen matrices' products were all there is to a step."""
    import torch
    import torch.nn.functional as F
    from config import BUNDLED
    from qlora.hardware import detect
    from qlora.loading import load_base
    from qlora.lora import linear_names

    hardware = detect()
    base = load_base(BUNDLED, "bf16" if hardware.dtype == torch.bfloat16 else "fp32", hardware)
    tokens = sum(b["input_ids"].numel() for b in batches(base.tokenizer)[1:]) // STEPS
    names = set(linear_names(base.model))
    shapes = [tuple(m.weight.shape) for n, m in base.model.named_modules() if n.rsplit(".", 1)[-1] in names]
    seconds = 0.0
    for shape in set(shapes):
        x, w, dy = torch.randn(tokens, shape[1]).to(hardware.dtype), torch.randn(shape).to(hardware.dtype), torch.randn(tokens, shape[0]).to(hardware.dtype)
        runs = []
        for _ in range(12):
            started = time.perf_counter()
            F.linear(x, w)
            dy @ w
            runs.append(time.perf_counter() - started)
        seconds += shapes.count(shape) * statistics.median(runs[2:])
    return tokens / seconds


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1]) if sys.argv[1] in VARIANTS else {"tokens_per_second": matrix_limit()}))
        return
    runs: dict = {name: [] for name in [*VARIANTS, "matrix limit"]}
    for _ in range(ROUNDS):
        for name in runs:
            done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, {k: round(v, 2) for k, v in runs[name][-1].items() if k != "environment"}, flush=True)
    result = {"what": {**VARIANTS, "matrix limit": matrix_limit.__doc__.strip()}, "rows_per_batch": ROWS, "runs": runs,
              "environment": runs["fast"][0].pop("environment")}
    for name in runs:
        for run in runs[name]:
            run.pop("environment", None)
    result["median"] = {name: {k: statistics.median(r[k] for r in runs[name]) for k in runs[name][0]} for name in runs}
    out = Path(__file__).parent / "results" / "training_speed.json"
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["median"], indent=2), f"\nwritten {out}")


if __name__ == "__main__":
    main()
