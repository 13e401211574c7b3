"""Training speed and memory of this repository and of what else could be used, on the same batches.

    python benchmarks/training_speed.py           # about 40 minutes on two slow cores
    python benchmarks/training_speed.py --sweep   # one factor at a time: length, batch, rank; 15 minutes

Each run is a process of its own (so that its peak memory is its own); all variants take turns, ROUNDS times.
TRL is measured where it is installed (pip install -r requirements-bench.txt). The limit is what the products
of the frozen weights alone cost here (forward, and backward to the input) with nothing between them. Writes
results/training_speed_<kind of processor>.json.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import qlora  # noqa: F401, I001  (first: it sets what torch reads when it is imported)
import torch
import torch.nn.functional as F
from peft import get_peft_model

from config import BUNDLED, MAX_GRAD_NORM, PAD_MULTIPLE, SENTIMENT_ANSWERS, TrainSettings
from processor import processor_kind
from qlora.batches import LengthBatches, collate, encode_rows
from qlora.cpu import kernels, lanes, plain
from qlora.data import load_rows, split
from qlora.evaluation import score_labels
from qlora.fast import make_fast
from qlora.hardware import detect, environment, peak_memory_bytes
from qlora.loading import load_base
from qlora.lora import lora_config
from qlora.prompts import answer_ids, choose_format, sentiment_prompt
from qlora.weights import linear_layers

ROUNDS, STEPS = 5, 2
VARIANTS = {
    "ours": "this repository",
    "ours, no compiler": "the same, its kernels in torch",
    "ours, checkpointing": "--gradient-checkpointing: the libraries' layers, frozen values dequantized once",
    "plain": "transformers + PEFT + bitsandbytes in the faster of fp32 and bf16, logits at every position",
    "TRL": "TRL's SFTTrainer with its defaults (bf16, gradient checkpointing), loss on the answer",
    "TRL, tuned": "the same without checkpointing, in the faster of fp32 and bf16",
    "ours, lm": "this repository, --objective lm: every token is a label",
    "TRL, lm": "TRL tuned, loss on every token",
    "scoring, ours": "scores of 48 reviews by two answers, real tokens read a second",
    "scoring, libraries": "the same by the libraries' layers, frozen values dequantized at each batch",
    "limit": "the products with frozen weights and nothing else, by the lane that ours takes",
}
CENTRE = {"length": 256, "batch": 4, "rank": 16}
SWEEP = {"rank": (8, 256), "batch": (1, 16), "length": (128, 2048)}


def examples(tokenizer, lm: bool, length: int, batch: int, steps: int) -> list[dict]:
    """Real reviews in the order of training: neighbours have about the same length."""
    kind = ("lm", "text") if lm else ("sentiment", "labels")
    rows, _ = split(load_rows("imdb"), 400, 1, 42)
    prompt = choose_format(*kind, () if lm else SENTIMENT_ANSWERS, length)
    made = encode_rows(tokenizer, prompt, rows, "training")
    order = list(LengthBatches([len(e["input_ids"]) for e in made], batch, 42))
    return [made[i] for i in order[: batch * steps]]


def full_rows(tokenizer, length: int, count: int) -> list[dict]:
    """Rows of exactly `length` tokens whose last two are labelled: reviews one after the other."""
    rows, _ = split(load_rows("imdb"), 400, 1, 42)
    stream = [t for row in rows for t in tokenizer(row.text)["input_ids"]]
    stream = stream * (1 + count * length // len(stream))
    cut = [stream[i * length : (i + 1) * length] for i in range(count)]
    return [{"input_ids": ids, "labels": [-100] * (length - 2) + ids[-2:]} for ids in cut]


def measure(variant: str, shape: dict, steps: int) -> dict:
    """Real tokens per second (median of `steps` after one to warm up) and the process's peak memory."""
    lane = "auto" if variant.startswith(("ours", "limit")) or variant.endswith("ours") else "libraries"
    hardware = detect(lane=lane)
    base = load_base(BUNDLED, "nf4", hardware)
    count = shape["batch"] * (steps + 1)
    if shape == CENTRE:
        rows = examples(base.tokenizer, variant.endswith("lm"), shape["length"], shape["batch"], steps + 1)
    else:
        rows = full_rows(base.tokenizer, shape["length"], count)
    settings = TrainSettings(lora_r=shape["rank"])
    if variant == "limit":
        return {"tokens_per_second": limit(base, hardware), "environment": environment(hardware)}
    if variant.startswith("scoring"):
        return {"tokens_per_second": scoring(variant, base), "environment": environment(hardware)}
    how = trl_steps if variant.startswith("TRL") else own_steps
    seconds, tokens = how(variant, base, rows, settings, shape["batch"])
    rates = [count / took for count, took in zip(tokens, seconds)][1:]
    measured = {"tokens_per_second": statistics.median(rates), "peak_gb": peak_memory_bytes("cpu") / 1e9}
    return {**measured, "environment": environment(hardware)}


def own_steps(variant: str, base, rows: list[dict], settings, batch: int):
    """(seconds, real tokens) of each step, with what the trainer does besides: clipping and AdamW."""
    if variant == "ours, no compiler":
        kernels.load = lambda: (plain, "kernels in torch")
    model = get_peft_model(base.model, lora_config(base.model, settings))
    if variant == "ours, checkpointing":
        base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if variant != "plain":
        make_fast(model, base.hardware.lane)
    # The plain stack trains under autocast in bf16 (Trainer's bf16=True).
    autocast = variant == "plain" and base.hardware.dtype != torch.float32
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    model.train()
    seconds, tokens = [], []
    for start in range(0, len(rows), batch):
        given = collate(rows[start : start + batch], 0, PAD_MULTIPLE)
        tokens.append(given.pop("real_tokens"))
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=base.hardware.dtype, enabled=autocast):
            loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return seconds, tokens


