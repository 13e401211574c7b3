"""What does --qat Q4_0 buy? Plain LoRA and quantization-aware LoRA, each deployed as a Q4_0 file.

    python benchmarks/qat.py   # about 25 minutes on two slow cores; needs llama.cpp/build.sh

The bundled model at NF4, a short training on IMDB, same rows and steps for all; a seed draws LoRA's A and the
order of rows. Each adapter is merged, converted and quantized by llama.cpp as export.py does it, plain ones
also with an importance matrix; the file's values are read back (gguf-py) and scored in fp32. So what is
compared are weights alone. A run that is in results/qat.json already is not repeated; other flags than its
own are refused. Writes it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "llama.cpp"))

import short_training  # noqa: I001  (it imports qlora before torch)
import numpy as np
import torch
from gguf_export import convert, execute, importance_matrix
from peft import get_peft_model
from scipy.stats import t as student
from settings import BIN, why_not_built
from transformers import AutoModelForCausalLM

from config import BUNDLED, PAD_MULTIPLE, TrainSettings
from qlora import qat
from qlora.adapters import read_adapter, save_notes
from qlora.batches import collate, encode_rows
from qlora.data import load_rows, split
from qlora.fast import make_fast
from qlora.hardware import detect, environment
from qlora.loading import load_base
from qlora.lora import lora_config
from qlora.merging import merged_model
from qlora.prompts import choose_format
from short_training import SPLIT, Trained

OUT = Path(__file__).parent / "results" / "qat.json"
KIND = "Q4_0"
METHODS = {"LoRA": None, "QAT": KIND}
# way -> (what was trained, in which form it is scored)
WAYS = {
    "LoRA, as trained": ("LoRA", "trained"),
    "LoRA → Q4_0": ("LoRA", "plain"),
    "LoRA → Q4_0 with importance matrix": ("LoRA", "imatrix"),
    "QAT, as trained": ("QAT", "trained"),
    "QAT → Q4_0": ("QAT", "plain"),
}
MEASURES = ("accuracy", "held_out_loss", "agreement", "survival")


def read_flags() -> argparse.Namespace:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--samples", type=int, default=240, help="training rows, four a step")
    flags.add_argument("--max-length", type=int, default=128, help="tokens of a row")
    flags.add_argument("--rows", type=int, default=200, help="held-out rows")
    flags.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    flags.add_argument("--steps", type=int, default=12, help="steps of each kind that are timed")
    return flags.parse_args()


def train(method: str, seed: int, flags) -> Trained:
    """All in fp32: plain LoRA by the decoder of qlora/cpu, QAT by the libraries' layers."""
    settings = TrainSettings(samples=flags.samples, max_length=flags.max_length, lane="fp32", seed=seed)
    settings.qat = METHODS[method]
    return short_training.train(settings, flags.rows)


def quantized(run: Trained, flags) -> dict[str, np.ndarray]:
    """{form: scores of the merged model's Q4_0 file}: plain; of plain LoRA also with an importance matrix.

    As export.py does it, QAT is quantized from 32 bits: from 16, some weights are rounded otherwise.
    """
    found, grid = {}, qat.grid_of(run.model, "default")
    bits, forms = (32, ("plain",)) if grid else (16, ("plain", "imatrix"))
    with tempfile.TemporaryDirectory() as name:
        aside = Path(name)
        folder = aside / "adapter"
        run.model.save_pretrained(folder, save_embedding_layers=False)
        run.base.tokenizer.save_pretrained(folder)
        rows = {"name": "imdb", "seed": SPLIT, "eval_samples": flags.rows, "samples": flags.samples}
        save_notes(folder, run.prompt, run.base.info, rows, qat=grid)
        adapter = read_adapter(folder)
        merged, _ = merged_model("dequantized", adapter, run.base, f"fp{bits}")
        merged.save_pretrained(aside / "merged")
        run.base.tokenizer.save_pretrained(aside / "merged")
        del merged
        whole = aside / "whole.gguf"
        convert(aside / "merged", whole, outtype=f"f{bits}")
        for form in forms:
            weighted = ["--imatrix", importance_matrix(adapter, whole, aside)] if form == "imatrix" else []
            execute(BIN / "llama-quantize", *weighted, whole, aside / f"{form}.gguf", KIND)
            model = AutoModelForCausalLM.from_pretrained(aside, gguf_file=f"{form}.gguf", dtype=torch.float32)
            make_fast(model, "fp32")
            found[form] = run.scores(model)
    return found


def at_strength_zero(run: Trained) -> np.ndarray:
    """Scores of the base in the form that was trained: of QAT, each weight through the grid."""
    kept = [(layer.scaling, dict(layer.scaling)) for layer in run.model.modules() if hasattr(layer, "lora_A")]
    for scaling, _ in kept:
        scaling.update(dict.fromkeys(scaling, 0.0))
    scores = run.scores()
    for scaling, values in kept:
        scaling.update(values)
    return scores


def log_odds(scores: np.ndarray) -> np.ndarray:
    return scores[:, 1] - scores[:, 0]


