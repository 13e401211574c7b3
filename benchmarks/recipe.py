"""Which recipe learns most in a given time? Rows, length, batch size and rate of the default run.

    python benchmarks/recipe.py search   # every recipe of TRIED once; an hour on two slow cores
    python benchmarks/recipe.py seeds    # the defaults of config.py with three seeds; as long

A recipe's cost is its number of real tokens: at equal speed they are proportional to time, whatever else the
machine did. Adds to results/recipe.json, which keeps what an earlier call found.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import short_training

from config import TrainSettings
from qlora.hardware import detect, environment

OUT = Path(__file__).parent / "results" / "recipe.json"
SEEDS, HELD_OUT = (1, 2, 3), 400
# (reviews, tokens, batch, rate, rank, target modules)
TRIED = (
    (560, 256, 4, 5e-4, 16, "all-linear"),
    (760, 192, 4, 5e-4, 16, "all-linear"),
    (1200, 256, 4, 5e-4, 16, "all-linear"),
)


def run(samples, max_length, batch_size, learning_rate, lora_r, target_modules, seed=42) -> dict:
    recipe = {"samples": samples, "max_length": max_length, "batch_size": batch_size}
    recipe |= {"learning_rate": learning_rate, "lora_r": lora_r, "target_modules": target_modules}
    found = short_training.train_and_score(TrainSettings(**recipe, seed=seed), HELD_OUT)
    del found["losses"]
    row = recipe | {"seed": seed} | found
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    given = sys.argv[1] if len(sys.argv) == 2 else None
    if given not in ("search", "seeds"):
        raise SystemExit(__doc__)
    s = TrainSettings()
    chosen = (s.samples, s.max_length, s.batch_size, s.learning_rate, s.lora_r, s.target_modules)
    record = json.loads(OUT.read_text()) if OUT.exists() else {"rows": []}
    done = [tuple(row.values())[:7] for row in record["rows"]]
    todo = [(*recipe, 42) for recipe in TRIED] if given == "search" else [(*chosen, seed) for seed in SEEDS]
    for recipe in [recipe for recipe in todo if recipe not in done]:
        record["rows"].append(run(*recipe))
        record["environment"] = environment(detect())
        OUT.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written {OUT}")


if __name__ == "__main__":
    main()
