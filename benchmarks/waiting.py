"""How long should a thread spin at a barrier before it sleeps? Training speed alone, and beside one other busy program.

    python benchmarks/waiting.py            # about 25 minutes on two cores; writes results/waiting.json

PyTorch's OpenMP library (libgomp) lets a thread that is done early spin until the others are: 300,000 turns, some
milliseconds, if nothing else is said. Where another program wants the core, the spinning thread keeps it from the
very thread that it waits for. GOMP_SPINCOUNT sets the turns
(https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html); this repository leaves it alone, since the default is
fastest where nothing else runs. The runs take turns, so that a busy hour of the machine meets every setting alike. The
busy program is one Python loop at the usual priority.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 3
TURNS = ("300000", "20000", "1000", "0")  # libgomp's default … sleep at once


def train(turns: str, busy: bool) -> dict:
    """One run of training_speed.py's `fast` variant in a process of its own."""
    command = [sys.executable, str(Path(__file__).parent / "training_speed.py"), "fast"]
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "GOMP_SPINCOUNT": turns})
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
    median = {place: {turns: statistics.median(values) for turns, values in by_turns.items()} for place, by_turns in runs.items()}
    out = Path(__file__).parent / "results" / "waiting.json"
    out.write_text(json.dumps({"what": "tokens per second of training, by place and GOMP_SPINCOUNT", "runs": runs, "median": median,
                               "environment": result["environment"]}, indent=2) + "\n")
    print(json.dumps(median, indent=2), f"\nwritten {out}")


if __name__ == "__main__":
    main()