def survival(deployed: tuple, trained: tuple) -> float:
    """Slope through the origin of what the adapter does to a file's log-odds on what it did in training.

    Each a pair of scores: with the adapter, and of the base in the same form.
    """
    there, here = (log_odds(adapted) - log_odds(base) for adapted, base in (deployed, trained))
    return float(there @ here / (here @ here))


def measure_bases(flags) -> dict[str, list]:
    """{method and form: scores of the base}: as each method trains it, and as its files hold it."""
    bases = {}
    for method in METHODS:
        settings = TrainSettings(samples=8, max_length=flags.max_length, lane="fp32", learning_rate=0.0)
        settings.qat = METHODS[method]
        run = short_training.train(settings, flags.rows)  # a rate of zero: nothing is learned
        bases[f"{method} trained"] = at_strength_zero(run)
        bases |= {f"{method} {form}": scores for form, scores in quantized(run, flags).items()}
        del run
        gc.collect()
    return {form: scores.tolist() for form, scores in bases.items()}


def measure(method: str, seed: int, flags, bases: dict) -> list[dict]:
    """One training: a row for each of its ways."""
    run = train(method, seed, flags)
    trained, bases = run.scores(), {form: np.array(scores) for form, scores in bases.items()}
    forms = {"trained": trained} | quantized(run, flags)
    rows = []
    for way, (whose, form) in WAYS.items():
        if whose == method:
            scores = forms[form]
            row = {"way": way, "method": method, "seed": seed} | run.report(scores)
            row["agreement"] = float((scores.argmax(1) == trained.argmax(1)).mean())
            row["survival"] = survival(
                (scores, bases[f"{method} {form}"]), (trained, bases[f"{method} trained"])
            )
            row["train_seconds"] = run.costs["train_seconds"]
            row["loss_last"] = statistics.mean(run.losses[-10:])
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def time_steps(flags) -> dict:
    """Seconds of a step of both methods by the libraries' layers, in turn, on the same batches."""
    hardware = detect(lane="fp32")
    prompt, seconds, steps = None, {method: [] for method in METHODS}, {}
    for method, kind in METHODS.items():
        base = load_base(BUNDLED, "nf4", hardware)
        settings = TrainSettings(max_length=flags.max_length)
        model = get_peft_model(base.model, qat.register(lora_config(base.model, settings), kind))
        qat.use_grid(model, "default", kind)
        make_fast(model, "libraries")
        trained = [p for p in model.parameters() if p.requires_grad]
        steps[method] = model.train(), torch.optim.AdamW(trained, lr=1e-4)
        prompt = prompt or choose_format("sentiment", "labels", ("Negative", "Positive"), flags.max_length)
    batch = TrainSettings.batch_size
    rows, _ = split(load_rows("imdb"), batch * (flags.steps + 2), flags.rows, SPLIT)
    examples = encode_rows(base.tokenizer, prompt, rows, "training")
    for start in range(0, len(examples), batch):
        given = collate(examples[start : start + batch], 0, PAD_MULTIPLE)
        given.pop("real_tokens")
        for method, (model, optimizer) in steps.items():
            started = time.perf_counter()
            model(**given).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[method].append(time.perf_counter() - started)
    ratios = [q / plain for plain, q in zip(*(seconds[m][2:] for m in METHODS))]
    middle = {method: statistics.median(s[2:]) for method, s in seconds.items()}
    return {"seconds": middle, "times_plain": statistics.median(ratios), "steps": len(ratios)}


def over_seeds(values: list[float]) -> dict:
    """Mean and half the width of its 95% interval (Student's t)."""
    half = None
    if len(values) > 1:
        spread = statistics.stdev(values) / len(values) ** 0.5
        half = float(student.ppf(0.975, len(values) - 1)) * spread
    return {"mean": statistics.mean(values), "half": half}


def summary(rows: list[dict]) -> list[dict]:
    table = []
    for way in WAYS:
        runs = [row for row in rows if row["way"] == way]
        if runs:
            table.append({"way": way, "seeds": len(runs)})
            table[-1] |= {name: over_seeds([run[name] for run in runs]) for name in MEASURES}
    return table


def main() -> None:
    flags = read_flags()
    if not (BIN / "llama-quantize").exists():
        raise SystemExit(f"error: {why_not_built()}")
    asked = {name: value for name, value in vars(flags).items() if name not in ("seeds", "steps")}
    record = json.loads(OUT.read_text()) if OUT.exists() else {"settings": asked, "rows": []}
    if record["settings"] != asked:
        raise SystemExit(
            f"error: {OUT} was measured with {record['settings']}: delete it, or give those flags"
        )

    def write() -> None:
        record["ways"], record["environment"] = summary(record["rows"]), environment(detect(lane="fp32"))
        record["seeds"] = len({row["seed"] for row in record["rows"]})
        OUT.write_text(json.dumps(record, indent=2) + "\n")

    if "speed" not in record:
        record["speed"] = time_steps(flags)
        write()
    if "bases" not in record:
        record["bases"] = measure_bases(flags)
        write()
    for seed in flags.seeds:
        for method in METHODS:
            if not any((row["method"], row["seed"]) == (method, seed) for row in record["rows"]):
                record["rows"] += measure(method, seed, flags, record["bases"])
                write()
                gc.collect()
    print(f"written {OUT}")


if __name__ == "__main__":
    main()
