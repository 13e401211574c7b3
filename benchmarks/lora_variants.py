"""Variants of LoRA on one budget: each at several learning rates, then the best rate with more seeds.

    python benchmarks/lora_variants.py   # 16 runs: about half an hour on one slow core
    python benchmarks/lora_variants.py --rows 240 --length 128 --rates 1e-4 5e-4 2e-3 --seeds 1 2 3   # hours

The bundled model, a short training on IMDB; every run is scored on the same held-out reviews. The first seed
(LoRA's A and the order of rows) tries every rate; the one with the lowest held-out loss is run with the other
seeds, too. A rate that suits one variant can be wrong for another, so one rate for all would compare rates. A
run that is in results/variants.json already is not repeated. Writes it after each run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import short_training

from config import LORA_VARIANTS, TrainSettings
from qlora.hardware import detect, environment
from qlora.measures import wilson

OUT = Path(__file__).parent / "results" / "variants.json"
# Plain LoRA on each kind of base, since PiSSA and OLoRA begin on 16-bit weights only.
SETUPS = [(name, "nf4") for name, v in LORA_VARIANTS.items() if v.weights != "16-bit"]
SETUPS += [("lora", "bf16")] + [(name, "bf16") for name, v in LORA_VARIANTS.items() if v.weights == "16-bit"]
KEPT = ("accuracy", "held_out_loss", "last_quarter", "start_seconds", "step_seconds", "peak_bytes")


def train(budget: argparse.Namespace, variant: str, precision: str, rate: float, seed: int) -> dict:
    """One run's scores, its cost, and which run it was."""
    settings = TrainSettings(
        **{"samples": budget.rows, "max_length": budget.length, "lane": "fp32", "seed": seed},
        **{"lora_variant": variant, "precision": precision, "learning_rate": rate},
    )
    found = short_training.train_and_score(settings, budget.held_out)
    row = {"variant": variant, "precision": precision, "rate": rate, "seed": seed}
    row |= {key: finite(found[key]) for key in KEPT}
    print(json.dumps(row), flush=True)
    return row


def finite(value: float) -> float | None:
    """None for what JSON has no number for: the loss of a run that diverged."""
    return value if math.isfinite(value) else None


def summary(rows: list[dict], held_out: int) -> list[dict]:
    """A row for each setup: accuracy at each rate with the first seed, and means at its best rate."""
    table = []
    for variant, precision in SETUPS:
        runs = [r for r in rows if (r["variant"], r["precision"]) == (variant, precision)]
        if not runs:
            continue
        first = [r for r in runs if r["seed"] == runs[0]["seed"]]
        best = [r for r in runs if r["rate"] == best_rate(first)]
        mean = {
            key: statistics.mean(r[key] for r in best) for key in ("accuracy", "peak_bytes", "start_seconds")
        }
        low, high = wilson(round(mean["accuracy"] * held_out), held_out)
        row = {"variant": variant, "precision": precision, "rate": best_rate(first), "seeds": len(best)}
        row |= {"at_rate": {f"{r['rate']:g}": r["accuracy"] for r in first}}
        row |= {"best": {"accuracy": mean["accuracy"], "low": low, "high": high}}
        losses = [r["held_out_loss"] for r in best]
        row["held_out_loss"] = None if None in losses else statistics.mean(losses)
        row |= {"step_seconds": statistics.mean(r["step_seconds"] for r in runs)}
        table.append(row | {key: mean[key] for key in ("peak_bytes", "start_seconds")})
    return table


def best_rate(runs: list[dict]) -> float:
    """Of runs with one seed: the rate with the lowest loss on the held-out rows."""
    return min(runs, key=lambda r: math.inf if r["held_out_loss"] is None else r["held_out_loss"])["rate"]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rows", type=int, default=120, help="training reviews, four a step")
    flags.add_argument("--length", type=int, default=96, help="tokens of a review")
    flags.add_argument("--held-out", type=int, default=200, help="reviews that every run is scored on")
    flags.add_argument("--rates", type=float, nargs="+", default=[5e-4, 2e-3])
    flags.add_argument("--seeds", type=int, nargs="+", default=[1])
    budget = flags.parse_args()
    same = {"training_rows": budget.rows, "max_length": budget.length, "held_out": budget.held_out}
    kept = json.loads(OUT.read_text()) if OUT.exists() else same | {"rows": []}
    if any(kept[key] != same[key] for key in same):
        sys.exit(f"error: {OUT} holds runs of another budget: move it away")
    rows = kept["rows"]

    def add(variant: str, precision: str, rate: float, seed: int) -> None:
        run = (variant, precision, rate, seed)
        if run in {(r["variant"], r["precision"], r["rate"], r["seed"]) for r in rows}:
            return
        rows.append(train(budget, *run))
        record = same | {"environment": environment(detect(lane="fp32")), "rows": rows}
        OUT.write_text(json.dumps(record | {"variants": summary(rows, budget.held_out)}, indent=2) + "\n")

    for setup in SETUPS:
        for rate in budget.rates:
            add(*setup, rate, budget.seeds[0])
    for setup in SETUPS:
        first = [r for r in rows if (r["variant"], r["precision"]) == setup and r["seed"] == budget.seeds[0]]
        for seed in budget.seeds[1:]:
            add(*setup, best_rate(first), seed)
    print(f"written {OUT}")


if __name__ == "__main__":
    main()
