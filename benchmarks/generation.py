"""Tokens written a second on this machine: adapter beside the base or merged, caches, a batch of prompts.

    python benchmarks/generation.py   # about four minutes on two slow cores

The bundled model as qlora_inference.py loads it (NF4, values dequantized once on a CPU), an adapter with
random B. The limit of one prompt is memory: every token reads every weight once. All variants take turns,
ROUNDS times; medians. Writes results/generation_<kind of processor>.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
from peft import get_peft_model

from config import BUNDLED, TrainSettings
from processor import processor_kind
from qlora import fast, generation
from qlora.fast import make_fast
from qlora.hardware import detect, environment
from qlora.loading import load_base
from qlora.lora import lora_config
from qlora.weights import linear_layers

ROUNDS, WRITTEN, PROMPT = 5, 24, 64
# name: (prompts at once, adapter added to the values or None without one, options of generate)
VARIANTS = {
    "base alone": (1, None, {}),
    "adapter beside the base": (1, False, {}),
    "the same, static cache": (1, False, {"cache_implementation": "static"}),
    "adapter merged": (1, True, {}),
    "adapter beside the base, 8 prompts": (8, False, {}),
    "adapter merged, 8 prompts": (8, True, {}),
}


def memory_rate() -> float:
    """Bytes a second that a product with one row reads from memory: a matrix too large for any cache."""
    weights, row = torch.randn(49152, 2048), torch.randn(1, 2048)
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        row @ weights.t()
        seconds.append(time.perf_counter() - started)
    return weights.nbytes / statistics.median(seconds)


def models() -> tuple[dict, int]:
    """({with an adapter: model}, bytes of weights that a token reads)"""
    found: dict = {}
    for adapted in (False, True):
        base = load_base(BUNDLED, "nf4", detect())
        model = base.model
        if adapted:
            model = get_peft_model(model, lora_config(model, TrainSettings()))
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=1e-3)
        model.requires_grad_(False)
        make_fast(model, base.hardware.lane)
        found[adapted] = model.eval()
    head = base.model.get_output_embeddings().weight
    frozen = sum(m.out_features * m.in_features for _, m in linear_layers(base.model))
    return found, frozen * 4 + head.nbytes


def main() -> None:
    loaded, read = models()
    runs: dict = {name: [] for name in VARIANTS}
    rates = []
    for i in range(ROUNDS + 1):  # the first to warm up
        rates.append(memory_rate())
        for name, (count, merged, options) in VARIANTS.items():
            model = loaded[merged is not None]
            generation.one_product = fast.one_product if merged else lambda model: nullcontext()
            prompts = [list(range(1000 + 100 * k, 1000 + 100 * k + PROMPT)) for k in range(count)]
            generation.generate(model, prompts, 2, min_new_tokens=2, **options)
            seconds = []
            for length in (1, WRITTEN + 1):  # the difference leaves out the reading of the prompt
                started = time.perf_counter()
                generation.generate(model, prompts, length, min_new_tokens=length, **options)
                seconds.append(time.perf_counter() - started)
            runs[name] += [count * WRITTEN / (seconds[1] - seconds[0])] if i else []
        print({name: round(done[-1], 1) for name, done in runs.items() if done}, flush=True)
    rate = statistics.median(rates)
    record = {
        "tokens_per_second": {name: statistics.median(done) for name, done in runs.items()},
        "memory_bytes_per_second": rate,
        "weights_read_per_token": read,
        "limit_of_one_prompt": rate / read,
        "runs": runs,
        "environment": environment(detect()),
    }
    out = Path(__file__).parent / "results" / f"generation_{processor_kind()}.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps({k: record[k] for k in list(record)[:4]}, indent=2), f"\nwritten {out}")


if __name__ == "__main__":
    main()
