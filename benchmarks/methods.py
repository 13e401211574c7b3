"""Full fine-tuning, LoRA and QLoRA beside what a widely copied tutorial claims of their speed.

    python benchmarks/methods.py   # about 25 minutes on two slow cores

The bundled model, 4 rows of up to 256 tokens, loss on the answer, the same batches for all. `libraries`:
transformers, PEFT and bitsandbytes as they are, with logits at labelled positions only, as everywhere here;
`ours`: the decoder of qlora/cpu. Each measurement is a process of its own; all take turns, ROUNDS times, and
the medians count. An inference is one forward pass of one row. Writes results/methods_<kind>.json.
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
from peft import get_peft_model

from config import BUNDLED, PAD_MULTIPLE, TrainSettings
from processor import processor_kind
from qlora.batches import collate
from qlora.fast import make_fast
from qlora.generation import generate
from qlora.hardware import detect, environment, peak_memory_bytes
from qlora.loading import load_base
from qlora.logits import last_logits, loss_at_labels
from qlora.lora import lora_config
from training_speed import CENTRE, examples

ROUNDS, STEPS, WRITTEN = 3, 2, 12
FULL = "full fine-tuning"
# (method, how the base is held, what computes)
ROWS = (
    (FULL, "fp32", "libraries"),
    (FULL, "bf16", "libraries"),
    ("LoRA", "fp32", "libraries"),
    ("LoRA", "fp32", "ours"),
    ("LoRA", "bf16", "libraries"),
    ("QLoRA", "int8", "libraries"),
    ("QLoRA", "int8", "ours"),
    ("QLoRA", "nf4", "libraries"),
    ("QLoRA", "nf4", "ours"),
)
# Times faster than fp32: training (there against full fine-tuning), inference. fp16 stands beside bf16 here.
CLAIMED = {
    (FULL, "fp32"): (1.0, 1.0),
    (FULL, "bf16"): (1.4, 1.5),
    ("LoRA", "fp32"): (3.0, 1.0),
    ("QLoRA", "int8"): (None, 2.0),
    ("QLoRA", "nf4"): (4.1, 3.0),
}


def measure(method: str, precision: str, by: str) -> dict:
    hardware = detect(precision, lane="auto" if by == "ours" else "libraries")
    base = load_base(BUNDLED, precision, hardware)
    rows = examples(base.tokenizer, False, CENTRE["length"], CENTRE["batch"], STEPS + 1)
    model = base.model
    if method == FULL:
        model.requires_grad_(True)
    else:
        model = get_peft_model(model, lora_config(model, TrainSettings()))
    if by == "ours":
        make_fast(model, hardware.lane)
    else:
        loss_at_labels(base.model)
    found = {"environment": environment(hardware)}
    trained = [p for p in model.parameters() if p.requires_grad]
    found["trainable"] = sum(p.numel() for p in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    model.train()
    seconds = []
    for start in range(0, len(rows), CENTRE["batch"]):
        given = collate(rows[start : start + CENTRE["batch"]], 0, PAD_MULTIPLE)
        del given["real_tokens"]
        started = time.perf_counter()
        model(**given).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    found |= {"step": statistics.median(seconds[1:]), "peak_gb": peak_memory_bytes("cpu") / 1e9}
    row, seconds = torch.tensor([rows[0]["input_ids"]]), []
    for _ in range(4):
        started = time.perf_counter()
        last_logits(model, row, hardware.autocast)
        seconds.append(time.perf_counter() - started)
    found["inference"] = statistics.median(seconds[1:])
    started = time.perf_counter()
    generate(model, [rows[0]["input_ids"][:8]], WRITTEN, min_new_tokens=WRITTEN)
    found["token"] = (time.perf_counter() - started) / WRITTEN
    return found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*sys.argv[2:])))
        return
    out = Path(__file__).parent / "results" / f"methods_{processor_kind()}.json"
    runs: dict = {row: [] for row in ROWS}
    for _ in range(ROUNDS):
        for row in ROWS:
            done = subprocess.run(
                [sys.executable, __file__, "--one", *row], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(f"{row} failed:\n{done.stderr[-2000:]}")
            runs[row].append(json.loads(done.stdout.splitlines()[-1]))
            print(*row, {k: v for k, v in runs[row][-1].items() if k != "environment"}, flush=True)
        out.write_text(json.dumps(record(runs), indent=2) + "\n")
    print(f"written {out}")


def record(runs: dict) -> dict:
    """Medians, and each beside full fine-tuning in fp32."""
    table, parameters = [], runs[ROWS[0]][0]["trainable"]  # of the base: all of them are trained there
    for (method, precision, by), done in runs.items():
        values = ("step", "inference", "token", "peak_gb")
        middle = {key: statistics.median(run[key] for run in done) for key in values}
        first = table[0] if table else middle
        training, inference = CLAIMED.get((method, precision), (None, None))
        row = {"method": method, "base": precision, "by": by, **middle}
        row |= {"token_ms": 1000 * middle["token"], "claimed_training": training}
        row |= {"faster_training": first["step"] / middle["step"]}
        row |= {"faster_inference": first["inference"] / middle["inference"], "claimed_inference": inference}
        trained = done[0]["trainable"]
        share = 1.0 if method == FULL else trained / (parameters + trained)
        table.append(row | {"trainable": trained, "trainable_share": share})
    every = {" ".join(row): done for row, done in runs.items()}
    return {"rows": table, "runs": every, "environment": runs[ROWS[0]][0]["environment"]}


if __name__ == "__main__":
    main()
