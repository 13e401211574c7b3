"""Real tokens per second of padded, length-grouped and packed batches, by the libraries and by the lane.

    python benchmarks/packing.py   # 3 rounds of 6 ways: about half an hour on two slow cores

The objective `lm` on IMDB reviews, cut at --length tokens, with the bundled model. Every way reads the same
reviews once, after one step to warm up, in a process of its own; the ways take turns, so that a machine that
slows down slows all of them. A round's ratios are made of that round's runs. A run that is in
results/packing.json already is not repeated. Writes it after each run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
from peft import get_peft_model

from config import BUNDLED, MAX_GRAD_NORM, PAD_MULTIPLE, TrainSettings
from qlora.batches import LengthBatches, collate, encode_rows
from qlora.data import load_rows, split
from qlora.example_packs import pack
from qlora.fast import make_fast
from qlora.hardware import detect, environment, peak_memory_bytes
from qlora.loading import load_base
from qlora.lora import lora_config
from qlora.prompts import choose_format

OUT = Path(__file__).parent / "results" / "packing.json"
ORDERS = {
    "random": "rows as they are drawn, padded to the longest of each batch",
    "by length": "rows of like length together (LengthBatches), padded likewise",
    "packed": "--packing",
}
LANES = {"libraries": "transformers, PEFT and bitsandbytes", "lane": "the CPU's own decoder (no padding)"}
WAYS = [f"{lane}, {order}" for lane in LANES for order in ORDERS]
RATIOS = {  # name: (a way, the way that it is compared with)
    "packing_over_padded_random": ("libraries, packed", "libraries, random"),
    "packing_over_by_length": ("libraries, packed", "libraries, by length"),
    "lane_packed_over_padded_random": ("lane, packed", "libraries, random"),
    "lane_packed_over_lane": ("lane, packed", "lane, by length"),
}


def batches(examples: list[dict], order: str, shape: dict) -> list[dict]:
    """All examples once, in padded batches; the widest first, as training begins."""
    if order == "packed":
        examples = pack(examples, shape["length"], seed=42)
    lengths, size = [len(e["input_ids"]) for e in examples], shape["batch"]
    rows = range(len(examples)) if order == "random" else list(LengthBatches(lengths, size, 42))
    cut = [rows[i : i + size] for i in range(0, len(rows), size)]
    made = [collate([examples[i] for i in each], 0, PAD_MULTIPLE) for each in cut]
    return sorted(made, key=lambda batch: -batch["input_ids"].shape[1]) if order == "random" else made


def measure(way: str, shape: dict) -> dict:
    """Real tokens per second of all reviews, with what the trainer does besides: clipping and AdamW."""
    lane, order = way.split(", ")
    hardware = detect(lane="auto" if lane == "lane" else "libraries")
    base = load_base(BUNDLED, "nf4", hardware)
    rows, _ = split(load_rows("imdb"), shape["rows"], 1, 42)
    prompt = choose_format("lm", "text", (), shape["length"])
    given = batches(encode_rows(base.tokenizer, prompt, rows, "training"), order, shape)
    model = get_peft_model(base.model, lora_config(base.model, TrainSettings()))
    kernels = make_fast(model, hardware.lane)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()
    tokens = [batch.pop("real_tokens") for batch in given]
    for batch in given[:1] + given:  # the first one to warm up
        if batch is given[0]:
            started = time.perf_counter()  # twice: the second time counts
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    return {
        "tokens_per_second": sum(tokens) / seconds,
        "steps": len(given),
        "real_share": sum(tokens) / sum(batch["input_ids"].numel() for batch in given),
        "peak_gb": peak_memory_bytes("cpu") / 1e9,
        "kernels": kernels,
        "environment": environment(hardware),
    }


def in_process(way: str, shape: dict) -> dict:
    command = [sys.executable, __file__, "--one", way, "--shape", json.dumps(shape)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: dict[str, list[dict]]) -> dict:
    """Medians of each way, and of the ratios inside the rounds that are complete."""
    numbers = ("tokens_per_second", "steps", "real_share", "peak_gb")
    median = {
        w: {k: statistics.median(r[k] for r in done) for k in numbers} for w, done in runs.items() if done
    }
    rates = {way: [run["tokens_per_second"] for run in done] for way, done in runs.items()}
    in_rounds = {
        name: [a / b for a, b in zip(*(rates[way] for way in pair))] for name, pair in RATIOS.items()
    }
    ratios = {
        name: {"median": statistics.median(each), "rounds": each} for name, each in in_rounds.items() if each
    }
    return {"median": median, "ratios": ratios}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rows", type=int, default=100, help="reviews that every way reads")
    flags.add_argument("--length", type=int, default=512, help="tokens of a review, or of a pack")
    flags.add_argument("--batch", type=int, default=4, help="reviews, or packs, of a step")
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--out", type=Path, default=OUT)
    flags.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    flags.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    given = flags.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.shape)))
        return
    shape = {"rows": given.rows, "length": given.length, "batch": given.batch}
    start = {"shape": shape, "what": {**LANES, **ORDERS}, "runs": {way: [] for way in WAYS}}
    record = json.loads(given.out.read_text()) if given.out.exists() else start
    if record["shape"] != shape:
        sys.exit(f"error: {given.out} holds runs of another shape: move it away")
    for number in range(given.rounds):
        for way in WAYS:
            if len(record["runs"][way]) > number:
                continue
            found = in_process(way, shape)
            record["environment"] = found.pop("environment")
            record["runs"][way].append(found)
            print(way, {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
            given.out.write_text(json.dumps({**record, **summary(record["runs"])}, indent=2) + "\n")
    print(f"written {given.out}")


if __name__ == "__main__":
    main()
