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

from config import LEARNING_RATE, TrainSettings
from qlora.hardware import detect, environment

OUT = Path(__file__).parent / "results" / "recipe.json"
SEEDS, HELD_OUT = (1, 2, 3), 400
WHAT = ("samples", "max_length", "batch_size", "learning_rate")
TRIED = ((560, 256, 4, 5e-4), (760, 192, 4, 5e-4), (1200, 256, 4, 5e-4))


def run(settings: TrainSettings) -> dict:
    found = short_training.train_and_score(settings, HELD_OUT)
    del found["losses"]
    row = {name: getattr(settings, name) for name in (*WHAT, "seed")} | found
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    if sys.argv[1:] == ["search"]:
        todo = [TrainSettings(**dict(zip(WHAT, recipe))) for recipe in TRIED]
    elif sys.argv[1:] == ["seeds"]:
        todo = [TrainSettings(seed=seed, learning_rate=LEARNING_RATE) for seed in SEEDS]
    else:
        raise SystemExit(__doc__)
    record = json.loads(OUT.read_text()) if OUT.exists() else {"rows": []}
    there = [{name: row[name] for name in (*WHAT, "seed")} for row in record["rows"]]
    for settings in todo:
        if {name: getattr(settings, name) for name in (*WHAT, "seed")} not in there:
            record["rows"].append(run(settings))
            record["environment"] = environment(detect())
            OUT.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written {OUT}")


if __name__ == "__main__":
    main()
