"""This tree against an earlier commit: the same short training with scores before and after, in turn.

    python benchmarks/against_commit.py 692ba1e   # about 15 minutes on two slow cores

The commit is unpacked into a temporary folder and runs with this environment's packages and models/. Medians
of ROUNDS; writes results/against_<commit>_<kind of processor>.json.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from processor import processor_kind

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
JOB = ("--samples", "96", "--eval-samples", "48")
# The end of the progress bar of the scores after training: "tuned: 100%|███| 48/48 [00:14<00:00,  3.36row/s"
SCORED = r"tuned: 100%[^\r\n]*? ([\d.]+)row/s"


def run(tree: Path) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        started = time.perf_counter()
        command = [sys.executable, "qlora_finetune.py", "--output-dir", str(out), *JOB]
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{tree} failed:\n{done.stderr[-2000:]}")
        report = json.loads((out / "report.json").read_text())
    found = {"seconds": time.perf_counter() - started, "dtype": report["environment"]["dtype"]}
    found["train_tokens_per_second"] = report["train"]["real_tokens"] / report["train"]["seconds"]
    found["scored_rows_per_second"] = float(re.findall(SCORED, done.stderr)[-1])
    found["peak_gb"] = report["memory"]["process_peak_bytes"] / 1e9
    return found | {"environment": report["environment"]}


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    commit = sys.argv[1]
    runs: dict = {commit: [], "this tree": []}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        tree.mkdir()
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True)
        if packed.returncode:
            raise SystemExit(f"error: {commit} can't be unpacked: {packed.stderr.decode().strip()}")
        subprocess.run(["tar", "-x", "-C", str(tree)], input=packed.stdout, check=True)
        for model in (ROOT / "models").iterdir():
            if not (tree / "models" / model.name).exists():
                (tree / "models" / model.name).symlink_to(model)
        for _ in range(ROUNDS):
            for name, where in ((commit, tree), ("this tree", ROOT)):
                runs[name].append(run(where))
                where = runs[name][-1].pop("environment")
                print(name, runs[name][-1], flush=True)
    keys = [k for k, v in runs[commit][0].items() if isinstance(v, float)]
    median = {name: {k: statistics.median(r[k] for r in done) for k in keys} for name, done in runs.items()}
    out = ROOT / "benchmarks" / "results" / f"against_{commit}_{processor_kind()}.json"
    record = {"job": " ".join(JOB), "runs": runs, "median": median, "environment": where}
    out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written {out}")


if __name__ == "__main__":
    main()