def trl_steps(variant: str, base, rows: list[dict], settings, batch: int):
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(-time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            times[-1] += time.perf_counter()

    tuned = {} if variant == "TRL" else {"gradient_checkpointing": False}
    tuned |= {} if variant == "TRL" else {"bf16": base.hardware.dtype == torch.bfloat16}
    data = {"input_ids": [e["input_ids"] for e in rows]}
    if variant != "TRL, lm":
        data["completion_mask"] = [[int(label != -100) for label in e["labels"]] for e in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=batch,
            max_steps=len(rows) // batch,
            train_sampling_strategy="sequential",  # the same batches as ours
            max_length=None,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1000,
            **tuned,
        )
        trl.SFTTrainer(
            base.model,
            arguments,
            train_dataset=Dataset.from_dict(data),
            processing_class=base.tokenizer,
            peft_config=lora_config(base.model, settings),
            callbacks=[Clock()],
        ).train()
    counts = [len(e["input_ids"]) for e in rows]
    return times, [sum(counts[i : i + batch]) for i in range(0, len(rows), batch)]


def scoring(variant: str, base) -> float:
    if variant.endswith("ours"):
        make_fast(base.model, base.hardware.lane)
    rows, _ = split(load_rows("imdb"), 48, 1, 42)
    prompt = choose_format("sentiment", "labels", SENTIMENT_ANSWERS, CENTRE["length"])
    prompts = [sentiment_prompt(base.tokenizer, prompt, row.text) for row in rows]
    answers = [answer_ids(base.tokenizer, prompt, label) for label in (0, 1)]
    score_labels(base.model, prompts[:8], answers, base.hardware.autocast)  # to warm up
    started = time.perf_counter()
    score_labels(base.model, prompts, answers, base.hardware.autocast)
    return sum(map(len, prompts)) / (time.perf_counter() - started)


def limit(base, hardware) -> float:
    """Tokens per second if the products with frozen weights were all there is to a step of 1,024 tokens."""
    tokens, seconds = 1024, 0.0
    shapes = [(m.out_features, m.in_features) for _, m in linear_layers(base.model)]
    for rows, columns in set(shapes):
        sizes = (tokens, columns), (rows, columns), (tokens, rows)
        x, w, dy = (torch.randn(size).to(lanes.DTYPES[hardware.lane]) for size in sizes)
        runs = []
        for _ in range(9):
            started = time.perf_counter()
            F.linear(x, w)
            dy @ w
            runs.append(time.perf_counter() - started)
        seconds += shapes.count((rows, columns)) * statistics.median(runs[2:])
    return tokens / seconds


def in_process(variant: str, shape: dict, steps: int) -> dict:
    command = [sys.executable, __file__, "--one", variant, json.dumps(shape), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{variant} failed:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    print(variant, shape, {k: round(v, 2) for k, v in found.items() if k != "environment"}, flush=True)
    return found


def centre() -> Iterator[dict]:
    """Every variant at 4 x 256 x rank 16, in turn; the record after each round."""
    names = [name for name in VARIANTS if "TRL" not in name or importlib.util.find_spec("trl")]
    runs: dict = {name: [] for name in names}
    for _ in range(ROUNDS):
        for name in names:
            found = in_process(name, CENTRE, STEPS)
            where = found.pop("environment")
            runs[name].append(found)
        median = {
            name: {k: statistics.median(r[k] for r in done) for k in done[0]} for name, done in runs.items()
        }
        yield {"what": VARIANTS, "runs": runs, "median": median, "environment": where}


def sweep() -> Iterator[list[dict]]:
    """One factor at a time around the centre, ours and TRL tuned, rows that are full; one run each.

    The rows so far, after each of them.
    """
    shapes = [CENTRE | {factor: value} for factor, values in SWEEP.items() for value in values]
    rows = []
    for shape in [{**CENTRE, "full": True}, *shapes]:
        for name in ("ours", "TRL, tuned") if importlib.util.find_spec("trl") else ("ours",):
            found = in_process(name, shape, 2)
            found.pop("environment")
            rows.append({"variant": name, **shape, **found})
            yield rows


def side_by_side(rows: list[dict]) -> list[dict]:
    """A row for each shape: ours, TRL tuned and their ratio."""
    table: dict = {}
    for row in rows:
        shape = {key: row[key] for key in CENTRE}
        who = "ours" if row["variant"] == "ours" else "trl"
        found = table.setdefault(tuple(shape.values()), shape)
        found |= {who: row["tokens_per_second"], f"{who}_gb": row["peak_gb"]}
    for row in table.values():
        row |= {"times": row["ours"] / row["trl"]} if {"ours", "trl"} <= row.keys() else {}
    return list(table.values())


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))))
        return
    out = Path(__file__).parent / "results" / f"training_speed_{processor_kind()}.json"
    record = json.loads(out.read_text()) if out.exists() else {}
    if sys.argv[1:] == ["--sweep"]:
        for rows in sweep():
            record |= {"sweep": rows, "sweep_table": side_by_side(rows)}
            out.write_text(json.dumps(record, indent=2) + "\n")
    else:
        for found in centre():
            record |= found
            out.write_text(json.dumps(record, indent=2) + "\n")
        print(json.dumps(record["median"], indent=2))
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written {out}")


if __name__ == "__main__":
    main()
