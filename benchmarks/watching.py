"""Early stopping on a run that overfits: which step was best, best against last, and what looking costs.

    python benchmarks/watching.py   # about half an hour on one core
    python benchmarks/watching.py --rows 16 --epochs 3 --held-out 8 --eval-steps 4 --length 64   # rehearsal

The bundled model on few IMDB rows, many epochs at a high rate, the same seed each time: once to the end
(--eval-steps alone saves the last step), once with --early-stopping, and once without any scoring, which has
to end with the same adapter as the first. Runs are folders in --work; a finished one is not repeated, one
that was stopped is resumed. Writes results/watching.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "results" / "watching.json"
WEIGHTS = "adapter_model.safetensors"


def train(folder: Path, budget: argparse.Namespace, *flags) -> dict:
    """The report of a run, trained now unless it is there; --resume does nothing for one that is complete."""
    begun = (folder / "settings.json").exists()
    fixed = {
        "samples": budget.rows,
        "epochs": budget.epochs,
        "eval-samples": budget.held_out,
        "max-length": budget.length,
        "learning-rate": budget.rate,
        "lane": "fp32",
        "model": "smollm2-135m",
    }
    named = [word for name, value in fixed.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, ROOT / "qlora_finetune.py", "--output-dir", folder]
    command += ["--resume"] if begun else [*named, *flags]
    done = subprocess.run([str(word) for word in command], cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: {folder.name} ended with {done.returncode}; run this again to go on")
    return json.loads((folder / "report.json").read_text())


def summary(folder: Path, report: dict) -> dict:
    """What the page tells of a run."""
    tuned, train, during = report["evaluation"]["tuned"], report["train"], report["during_training"]
    row = {
        "adapter_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
        **{key: tuned[key] for key in ("accuracy", "low", "high", "rows")},
        **{key: train[key] for key in ("steps", "seconds", "tokens_per_second", "loss_first", "loss_last")},
    }
    if others := report["evaluation"].get("tuned_on_others"):
        row["on_others"] = {key: others[key] for key in ("accuracy", "low", "high", "rows")}
    if during:
        row |= {
            key: during[key] for key in ("points", "best_step", "last_step", "saved_step", "stopped_early")
        }
        row |= {"watched_rows": during["rows"], "scoring_seconds": during["seconds"]}
        row["scoring_share"] = during["seconds"] / (during["seconds"] + train["seconds"])
    return row


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--rows", type=int, default=64, help="training reviews, four a step")
    flags.add_argument("--epochs", type=int, default=10)
    flags.add_argument("--held-out", type=int, default=300, help="reviews scored at the end")
    flags.add_argument("--length", type=int, default=96, help="tokens of a review")
    flags.add_argument("--rate", type=float, default=1e-3)
    flags.add_argument("--eval-steps", type=int, default=8, help="half an epoch of the default rows")
    flags.add_argument("--patience", type=int, default=5)
    flags.add_argument("--work", type=Path, default=ROOT / "qlora-out-watching")
    flags.add_argument("--out", type=Path, default=OUT)
    budget = flags.parse_args()
    scored = ("--eval-steps", budget.eval_steps)
    setups = {
        "to_the_end": scored,
        "early_stopping": (*scored, "--early-stopping", budget.patience),
        "not_watched": (),
    }
    asked = {key: value for key, value in vars(budget).items() if key not in ("work", "out")}
    runs = {}
    for name, more in setups.items():
        folder = budget.work / name
        report = train(folder, budget, *more)
        runs[name] = summary(folder, report)
        record = {"budget": asked, "environment": report["environment"], "runs": runs}
        if len(runs) == len(setups):
            same = {runs[each]["adapter_sha256"] for each in ("to_the_end", "not_watched")}
            record["same_adapter_without_scoring"] = len(same) == 1
        budget.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written {budget.out}")


if __name__ == "__main__":
    main()
