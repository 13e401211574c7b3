"""Peak memory and speed of QLoRA training and generation at Llama's real shapes, with random weights.

    python benchmarks/gpu_shapes.py                             # 1B, 3B and 8B on the CUDA device
    python benchmarks/gpu_shapes.py --shapes tiny --device cpu  # that the script itself works, anywhere

On a GPU it writes results/gpu_shapes.json. Memory and speed do not depend on the values of weights, so no
download and no account is needed. What is measured is this repository's own path: NF4 with double
quantization, LoRA r 16 on all linear layers, loss at labelled positions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import memory_prediction as mp  # first: it finds qlora, which sets what torch reads when it is imported
import torch
from transformers import LlamaConfig

from qlora.hardware import detect, environment
from qlora.memory.step import Job
from qlora.shapes import model_config

TINY = LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1000,
)
RUNS = (
    {"batch_size": 4, "length": 256},
    {"batch_size": 8, "length": 512},
    {"batch_size": 8, "length": 512, "gradient_checkpointing": True},
)


def train(base, job: Job) -> dict:
    """Median of five steps after two; two supervised tokens a row, as in the sentiment objective."""
    torch.manual_seed(0)
    step, _ = mp.prepare(base, job)
    if job.on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        loss = step().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return {
        "tokens_per_second": job.batch_size * job.length / statistics.median(seconds[2:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if job.on_gpu else None,
        "finite": abs(loss) < float("inf"),
    }


def generate(base, job: Job, tokens: int = 64) -> dict:
    """Tokens per second after a prompt of 128 tokens, one row, greedy."""
    model = mp.prepare(base, job)[1].eval()
    ids = torch.randint(0, model.config.vocab_size, (1, 128), device=job.device)
    options = {"input_ids": ids, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.inference_mode(), mp.autocast(job):
        model.generate(**options, max_new_tokens=4)
        started = time.perf_counter()
        model.generate(**options, max_new_tokens=tokens, min_new_tokens=tokens)
    return {"decode_tokens_per_second": tokens / (time.perf_counter() - started)}


def measure(name: str, what, job: Job) -> dict:
    """One row of the result; a new model each time, so that one run leaves nothing behind for the next."""
    base = mp.random_model(TINY if name == "tiny" else model_config(name)[0], job)
    size = {"batch": job.batch_size, "length": job.length, "checkpointing": job.gradient_checkpointing}
    row = {"shape": name, "what": what.__name__, **(size if what is train else {})}
    row["weights_gb"] = base.get_memory_footprint() / 1e9
    try:
        row |= what(base, job)
    except torch.OutOfMemoryError:
        row["out_of_memory"] = True
    print(row, flush=True)
    return row


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--shapes", nargs="+", choices=("tiny", *mp.GPU_MODELS), default=mp.GPU_MODELS)
    flags.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    chosen = flags.parse_args()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: no CUDA device; `--shapes tiny --device cpu` only shows that the script works")
    hardware = detect()
    rows = []
    for name in chosen.shapes:
        for what, run in [*((train, run) for run in RUNS), (generate, {})]:
            rows.append(measure(name, what, Job(device=chosen.device, dtype=hardware.dtype, **run)))
            if chosen.device == "cuda":
                torch.cuda.empty_cache()
    if chosen.device == "cuda":
        out = Path(__file__).parent / "results" / "gpu_shapes.json"
        out.write_text(json.dumps({"environment": environment(hardware), "rows": rows}, indent=2) + "\n")
        print(f"written {out}")


if __name__ == "__main__":
    main()
