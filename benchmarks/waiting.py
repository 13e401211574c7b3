"""How long should a thread spin at a barrier before it sleeps? Alone, and beside one other busy program.

    python benchmarks/waiting.py   # about 25 minutes on two cores; writes results/waiting.json

PyTorch's OpenMP library (libgomp) lets a thread that finishes early spin until the others finish: by default
300,000 turns, some milliseconds. If another program wants the core, the spinning thread keeps it from the
very thread that it waits for. GOMP_SPINCOUNT sets the turns
(https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). This repository does not set it, since the
default is fastest where nothing else runs. The runs alternate between the settings, so that a busy hour of
the machine affects all of them alike. The busy program is one Python loop at the usual priority.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from training_speed import CENTRE, STEPS

ROUNDS = 3
TURNS = ("300000", "20000", "1000", "0")  # libgomp's default … sleep at once


def train(turns: str, busy: bool) -> dict:
    """One run of training_speed.py's `ours` in a process of its own."""
    script = str(Path(__file__).parent / "training_speed.py")
    command = [sys.executable, script, "--one", "ours", json.dumps(CENTRE), str(STEPS)]
    environment = {**os.environ, "GOMP_SPINCOUNT": turns}
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    finally:
        if other:
            other.kill()
            other.wait()
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    runs: dict = {place: {turns: [] for turns in TURNS} for place in ("alone", "beside a busy program")}
    for _ in range(ROUNDS):
        for place in runs:
            for turns in TURNS:
                result = train(turns, place != "alone")
                runs[place][turns].append(result["tokens_per_second"])
                print(f"{place}, GOMP_SPINCOUNT={turns}: {runs[place][turns][-1]:.0f} tokens/s", flush=True)
    median = {
        place: {t: statistics.median(rates) for t, rates in found.items()} for place, found in runs.items()
    }
    record = {
        "what": "tokens per second of training, by place and GOMP_SPINCOUNT",
        "runs": runs,
        "median": median,
        "environment": result["environment"],
    }
    out = Path(__file__).parent / "results" / "waiting.json"
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(median, indent=2), f"\nwritten {out}")


if __name__ == "__main__":
    main()
